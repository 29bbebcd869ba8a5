"""Sets of pictures: which files a source names, in which order, and how they come to one size."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.registry import DATASETS_REGISTRY

from dsdiff.images import registered
from dsdiff.images.folders import choose_framing, open_source
from dsdiff.images.sets import ShapesPictures
from dsdiff.images.sources import SHAPES_SEED, Framing
from ldm.data.shapes import ShapesDataset


def write_pictures(folder, counts):
    """Write so many pictures of 8 x 8 into each folder, of different colours."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (40 * i % 256, 0, 0)).save(folder / name / f"ILSVRC2012_val_{i:08}.JPEG")


# --- sources -----------------------------------------------------------------------------------------------


def test_shapes_are_a_data_set_of_torch_fidelity():
    data = registered.DATASETS_REGISTRY["shapes"](None, False)
    expected = np.asarray(ShapesDataset(10, "heldout", 128, SHAPES_SEED).picture(7))
    assert len(data) == 5000 and data[7].dtype == torch.uint8
    assert (data[7].permute(1, 2, 0).numpy() == expected).all()


def test_real_shapes_are_not_scored_against_themselves():
    ours = ShapesPictures(20, 32)
    others = [ShapesDataset(20, split, 32, seed) for split in ("test", "heldout") for seed in (0, 1000)]
    drawn = {other.picture(i).tobytes() for other in others for i in range(20)}
    assert not drawn & {ours.picture(i).tobytes() for i in range(20)}


def test_of_a_txt2img_run_only_the_samples_count(tmp_path):
    write_pictures(tmp_path, {"samples": 6})
    Image.new("RGB", (70, 70)).save(tmp_path / "grid-0000.png")
    (tmp_path / "settings.yaml").write_text("{}")
    assert len(open_source(str(tmp_path), what="pictures")) == 6
    (tmp_path / "settings.yaml").unlink()
    assert len(open_source(str(tmp_path), what="pictures")) == 7


def test_a_folder_is_read_recursively_in_order(tmp_path):
    for name in ("b/2.JPEG", "a/1.png", "b/c/3.webp", ".hidden.png", "note.txt", "c.PNG"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, format="PNG")
    found = open_source(str(tmp_path), what="pictures")
    assert [str(path.relative_to(tmp_path)) for path in found.paths] == ["a/1.png", "b/2.JPEG", "b/c/3.webp", "c.PNG"]


def test_what_is_left_out_or_ignored_is_told(tmp_path, caplog):
    write_pictures(tmp_path / "pictures", {"a": 2})
    for name in ("1.tiff", "2.tif", "3.TIFF", "4.gif", "note.txt"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name, format="TIFF")
    (tmp_path / "pictures" / "more").symlink_to(tmp_path / "pictures" / "a")
    assert len(open_source(str(tmp_path / "pictures"), what="pictures")) == 2
    formats, links = (record.getMessage() for record in caplog.records)
    assert "1 .gif, 1 .tif, 2 .tiff" in formats and "not followed" in links and "more" in links
    caplog.clear()
    clear = tmp_path / "clear"
    clear.mkdir()
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    for name, picture in {"a": Image.new("RGB", (8, 8)), "b": Image.new("RGBA", (8, 8)), "c": palette}.items():
        picture.save(clear / f"{name}.png")
    open_source(str(clear), what="pictures")
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "transparency is ignored in 2 pictures, as 'b.png': the colours of transparent pixels count"
    ]


def test_a_file_that_is_no_picture_is_told_with_a_reason(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"a\.png' is no readable picture \(no format of pictures\)"):
        open_source(str(tmp_path), what="pictures")


def test_imagenet_is_the_first_of_each_class(tmp_path):
    expected = ["n01/0", "n01/1", "n01/2", "n02/0", "n02/1", "n02/2", "n03/0"]
    for case, place in (("plain", "."), ("with-val", "val")):
        write_pictures(tmp_path / case / place, {"n02": 4, "n01": 7, "n03": 1})
        found = open_source(f"imagenet:{tmp_path / case}", what="reference", per_class=3)
        assert [f"{path.parent.name}/{path.stem[-1]}" for path in found.paths] == expected, case


def test_coco_is_its_validation_part(tmp_path):
    write_pictures(tmp_path, {"val2017": 3, "train2017": 2})
    assert len(open_source(f"coco:{tmp_path}", what="reference")) == 3
    assert len(open_source(f"coco:{tmp_path}/val2017", what="reference", limit=2)) == 2
    write_pictures(tmp_path, {"val2014": 3})
    with pytest.raises(ValueError, match="val2014 and val2017"):
        open_source(f"coco:{tmp_path}", what="reference")


def test_a_data_set_of_torch_fidelity_is_a_reference(tmp_path, monkeypatch):
    items = [torch.full((3, 40, 40), i, dtype=torch.uint8) for i in range(8)]
    monkeypatch.setitem(DATASETS_REGISTRY, "cifar10-val", lambda root, download: items)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = open_source("cifar10-val", what="reference", limit=5)
    assert len(found) == 5 and found[3].equal(items[3]) and found.sizes == {(40, 40): "picture 0"}


def test_a_folder_goes_before_a_data_set_of_the_same_name(tmp_path, monkeypatch):
    write_pictures(tmp_path, {"cifar10-val": 2})
    monkeypatch.chdir(tmp_path)
    assert len(open_source("cifar10-val", what="reference")) == 2


def test_the_content_tells_pictures_orders_and_sizes_apart(tmp_path):
    write_pictures(tmp_path, {"a": 3, "b": 3})
    first, same = (open_source(str(tmp_path / name), what="pictures") for name in "ab")
    assert first.content == same.content
    smaller = first.framed(Framing(mode="squash", size=4))
    others = [first.subset([0, 1]), first.subset([1, 0, 2]), smaller]
    assert len({first.content, *(other.content for other in others)}) == 4


# --- resize ------------------------------------------------------------------------------------------------


def stripes():
    """60 x 20: red, then green, then blue."""
    picture = Image.new("RGB", (60, 20), (255, 0, 0))
    picture.paste((0, 255, 0), (20, 0, 40, 20))
    picture.paste((0, 0, 255), (40, 0, 60, 20))
    return picture


def test_center_crop_keeps_the_middle_and_squash_keeps_all():
    cropped = Framing(mode="center-crop", size=10)(stripes())
    assert cropped.size == (10, 10) and cropped.getcolors() == [(100, (0, 255, 0))]
    squashed = Framing(mode="squash", size=30)(stripes())
    assert squashed.size == (30, 30)
    assert [squashed.getpixel((x, 15)) for x in (2, 15, 27)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_picture_of_the_size_stays_as_it_is():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert all(Framing(mode=mode, size=16)(picture) is picture for mode in ("squash", "center-crop"))


def test_the_size_is_that_of_the_pictures_if_they_are_alike(tmp_path):
    write_pictures(tmp_path, {"a": 2})
    pictures = open_source(str(tmp_path), what="pictures")
    assert choose_framing("squash", None, pictures) == Framing(mode="squash", size=8)
    assert choose_framing("none", None, pictures) == Framing()
    stripes().save(tmp_path / "a" / "wide.png")
    with pytest.raises(ValueError, match="needs a --size"):
        choose_framing("squash", None, open_source(str(tmp_path), what="pictures"))


def test_a_framing_without_meaning_is_refused():
    for case in ({"mode": "crop", "size": 8}, {"mode": "none", "size": 8}, {"mode": "squash"}):
        with pytest.raises(ValueError, match="choose one of none, squash, center-crop, and a size"):
            Framing(**case)
