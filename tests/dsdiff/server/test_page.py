"""The page, in headless Chromium: opened, filled in, clicked and looked at."""

import gc
import io
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dsdiff.server.options import ServerOptions
from dsdiff.server.page.forms import Form, variants

PROMPT = "a red circle on a blue background"
PATIENCE = 60_000  # milliseconds that anything may take on a busy machine
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def test_variants_are_all_combinations_by_model():
    found = variants(["a", "b", "a"], "0, 0.5", "4 2")
    assert [(each.model, each.ratio, each.steps) for each in found] == [
        (model, ratio, steps) for model in "ab" for ratio in (0, 0.5) for steps in (4, 2)
    ]
    assert found[2].title == "a, ratio 0.5, 4 steps"
    for models, ratios, steps, words in (
        ([], "0", "1", "at least one model"),
        (["a"], "", "1", "there are no ratios"),
        (["a"], "0", "few", "steps are 'few'"),
        (["a"], "0", "1,2,3,4,5,6,7,8,9,10,11,12,13", "13 pictures: choose 12"),
    ):
        with pytest.raises(ValueError, match=words):
            variants(models, ratios, steps)


def test_fields_become_a_request(studio):
    form = Form(prompt=f" {PROMPT} ", model="embedded", steps=3, scale=2.5, seed=5, width=64, height=32, ratio=0.5)
    request = form.request(studio.shelf)
    assert (request.prompt, request.seed, request.options.width, request.options.height) == (PROMPT, 5, 64, 32)
    assert request.options.merge.ratio == 0.5 and request.options.vae is None and request.pictures == 1
    for change, words in (({"prompt": " "}, "the prompt is empty"), ({"steps": 1.5}, "steps is 1.5")):
        with pytest.raises(ValueError, match=words):
            Form(**vars(form) | change).request(studio.shelf)


def test_pictures_that_are_not_shown_any_more_are_deleted(studio, monkeypatch, tmp_path):
    gr = pytest.importorskip("gradio")
    from dsdiff.server.page import draw
    from dsdiff.server.requests import Drawn

    form = Form(prompt=PROMPT, model="embedded", steps=2, scale=4, seed=1, width=8, height=8)
    picture = Drawn(image=Image.new("RGB", (8, 8)), seed=1, texts={"parameters": PROMPT}, whole=True)
    drawing = SimpleNamespace(
        pictures=[picture] * 2, interrupted=False, seconds=1.0, memory=1, request=SimpleNamespace(model="embedded")
    )
    monkeypatch.setattr(draw, "put_in_line", lambda *_: None)
    monkeypatch.setattr(draw, "following", lambda *_: ())
    monkeypatch.setattr(draw, "result_of", lambda _: drawing)
    monkeypatch.setattr(draw, "MOST_SHOWN", 3)
    with tempfile.TemporaryDirectory(dir=tmp_path) as name, gr.Blocks():
        tab = draw.DrawTab(studio, SimpleNamespace(name=name))
        values = {field: getattr(form, key) for key, field in tab.fields.items()}
        visits = {"a": [], "b": []}
        for visit in "aab":
            *_, last = tab.draw(values | {tab.shown: visits[visit]})
            visits[visit] = last[tab.shown]
            del last
        assert [len(shown) for shown in visits.values()] == [3, 2]
        kept = {Path(each.path) for shown in visits.values() for each in shown}
        gc.collect()
        assert set(Path(name).iterdir()) == kept and len(kept) == 5
        del visits["a"]  # that visit has ended
        gc.collect()
        assert set(Path(name).iterdir()) == {Path(each.path) for each in visits["b"]}


@pytest.fixture
def page(studio, serving, tmp_path, monkeypatch):
    """The page in a browser, which has loaded nothing from elsewhere and complained of nothing when the test ends."""
    if CHROMIUM is None:
        pytest.skip("no chromium")
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    hosts, complaints = set(), []
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # so that it is put back
    with (
        serving(studio, ServerOptions(limits=studio.limits)) as port,
        playwright.sync_playwright() as browsers,
        browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else "inline"))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.goto(f"http://127.0.0.1:{port}/")
        yield page
        page.close()
    assert hosts <= {f"127.0.0.1:{port}", "inline"}
    assert complaints == []


def fill(page, name, text):
    field = page.locator(f"#{name} textarea, #{name} input").first
    field.fill(str(text))
    field.blur()


def look(page, name, part=None):
    """Return the pixels [H, W, 3] of the page, or of a part; with DSDIFF_SCREENSHOTS=DIR the page is kept there."""
    data = page.screenshot() if part is None else page.locator(part).first.screenshot()
    if folder := os.environ.get("DSDIFF_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
    return np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def red_and_blue(pixels):
    """Return the shares of pixels that are clearly red, and clearly blue."""
    r, g, b = np.moveaxis(pixels, -1, 0)
    return ((r > 150) & (g < 90) & (b < 90)).mean(), ((b > 150) & (r < 90) & (g < 120)).mean()


@pytest.mark.slow
def test_leaving_the_page_ends_the_picture(page, studio):
    fill(page, "prompt", PROMPT)
    fill(page, "steps", studio.limits.steps)
    page.locator("#draw").click()
    page.wait_for_selector("#progress img")
    job = studio.job
    page.close()
    assert job.future.result(60).interrupted


@pytest.mark.slow
def test_drawing_and_comparing(page, studio):
    look(page, "opened")
    fill(page, "prompt", PROMPT)
    fill(page, "seed", 7)
    fill(page, "steps", 20)
    page.locator("#draw").click()
    page.wait_for_selector("#progress img")  # a preview
    page.wait_for_selector("#gallery img")
    assert "1 picture:" in page.locator("#progress").inner_text()
    text = page.locator("#settings textarea").input_value()
    assert text.startswith(PROMPT) and "Steps: 20, Sampler: DDIM" in text and "Seed: 7" in text
    page.wait_for_function("document.querySelector('#gallery img').naturalWidth == 256")
    red, blue = red_and_blue(look(page, "drawn", "#gallery img"))
    assert red > 0.05 and blue > 0.5  # a red circle on a blue background, as the browser shows it

    fill(page, "steps", 1)
    page.locator("#draw").click()
    page.wait_for_function("document.querySelectorAll('#gallery img').length == 2")
    for source in page.locator("#gallery img").evaluate_all("all => all.map(each => each.src)"):
        assert page.request.get(source).status == 200  # also the earlier picture's

    fill(page, "seed", 8)
    page.locator("#again").click()  # the settings of the picture come back
    page.wait_for_function("document.querySelector('#seed input').value == '7'")
    fill(page, "prompt", "")
    page.locator("#draw").click()
    page.get_by_text("the prompt is empty: write what to draw").wait_for()

    page.get_by_role("tab", name="Compare").click()
    fill(page, "compare-prompt", PROMPT)
    fill(page, "ratios", "0, 0.5")
    fill(page, "counts", 2)
    page.locator("#models .token-remove").nth(2).click()  # W8A8: two models are enough
    page.locator("#compare").click()
    page.wait_for_function("document.querySelectorAll('#comparison figure').length == 4")
    captions = page.locator("#comparison figcaption").all_inner_texts()
    assert [caption.splitlines()[0] for caption in captions] == [
        f"embedded{bits}{ratio}, 2 steps" for bits in ("", " W4A8") for ratio in ("", ", ratio 0.5")
    ]
    assert captions[0].endswith("the first") and all("PSNR" in each and " s " in each for each in captions[1:])
    assert all(" GB " in caption for caption in captions)
    look(page, "compared")

    file = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"some text"}
    assert page.request.post(f"{page.url}gradio_api/upload", multipart={"files": file}).status == 413  # gradio's route
