"""A lowered UNet by CUDA graphs gives what it gives without, whatever changes from call to call."""

import pytest
import torch
from torch import nn

import tomesd
from dsdiff.models.cuda_graph import GraphedUNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff import QuantConfig, QuantModel
from qdiff.calibration_set import CalibrationSet
from qdiff.engine import step_cache
from qdiff.engine.backends.simulated import SimulatedLayer
from qdiff.engine.lower import backend_for, lower
from qdiff.observers import fit_activations

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CONFIG = QuantConfig(weight_bit=4, act_bit=8, quant_act=True, split=True, sm_abit=16)


def small_unet(device):
    torch.manual_seed(0)
    unet = UNetModel(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[2, 1], num_res_blocks=1,
        channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, transformer_depth=1, context_dim=24,
        legacy=False,
    ).eval()  # fmt: skip
    for parameter in unet.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet.to(device)


def inputs(device, time=500, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    context = torch.randn(batch, 7, 24, generator=generator)
    return {"x": x.to(device), "timesteps": torch.full((batch,), time, device=device), "context": context.to(device)}


def lowered(device, backend=None):
    qnn = QuantModel(small_unet(device), CONFIG)
    qnn.fit_weights()
    fit_activations(qnn, CalibrationSet(*(each[:1] for each in inputs(device).values())), 1, running=True)
    qnn.set_quant_state(True, True)
    lower(qnn, backend or backend_for(CONFIG, torch.device(device)))
    return qnn


@pytest.fixture
def unet():
    return lowered("cuda")


def calls():
    """Other latents, other prompts, other times and back, another batch."""
    same = inputs("cuda", 500, 1)
    return [
        same, inputs("cuda", 321, 2), {**inputs("cuda", 500, 3), "context": same["context"]}, same,
        {**same, "timesteps": torch.tensor([500, 321], device="cuda")}, inputs("cuda", 321, 2, batch=1), same,
    ]  # fmt: skip


@needs_gpu
@torch.no_grad()
def test_replays_equal_calls(unet):
    graphed = GraphedUNet(unet)
    with torch.autocast("cuda", torch.bfloat16):
        expected = [unet(**each) for each in calls()]
        for _ in range(2):
            for i, (each, output) in enumerate(zip(calls(), expected, strict=True)):
                assert torch.equal(graphed(**each), output), i
        with step_cache.walk(unet, [500, 321]):
            for i, (each, output) in enumerate(zip(calls(), expected, strict=True)):
                assert torch.equal(graphed(**each), output), i
                assert torch.equal(unet(**each), output), i


@needs_gpu
@torch.no_grad()
def test_outputs_are_kept(unet):
    graphed = GraphedUNet(unet)
    with torch.autocast("cuda", torch.bfloat16):
        first = graphed(**calls()[0])
        kept = first.clone()
        graphed(**calls()[1])
    assert torch.equal(first, kept)


@needs_gpu
@torch.no_grad()
def test_merging_draws_what_it_draws_without(unet):
    graphed = GraphedUNet(unet)
    tomesd.apply_patch(unet, ratio=0.5, seed=3)
    with torch.autocast("cuda", torch.bfloat16):
        first = [unet(**each) for each in calls()]
        tomesd.reseed(unet, 3)
        second = [graphed(**each) for each in calls()]
        for i, (actual, expected) in enumerate(zip(second, first, strict=True)):  # sums are in no fixed order
            assert (actual - expected).norm() < 0.02 * expected.norm(), i
        tomesd.remove_patch(unet)
        assert torch.equal(graphed(**calls()[0]), unet(**calls()[0]))


@needs_gpu
@torch.no_grad()
def test_float32_is_not_recorded(unet):
    graphed = GraphedUNet(unet)
    assert torch.equal(graphed(**calls()[0]), unet(**calls()[0]))
    assert not graphed._recorded


@torch.no_grad()
def test_cpus_have_no_graphs():
    unet = lowered("cpu", SimulatedLayer)
    assert torch.equal(GraphedUNet(unet)(**inputs("cpu")), unet(**inputs("cpu")))


def test_a_float_unet_is_refused():
    with pytest.raises(ValueError, match="lower it first"):
        GraphedUNet(small_unet("cpu"))
