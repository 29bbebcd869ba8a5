"""Latent consistency distillation: the objective against its formulas, its fixed point, and the exported file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.lora import layer_shapes, merge_lora, read_lora, save_lora
from ldm.models.consistency_distillation import ConsistencyDistillation
from ldm.models.diffusion.lcm import LCMSampler
from ldm.modules.low_rank import LowRank

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
FILES: dict[str, Any] = {"teacher": str(GOLDENS / "tiny_ldm.yaml"), "ckpt": str(GOLDENS / "tiny_ldm.safetensors")}
PLACES = torch.tensor([1, 3, 25, 50])  # in the schedule, from the least noise to the most


class PointMass(nn.Module):
    """The exact denoiser of data that are one point for each context: that context's mean."""

    def __init__(self, alphas_cumprod):
        super().__init__()
        self.alphas_cumprod = alphas_cumprod

    def forward(self, x, t, c_crossattn):
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        point = c_crossattn[0].mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return (x - alpha_bar.sqrt() * point) / (1 - alpha_bar).sqrt()


def distillation(**settings: Any):
    torch.manual_seed(0)
    return ConsistencyDistillation(**FILES, **settings)


def inputs(scale=3.0):
    """Arguments of `losses` for one latent at each of PLACES."""
    torch.manual_seed(1)
    latents, noise = torch.randn(2, len(PLACES), 4, 8, 8)
    context, empty = torch.randn(2, len(PLACES), 5, 24)
    return latents, context, empty, PLACES, noise, torch.full((len(PLACES), 1, 1, 1), scale)


def perturbed(model):
    """Give the changes of a new distillation a size."""
    with torch.no_grad():
        for factors in model.factors.values():
            factors.up.normal_(std=0.05)
    return model


def merged(model):
    """Return the teacher's weights with the changes merged, as a model of its own."""
    student = ConsistencyDistillation(**FILES).teacher
    merge_lora(student, model.changes(), 1.0)
    return student


def reference(model, skip, huber, latents, context, empty, places, noise, guidance):
    """Return the distance between both ends of each step, by the formulas of the paper and the sampler."""
    teacher, student, found = model.teacher, merged(model), []
    alpha_bar = teacher.alphas_cumprod.double()
    for i, place in enumerate(places.tolist()):
        t, s = 20 * place - 1, max(20 * (place - skip) - 1, 0)
        a, b = alpha_bar[t], alpha_bar[s] if place > skip else torch.tensor(1.0)
        x = a.sqrt() * latents[i : i + 1] + (1 - a).sqrt() * noise[i : i + 1]
        times, c, u = torch.tensor([t]), context[i : i + 1], empty[i : i + 1]
        eps_c, eps_u = (teacher.apply_model(x.float(), times, each) for each in (c, u))
        eps = eps_u + guidance[i] * (eps_c - eps_u)
        further = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        target = further
        if place > skip:
            target = (further - (1 - b).sqrt() * student.apply_model(further.float(), torch.tensor([s]), c)) / b.sqrt()
        predicted = (x - (1 - a).sqrt() * student.apply_model(x.float(), times, c)) / a.sqrt()
        found.append((((predicted - target) ** 2 + huber**2).sqrt() - huber).mean())
    return torch.stack(found).float()


@torch.no_grad()
def test_the_loss_is_the_distance_between_both_ends_of_a_guided_step():
    for skip, huber in ((1, 1e-3), (5, 0.5)):
        model = perturbed(distillation(rank=2, skip=skip, huber=huber))
        got, expected = model.losses(*inputs()), reference(model, skip, huber, *inputs())
        assert torch.allclose(got, expected, rtol=1e-3), (skip, got, expected)


@torch.no_grad()
def test_a_teacher_that_is_consistent_leaves_nothing_to_learn():
    model = distillation(skip=5, huber=0.0)
    model.layers = []
    model.teacher.add_module("model", PointMass(model.teacher.alphas_cumprod))
    latents, context, empty, places, noise, guidance = inputs()
    assert model.losses(latents, context, context, places, noise, guidance).max() < 1e-3
    # With guidance they lead elsewhere. The first to tell are those that end in the picture, by (s - 1) (c - u).
    apart = (2 * (context.mean((1, 2)) - empty.mean((1, 2)))).abs()
    got = model.losses(latents, context, empty, places, noise, guidance)
    assert torch.allclose(got[:2], apart[:2], rtol=1e-3) and apart[:2].min() > 0.1 and got[2:].max() < 1e-3


def test_a_step_reaches_the_factors_and_not_the_teacher():
    model = perturbed(distillation(rank=2))
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    model.losses(*inputs()).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.factors.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())
    model.average(model.factors)
    with model.applied() as drawing:
        assert not torch.equal(
            drawing.model.diffusion_model.out[2].weight, before["model.diffusion_model.out.2.weight"]
        )
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())
    assert all(name.startswith(("factors.", "average.")) for name in model.state_dict())


@torch.no_grad()
def test_the_target_may_be_the_average():
    model = distillation(rank=2, average_target=True)
    own = distillation(rank=2, average_target=False)
    assert torch.equal(model.losses(*inputs()), own.losses(*inputs()))
    for each in (model, own):
        perturbed(each)  # the average stays at no changes
    assert (model.losses(*inputs()) - own.losses(*inputs()))[1:].abs().min() > 1e-3


@torch.no_grad()
def test_noisy_ends_weigh_less():
    plain, weighted = distillation(rank=2), distillation(rank=2, low_snr=0.05)
    alpha_bar = plain.teacher.alphas_cumprod[20 * PLACES - 1]
    factors = (alpha_bar / (1 - alpha_bar) / 0.05).sqrt().clamp(max=1)
    assert factors[0] == 1 and factors[-1] < 0.5
    assert torch.allclose(weighted.losses(*inputs()), plain.losses(*inputs()) * factors, rtol=1e-4)


@torch.no_grad()
def test_the_file_holds_the_changes_and_draws_what_training_drew(tmp_path):
    model = perturbed(distillation(rank=2, average_decay=0.0))
    model.average(model.factors)
    save_lora(model.changes(), tmp_path / "lcm.safetensors", model.layers, {"steps": 3})
    shapes = layer_shapes(model.teacher.model.diffusion_model, model.teacher.cond_stage_model)
    read, changes = read_lora(tmp_path / "lcm.safetensors", shapes), model.changes()
    assert read.keys() == changes.keys() == set(model.layers)
    for name, change in changes.items():
        delta = change.delta()
        assert read[name].down.dtype == torch.float16
        assert (read[name].delta() - delta).abs().max() < 2e-3 * delta.abs().max(), name
    arguments = {"x_T": torch.randn(2, 4, 8, 8), "conditioning": torch.randn(2, 5, 24), "verbose": False}
    pictures = []
    teacher = ConsistencyDistillation(**FILES).teacher
    merge_lora(teacher, read, 1.0)
    with model.applied() as drawing:
        for each in (drawing, teacher):
            generator = torch.Generator().manual_seed(0)
            pictures.append(LCMSampler(each).sample(4, 2, (4, 8, 8), **arguments, generator=generator)[0])
    assert (pictures[0] - pictures[1]).abs().max() < 0.02 * pictures[0].abs().max()


@torch.no_grad()
def test_training_goes_on_from_a_file(tmp_path):
    model, path = perturbed(distillation(rank=2)), tmp_path / "lcm.safetensors"
    changes = {name: LowRank(down=change.down, up=change.up, strength=0.5) for name, change in model.changes().items()}
    save_lora(changes, path, model.layers, {})
    further = distillation(rank=2, lora=str(path))
    for name, change in further.changes().items():
        delta = changes[name].delta()
        assert (change.delta() - delta).abs().max() < 2e-3 * delta.abs().max(), name
    with further.average.average_parameters(further.factors):  # the average begins there too
        name = further.layers[0]
        assert torch.equal(
            further.changes()[name].delta(), distillation(rank=2, lora=str(path)).changes()[name].delta()
        )
    with pytest.raises(ValueError, match=r"cannot be trained on: .* has rank 2 in place of 3"):
        distillation(rank=3, lora=str(path))


def test_a_teacher_that_predicts_v_is_refused(tmp_path):
    config = OmegaConf.load(FILES["teacher"])
    config.model.params.parameterization = "v"
    OmegaConf.save(config, tmp_path / "v.yaml")
    with pytest.raises(ValueError, match="only a teacher that predicts eps works"):
        ConsistencyDistillation(teacher=str(tmp_path / "v.yaml"), ckpt=FILES["ckpt"])


def test_settings_out_of_range_are_refused():
    for settings, says in (
        ({"rank": 0}, "rank is 0"),
        ({"guidance": [4.0]}, "a lowest and a highest scale"),
        ({"guidance": [5.0, 4.0]}, "a lowest and a highest scale"),
        ({"skip": 0}, r"skip is 0: it must be in 1\.\.50"),
        ({"huber": -1.0}, "0 or more"),
    ):
        with pytest.raises(ValueError, match=says):
            distillation(**settings)
