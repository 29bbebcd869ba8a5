"""Captions, layouts and pictures of the procedural data set."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.data import captions, palette, scenes, shapes
from ldm.data.shapes import (
    COLORS,
    HELD_OUT_COLOR_SHAPE,
    SHAPES,
    ObjectSpec,
    SceneSpec,
    ShapesDataset,
    caption,
    code_sha256,
    held_out,
    layout,
    parse_caption,
    render,
    sample_spec,
)

EXAMPLES = (
    "a red circle",
    "a small blue star on a yellow background",
    "a large striped green square left of a pink heart on a white background",
    "an orange ring above a black cross on a red to white gradient background",
    "a dotted gray diamond below an orange triangle",
    "a small purple heart right of a large purple cross on an orange to gray gradient background",
)


def one(shape: str, color: str, **more: str) -> SceneSpec:
    return SceneSpec(objects=(ObjectSpec(shape=shape, color=color, **more),))


def pixels(spec: SceneSpec, seed: int = 0) -> np.ndarray:
    return np.asarray(render(layout(spec, np.random.default_rng(seed)))) / 255.0


# captions


def test_caption_inverts_parse():
    for text in EXAMPLES:
        assert caption(parse_caption(text)) == text


def test_parse_reads_every_field():
    spec = parse_caption("a large striped green square left of a pink heart on a red to white gradient background")
    assert spec == SceneSpec(
        objects=(
            ObjectSpec(shape="square", color="green", size="large", texture="striped"),
            ObjectSpec(shape="heart", color="pink"),
        ),
        relation="left of",
        background=("red", "white"),
    )


def test_parse_inverts_caption():
    for split in ("train", "heldout"):
        rng = np.random.default_rng(1)
        for _ in range(300):
            spec = sample_spec(rng, split)
            assert parse_caption(caption(spec)) == spec, split


def test_parse_refuses_what_is_outside_the_grammar():
    for text in (
        "",
        "a circle",
        "red circle",
        "A red circle",
        "a red circle ",
        "a  red circle",
        "a orange circle",
        "an red circle",
        "a red hexagon",
        "a striped small red circle",
        "a red circle near a blue star",
        "a red circle above",
        "a red circle on a blue to white background",
        "a red circle on a blue gradient background",
        "a red circle on an blue background",
        "a red circle on a red background",
        "a red circle on a blue to blue gradient background",
        "a red circle above a red circle",
        "a red circle above a blue star above a pink ring",
        "a red circle\n",
    ):
        try:
            spec = parse_caption(text)
        except ValueError:
            continue
        pytest.fail(f"{text!r} was read as {spec}")


def test_object_spec_names_the_bad_value():
    for kwargs, message in (
        ({"shape": "hexagon", "color": "red"}, "hexagon"),
        ({"shape": "circle", "color": "mauve"}, "mauve"),
        ({"shape": "circle", "color": "red", "size": "huge"}, "huge"),
        ({"shape": "circle", "color": "red", "texture": "furry"}, "furry"),
    ):
        with pytest.raises(ValueError, match=message):
            ObjectSpec(**kwargs)


def test_scene_spec_refuses_contradictions():
    red, blue = (ObjectSpec(shape="circle", color=color) for color in ("red", "blue"))
    for bad in (
        {"objects": ()},
        {"objects": (red, blue, red), "relation": "above"},
        {"objects": (red,), "relation": "above"},
        {"objects": (red, blue)},
        {"objects": (red, blue), "relation": "inside"},
        {"objects": (red, red), "relation": "above"},
        {"objects": (red,), "background": ("red",)},
        {"objects": (red,), "background": ("mauve",)},
        {"objects": (red,), "background": ("blue", "gray", "white")},
    ):
        with pytest.raises(ValueError):
            SceneSpec(**bad)


# sampling


def test_splits_keep_held_out_combinations_apart():
    rng = np.random.default_rng(2)
    for split, expected in (("train", False), ("test", False), ("heldout", True)):
        assert {held_out(sample_spec(rng, split)) for _ in range(200)} == {expected}


def test_every_shape_misses_one_colour_and_all_others_occur():
    assert sorted(shape for _, shape in HELD_OUT_COLOR_SHAPE) == sorted(SHAPES)
    rng = np.random.default_rng(3)
    seen = {(o.color, o.shape) for _ in range(1500) for o in sample_spec(rng).objects}
    assert seen == set(itertools.product(COLORS, SHAPES)) - HELD_OUT_COLOR_SHAPE


def test_held_out_arrangement_counts_in_either_wording():
    assert held_out(parse_caption("a red heart above a green square"))
    assert held_out(parse_caption("a green square below a red heart"))
    assert not held_out(parse_caption("a green square above a red heart"))
    assert held_out(parse_caption("a red ring right of a blue triangle"))
    assert held_out(parse_caption("a striped red star"))


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="valid"):
        ShapesDataset(4, split="valid")


def test_mixture():
    specs = [ShapesDataset(1500).spec(i) for i in range(1500)]
    objects = [o for spec in specs for o in spec.objects]
    share = {
        "one object": (np.mean([len(s.objects) == 1 for s in specs]), 0.43),
        "sized": (np.mean([o.size is not None for o in objects]), 0.5),
        "textured": (np.mean([o.texture is not None for o in objects]), 0.4),
        "background": (np.mean([bool(s.background) for s in specs]), 0.47),
    }
    for name, (found, expected) in share.items():
        assert abs(found - expected) < 0.06, name


# layouts


def drawn_scenes(split="train", n=300):
    data = ShapesDataset(n, split=split)
    return [data.scene(i) for i in range(n)]


def test_objects_stay_on_the_canvas_and_apart():
    for scene in drawn_scenes():
        for o in scene.objects:
            assert o.radius <= o.x <= 1 - o.radius and o.radius <= o.y <= 1 - o.radius
        if len(scene.objects) == 2:
            a, b = scene.objects
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


def test_relations_are_clear():
    for scene in drawn_scenes():
        if len(scene.objects) < 2:
            continue
        a, b = scene.objects
        dx, dy = b.x - a.x, b.y - a.y
        along, across = {
            "left of": (dx, dy),
            "right of": (-dx, dy),
            "above": (dy, dx),
            "below": (-dy, dx),
        }[scene.spec.relation]
        assert along >= 0.3 - 1e-9 and abs(across) <= 0.12 + 1e-9


def test_sizes_do_not_overlap():
    radii = {}
    for scene in drawn_scenes():
        for o in scene.objects:
            radii.setdefault((len(scene.objects), o.spec.size), []).append(o.radius)
    for n in (1, 2):
        assert max(radii[n, "small"]) + 0.02 < min(radii[n, None])
        assert max(radii[n, None]) + 0.02 < min(radii[n, "large"])


def test_objects_stand_out_from_the_background():
    for scene in drawn_scenes():
        ends = [np.array(c) for c in (scene.background[0], scene.background[-1])]
        behind = [ends[0] + t * (ends[1] - ends[0]) for t in np.linspace(0, 1, 9)]
        for o in scene.objects:
            assert min(math.dist(o.color, b) for b in behind) > 0.3


# pictures


def test_the_same_caption_is_drawn_in_many_ways():
    spec = parse_caption("a dotted red ring left of a gray star")
    first, second = (layout(spec, np.random.default_rng(seed)) for seed in (0, 1))
    for name in ("x", "y", "radius", "rotation", "color", "line_width", "period", "texture_angle"):
        assert getattr(first.objects[0], name) != getattr(second.objects[0], name), name
    assert first.background != second.background


def test_centre_shows_the_object_except_in_a_ring():
    for shape in SHAPES:
        spec = SceneSpec(objects=(ObjectSpec(shape=shape, color="red"),), background=("white",))
        scene = layout(spec, np.random.default_rng(0))
        obj = scene.objects[0]
        centre = np.asarray(render(scene))[int(obj.y * 128), int(obj.x * 128)] / 255
        expected = scene.background[0] if shape == "ring" else obj.color
        assert np.abs(centre - expected).max() < 0.01, shape


def test_shapes_cover_their_geometric_area():
    """In squared radii: disc, square of side 1.7, triangle, pentagram, diamond; textures keep the outline."""
    wanted = {
        "circle": math.pi,
        "square": 1.7**2,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 5 * 0.45 * math.sin(math.pi / 5),
        "diamond": 2 * 0.74,
    }
    for shape, area in wanted.items():
        spec = SceneSpec(
            objects=(ObjectSpec(shape=shape, color="black", size="large", texture="striped"),),
            background=("white",),
        )
        scene = layout(spec, np.random.default_rng(0))
        gray = np.asarray(render(scene), dtype=float).mean(axis=-1)
        dark = (gray < 126).mean() / scene.objects[0].radius ** 2
        assert abs(dark / area - 1) < 0.04, shape


def test_textures_cover_less_than_half_of_the_object():
    for texture, color, shape in itertools.product(("striped", "dotted"), COLORS, SHAPES):
        scene = layout(one(shape, color, texture=texture, size="large"), np.random.default_rng(5))
        obj, picture = scene.objects[0], np.asarray(render(scene)) / 255
        base, accent = ((np.linalg.norm(picture - np.array(c), axis=-1) < 0.05).sum() for c in (obj.color, obj.accent))
        if color not in ("white", "gray"):  # these two may meet a background of the accent's shade
            assert 0.1 < accent / (accent + base) < 0.5, (texture, color, shape)


def test_gradient_runs_between_its_colours():
    spec = SceneSpec(objects=(ObjectSpec(shape="circle", color="black", size="small"),), background=("red", "white"))
    scene = layout(spec, np.random.default_rng(0))
    picture = np.asarray(render(scene)) / 255
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    for end in scene.background:
        assert min(np.abs(corner - end).max() for corner in corners) < 0.02


def test_edges_are_anti_aliased():
    picture = pixels(SceneSpec(objects=(ObjectSpec(shape="circle", color="black"),), background=("white",)))
    assert len(np.unique(picture[..., 0])) >= 16  # 4 x 4 samples a pixel


def test_resolution_scales_the_picture():
    scene = layout(parse_caption("a large red heart"), np.random.default_rng(0))
    big, small = render(scene, 256), render(scene, 64)
    assert big.size == (256, 256) and small.size == (64, 64)
    assert np.abs(np.asarray(big.reduce(4), dtype=float) - np.asarray(small, dtype=float)).mean() < 1.5
    with pytest.raises(ValueError, match="resolution 8"):
        render(scene, 8)


# data set


def test_item_layout():
    item = ShapesDataset(3, resolution=64)[1]
    assert set(item) == {"image", "caption"}
    assert item["image"].shape == (64, 64, 3) and item["image"].dtype == torch.float32
    assert -1 <= item["image"].min() < item["image"].max() <= 1
    parse_caption(item["caption"])


def test_items_depend_on_seed_split_and_index_alone():
    small, large = ShapesDataset(4, seed=7), ShapesDataset(1000, seed=7)
    assert torch.equal(large[3]["image"], small[3]["image"])  # whatever was drawn before
    assert large[3]["caption"] == small[3]["caption"] == caption(small.spec(3))
    captions = {
        (seed, split, i): ShapesDataset(8, split=split, seed=seed)[i]["caption"]
        for seed, split, i in itertools.product((0, 1), ("train", "test", "heldout"), range(8))
    }
    assert len(set(captions.values())) == len(captions)


def test_stream_is_pinned():
    """Reference statistics and the embedded model rest on these very items: they must not drift."""
    data = ShapesDataset(4)
    assert [caption(data.spec(i)) for i in range(4)] == [
        "a small yellow heart below a brown circle",
        "a dotted blue circle above a small striped orange square on a white background",
        "a blue triangle above a large brown heart on a yellow background",
        "a large blue diamond left of a large red diamond",
    ]
    scene = data.scene(0)
    found = [round(v, 4) for o in scene.objects for v in (o.x, o.y, o.radius)]
    assert found == [0.592, 0.6347, 0.106, 0.5898, 0.2351, 0.162]


def test_picture_equals_item():
    data = ShapesDataset(2)
    item = ((data[1]["image"].numpy() + 1) * 127.5).round().astype(np.uint8)
    assert np.array_equal(item, np.asarray(data.picture(1)))


def test_index_out_of_range():
    for index in (-1, 4):
        with pytest.raises(IndexError):
            ShapesDataset(4)[index]


def test_the_code_hash_covers_every_file_that_decides_a_picture(tmp_path, monkeypatch):
    before = code_sha256()
    assert before == code_sha256()
    for module in (captions, palette, scenes, shapes):
        changed = tmp_path / "changed.py"
        changed.write_text(Path(module.__file__).read_text() + f"# {module.__name__}")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            assert code_sha256() != before, module


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="size 0"):
        ShapesDataset(0)
