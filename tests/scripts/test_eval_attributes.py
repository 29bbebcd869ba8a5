"""The figures and the folder mode of scripts/eval_attributes.py."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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


def test_pictures_survive_the_way_to_a_tensor_and_back():
    picture = ShapesDataset(1).picture(0)
    assert script.picture_of(script.tensor_of(picture)).tobytes() == picture.tobytes()


def test_folder_keeps_prompts_and_pictures_together(tmp_path):
    data = write_pictures(tmp_path)
    specs, pictures = script.read_folder(tmp_path)
    assert specs == [data.spec(i) for i in range(4)]
    assert pictures[2].tobytes() == data.picture(2).tobytes()


def test_judges_a_folder(tmp_path, capsys):
    if not script.parse_args([]).reader.exists():
        pytest.skip("the reader's weights are not built")
    folder, outdir = tmp_path / "samples", tmp_path / "out"
    folder.mkdir()
    write_pictures(folder)
    assert script.main(["--images", str(folder), "--outdir", str(outdir), "--device", "cpu"]) == 0
    figures = json.loads((outdir / "attributes.json").read_text())["figures"]["images"]["images"]
    assert figures["count"]["n"] == 4 and figures["color"]["percent"] == 100
    assert "color n=" in capsys.readouterr().out
    assert Image.open(outdir / "sheet-images.png").width > 8 * 128
    assert len((outdir / "prompts-images.txt").read_text().splitlines()) == 4
    assert not list(outdir.glob("*.tmp"))


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    Image.new("RGB", (128, 128)).save(tmp_path / "0.png")
    missing = str(tmp_path / "missing.safetensors")
    assert script.main(["--reader", missing, "--outdir", str(tmp_path)]) == 2
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(["--n", "0"])
    with pytest.raises(ValueError, match="holds no prompt"):
        script.read_folder(tmp_path)
    with pytest.raises(ValueError, match="no PNG"):
        script.read_folder(tmp_path / "empty")
    assert "missing.safetensors" in capsys.readouterr().err
