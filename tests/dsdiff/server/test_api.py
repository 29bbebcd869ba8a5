"""The API, as webuiapi's client and plain requests see it."""

import base64
import io
import json
import threading
import time
from http.client import HTTPConnection

import pytest
import torch
from PIL import Image, ImageChops

import dsdiff
from dsdiff.server.options import ServerOptions

pytest.importorskip("fastapi")
webuiapi = pytest.importorskip("webuiapi")
requests = pytest.importorskip("requests")
pytest.importorskip("httpx")  # of TestClient

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from dsdiff.server.api import add_errors  # noqa: E402
from dsdiff.server.job import StoppingError  # noqa: E402

PROMPT = "a red circle on a blue background"
SMALL = {
    "prompt": PROMPT,
    "seed": 7,
    "steps": 2,
    "width": 64,
    "height": 64,
    "cfg_scale": 4,
    "sampler_name": "DDIM",
    "eta": 0,
}


@pytest.fixture(scope="module")
def port(studio, serving):
    with serving(studio, ServerOptions(page=False, limits=studio.limits)) as port:
        yield port


@pytest.fixture(scope="module")
def api(port):
    return webuiapi.WebUIApi(port=port)


@pytest.fixture
def post(port):
    """(route, body) -> (status, reply)."""

    def call(route, body, method="post"):
        reply = requests.request(method, f"http://127.0.0.1:{port}/sdapi/v1/{route}", json=body, timeout=60)
        return reply.status_code, reply.json()

    return call


def same(first, second):
    return ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getbbox() is None


def test_pictures_are_those_of_the_pipeline(api, studio):
    result = api.txt2img(**SMALL, batch_size=1, n_iter=2)
    pipeline = dsdiff.load("embedded", device="cpu")
    options = dsdiff.DrawOptions(steps=2, width=64, height=64, scale=4.0)
    expected = [picture.image for picture in pipeline.draw([PROMPT] * 2, seeds=[7, 8], options=options)]
    assert all(map(same, result.images, expected)) and len(result.images) == 2
    assert result.info["all_seeds"] == [7, 8] and result.parameters["steps"] == 2
    # The text is that of PNGs of scripts/txt2img.py, and comes back by png-info.
    text = api.png_info(result.image).info
    assert text == result.info["infotexts"][0]
    assert text.startswith(f"{PROMPT}\nSteps: 2, Sampler: DDIM, CFG scale: 4, Seed: 7, Size: 64x64")
    assert json.loads(result.image.info["dsdiff"])["seed"] == 7
    kept = sorted(studio.outdir.glob("*.png"))
    assert same(Image.open(kept[-1]), expected[1]) and Image.open(kept[-1]).info["seed"] == "8"


def test_from_a_picture(api):
    init = Image.new("RGB", (64, 64), "blue")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    masked = dict(mask_image=mask, mask_blur=0, inpaint_full_res=False, inpainting_fill=1)
    drawn = api.img2img(images=[init], denoising_strength=0.5, **SMALL | masked).image.convert("RGB")
    assert drawn.crop((32, 0, 64, 64)).getcolors() == [(32 * 64, (0, 0, 255))]
    assert len(drawn.crop((0, 0, 32, 64)).getcolors(10**4) or ()) != 1
    inverted = api.img2img(images=[init], denoising_strength=0.5, inpainting_mask_invert=1, **SMALL | masked).image
    assert inverted.convert("RGB").crop((0, 0, 32, 64)).getcolors() == [(32 * 64, (0, 0, 255))]
    with pytest.raises(RuntimeError, match="inpaint_full_res has no effect"):
        api.img2img(images=[init], mask_image=mask, **SMALL)


def test_models_and_settings(api, post, studio):
    titles = api.util_get_model_names()
    assert titles[:4] == ["embedded", "embedded W4A8", "embedded W4A8 dynamic", "embedded W8A8"]  # sorted
    assert "DPM++ 2M Karras" in api.util_get_sampler_names() and "karras" in api.util_get_scheduler_names()
    api.util_set_model("embedded w8a8")
    assert studio.title == "embedded W8A8" == api.util_get_current_model()
    few = api.txt2img(**SMALL, override_settings={"token_merging_ratio": 0.5}).image
    assert few.info["parameters"].endswith("Quantization: W8A8 sm16 split, Token merging ratio: 0.5")
    counted = {"token_merging_ratio": 0.5, "dsdiff_proportional": True, "sd_model_checkpoint": "embedded W4A8 dynamic"}
    counted = api.txt2img(**SMALL, override_settings=counted).image
    assert "W4A8 sm16 dynamic" in counted.info["parameters"]
    assert counted.info["parameters"].endswith("Token merging ratio: 0.5, Token merging options: proportional")
    float_one = api.txt2img(**SMALL, override_settings={"sd_model_checkpoint": "EMBEDDED"}).info["infotexts"][0]
    assert float_one.endswith("Model: model") and api.util_get_current_model() == "embedded W8A8"  # for that request
    options = api.get_options()
    api.set_options(options | {"sd_model_checkpoint": "embedded", "dsdiff_cache": 2})
    assert 'Feature cache: "2, depth 1"' in api.txt2img(**SMALL).info["infotexts"][0]
    api.set_options({"dsdiff_cache": 1})
    assert api.get_options() == options | {"sd_model_checkpoint": "embedded"}
    assert post("options", {"sd_vae": "x"})[0] == 422 and post("options", {"sd_model_checkpoint": "x"})[0] == 422


def test_lists_that_clients_ask_for(api, post):
    assert api.get_scripts() == {"txt2img": [], "img2img": []} and api.get_cmd_flags() == {}
    lists = (api.get_sd_vae, api.get_upscalers, api.get_latent_upscale_modes, api.get_hypernetworks)
    lists += (api.get_face_restorers, api.get_realesrgan_models, api.get_prompt_styles)
    assert all(call() == [] for call in lists)
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}} and api.get_memory()["ram"]["used"] > 0
    before = api.get_sd_models()
    assert all("/" not in str(value) for model in before for value in model.values())  # no paths
    assert api.refresh_checkpoints() == {} and api.get_sd_models() == before


def test_loras_by_their_names_in_prompts(api, post):
    assert [lora["name"] for lora in api.get_loras()] == ["other", "own"]
    plain = api.txt2img(**SMALL).image
    changed = api.txt2img(**SMALL | {"prompt": f"{PROMPT} <lora:own:0.5>"})
    assert changed.info["prompt"] == PROMPT and "LoRA: " in changed.info["infotexts"][0]
    assert "own.safetensors:0.5" in changed.info["infotexts"][0] and not same(changed.image, plain)
    assert same(api.txt2img(**SMALL).image, plain)
    status, reply = post("txt2img", SMALL | {"prompt": f"{PROMPT} <lora:none:1>"})
    assert status == 422 and "there is no LoRA 'none': the LoRAs are 'other', 'own'" in reply["detail"]
    status, reply = post("txt2img", SMALL | {"prompt": f"{PROMPT} <lora:other:0.5>"})
    assert status == 422 and "other.safetensors" in reply["detail"]  # it is for another model
    assert post("txt2img", SMALL)[0] == 200


def test_what_cannot_be_is_told_in_a_line(post):
    for change, words in (
        ({"width": 60}, "width 60 is not a multiple of 8"),
        ({"width": 264}, "width is 264: this server takes 256 at most"),
        ({"steps": 61}, "steps is 61"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"batch_size": 3}, "batch_size is 3"),
        ({"batch_size": 2, "n_iter": 2}, "the number of pictures is 4"),
        ({"seed": -2}, "seed: "),
        ({"seed": 2**63 - 1}, "seed is "),
        ({"prompt": "x" * 10_001}, "the prompt has 10001 characters"),
        ({"sampler_name": "Heun"}, "there is no sampler 'Heun'"),
        ({"scheduler": "karras"}, "DDIM has no scheduler 'karras'"),
        ({"scheduler": "karras", "sampler_name": None}, "ddim has no scheduler 'karras'"),
        ({"prompt": "\ud800"}, "the prompt has half a letter in it"),
        ({"enable_hr": True}, "enable_hr has no effect on this server"),
        ({"s_churn": 0.5}, "s_churn has no effect on this server"),
        ({"s_noise": 0.5}, "s_noise: "),
        ({"alwayson_scripts": {"ControlNet": {}}}, "alwayson_scripts has no effect"),
        ({"override_settings": {"nothing": 1}}, "there is no setting 'nothing'"),
        ({"cfg_scale": 1, "negative_prompt": "blue"}, "a negative prompt has no effect with scale 1"),
    ):
        status, reply = post("txt2img", SMALL | change)
        assert status == 422 and words in reply["detail"] == reply["errors"] and "\n" not in reply["detail"], reply
    for picture in ("%", base64.b64encode(b"no picture").decode(), encoded(Image.new("RGB", (64, 64)), "GIF")):
        status, reply = post("img2img", SMALL | {"init_images": [picture]})
        assert status == 422 and "init_images[0]" in reply["detail"], reply
    white = encoded(Image.new("RGB", (64, 64), "white"), "PNG")
    masked = {"init_images": [white], "mask": white, "inpaint_full_res": False}
    status, reply = post("img2img", SMALL | masked | {"mask_blur": 1e10})  # Pillow would crash
    assert status == 422 and "mask_blur is 10000000000.0" in reply["detail"], reply
    status, reply = post("nowhere", {})
    assert status == 404 and reply["error"] == "http" and "/sdapi/v1/nowhere is no route" in reply["detail"]
    assert post("txt2img", None, "get")[0] == 405


def test_progress_interrupt_and_line(api, post, studio):
    whole = api.txt2img(**SMALL).image
    long = SMALL | {"steps": 50, "width": 128, "height": 128}
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(post("txt2img", long))) for _ in range(2)]
    threads[0].start()
    progress = until(lambda: api.get_progress(), lambda reply: reply["current_image"])
    assert 0 < progress["progress"] < 1 and progress["state"]["job"] == "txt2img"
    assert 1 <= progress["state"]["sampling_step"] <= 50 == progress["state"]["sampling_steps"]
    preview = Image.open(io.BytesIO(base64.b64decode(progress["current_image"])))
    assert preview.size == (128, 128)
    threads[1].start()
    until(studio.waiting, lambda count: count == 1)
    status, reply = post("txt2img", SMALL)
    assert status == 503 and reply["detail"] == "1 requests wait already: try again later"
    while any(thread.is_alive() for thread in threads):
        api.interrupt()
        time.sleep(0.05)
    for status, reply in replies:
        info = json.loads(reply["info"])
        assert status == 200 and info["interrupted"] and len(reply["images"]) == len(info["all_seeds"]) <= 1
    assert any(reply["images"] for _, reply in replies)  # as far as it was
    assert api.get_progress()["progress"] == 0 and api.get_progress()["state"]["job_count"] == 0
    assert same(api.txt2img(**SMALL).image, whole)  # nothing is left of the walk that was stopped


def test_a_body_that_is_no_json_is_told(port):
    client = HTTPConnection("127.0.0.1", port)
    client.request("POST", "/sdapi/v1/txt2img", "{bad", {"Content-Type": "application/json"})
    reply = client.getresponse()
    assert reply.status == 422 and json.loads(reply.read())["detail"].startswith("the body is no JSON: Expecting")
    client.close()


def test_a_client_that_goes_away_ends_its_job(port, studio):
    body = SMALL | {"steps": 50, "batch_size": 1, "n_iter": 3, "width": 128, "height": 128}
    client = HTTPConnection("127.0.0.1", port)
    client.request("POST", "/sdapi/v1/txt2img", json.dumps(body), {"Content-Type": "application/json"})
    job = until(lambda: studio.job, lambda job: job is not None and job.step)
    client.close()
    assert job.future.result(60).interrupted


def test_errors_of_work_have_their_status():
    app = FastAPI()
    add_errors(app)
    errors = {
        "gpu": (torch.OutOfMemoryError("CUDA out of memory"), 507),
        "cpu": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 507),
        "python": (MemoryError(), 507),
        "missing": (FileNotFoundError(2, "No such file", "x"), 422),
        "defect": (RuntimeError("a defect"), 500),
        "stopping": (StoppingError("the server is being stopped"), 503),
    }

    @app.get("/{name}")
    def fail(name: str):
        raise errors[name][0]

    client = TestClient(app, raise_server_exceptions=False)
    for name, (_, status) in errors.items():
        reply = client.get(f"/{name}")
        assert reply.status_code == status and reply.json()["detail"], name


def encoded(image, kind):
    """Return a picture in a format, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


def until(look, right, seconds=60):
    """Return what `look` gives once it is right."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = look()
        if right(found):
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s")
