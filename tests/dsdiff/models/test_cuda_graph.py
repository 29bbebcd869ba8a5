"""A lowered UNet by CUDA graphs gives what it gives without, whatever changes from call to call."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tomesd
from dsdiff.models import cuda_graph
from dsdiff.models.cuda_graph import GraphedUNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff import QuantConfig, QuantModel
from qdiff.calibration_set import CalibrationSet
from qdiff.engine import features, step_cache
from qdiff.engine.attention import LoweredCrossAttention
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
            assert (actual - expected).norm() < 0.05 * expected.norm(), i
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


# --- without a GPU -----------------------------------------------------------------------------------------

MERGINGS = (
    {}, {"use_rand": False}, {"merge_kv": True}, {"proportional": True}, {"max_downsample": 2, "merge_kv": True},
    {"merge_crossattn": True, "merge_mlp": True, "sx": 4},
)  # fmt: skip


class Recordable(TorchDispatchMode):
    """Refuses what cannot be recorded in a CUDA graph: an operation on tensors of the meta device and of the CPU.

    Tensors on the meta device refuse the rest themselves: their numbers, and sizes that depend on them, are not known.
    A number that is assigned to places of a tensor is on the CPU if the tensor is on a GPU, so this is refused, too.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
        assert len({each.device for each in tensors}) <= 1, f"{func} copies between devices"
        assert func is not torch.ops.aten.scalar_tensor.default, "a number is assigned"
        return out


def operands(attention):
    return attention.act_quantizer_q, attention.act_quantizer_k, attention.act_quantizer_v


def record_on_meta(network, merge):
    """Call a UNet on the meta device as `_Recording.of` does; its calls after the first are to be recordable."""
    network.embed_time = lambda timesteps, dtype: torch.empty(1, 128, dtype=dtype, device="meta")  # it is kept
    tomesd.apply_patch(network, ratio=0.5, **merge)
    mergings = [block.token_merging for block in cuda_graph.blocks_of(network).values()]
    given = inputs("meta")
    given["context"] = given["context"].bfloat16()

    def call():
        mergings[0].model.note_size(network, (given["x"],), {})
        UNetModel.forward(network, **given, dtype=torch.bfloat16)  # a LoweredUNet asks for autocast, unknown to meta

    call()
    draws, drawn = cuda_graph._draw_fixed(mergings, torch.device("meta"))
    with Recordable():
        call()
    return draws, drawn


@torch.no_grad()
@pytest.mark.parametrize("merge", MERGINGS, ids=str)
def test_a_call_that_merges_can_be_recorded(merge):
    draws, drawn = record_on_meta(small_unet("cpu").bfloat16().to("meta"), merge)
    assert bool(draws) == (drawn.numel() > 0) == merge.get("use_rand", True)


@torch.no_grad()
@pytest.mark.parametrize("merge", MERGINGS, ids=str)
def test_a_lowered_call_that_merges_can_be_recorded(merge, monkeypatch):
    """With the Triton engine's layers, whose kernels are left out."""
    pytest.importorskip("triton")
    from qdiff.engine.backends import triton_elementwise, triton_layers

    launched = []
    for module in (triton_elementwise, triton_layers):
        for name, value in vars(module).copy().items():
            if hasattr(value, "arg_names"):
                kernel = SimpleNamespace(launch=lambda *args, name=name, **kwargs: launched.append(name))
                monkeypatch.setattr(
                    module, name, type("Kernel", (), {"__getitem__": lambda _, grid, k=kernel: k.launch})()
                )
    monkeypatch.setattr(features, "has_triton", lambda device: device.type == "meta")
    qnn = lowered("cpu", triton_layers.triton_layer)
    attentions = [module for module in qnn.modules() if isinstance(module, LoweredCrossAttention)]
    ranges = [(each, which, each.params_of(which)) for each in attentions for which in operands(each)]
    qnn.to("meta")
    for attention, which, params in ranges:  # as the first call has read them
        attention._known[which] = (which.delta, which.zero_point, params)
    record_on_meta(qnn.model, merge)
    assert {"product", "gated_product", "_quantize", "_normed_codes", "_layer_norm"} <= set(launched)


def test_reading_and_copying_cannot_be_recorded():
    places = torch.zeros(4, dtype=torch.long, device="meta")
    for refused in (
        lambda: places.__setitem__(places, -1), lambda: places.copy_(torch.ones(4)), lambda: places.cpu(),
        lambda: places.sum().item(), lambda: places[places > 0], lambda: torch.ones(3).to("meta"),
    ):  # fmt: skip
        with Recordable(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            refused()


def test_the_destinations_of_a_call_are_drawn_together():
    """As the blocks would draw them, by one copy."""
    unet = small_unet("cpu")
    tomesd.apply_patch(unet, ratio=0.5, max_downsample=2, seed=5)
    mergings = [block.token_merging for block in cuda_graph.blocks_of(unet).values()]
    with torch.no_grad():
        unet(**inputs("cpu"))
        state = mergings[0].model.generator.get_state()
        unet(**inputs("cpu"))
        expected = torch.cat([merging.drawn[1].flatten() for merging in mergings])
        draws, drawn = cuda_graph._draw_fixed(mergings, torch.device("cpu"))
        assert torch.equal(drawn, expected)
        drawn.zero_()
        unet(**inputs("cpu"))  # from this tensor
    assert all((merging.drawn[1] == 0).all() for merging in mergings)
    mergings[0].model.generator.set_state(state)
    assert torch.equal(cuda_graph._drawn_anew(draws), expected)
    assert [merging for merging, _ in draws] == mergings


def test_times_and_prompt_are_read_together():
    context = torch.randn(2, 3, 4)
    times = torch.tensor([500, 321])
    assert cuda_graph._read(times, context, None) == ([500, 321], False)
    assert cuda_graph._read(times, context, context.clone()) == ([500.0, 321.0], True)
    assert cuda_graph._read(times.float() + 0.1, context, context + 1) == ((times.float() + 0.1).tolist(), False)
