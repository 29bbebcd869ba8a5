"""The figures and the folder mode of scripts/eval_attributes.py."""

import json
import re

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


def test_folder_leaves_no_file_open(tmp_path, monkeypatch):
    write_pictures(tmp_path)
    files, open_picture = [], Image.open

    def opened(path):
        files.append(open_picture(path))
        return files[-1]

    monkeypatch.setattr(script.Image, "open", opened)
    _, pictures = script.read_folder(tmp_path)
    assert len(files) == 4 and all(file.fp is None or file.fp.closed for file in files)
    assert pictures[3].getpixel((0, 0)) is not None


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


def test_generates_and_reads(tmp_path, monkeypatch, capsys, random_ckpt):
    """The whole run with a stand-in for the model, which paints what the latents say."""
    data = ShapesDataset(3, "test")
    monkeypatch.setattr(script, "build_model", lambda args, choice, options: None)
    monkeypatch.setattr(script, "sample", lambda model, captions, seeds, options: seeds)
    monkeypatch.setattr(script, "decode", lambda model, seeds: script.tensor_of([data.picture(i) for i in seeds]))
    monkeypatch.setattr(script, "through_autoencoder", lambda model, images: torch.ones_like(images))
    reader = ShapesReader(width=8, features=8).eval()
    monkeypatch.setattr(script.ShapesReader, "from_file", lambda path: reader)
    flags = ["--ckpt", str(random_ckpt), "--ddim_steps", "7", "--plms", "--ratio", "0.5", "--device", "cpu"]
    script.main(["--n", "3", "--captions", "test", "--n_samples", "2", "--outdir", str(tmp_path), *flags])
    content = json.loads((tmp_path / "attributes.json").read_text())
    options = {"height": 128, "sampler": "plms", "steps": 7, "steps_taken": 8, "scale": 4.0, "precision": "full"}
    assert {name: content["options"][name] for name in options} == options
    assert content["options"]["merge"]["ratio"] == 0.5 and content["arguments"]["ckpt"] == str(random_ckpt)
    assert all(len(content[name]) == 64 for name in ("ckpt_sha256", "config_sha256", "reader_sha256"))
    assert content["versions"]["torch"] == torch.__version__
    figures = content["figures"]["test"]
    assert list(figures) == ["generated", "autoencoder", "rendered"]
    assert figures["generated"] == figures["rendered"]
    assert figures["generated"]["count"]["n"] == 3
    assert (tmp_path / "prompts-test.txt").read_text().splitlines() == [caption(data.spec(i)) for i in range(3)]
    out = capsys.readouterr().out.strip().splitlines()
    assert out[0] == f"embedded shapes model ({random_ckpt})" and "8 are taken" in out[1]
    assert len(out) == 2 + 4


@pytest.mark.parametrize("verbose", [[], ["--verbose"]], ids=str)
def test_verbose_shows_the_packages_details(tmp_path, monkeypatch, capsys, verbose):
    monkeypatch.setattr(script, "run", lambda args: script.logger.debug("a detail") or {})
    script.main([*verbose, "--outdir", str(tmp_path)])
    assert ("a detail" in capsys.readouterr().out) is bool(verbose)


@pytest.mark.parametrize(
    "flags", [["--n", "0"], ["--captions", "train"], ["--reader", "missing.safetensors"], ["--images", "missing"]]
)
def test_bad_input_is_one_line_and_status_2(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        script.main([*flags, "--outdir", str(tmp_path / "out")])
    assert leaving.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--n", "256"], "--n"),
        (["--captions", "both"], "--captions"),
        (["--ptq"], "--ptq"),
        (["--plms", "--ddim_steps", "9"], "--plms, --ddim_steps"),
        (["--scale", "4"], "--scale"),
        (["--seed", "0"], "--seed"),
        (["--ratio", "0"], "--ratio"),
        (["--no-use_rand"], "--use_rand"),
        (["--config", str(script.EMBEDDED)], "--config"),
        (["--ckpt", "x.ckpt"], "--ckpt"),
        (["--tokenizer", "x"], "--tokenizer"),
        (["--precision", "full"], "--precision"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_of_generation_are_refused_with_images(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--images", str(tmp_path), "--outdir", str(tmp_path / "out"), *flags])
    told = set(re.findall(r"--\w+", capsys.readouterr().err.split("so ")[1].split(" has")[0]))
    assert told == set(named.split(", ")) and not list(tmp_path.iterdir())


def test_pictures_without_a_prompt_are_refused(tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="holds no prompt"):
        script.read_folder(tmp_path)


# --- the shipped weights -----------------------------------------------------------------------------------


def test_the_embedded_model_draws_the_colours_it_is_asked_for():
    """Eight captions of one object. A guess is right in one of eleven cases; a model that works, in most."""
    data = ShapesDataset(100, "test", seed=11)
    specs = [spec for spec in map(data.spec, range(len(data))) if len(spec.objects) == 1][:8]
    args = script.parse_args(["--ddim_steps", "12", "--device", "cpu"])
    choice = script.choose_model(args)
    options = script.sampling_options(args, choice)
    model = script.build_model(args, choice, options)
    latents = script.sample(model, [caption(spec) for spec in specs], range(8), options)
    objects = ShapesReader.from_file(script.READER).read(script.decode(model, latents) * 2 - 1)
    verdicts = [script.judge(spec, seen) for spec, seen in zip(specs, objects, strict=True)]
    assert len(verdicts) == 8 and sum(verdict["color 1"] for verdict in verdicts) >= 6, verdicts
