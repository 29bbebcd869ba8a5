"""scripts/reproduce.py on a small model with random weights: the way from a table to its page."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dsdiff import jobs
from dsdiff.benchmark import comparison
from dsdiff.metrics.clip_scores import build_shapes_clip
from dsdiff.models.registry import READER, ROOT
from dsdiff.models.spec import find_model
from dsdiff.options import ModelOptions
from dsdiff.pipeline import Pipeline
from dsdiff.results import page as report
from dsdiff.results.options import TABLE
from dsdiff.results.quantization_cost import attributes_right
from ldm.data.reader import ShapesReader
from qdiff import QuantConfig, QuantModel, save_cali_ckpt
from scripts import reproduce

ROWS = [
    {"name": "FP32", "ratio": 0.0, "published": 33.77},
    {"name": "W4A8", "weight_bit": 4, "act_bit": 8, "ratio": 0.0},
    {"name": "W4A8", "weight_bit": 4, "act_bit": 8, "ratio": 0.5, "published": 34.02},
]
N = 20  # the least that has intervals


@pytest.fixture(scope="module")
def flags(small_model, tmp_path_factory):
    """Of reproduce.py: the small model, calibrated to a range that is somewhere near."""
    folder = tmp_path_factory.mktemp("reproduce")
    config, ckpt = small_model
    pipeline = Pipeline(find_model(ModelOptions(config=Path(config), ckpt=Path(ckpt))), device="cpu")
    qnn = QuantModel(pipeline.model.model.diffusion_model, QuantConfig())
    qnn.fit_weights()
    for quantizer in qnn.act_quantizers().values():
        quantizer.set(torch.tensor(0.05), torch.tensor(0.0 if quantizer.n_bits == 16 else 128.0))
    save_cali_ckpt(qnn, folder / "cali.safetensors")
    protocol = {
        "config": str(config),
        "prompts": "shapes",
        "pictures": N,
        "seed": 0,
        "drawing": {"sampler": "dpm_solver", "steps": 2, "height": 32, "width": 32},
        "reference": "shapes",
        "scoring": {"reference_n": 30},
    }
    models = {"embedded": protocol}
    (folder / "table.yaml").write_text(yaml.safe_dump({"rows": ROWS, "models": models}))
    named = {"table": "table.yaml", "cali_ckpt": "cali.safetensors", "cache": "cache"}
    paths = [text for name, file in named.items() for text in (f"--{name}", str(folder / file))]
    return [*paths, "--ckpt", str(ckpt), "--repeats", "1", "--shown", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def outdir(flags, tmp_path_factory):
    """Of a whole run."""
    outdir = tmp_path_factory.mktemp("results")
    reproduce.main([*flags, "--outdir", str(outdir)])
    return outdir


@pytest.fixture(scope="module")
def results(outdir):
    return json.loads((outdir / "results.json").read_text())


@pytest.mark.slow
def test_rows_are_those_of_the_table(results):
    rows = results["rows"]
    assert [(row["name"], row["ratio"], row["published"]) for row in rows] == [
        (row["name"], row["ratio"], row.get("published")) for row in ROWS
    ]
    assert [row["n"] for row in rows] == [N] * 3
    assert all(row["features"] == "shapes features" for row in rows)
    assert rows[0]["unet"]["weight_bytes"] > 3 * rows[1]["unet"]["weight_bytes"]


@pytest.mark.slow
def test_differences_are_those_of_the_fids(results):
    base, *others = results["rows"]
    assert "fid_difference" not in base["scores"] and "psnr" not in base["scores"]
    for row in others:
        change = row["scores"]["fid_difference"]
        assert change["value"] == pytest.approx(
            row["scores"]["fid"]["value"] - base["scores"]["fid"]["value"], rel=1e-6
        )
        assert 5 < row["scores"]["psnr"]["value"] < 80
        assert row["scores"]["psnr"]["value"] < row["scores"]["psnr_mean_of_pictures"]["value"]


@pytest.mark.slow
def test_scores_against_full_precision_and_against_prompts(outdir, results):
    base, *others = results["rows"]
    assert "fid_to_base" not in base["scores"]
    for row in others:
        distance = row["scores"]["fid_to_base"]
        assert distance["name"] == "FID to FP32's pictures" and 0 < distance["value"] < row["scores"]["fid"]["value"]
    clip, reader = build_shapes_clip(torch.device("cpu")), ShapesReader.from_file(READER)
    for row in results["rows"]:
        paths = [outdir / row["pictures"] / f"{i:05}.png" for i in range(N)]
        pictures = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])
        right, asked = attributes_right(pictures, results["prompts"], reader, N)
        assert row["scores"]["attributes"]["value"] == pytest.approx(100 * right / asked)
        assert row["scores"]["attributes"]["n"] == asked
        expected = clip(pictures.permute(0, 3, 1, 2), results["prompts"]).mean().item()
        assert row["scores"]["shapes_clip_score"]["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_same_prompts_from_the_same_noise(outdir, results):
    seen = []
    for row in results["rows"]:
        folder = outdir / row["pictures"]
        infos = [Image.open(path).info for path in sorted(folder.glob("*.png"))]
        seen.append([(info["prompt"], info["seed"]) for info in infos])
    assert seen[0] == seen[1] == seen[2] == [(prompt, str(i)) for i, prompt in enumerate(results["prompts"])]
    pixels = [Image.open(outdir / row["pictures"] / "00000.png").tobytes() for row in results["rows"]]
    assert len(set(pixels)) == 3


@pytest.mark.slow
def test_second_run_draws_nothing_and_says_the_same(outdir, flags, results, monkeypatch):
    monkeypatch.setattr(jobs, "write_png", None)
    monkeypatch.setattr(comparison, "side_by_side", None)
    reproduce.main([*flags, "--outdir", str(outdir)])
    assert json.loads((outdir / "results.json").read_text()) == results


# --- what it writes ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Cells of the table, pictures, and whatever a browser would have to fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.fetched, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img", "use", "path", "rect", "br"):
            self.open.append(tag)
        self.fetched += [attrs[name] for name in ("src", "href") if attrs.get(name, "#")[:5] not in ("data:", "#")]
        if tag == "img":
            self.images.append(attrs["src"])
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.mark.slow
def test_markdown_and_page_show_the_same_table(outdir, results):
    lines = (outdir / "results.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    page = Page((outdir / "results.html").read_text())
    assert len(table) == 2 + len(ROWS)
    assert [page.rows[0], *page.rows[1:4]] == [table[0], *table[2:]]
    assert [row[-1] for row in table[2:]] == ["33.77", "-", "34.02"]
    fid = results["rows"][0]["scores"]["fid"]["value"]
    assert table[2][1].startswith(f"{fid:.4g} [") and table[2][2] == "-" and re.match(r"[+-]\d", table[3][2])


@pytest.mark.slow
def test_page_holds_all_it_shows(outdir):
    text = (outdir / "results.html").read_text()
    page = Page(text)
    assert [target for target in page.fetched if not target.startswith("#")] == []
    assert len(page.images) == 2 * len(ROWS) == len(set(page.images))
    assert text.count("<svg") == 5  # FID and PSNR against the ratio; these and the attributes against time


def browser():
    return next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no browser to open the page with")
def test_a_browser_shows_the_page(outdir, tmp_path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    places = [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={tmp_path / 'page.png'}",
        "--window-size=1300,2500",
    ]
    command = [browser(), *options, *places, (outdir / "results.html").resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "page.png") as picture:
        counts = {colour: count for count, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}
    for colour in report.COLOURS[:2]:  # the lines of the plots
        assert counts[tuple(bytes.fromhex(colour[1:]))] > 50
    assert len(counts) > 2000  # pictures, of which text and plots have not so many


# --- bad input ---------------------------------------------------------------------------------------------


BAD_INPUT = [
    (["--model", "sd-v1", "--table", str(TABLE)], "give --reference imagenet:DIR"),
    (["--cali_ckpt", "missing.safetensors"], "missing.safetensors"),
    (["--table", "missing.yaml"], "missing.yaml"),
    (["--ckpt", "missing.ckpt"], "missing.ckpt"),
    (["--model", "sd-v1"], "has no model sd-v1"),
    (["--inception_weights", "x.pth"], "--inception_weights has no effect"),
    (["--cali_ckpt", str(TABLE)], "table.yaml"),
    (["--reference", "no/such/folder"], "no/such/folder"),
    (["--n_samples", "4"], "unrecognized arguments: --n_samples"),
]


def test_bad_input_is_told_in_one_line(flags, tmp_path, capsys):
    for more, says in BAD_INPUT:
        with pytest.raises(SystemExit) as exit_:
            reproduce.main([*flags, "--outdir", str(tmp_path / "out"), *more])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit_.value.code == 2 and says in error and not (tmp_path / "out").exists(), more


def test_scripts_run_by_themselves():
    done = subprocess.run([sys.executable, "scripts/reproduce.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "results.html" in done.stdout
