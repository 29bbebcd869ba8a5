"""The figures and the folder mode of scripts/eval_attributes.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.data.reader import ShapesReader
from ldm.data.shapes import ShapesDataset, caption
from scripts import eval_attributes as script


def write_pictures(folder, n=4):
    data = ShapesDataset(n, split="test", seed=3)
    for i in range(n):
        info = PngInfo()
        info.add_text("prompt", caption(data.spec(i)))
        data.picture(i).save(folder / f"{i:05}.png", pnginfo=info)
    return data


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 100, 0.7222, 0.8749)]
)
def test_wilson_interval(right, n, low, high):
    assert script.wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_counts_are_by_attribute_over_all_objects():
    verdicts = [{"color 1": True, "color 2": False, "count": True}, {"color 1": True, "size 1": False, "count": True}]
    counts = script.count(verdicts)
    assert {name: (c["right"], c["n"]) for name, c in counts.items()} == {
        "color": (2, 3),
        "size": (0, 1),
        "count": (2, 2),
    }
    assert "66.7" in script.table("test", {"generated": counts})


def test_sheet_has_a_place_for_each_picture():
    data = ShapesDataset(9, split="test")
    page = script.sheet([data.picture(i) for i in range(9)], ["a red circle"] * 9, [{"color 1": False}] * 9)
    assert page.width == 8 * 136 and page.height > 2 * 128
    assert page.crop((0, 0, 128, 128)).tobytes() == data.picture(0).tobytes()


def test_folder_keeps_prompts_and_pictures_together(tmp_path):
    data = write_pictures(tmp_path)
    specs, pictures = script.read_folder(tmp_path)
    assert specs == [data.spec(i) for i in range(4)]
    assert pictures[2].tobytes() == data.picture(2).tobytes()


def test_judges_a_folder(tmp_path, capsys):
    if not script.READER.exists():
        pytest.skip("the reader's weights are not built")
    folder, outdir = tmp_path / "samples", tmp_path / "out"
    folder.mkdir()
    write_pictures(folder)
    script.main(["--images", str(folder), "--outdir", str(outdir), "--device", "cpu"])
    figures = json.loads((outdir / "attributes.json").read_text())["figures"]["images"]["images"]
    assert figures["count"]["n"] == 4 and figures["color"]["percent"] == 100
    assert "color n=" in capsys.readouterr().out
    assert Image.open(outdir / "sheet-images.png").width > 8 * 128
    assert len((outdir / "prompts-images.txt").read_text().splitlines()) == 4
    assert not list(outdir.glob(".*"))


def test_generates_and_reads(tmp_path, monkeypatch, capsys):
    """The whole run with a stand-in for the model, which paints what the latents say."""
    data = ShapesDataset(3, "test")
    monkeypatch.setattr(script, "generator", lambda args: (None, SimpleNamespace(height=128)))
    monkeypatch.setattr(script, "sample", lambda model, captions, seeds, options: seeds)
    monkeypatch.setattr(script, "decode", lambda model, seeds: script.tensor_of([data.picture(i) for i in seeds]))
    monkeypatch.setattr(script, "through_autoencoder", lambda model, images: torch.ones_like(images))
    reader = ShapesReader(width=8, features=8).eval()
    monkeypatch.setattr(script.ShapesReader, "from_file", lambda path: reader)
    script.main(["--n", "3", "--split", "test", "--batch_size", "2", "--outdir", str(tmp_path), "--device", "cpu"])
    figures = json.loads((tmp_path / "attributes.json").read_text())["figures"]["test"]
    assert list(figures) == ["generated", "autoencoder", "rendered"]
    assert figures["generated"] == figures["rendered"]
    assert figures["generated"]["count"]["n"] == 3
    assert (tmp_path / "prompts-test.txt").read_text().splitlines() == [caption(data.spec(i)) for i in range(3)]
    assert len(capsys.readouterr().out.strip().splitlines()) == 4


@pytest.mark.parametrize(
    "flags", [["--n", "0"], ["--split", "train"], ["--reader", "missing.safetensors"], ["--images", "missing"]]
)
def test_bad_input_is_one_line_and_status_2(flags, tmp_path, capsys):
    if "--images" in flags and not script.READER.exists():
        pytest.skip("the reader's weights are not built")
    with pytest.raises(SystemExit) as leaving:
        script.main([*flags, "--outdir", str(tmp_path / "out")])
    assert leaving.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_pictures_without_a_prompt_are_refused(tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="holds no prompt"):
        script.read_folder(tmp_path)
