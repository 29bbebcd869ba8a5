"""The UNets that scripts/benchmark.py compares: that they compute the same, and how what they do is told apart."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from dsdiff.benchmark import operations as benchmark_operations
from dsdiff.benchmark import peers as benchmark_peers
from dsdiff.benchmark import variants as benchmark_engines
from dsdiff.benchmark.source import MODELS, UNET_PREFIX, Source, random_unet, trained_unet
from ldm.checkpoint import save_checkpoint
from qdiff.config import QuantConfig
from qdiff.engine.backends import onednn

CPU = torch.device("cpu")
CONFIG = QuantConfig()
HAS_KERNELS = pytest.mark.skipif(not onednn.works(), reason="no exact integer kernels here")
HAS_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny work, shared by threads, is slow on a machine that does other work, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source():
    return Source.read(MODELS["embedded"], False, CPU)


@pytest.fixture(scope="module")
def float32(source):
    return benchmark_engines.build("float32", source, CONFIG)


def output(engine, ratio=0.0):
    with engine.running(ratio) as call:
        return call()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# Our engines


@pytest.mark.parametrize(
    "name, nearest, furthest",
    [
        ("bf16", 1e-4, 0.02),
        ("simulate", 1e-3, 0.1),
        pytest.param("int8", 1e-3, 0.1, marks=HAS_KERNELS),
        pytest.param("int8-float32", 1e-3, 0.1, marks=HAS_KERNELS),
    ],
)
def test_engines_compute_the_same_in_other_ways(source, float32, name, nearest, furthest):
    engine = benchmark_engines.build(name, source, CONFIG)
    assert nearest < distance(output(engine).float(), output(float32)) < furthest
    assert not torch.equal(output(engine, 0.5), output(engine))
    assert engine.weight_bytes < float32.weight_bytes


@HAS_KERNELS
def test_the_simulation_and_the_kernels_agree(source):
    simulated, packed = (benchmark_engines.build(name, source, CONFIG) for name in ("simulate", "int8-float32"))
    assert distance(output(packed), output(simulated)) < 1e-5
    assert packed.weight_bytes == simulated.weight_bytes


def test_float_engines_are_channels_last_as_a_whole(float32):
    weights = [weight for weight in float32.unet.parameters() if weight.ndim == 4]
    tensors = [*weights, float32.inputs["x"]]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)


def test_ranges_are_those_that_come_with_the_model(source, tmp_path):
    assert benchmark_engines.shipped_ranges(source, CONFIG).name == "cali_w4a8.safetensors"
    assert benchmark_engines.shipped_ranges(source, QuantConfig(weight_bit=8)).name == "cali_w8a8.safetensors"
    assert benchmark_engines.shipped_ranges(Source.read(MODELS["embedded"], True, CPU), CONFIG) is None


def test_trained_weights_are_the_files(source, tmp_path):
    weights = {UNET_PREFIX + name: tensor for name, tensor in random_unet(source.unet_config).state_dict().items()}
    weights["first_stage_model.encoder.weight"] = torch.ones(3)  # another part, which is not built
    save_checkpoint(weights, tmp_path / "model.safetensors")
    unet = trained_unet(source.unet_config, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[UNET_PREFIX + name].float()), name


@pytest.mark.parametrize(
    "name, latents, context, parameters",
    [("embedded", 16, (32, 128), 7014532), ("sd-v1", 64, (77, 768), 859520964)],
)
def test_models_have_their_real_sizes(name, latents, context, parameters):
    source = Source.read(MODELS[name], True, CPU)
    inputs = source.inputs()
    assert inputs["x"].shape == (2, 4, latents, latents) and inputs["context"].shape == (2, *context)
    assert source.parameters() == parameters and source.steps == 50


# What they do


def test_operations_are_counted_by_kind(float32):
    with float32.running(0.0) as call:
        found = benchmark_operations.operations(call)
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
    # 3 blocks each at 16x16, 8x8 and 4x4 pixels, one more in the middle, which attend to themselves and to 32 words.
    sizes = [(256, 64)] * 3 + [(64, 128)] * 3 + [(16, 128)] * 4
    expected["attention"] = sum(2 * 2 * 2 * tokens * (tokens + 32) * width for tokens, width in sizes)
    assert found == expected


@pytest.mark.parametrize(
    "operator, kind",
    [
        ("aten::conv2d", "convolutions"),
        ("onednn::qconv_pointwise", "convolutions"),
        ("onednn::qlinear_pointwise", "linear layers"),
        ("aten::addmm", "linear layers"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("dsdiff::attention", "attention"),
        ("aten::bmm", "attention"),
        ("dsdiff::group_norm", "elementwise"),
        ("dsdiff::quantize", "elementwise"),
        ("aten::add_", "elementwise"),
        ("aten::scatter_reduce", "merging"),
        ("aten::linalg_vector_norm", "merging"),
        ("aten::cat", "other"),
    ],
)
def test_kinds_of_operators(operator, kind):
    assert benchmark_operations.kind_of(operator) == kind


def test_shares_are_of_operators_of_pytorch():
    x = torch.ones(8, 8)
    found = benchmark_operations.shares(lambda: x.softmax(0), CPU)
    assert found["attention"] == 1 and sum(found.values()) == 1
    assert benchmark_operations.shares(lambda: x.contiguous(), CPU) is None


# Peers


def test_diffusers_has_a_unet_of_the_same_sizes(source):
    assert benchmark_peers.unlike(source) is None
    assert benchmark_peers.unlike(Source.read(MODELS["sd-v1"], True, CPU)) is None
    engine = benchmark_peers.build("diffusers-bf16", source, None)
    assert engine.weight_bytes == 2 * source.parameters()
    (result,) = output(engine)
    assert result.shape == source.inputs()["x"].shape and result.dtype == torch.bfloat16


def test_a_unet_that_diffusers_has_not_is_left_out(source, monkeypatch):
    changed = {"legacy": True, "transformer_depth": 2}
    other = source.unet_config | {"params": source.unet_config["params"] | changed}
    monkeypatch.setitem(source.params, "unet_config", other)
    names, reasons = benchmark_peers.choose_peers(["diffusers-bf16"], source)
    assert not names and "parameters, in place of" in reasons["diffusers-bf16"]


def test_openvino_is_of_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(benchmark_peers.util, "find_spec", lambda name: True)
    source = Source.read(MODELS["embedded"], True, torch.device("cuda"))
    assert "--device cpu" in benchmark_peers.why_not("openvino-int8", source)


def test_converted_models_are_complete_and_kept(source, tmp_path, monkeypatch):
    made = []

    def save(path):
        made.append(path.name)
        path.write_text("model")
        if len(made) == 2:
            raise KeyboardInterrupt
        path.with_suffix(".bin").write_text("weights")

    monkeypatch.setattr(benchmark_peers, "_converted", lambda source: save)
    monkeypatch.setattr(benchmark_peers, "_quantized", lambda xml, source: save)
    folder = benchmark_peers.folder_of(source, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        benchmark_peers.convert(["float32", "openvino-int8"], source, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["float32.bin", "float32.xml"]
    for _ in range(2):
        benchmark_peers.convert(["openvino-int8"], source, tmp_path)
    assert made == ["float32.xml", "int8.xml", "int8.xml"]
    assert folder != benchmark_peers.folder_of(Source.read(MODELS["embedded"], True, CPU), tmp_path)


@HAS_OPENVINO
def test_openvino_computes_what_we_compute(source, float32, tmp_path):
    names = ("openvino-float32", "openvino-bf16")
    benchmark_peers.convert(names, source, tmp_path)
    full, bf16 = (benchmark_peers.build(name, source, tmp_path) for name in names)
    assert distance(output(full), output(float32)) < 1e-5
    assert distance(output(bf16), output(float32)) < 0.02
    assert full.weight_bytes == pytest.approx(4 * source.parameters(), rel=0.01)
