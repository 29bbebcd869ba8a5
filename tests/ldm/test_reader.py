"""The detector of shapes: targets, peaks, judgement, and what the shipped weights can read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.data.reader import (
    CLASSES,
    ReaderDataset,
    SeenObject,
    ShapesReader,
    at_reading_size,
    augment,
    dense_targets,
    judge,
    reader_losses,
    relation_holds,
)
from ldm.data.shapes import ShapesDataset, held_out, parse_caption
from ldm.tensor_files import save_tensors

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "models/ldm/shapes/reader.safetensors"


def seen(words: str, x: float = 0.5, y: float = 0.5, score: float = 0.9) -> SeenObject:
    spec = parse_caption(words).objects[0]
    return SeenObject(shape=spec.shape, color=spec.color, size=spec.size, texture=spec.texture, x=x, y=y, score=score)


def perfect_maps(targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The logits of a reader that answers `targets` (of one picture) with full confidence."""
    maps = {"heat": torch.logit(targets["heat"], eps=1e-4)[None, None], "offset": targets["offset"][None]}
    for name, values in CLASSES.items():
        one_hot = torch.nn.functional.one_hot(targets[name], len(values))
        maps[name] = 20.0 * one_hot.permute(2, 0, 1)[None].float()
    return maps


# targets


def test_targets_read_back_as_the_scene(monkeypatch):
    data = ShapesDataset(20, split="heldout")
    reader = ShapesReader(width=8, features=8).eval()
    for i in range(len(data)):
        scene = data.scene(i)
        maps = perfect_maps(dense_targets(scene, 16))
        monkeypatch.setattr(reader, "forward", lambda images, maps=maps: maps)
        objects = reader.read(torch.zeros(1, 3, 128, 128))[0]
        verdict = judge(scene.spec, objects)
        assert all(verdict.values()), (scene.spec, verdict)
        for o in scene.objects:
            assert min(abs(o.x - s.x) + abs(o.y - s.y) for s in objects) < 1e-4


def test_right_answers_cost_less_than_wrong_ones():
    targets = dense_targets(ShapesDataset(1).scene(0), 16)
    batch = {name: target[None] for name, target in targets.items()}
    right = reader_losses(perfect_maps(targets), batch)
    wrong = reader_losses({name: -part for name, part in perfect_maps(targets).items()}, batch)
    assert set(right) == {"heat", "offset", *CLASSES}
    for name in right:
        assert right[name] < 0.1 < wrong[name], name


def test_reader_dataset_items():
    data = ReaderDataset(10, resolution=64)
    item = data[4]
    assert item["image"].shape == (3, 64, 64) and item["image"].abs().max() <= 1
    assert item["heat"].shape == (8, 8) and item["offset"].shape == (2, 8, 8)
    assert (item["heat"] == 1).sum() == len(data.sources[1].spec(4).objects)
    assert torch.equal(data[4]["image"], item["image"])
    assert held_out(data.sources[1].spec(4))
    with pytest.raises(ValueError, match="multiple of 8"):
        ReaderDataset(10, resolution=60)


def test_augmentation_changes_the_picture_but_not_what_it_shows():
    picture = ShapesDataset(1).picture(0)
    clean = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    first, second = (augment(picture, np.random.default_rng(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    for changed in (first, second):
        assert 0 < (changed - clean).abs().mean() < 0.2


# network


def test_maps_and_features_have_the_promised_shapes():
    reader = ShapesReader(width=8, features=12).eval()
    images = torch.zeros(2, 3, 64, 32)
    maps = reader(images)
    assert {name: tuple(part.shape) for name, part in maps.items()} == {
        "heat": (2, 1, 8, 4),
        "offset": (2, 2, 8, 4),
        "shape": (2, 8, 8, 4),
        "color": (2, 11, 8, 4),
        "size": (2, 3, 8, 4),
        "texture": (2, 3, 8, 4),
    }
    assert reader.features(images).shape == (2, 12)


def test_other_images_are_refused():
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 60, 64)):
        with pytest.raises(ValueError, match="expected images"):
            ShapesReader(width=8, features=8).read(torch.zeros(shape))


def test_large_pictures_are_read_reduced():
    for size, expected in (
        ((128, 128), (128, 128)),
        ((64, 200), (64, 200)),
        ((256, 256), (128, 128)),
        ((264, 400), (128, 200)),
        ((512, 512), (128, 128)),
    ):
        assert tuple(at_reading_size(torch.zeros(1, 3, *size)).shape[2:]) == expected, size
    reader = ShapesReader(width=8, features=8).eval()
    small = torch.rand(1, 3, 128, 128)
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(reader.features(large), reader.features(small), atol=1e-6)


def test_close_peaks_are_one_object():
    reader = ShapesReader(width=8, features=8).eval()
    maps = {name: torch.zeros(1, n, 16, 16) for name, n in reader.parts.items()}
    maps["heat"] -= 5
    for row, column, logit in ((4, 4, 2.0), (4, 6, 1.0), (12, 4, 0.5), (8, 8, -2.0)):
        maps["heat"][0, 0, row, column] = logit
    reader.forward = lambda images: maps
    found = reader.read(torch.zeros(1, 3, 128, 128))[0]
    assert [(round(o.x * 16 - 0.5), round(o.y * 16 - 0.5)) for o in found] == [(4, 4), (4, 12)]
    assert found[0].score > found[1].score > 0.4


def test_the_objective_reaches_every_weight():
    torch.manual_seed(0)
    reader = ShapesReader(width=8, features=8)
    batch = torch.utils.data.default_collate([ReaderDataset(2, resolution=64)[i] for i in range(2)])
    sum(reader_losses(reader(batch["image"]), batch).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reader.parameters())


def test_weights_come_back_from_half_precision(tmp_path):
    torch.manual_seed(0)
    reader, path = ShapesReader(width=8, features=8).eval(), tmp_path / "reader.safetensors"
    save_file({name: w.half() if w.is_floating_point() else w for name, w in reader.state_dict().items()}, path)
    again = ShapesReader.from_file(path, width=8, features=8)
    images = torch.rand(1, 3, 64, 64)
    assert not again.training and again.features(images).dtype == torch.float32
    assert torch.allclose(again.features(images), reader.features(images), atol=1e-2)


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "reader.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not hold the weights"):
        ShapesReader.from_file(path)
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="does not hold the weights"):
        ShapesReader.from_file(path)
    save_tensors(ShapesReader(width=8, features=8).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="damaged"):
        ShapesReader.from_file(path, width=8, features=8)


# judgement


def test_all_right():
    spec = parse_caption("a large striped red circle left of a blue star")
    verdict = judge(spec, [seen("a blue star", x=0.8), seen("a large striped red circle", x=0.2)])
    assert verdict == dict.fromkeys(
        ("shape 1", "color 1", "size 1", "texture 1", "shape 2", "color 2", "count", "relation"), True
    )


def test_each_mistake_is_told_apart():
    spec = parse_caption("a large striped red circle left of a blue star")
    star = seen("a blue star", x=0.8)
    for words, x, wrong in (
        ("a large striped red square", 0.2, {"shape 1"}),
        ("a large striped pink circle", 0.2, {"color 1"}),
        ("a striped red circle", 0.2, {"size 1"}),
        ("a large dotted red circle", 0.2, {"texture 1"}),
        ("a large striped red circle", 0.95, {"relation"}),
    ):
        verdict = judge(spec, [star, seen(words, x=x)])
        assert {name for name, right in verdict.items() if not right} == wrong


def test_a_missing_object_makes_all_asked_of_it_wrong():
    spec = parse_caption("a small red circle left of a dotted blue star")
    verdict = judge(spec, [seen("a dotted blue star")])
    assert {name for name, right in verdict.items() if not right} == {
        "shape 1",
        "color 1",
        "size 1",
        "count",
        "relation",
    }
    assert not any(judge(spec, []).values())


def test_an_object_too_many_is_a_wrong_count_only():
    verdict = judge(parse_caption("a red circle"), [seen("a blue star", score=0.99), seen("a red circle", score=0.5)])
    assert verdict == {"shape 1": True, "color 1": True, "count": False}


def test_swapped_colours_are_wrong():
    spec = parse_caption("a red circle above a blue star")
    verdict = judge(spec, [seen("a blue circle", y=0.2), seen("a red star", y=0.8)])
    assert verdict["count"] and not (verdict["shape 1"] and verdict["color 1"])


def test_relations():
    places = {"left of": (0.8, 0.55), "right of": (0.2, 0.4), "above": (0.5, 0.9), "below": (0.4, 0.1)}
    for relation, (x, y) in places.items():
        middle, other = seen("a red circle"), seen("a blue star", x=x, y=y)
        assert [r for r in places if relation_holds(r, middle, other)] == [relation]


# shipped weights


@pytest.fixture(scope="module")
def reader():
    return ShapesReader.from_file(WEIGHTS)


def test_weights_are_small():
    assert WEIGHTS.stat().st_size < 1_000_000


def test_shipped_reader_reads_pictures(reader):
    required = {"color": 0.97, "shape": 0.97, "count": 0.97, "relation": 0.97, "size": 0.9, "texture": 0.9}
    for split, side in (("test", 128), ("heldout", 128), ("test", 256)):
        data = ShapesDataset(64, split=split, resolution=side, seed=3)
        images = torch.stack([data[i]["image"] for i in range(len(data))]).permute(0, 3, 1, 2)
        rights = {}
        for i, objects in enumerate(reader.read(images)):
            for name, right in judge(data.spec(i), objects).items():
                rights.setdefault(name.split()[0], []).append(right)
        for name, least in required.items():
            assert np.mean(rights[name]) >= least, (split, side, name)


def test_shipped_reader_sees_nothing_on_an_empty_picture(reader):
    assert reader.read(torch.ones(1, 3, 128, 128)) == [[]]


def test_shipped_features_tell_pictures_apart(reader):
    data = ShapesDataset(4, split="test")
    images = torch.stack([data[i]["image"] for i in range(4)]).permute(0, 3, 1, 2)
    features = reader.features(images)
    assert features.shape == (4, 128) and torch.pdist(features).min() > 0.1
