"""scripts/eval_attributes.py: what it writes, for a folder and for a model, and what it refuses."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dsdiff.metrics import attributes
from dsdiff.models import quantized
from dsdiff.models.registry import EMBEDDED
from dsdiff.pipeline import Pipeline
from ldm.data.reader import ShapesReader
from ldm.data.shapes import ShapesDataset, caption
from ldm.fileio import only_run_in
from scripts import eval_attributes as script


def write_pictures(folder, n=4):
    data = ShapesDataset(n, split="test", seed=3)
    for i in range(n):
        info = PngInfo()
        info.add_text("prompt", caption(data.spec(i)))
        data.picture(i).save(folder / f"{i:05}.png", pnginfo=info)


def test_judges_a_folder(tmp_path, capsys):
    folder, outdir = tmp_path / "samples", tmp_path / "out"
    folder.mkdir()
    write_pictures(folder)
    script.main(["--images", str(folder), "--outdir", str(outdir), "--device", "cpu"])
    content = json.loads((outdir / "attributes.json").read_text())
    figures = content["figures"]["images"]["images"]
    assert len(content["reader_sha256"]) == 64 and "ckpt_sha256" not in content and "options" not in content
    assert figures["count"]["n"] == 4 and figures["color"]["percent"] == 100
    assert "color n=" in capsys.readouterr().out
    assert Image.open(outdir / "sheet-images.png").width > 8 * 128
    assert len((outdir / "prompts-images.txt").read_text().splitlines()) == 4
    assert not list(outdir.glob(".*"))


@pytest.fixture
def drawn(monkeypatch):
    """Put a stand-in for the model in place, which paints what the latents say; return the seeds that were drawn."""
    data, seeds_drawn = ShapesDataset(3, "test"), []

    def sample(pipeline, captions, seeds, settings):
        seeds_drawn.extend(seeds)
        return seeds

    def decode(pipeline, latents, settings=None):
        """Latents are seeds, or pictures that went through the stand-in for the encoder."""
        return latents if torch.is_tensor(latents) else attributes.tensor_of([data.picture(i) for i in latents])

    monkeypatch.setattr(Pipeline, "prepare", lambda pipeline, settings: None)
    monkeypatch.setattr(Pipeline, "sample", sample)
    monkeypatch.setattr(Pipeline, "decode", decode)
    monkeypatch.setattr(Pipeline, "encode", lambda pipeline, images: torch.ones_like(images))
    reader = ShapesReader(width=8, features=8).eval()
    monkeypatch.setattr(ShapesReader, "from_file", lambda path: reader)
    return seeds_drawn


def test_generates_and_reads(tmp_path, capsys, random_ckpt, drawn):
    data = ShapesDataset(3, "test")
    flags = ["--ckpt", str(random_ckpt), "--ddim_steps", "7", "--plms", "--ratio", "0.5", "--device", "cpu"]
    script.main(["--n", "3", "--captions", "test", "--batch_size", "2", "--outdir", str(tmp_path), *flags])
    content = json.loads((tmp_path / "attributes.json").read_text())
    options = {"height": 256, "sampler": "plms", "steps": 7, "steps_taken": 8, "scale": 4.0, "precision": "full"}
    assert {name: content["options"][name] for name in options} == options
    assert content["options"]["merge"]["ratio"] == 0.5 and content["arguments"]["ckpt"] == str(random_ckpt)
    assert all(len(content[name]) == 64 for name in ("ckpt_sha256", "config_sha256", "reader_sha256"))
    assert torch.__version__.startswith(content["versions"]["torch"])
    figures = content["figures"]["test"]
    assert list(figures) == ["generated", "autoencoder", "rendered"]
    assert figures["generated"] == figures["rendered"]
    assert figures["generated"]["count"]["n"] == 3
    assert (tmp_path / "prompts-test.txt").read_text().splitlines() == [caption(data.spec(i)) for i in range(3)]
    out = capsys.readouterr().out.strip().splitlines()
    assert out[0] == f"embedded shapes model ({random_ckpt})" and "8 are taken" in out[1]
    assert len(out) == 2 + 4


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys, random_ckpt, drawn):
    flags = ["--ckpt", str(random_ckpt), "--n", "3", "--captions", "test", "--batch_size", "1", "--device", "cpu"]
    flags += ["--outdir", str(tmp_path)]
    decode = Pipeline.decode

    def stop(pipeline, latents, settings=None):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return decode(pipeline, latents, settings)

    monkeypatch.setattr(Pipeline, "decode", stop)
    with pytest.raises(SystemExit) as leaving:
        script.main(flags)
    assert leaving.value.code == 130 and len(list(tmp_path.glob("pictures/test-*/*.png"))) == 2
    monkeypatch.setattr(Pipeline, "decode", decode)
    figures = []
    for expected in ([0, 1, 2, 2], [0, 1, 2, 2]):  # what was begun is drawn, and nothing at last
        script.main(flags)
        assert drawn == expected
        figures.append(json.loads((tmp_path / "attributes.json").read_text())["figures"])
    assert figures[0] == figures[1] and figures[0]["test"]["generated"] == figures[0]["test"]["rendered"]


def test_one_run_at_a_time_writes_to_a_folder(tmp_path, capsys, random_ckpt, drawn):
    with only_run_in(tmp_path / "out"), pytest.raises(SystemExit, match="2"):
        script.main(["--n", "1", "--ckpt", str(random_ckpt), "--outdir", str(tmp_path / "out"), "--device", "cpu"])
    assert "another run is writing to" in capsys.readouterr().err and not drawn


def test_what_a_cali_ckpt_does_not_say_is_told(monkeypatch, caplog):
    read = quantized.read_cali_header
    monkeypatch.setattr(quantized, "read_cali_header", lambda *args: replace(read(*args), inferred=("sm_abit",)))
    with caplog.at_level("INFO", logger="dsdiff"):
        script.build_model(script.parse_args(["--ptq", "--device", "cpu"]))
    assert "does not say sm_abit: told by its numbers" in caplog.text


def test_verbose_shows_the_packages_details(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", lambda args: script.logger.debug("a detail") or {})
    for verbose in ([], ["--verbose"]):
        script.main([*verbose, "--outdir", str(tmp_path)])
        assert ("a detail" in capsys.readouterr().out) is bool(verbose), verbose


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    cases = (
        ["--n", "0"],
        ["--captions", "train"],
        ["--reader", "missing.safetensors"],
        ["--images", "missing"],
        ["--n_samples", "4"],
    )
    for flags in cases:
        with pytest.raises(SystemExit) as leaving:
            script.main([*flags, "--outdir", str(tmp_path / "out")])
        assert leaving.value.code == 2, flags
        assert len(capsys.readouterr().err.strip().splitlines()) == 1, flags


IDLE = [
    (["--n", "256"], "--n"),
    (["--captions", "both"], "--captions"),
    (["--ptq"], "--ptq"),
    (["--plms", "--ddim_steps", "9"], "--plms, --ddim_steps"),
    (["--scale", "4"], "--scale"),
    (["--seed", "0"], "--seed"),
    (["--ratio", "0"], "--ratio"),
    (["--no-use_rand"], "--use_rand"),
    (["--config", str(EMBEDDED)], "--config"),
    (["--ckpt", "x.ckpt"], "--ckpt"),
    (["--tokenizer", "x"], "--tokenizer"),
    (["--precision", "full"], "--precision"),
]


def test_flags_of_generation_are_refused_with_images(tmp_path, capsys):
    for flags, named in IDLE:
        with pytest.raises(SystemExit, match="2"):
            script.main(["--images", str(tmp_path), "--outdir", str(tmp_path / "out"), *flags])
        told = set(re.findall(r"--\w+", capsys.readouterr().err.split("so ")[1].split(" has")[0]))
        assert told == set(named.split(", ")) and not list(tmp_path.iterdir()), flags
