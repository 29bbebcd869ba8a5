"""The two towers of the project's CLIP and their objective."""

from pathlib import Path

import pytest
import torch

from ldm.data.captions import parse_caption
from ldm.data.contrasts import PLACES, arrangement
from ldm.data.reader import CLASSES
from ldm.models.clip import ContrastiveModel, ImageTower, grid_positions

ROOT = Path(__file__).resolve().parents[2]
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CAPTIONS = ["a red circle", "a large striped blue star above a pink heart on a white background"]


def build() -> ContrastiveModel:
    text = {
        "version": "dsdiff-shapes",
        "max_length": 32,
        "trainable": True,
        "tokenizer": str(ROOT / "models/ldm/shapes/tokenizer"),
        "text_config": {**TOWER, "vocab_size": 624, "max_position_embeddings": 77},
    }
    image = {"vision_config": TOWER, "trunk": {"width": 8, "features": 8}}
    return ContrastiveModel(
        text_config={"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": text},
        image_config={"target": "ldm.models.clip.ImageTower", "params": image},
        projection_dim=12,
    ).eval()


def test_embeddings_have_length_one_and_depend_on_nothing_else_in_the_batch():
    model, pictures = build(), torch.rand(2, 3, 128, 128) * 2 - 1
    for embed, batch in ((model.embed_images, pictures), (model.embed_texts, CAPTIONS)):
        together, alone = embed(batch), torch.cat([embed(batch[:1]), embed(batch[1:])])
        assert together.shape == (2, 12)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_text_is_embedded_at_its_end_token():
    """As the whole tower gives it on padded prompts, which are what the diffusion model sees."""
    model = build()
    hidden, ids = model.text(CAPTIONS), model.text.tokenize(CAPTIONS)
    for k, row in enumerate(ids.tolist()):
        end = row.index(model.text.tokenizer.eos_id)
        vector = model.text_projection(hidden[k, end])
        torch.testing.assert_close(model.embed_texts(CAPTIONS)[k], vector / vector.norm())


def test_the_image_tower_sees_large_pictures_reduced_and_knows_places():
    tower = ImageTower(vision_config=TOWER, trunk={"width": 8, "features": 8}).eval()
    picture = torch.rand(1, 3, 128, 128) * 2 - 1
    large = picture.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(tower(large), tower(picture))
    assert (tower(picture.flip(3)) - tower(picture)).abs().max() > 1e-3
    positions = grid_positions(8, 16)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(64)
    assert distances.min() > 0.1  # no two places look alike
    with pytest.raises(ValueError, match="multiple of 4"):
        grid_positions(8, 18)


def test_cosines_and_loss_on_known_embeddings(monkeypatch):
    """Embeddings of any length; the loss of the contrast is that of their cosines."""
    model = build()
    basis = torch.eye(12)
    texts = {"a": 3 * basis[0], "b": basis[1], "not a": basis[0] * 0.6 + basis[2] * 0.8, "not b": -basis[1]}
    monkeypatch.setattr(model, "project_images", lambda images: 2 * basis[:2])
    monkeypatch.setattr(model, "project_texts", lambda captions: torch.stack([texts[each] for each in captions]))
    contrast = model(torch.zeros(2), ["a", "b"], [["not a", "not b"], ["b", "a"]])
    torch.testing.assert_close(contrast.of_others, torch.eye(2))
    torch.testing.assert_close(contrast.of_wrong, torch.tensor([[0.6, 0.0], [-1.0, 0.0]]))
    assert contrast.told_apart.all() and contrast.retrieved.all()
    s = model.scale.item()
    first = torch.tensor([[s, 0, 0.6 * s, 0], [0, s, -s, 0]]).log_softmax(1)[[0, 1], [0, 1]].mean()
    second = torch.tensor([[s, 0], [0, s]]).log_softmax(1)[[0, 1], [0, 1]].mean()
    torch.testing.assert_close(model.contrast_loss(contrast), -(first + second) / 2)
    nothing = torch.full((2, len(PLACES), len(CLASSES)), -1)
    nothing[:, 0] = 0
    both = sum(model.arrangement_loss(each, nothing) for each in (contrast.pictures, contrast.captions))
    torch.testing.assert_close(model.loss(contrast, nothing), model.contrast_loss(contrast) + 0.3 * both)


def test_the_arrangement_is_told_at_no_cost_and_a_wrong_one_at_a_high_one():
    model = build()
    specs = [parse_caption(text) for text in CAPTIONS]
    found = torch.stack([arrangement(spec) for spec in specs])
    logits = torch.zeros(2, len(PLACES), 2 + sum(map(len, CLASSES.values())))
    for b, place in ((b, place) for b in range(2) for place in range(len(PLACES))):
        first, filled = 2, bool(found[b, place, 0] >= 0)
        logits[b, place, int(filled)] = 20
        for index, values in zip(found[b, place].tolist(), CLASSES.values(), strict=True):
            if filled:
                logits[b, place, first + index] = 20
            first += len(values)
    model.arrangement_head = torch.nn.Identity()
    assert model.arrangement_loss(logits.flatten(1), found) < 1e-6
    assert model.arrangement_loss(logits.flatten(1), found.flip(0)) > 5


def test_the_scale_has_a_limit():
    model = build()
    model.logit_scale.data.fill_(10.0)
    assert model.scale.item() == pytest.approx(100.0)
