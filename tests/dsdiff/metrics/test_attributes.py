"""Reading the attributes of pictures of shapes: verdicts, shares, folders, and the shipped weights."""

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dsdiff.metrics import attributes
from dsdiff.models.registry import EMBEDDED, READER
from dsdiff.models.spec import find_model
from dsdiff.options import DrawOptions, ModelOptions
from dsdiff.pipeline import Pipeline
from ldm.data.reader import ShapesReader
from ldm.data.shapes import ShapesDataset, caption


def write_pictures(folder, n=4):
    data = ShapesDataset(n, split="test", seed=3)
    for i in range(n):
        info = PngInfo()
        info.add_text("prompt", caption(data.spec(i)))
        data.picture(i).save(folder / f"{i:05}.png", pnginfo=info)
    return data


def test_counts_are_by_attribute_over_all_objects():
    verdicts = [{"color 1": True, "color 2": False, "count": True}, {"color 1": True, "size 1": False, "count": True}]
    counts = attributes.count(verdicts)
    assert {name: (share.right, share.n) for name, share in counts.items()} == {
        "color": (2, 3),
        "size": (0, 1),
        "count": (2, 2),
    }
    assert "66.7" in attributes.table("test", {"generated": counts})


def test_sheet_has_a_place_for_each_picture():
    data = ShapesDataset(9, split="test")
    page = attributes.sheet([data.picture(i) for i in range(9)], ["a red circle"] * 9, [{"color 1": False}] * 9)
    assert page.width == 8 * 136 and page.height > 2 * 128
    assert page.crop((0, 0, 128, 128)).tobytes() == data.picture(0).tobytes()


def test_folder_keeps_prompts_and_pictures_together(tmp_path):
    data = write_pictures(tmp_path)
    specs, pictures = attributes.read_folder(tmp_path)
    assert specs == [data.spec(i) for i in range(4)]
    assert pictures[2].tobytes() == data.picture(2).tobytes()


def test_folder_leaves_no_file_open(tmp_path, monkeypatch):
    write_pictures(tmp_path)
    files, open_picture = [], Image.open

    def opened(path):
        files.append(open_picture(path))
        return files[-1]

    monkeypatch.setattr(attributes.Image, "open", opened)
    _, pictures = attributes.read_folder(tmp_path)
    assert len(files) == 4 and all(file.fp is None or file.fp.closed for file in files)
    assert pictures[3].getpixel((0, 0)) is not None


def test_folders_that_cannot_be_judged_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no PNG in"):
        attributes.read_folder(tmp_path)
    write_pictures(tmp_path, 1)
    with Image.open(tmp_path / "00000.png") as picture:
        info = PngInfo()
        info.add_text("prompt", picture.info["prompt"])
        picture.resize((64, 64)).save(tmp_path / "00001.png", pnginfo=info)
    with pytest.raises(ValueError, match="use one size"):
        attributes.read_folder(tmp_path)
    Image.new("RGB", (128, 128)).save(tmp_path / "00000.png")
    with pytest.raises(ValueError, match="holds no prompt"):
        attributes.read_folder(tmp_path)


def test_real_pictures_have_their_attributes_and_noise_has_not():
    reader, data = ShapesReader.from_file(READER), ShapesDataset(8, "heldout")
    specs = [data.spec(i) for i in range(8)]
    real = attributes.tensor_of([data.picture(i) for i in range(8)])
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    shares = []
    for images in (real, noise):
        answers = [right for verdict in attributes.judge_batch(images, specs, reader) for right in verdict.values()]
        shares.append(sum(answers) / len(answers))
    assert len(answers) > 20 and shares[0] > 0.95 and shares[1] < 0.6


# --- the shipped weights -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_draws_the_colours_it_is_asked_for():
    """Eight captions of one object. A guess is right in one of eleven cases; a model that works, in most."""
    data = ShapesDataset(100, "test", seed=11)
    specs = [spec for spec in map(data.spec, range(len(data))) if len(spec.objects) == 1][:8]
    pipeline = Pipeline(find_model(ModelOptions(config=EMBEDDED)), device="cpu")
    settings = pipeline.resolve(DrawOptions(steps=12))
    latents = pipeline.sample([caption(spec) for spec in specs], range(8), settings)
    verdicts = attributes.judge_batch(pipeline.decode(latents), specs, ShapesReader.from_file(READER))
    assert len(verdicts) == 8 and sum(verdict["color 1"] for verdict in verdicts) >= 6, verdicts
