"""Our engines: that they compute the same in other ways, and how their work is counted and told apart by kind."""

import pytest
import torch
from safetensors.torch import load_file

from dsdiff.benchmark import operations, variants
from dsdiff.benchmark.source import UNET_PREFIX, Source, random_unet, trained_unet
from dsdiff.models.registry import CONFIGS, EMBEDDED
from ldm.checkpoint import save_checkpoint
from qdiff.engine.backends import onednn

CPU = torch.device("cpu")
CONFIG = variants.quant_config(4)
HAS_KERNELS = variants.why_not("int8", CONFIG, CPU) is None


@pytest.fixture(scope="module")
def source():
    return Source.read(EMBEDDED, False, CPU)


@pytest.fixture(scope="module")
def float32(source):
    return variants.build("float32", source, CONFIG)


def output(engine, ratio=0.0):
    with engine.running(ratio) as call:
        return call()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# Engines


def test_engines_compute_the_same_in_other_ways(source, float32):
    expected = {"bf16": (1e-4, 0.02), "simulate": (1e-3, 0.1)}
    if HAS_KERNELS:
        expected |= dict.fromkeys(("int8", "int8-float32"), (1e-3, 0.1))
    for name, (nearest, furthest) in expected.items():
        engine = variants.build(name, source, CONFIG)
        assert nearest < distance(output(engine).float(), output(float32)) < furthest, name
        assert not torch.equal(output(engine, 0.5), output(engine)), name
        assert engine.weight_bytes < float32.weight_bytes, name


@pytest.mark.skipif(not HAS_KERNELS, reason="no exact integer kernels here")
def test_the_simulation_and_the_kernels_agree(source):
    simulated, lowered = (variants.build(name, source, CONFIG) for name in ("simulate", "int8-float32"))
    if (
        onednn.step_order(torch.float32) is None
    ):  # a CPU of which oneDNN's last formula is not known: codes may tip over
        assert distance(output(lowered), output(simulated)) < 0.05
    else:
        assert torch.equal(output(lowered), output(simulated))
    assert lowered.weight_bytes == simulated.weight_bytes


@pytest.mark.skipif(not HAS_KERNELS, reason="no exact integer kernels here")
def test_calls_of_a_measurement_are_those_of_one_picture(source):
    """What a lowered UNet keeps from step to step is computed in the first call alone, as in a picture."""
    engine = variants.build("int8", source, CONFIG)
    cache = engine.unet.model.step_cache
    computed = []

    def counted(keep):
        def of(layer, *args):
            *before, compute = args
            return keep(layer, *before, lambda: computed.append(layer) or compute())

        return of

    with pytest.MonkeyPatch.context() as patch:
        for name in ("of_time", "of_context"):
            patch.setattr(cache, name, counted(getattr(cache, name)))
        with engine.running(0.0) as call:
            first = call()
            assert computed
            computed.clear()
            assert torch.equal(call(), first) and not computed


def test_float_engines_are_channels_last_as_a_whole(float32):
    weights = [weight for weight in float32.unet.parameters() if weight.ndim == 4]
    tensors = [*weights, float32.inputs["x"]]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)


def test_ranges_are_those_that_come_with_the_model(source):
    assert variants.shipped_ranges(source, CONFIG).name == "cali_w4a8.safetensors"
    assert variants.shipped_ranges(source, variants.quant_config(8)).name == "cali_w8a8.safetensors"
    assert variants.shipped_ranges(Source.read(EMBEDDED, True, CPU), CONFIG) is None


# Sources


def test_trained_weights_are_the_files(source, tmp_path):
    weights = {UNET_PREFIX + name: tensor for name, tensor in random_unet(source.unet_config).state_dict().items()}
    weights["first_stage_model.encoder.weight"] = torch.ones(3)  # of another part, which is not built
    save_checkpoint(weights, tmp_path / "model.safetensors")
    unet = trained_unet(source.unet_config, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in unet.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, stored[UNET_PREFIX + name].float()), name


def test_models_have_their_real_sizes():
    sizes = {"embedded": (32, (32, 128), 7014532), "sd-v1": (64, (77, 768), 859520964)}
    for name, (side, context, parameters) in sizes.items():
        source = Source.read(CONFIGS[name], True, CPU)
        inputs = source.inputs()
        assert inputs["x"].shape == (2, 4, side, side), name
        assert inputs["context"].shape == (2, *context), name
        assert (source.parameters(), source.steps) == (parameters, 50), name


def test_calls_have_the_batch_and_size_asked_for():
    source = Source.read(EMBEDDED, False, CPU, batch=1, latents=(24, 16))
    assert {name: list(tensor.shape) for name, tensor in source.inputs().items()} == {
        "x": [1, 4, 24, 16],
        "timesteps": [1],
        "context": [1, 32, 128],
    }
    for latents in ((18, 16), (0, 16)):
        with pytest.raises(ValueError, match="both sides must be multiples of 4"):
            Source.read(EMBEDDED, False, CPU, latents=latents)


# Operations


def test_operations_are_counted_by_kind(float32):
    with float32.running(0.0) as call:
        found = operations.operations(call)
    expected = dict.fromkeys(("convolutions", "linear layers"), 0)

    def count(layer, args, result):
        convolution = isinstance(layer, torch.nn.Conv2d)
        products = layer.weight[0].numel() * result.numel()
        expected["convolutions" if convolution else "linear layers"] += 2 * products

    layers = [layer for layer in float32.unet.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    output(float32)
    for hook in hooks:
        hook.remove()
    # 3 blocks each at 32x32, 16x16 and 8x8 pixels, one more in the middle, which attend to themselves and to 32 words.
    sizes = [(1024, 64)] * 3 + [(256, 128)] * 3 + [(64, 128)] * 4
    expected["attention"] = sum(2 * 2 * 2 * tokens * (tokens + 32) * width for tokens, width in sizes)
    assert found == expected


def test_kinds_of_operators():
    kinds = {
        "aten::conv2d": "convolutions",
        "onednn::qconv_pointwise": "convolutions",
        "onednn::qlinear_pointwise": "linear layers",
        "aten::addmm": "linear layers",
        "aten::scaled_dot_product_attention": "attention",
        "dsdiff::attention": "attention",
        "aten::bmm": "attention",
        "dsdiff::group_norm": "elementwise",
        "dsdiff::quantize": "elementwise",
        "aten::add_": "elementwise",
        "aten::scatter_reduce": "merging",
        "aten::linalg_vector_norm": "merging",
        "aten::cat": "other",
    }
    assert {operator: operations.kind_of(operator) for operator in kinds} == kinds


def test_shares_are_of_operators_of_pytorch():
    x = torch.ones(8, 8)
    found = operations.shares(lambda: x.softmax(0), CPU)
    assert found["attention"] == 1 and sum(found.values()) == 1
    assert operations.shares(lambda: x.contiguous(), CPU) is None
