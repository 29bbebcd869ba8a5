"""Captions that contradict a picture, and the data set that holds them."""

import numpy as np
import pytest
import torch

from ldm.data.captions import caption, held_out, parse_caption, sample_spec
from ldm.data.contrasts import BINDING, CONTRASTS, PLACES, ContrastDataset, arrangement, contradiction
from ldm.data.reader import CLASSES
from ldm.data.shapes import SceneSpec, ShapesDataset

PAIR = "a small striped red circle left of a large blue star on a white background"


def meaning(spec: SceneSpec) -> set:
    """Return what a spec claims, the same for both wordings of an arrangement."""
    mirrored = {"right of": "left of", "below": "above"}
    relation = spec.relation or ""
    objects = spec.objects[::-1] if relation in mirrored else spec.objects
    return {objects, mirrored.get(relation, relation), frozenset(spec.background)}


def drawn(text: str, kind: str, n: int = 40) -> set[str]:
    """Return the wrong captions that n draws find."""
    rng = np.random.default_rng(0)
    found = (contradiction(rng, parse_caption(text), kind) for _ in range(n))
    return {caption(spec) for spec in found if spec is not None}


def test_each_kind_changes_what_it_names():
    for kind, wanted in (
        ("relation", PAIR.replace("left of", "right of")),
        ("order", "a large blue star left of a small striped red circle on a white background"),
        ("colors", "a small striped blue circle left of a large red star on a white background"),
        ("color", PAIR.replace("red", "pink")),
        ("shape", PAIR.replace("circle", "heart")),
        ("texture", PAIR.replace("striped", "dotted")),
        ("texture", "a small red circle left of a large striped blue star on a white background"),
        ("size", "a large striped red circle left of a small blue star on a white background"),
        ("size", PAIR.replace("a large", "a")),
        ("count", "a small striped red circle on a white background"),
        ("background", PAIR.replace("white", "yellow")),
    ):
        found = drawn(PAIR, kind, 400)
        allowed = wanted in found or held_out(parse_caption(wanted))
        assert allowed and PAIR not in found, (kind, wanted)
    assert len(drawn(PAIR, "relation")) == 3 and len(drawn(PAIR, "order")) == 1


def test_same_words_in_another_meaning():
    for kind in ("order", "colors"):
        for text in drawn(PAIR, kind):
            assert sorted(text.split()) == sorted(PAIR.split()), kind


def test_what_a_caption_does_not_say_is_not_contradicted():
    alone = "a red circle"
    for kind in ("relation", "order", "colors", "background"):
        assert not drawn(alone, kind), kind
    assert drawn("a red circle on a white background", "colors") == {"a white circle on a red background"}
    assert not drawn("a red circle above a red star", "colors")
    assert drawn(alone, "count")


def test_a_contradiction_is_never_true_and_never_held_out():
    rng = np.random.default_rng(1)
    for split in ("train", "heldout"):
        for _ in range(150):
            spec = sample_spec(rng, split)
            for kind in CONTRASTS:
                wrong = contradiction(rng, spec, kind)
                if wrong is None:
                    continue
                parse_caption(caption(wrong))
                assert meaning(wrong) != meaning(spec), (kind, caption(spec), caption(wrong))
                assert split == "heldout" or not held_out(wrong), (kind, caption(spec), caption(wrong))


def test_arrangement_is_the_same_for_both_wordings():
    first = arrangement(parse_caption("a striped red circle left of a large blue star"))
    assert torch.equal(first, arrangement(parse_caption("a large blue star right of a striped red circle")))
    left, right = (dict(zip(CLASSES, first[PLACES.index(place)].tolist(), strict=True)) for place in ("left", "right"))
    named = [{name: CLASSES[name][index] for name, index in each.items()} for each in (left, right)]
    assert named == [
        {"shape": "circle", "color": "red", "size": None, "texture": "striped"},
        {"shape": "star", "color": "blue", "size": "large", "texture": None},
    ]
    assert (first[PLACES.index("above") :] == -1).all()
    alone = arrangement(parse_caption("a red circle on a white background"))
    assert (alone[:-1] == -1).all() and (alone[-1] >= 0).all()


def test_items():
    data = ContrastDataset(20, resolution=64, contrasts=9, augmented=False)
    item, shapes = data[3], ShapesDataset(20, resolution=64)
    assert torch.equal(item["image"], shapes[3]["image"].permute(2, 0, 1))
    assert item["caption"] == shapes[3]["caption"] and len(item["wrong"]) == len(item["kinds"]) == 9
    assert torch.equal(item["arrangement"], arrangement(parse_caption(item["caption"])))
    assert data[3]["wrong"] == item["wrong"]
    counts = [item["kinds"].count(kind) for kind in set(item["kinds"])]
    assert max(counts) - min(counts) <= 1
    few = ContrastDataset(20, resolution=64, contrasts=3)
    for i in range(20):
        if len(parse_caption(few[i]["caption"]).objects) == 2:
            assert set(few[i]["kinds"]) >= set(BINDING[:2]), i  # exchanged colours may be a held-out combination
    blurred = ContrastDataset(20, resolution=64)[3]["image"]
    assert blurred.shape == item["image"].shape and not torch.equal(blurred, item["image"])
    with pytest.raises(ValueError, match="contrasts 0"):
        ContrastDataset(20, contrasts=0)
