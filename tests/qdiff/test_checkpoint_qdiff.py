"""Q-Diffusion's published format: the golden checkpoint gives the golden outputs."""

import json
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import tomesd
from ldm.util import instantiate_from_config
from qdiff import AdaRoundQuantizer, QuantConfig, QuantModel
from qdiff.checkpoint import load_cali_ckpt, read_cali_header, save_cali_ckpt, split_layers
from qdiff.checkpoint_qdiff import expected_shapes

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
VARIANTS = ("default", "ds2", "all")
with open(GOLDENS / "q_tome.json") as file:
    TOME_FACTS = json.load(file)


def inputs(golden, name):
    return golden[f"in_{name}/x"], golden[f"in_{name}/t"], golden[f"in_{name}/context"]


@pytest.fixture(scope="module")
def golden_tome():
    return load_file(GOLDENS / "q_tome.safetensors")


@pytest.fixture(scope="module")
def resumed(golden_tensors, golden_ckpt):
    """("qa0" or "qa1") -> the golden model without or with activations, one for all tests: to be left as it is."""
    models = {}

    def get(qa):
        if qa not in models:
            unet = instantiate_from_config(OmegaConf.load(GOLDENS / "q_unet.yaml"))
            unet.load_state_dict({name: golden_tensors[f"model.{name}"] for name in unet.state_dict()})
            models[qa] = QuantModel(unet.eval(), QuantConfig(quant_act=qa == "qa1"))
            load_cali_ckpt(models[qa], golden_ckpt)
        return models[qa]

    return get


@contextmanager
def merged(qnn, **kwargs):
    tomesd.apply_patch(qnn, **kwargs)
    try:
        yield
    finally:
        tomesd.remove_patch(qnn)


@pytest.fixture(scope="module")
def make_small():
    """(**settings) -> a calibrated UNet of a few blocks, all quantizers on, its weights always the same."""
    small = {"params": {"channel_mult": [1], "attention_resolutions": [1]}}
    config = OmegaConf.merge(OmegaConf.load(GOLDENS / "q_unet.yaml"), small)

    def make(**settings):
        unet = instantiate_from_config(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.normal_(std=0.1, generator=generator)
        qnn = QuantModel(unet, QuantConfig(**settings))
        qnn.fit_weights()
        set_act_ranges(qnn)
        qnn.set_quant_state(True, qnn.config.quant_act)
        return qnn

    return make


@pytest.fixture(scope="module")
def small(make_small, witness):
    """The witness of all tests that must not change a model."""
    return witness(make_small())


@pytest.fixture(scope="module")
def small_tensors(make_small, tmp_path_factory):
    """The content of its file."""
    path = tmp_path_factory.mktemp("small") / "small.pth"
    save_cali_ckpt(make_small(), path, format="qdiff")
    return torch.load(path, weights_only=True)


def set_act_ranges(qnn):
    """[0, 1] for the outputs of softmax, [-1, 0.8] for all others."""
    for quantizer in qnn.act_quantizers().values():
        low, high = (0.0, 1.0) if quantizer.always_zero else (-1.0, 0.8)
        quantizer.set_range(torch.tensor(low), torch.tensor(high))


# --- the golden outputs ------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_only_outputs(make_qnn, golden, golden_ckpt, assert_close, subtests):
    for name in ["A", "R", "B1"]:
        with subtests.test(name=name):
            qnn = make_qnn(quant_act=False)
            load_cali_ckpt(qnn, golden_ckpt)
            assert_close(qnn(*inputs(golden, name)), golden[f"resumed_qa0/{name}"])


@torch.no_grad()
def test_outputs_with_activations(make_qnn, golden, golden_ckpt, assert_close, subtests):
    for name in ["R", "B1"]:
        with subtests.test(name=name):
            qnn = make_qnn()
            load_cali_ckpt(qnn, golden_ckpt)
            assert_close(qnn(*inputs(golden, name)), golden[f"resumed_qa1/{name}"])


@torch.no_grad()
def test_every_module_gives_its_recorded_output(resumed, golden, golden_facts, subtests):
    for qa in ["qa0", "qa1"]:
        with subtests.test(qa=qa):
            qnn = resumed(qa)
            noise = golden_facts[f"resumed_{qa}"]["teacher_B1_rel_change_under_1e7_noise"]
            errors = {}
            for name in noise:
                record = f"resumed_{qa}/teacher_B1/{name}"
                args = [golden[f"{record}/in{i}"] for i in range(2) if f"{record}/in{i}" in golden]
                kwargs = {"context": golden[f"{record}/in_context"]} if f"{record}/in_context" in golden else {}
                expected = golden[f"{record}/out"]
                actual = qnn.get_submodule(name)(*args, **kwargs)
                assert actual.shape == expected.shape, name
                errors[name] = ((actual - expected).abs().max() / expected.abs().max()).item()
            assert len(errors) == 51
            assert {name: error for name, error in errors.items() if not error <= max(1e-5, noise[name])} == {}


ATTN1 = "model.input_blocks.1.1.transformer_blocks.0.attn1"


@torch.no_grad()
def test_attention_operand_is_quantized_as_recorded(resumed, golden, subtests):
    for operand in ["q", "k", "v", "w"]:
        with subtests.test(operand=operand):
            quantizer = resumed("qa1").get_submodule(f"{ATTN1}.act_quantizer_{operand}")
            record = f"resumed_qa1/attn1_operands_B1/{operand}"
            assert torch.equal(quantizer(golden[f"{record}_in"]), golden[f"{record}_out"])


@torch.no_grad()
def test_attention_quantizes_the_recorded_operand(resumed, golden, assert_close, subtests):
    for operand in ["q", "k", "v", "w"]:
        with subtests.test(operand=operand):
            attention, seen = resumed("qa1").get_submodule(ATTN1), []
            quantizer = getattr(attention, f"act_quantizer_{operand}")
            hook = quantizer.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output)))
            try:
                attention(golden[f"resumed_qa1/teacher_B1/{ATTN1}/in0"])
            finally:
                hook.remove()
            assert len(seen) == 1
            for actual, what in zip(seen[0], ("in", "out"), strict=True):
                expected = golden[f"resumed_qa1/attn1_operands_B1/{operand}_{what}"]
                assert_close(actual.reshape(expected.shape), expected)


def test_activation_ranges_are_exact(resumed, golden):
    prefix = "resumed_qa1/quantizers/"
    expected = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    actual = {
        f"{name}.{what}": getattr(quantizer, what)
        for name, quantizer in resumed("qa1").act_quantizers().items()
        for what in ("delta", "zero_point")
    }
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


# --- with merged tokens ------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_with_merged_tokens(resumed, golden_tome, assert_close, subtests):
    for qa in ["qa0", "qa1"]:
        for variant in VARIANTS:
            with subtests.test(qa=qa, variant=variant):
                facts = TOME_FACTS[f"{qa}/tome_{variant}"]
                assert TOME_FACTS[f"input_{variant}"]["robust_to_rounding_noise"]
                qnn = resumed(qa)
                with merged(qnn, **facts["kwargs"]):
                    assert len(tomesd.token_report(qnn)) == facts["patched_blocks"]
                    assert_close(qnn(*inputs(golden_tome, variant)), golden_tome[f"{qa}/tome_{variant}"])


@torch.no_grad()
def test_blocks_with_merged_tokens_give_their_recorded_outputs(resumed, golden_tome, assert_close, subtests):
    for qa in ["qa0", "qa1"]:
        for variant in ["default", "all"]:
            with subtests.test(qa=qa, variant=variant):
                prefix = f"{qa}/tome_{variant}/teacher/"
                names = [key.removeprefix(prefix).removesuffix("/out") for key in golden_tome if key.startswith(prefix)]
                names = [name for name in names if "/" not in name]
                assert len(names) == 2
                qnn = resumed(qa)
                with merged(qnn, **TOME_FACTS[f"{qa}/tome_{variant}"]["kwargs"]):
                    qnn(*inputs(golden_tome, variant))  # tells the blocks the size of the latents
                    for name in names:
                        x, context, out = (
                            golden_tome[f"{prefix}{name}/{what}"] for what in ("in_x", "in_context", "out")
                        )
                        assert_close(qnn.get_submodule(name)(x, context), out)


@torch.no_grad()
def test_outputs_after_unpatching(resumed, golden_tome, assert_close, subtests):
    for variant in VARIANTS:
        with subtests.test(variant=variant):
            qnn = resumed("qa0")
            with merged(qnn, **TOME_FACTS[f"qa0/tome_{variant}"]["kwargs"]):
                pass
            assert_close(qnn(*inputs(golden_tome, variant)), golden_tome[f"qa0/no_tome_{variant}"])


# --- writing -----------------------------------------------------------------------------------------------


def test_round_trip_is_bit_equal(make_qnn, golden_ckpt, golden_tensors, tmp_path):
    qnn = make_qnn()
    load_cali_ckpt(qnn, golden_ckpt, freeze=False)
    save_cali_ckpt(qnn, tmp_path / "again.pth", format="qdiff")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == golden_tensors.keys()
    for key, value in golden_tensors.items():
        assert again[key].dtype == value.dtype, key
        assert torch.equal(again[key], value), key


@pytest.fixture(scope="module")
def frozen_file(resumed, tmp_path_factory):
    """What is written of a model whose roundings are decided."""
    path = tmp_path_factory.mktemp("frozen") / "frozen.pth"
    save_cali_ckpt(resumed("qa1"), path, format="qdiff")
    return path


def test_frozen_model_is_written_with_the_same_roundings(frozen_file, golden_tensors):
    again = torch.load(frozen_file, weights_only=True)
    assert again.keys() == golden_tensors.keys()
    decisive = total = 0
    for key, value in golden_tensors.items():
        if not key.endswith(".alpha"):
            assert torch.equal(again[key], value), key
            continue
        layer, part = key.removesuffix(".alpha").rsplit(".", 1)
        delta, zero_point = (golden_tensors[f"{layer}.{part}.{what}"] for what in ("delta", "zero_point"))
        weight = golden_tensors[f"{layer}.weight"]
        if value.shape != weight.shape:  # a half of a split layer
            width = value.shape[1]
            weight = weight[:, -width:] if part.endswith("_0") else weight[:, :width]
        down = (weight / delta).floor() + zero_point
        differ = down.clamp(0, 15) != (down + 1).clamp(0, 15)  # elsewhere both roundings clamp to one code
        assert torch.equal((again[key] >= 0)[differ], (value >= 0)[differ]), key
        decisive, total = decisive + int(differ.sum()), total + value.numel()
    assert 0.9 * total < decisive < total


@torch.no_grad()
def test_frozen_model_survives_the_format(make_qnn, resumed, frozen_file, golden):
    qnn = make_qnn()
    load_cali_ckpt(qnn, frozen_file)
    for name in ("A", "R", "B1"):
        assert torch.equal(qnn(*inputs(golden, name)), resumed("qa1")(*inputs(golden, name)))


def test_decided_roundings_are_decided_for_soft_rounding_too(make_qnn, frozen_file):
    qnn = make_qnn()
    load_cali_ckpt(qnn, frozen_file, freeze=False)
    roundings = [module for module in qnn.modules() if isinstance(module, AdaRoundQuantizer)]
    assert len(roundings) == len(qnn.weight_quantizers())
    for rounding in roundings:
        assert torch.allclose(rounding.soft_targets(), (rounding.alpha >= 0).float(), rtol=0, atol=1e-6)


def test_another_float_unet_in_the_file_is_told(make_small, small_tensors, tmp_path, caplog):
    path = tmp_path / "small.pth"
    torch.save(small_tensors, path)

    def told(change):
        qnn = make_small()
        caplog.clear()
        with torch.no_grad():
            change(qnn.get_parameter("model.out.0.bias"))
        load_cali_ckpt(qnn, path)
        assert torch.equal(qnn.get_parameter("model.out.0.bias"), small_tensors["model.out.0.bias"])
        return caplog.text

    assert told(lambda bias: None) == ""
    assert told(lambda bias: bias.copy_(bias.half())) == ""
    told_of = told(lambda bias: bias.add_(0.01))
    assert "small.pth brings its own float UNet" in told_of and "1 of" in told_of and "model.out.0.bias" in told_of


def test_signed_activations_are_not_written(make_small, tmp_path):
    with pytest.raises(ValueError, match="signed activations"):
        save_cali_ckpt(make_small(act_symmetric=True), tmp_path / "x.pth", format="qdiff")
    assert list(tmp_path.iterdir()) == []


def test_codes_far_from_the_weight_are_not_written(make_small, tmp_path):
    qnn = make_small()
    qnn.freeze()
    qnn.get_submodule("model.out.2.weight_quantizer").packed ^= 0x88  # each code by 8
    with pytest.raises(ValueError, match="neither its rounding up nor down"):
        save_cali_ckpt(qnn, tmp_path / "x.pth", format="qdiff")
    assert list(tmp_path.iterdir()) == []


# --- what is in a file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_v1():
    """(**settings) -> the UNet of Stable Diffusion v1, quantized, without memory for its weights."""
    config = OmegaConf.load(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params.unet_config

    def make(**settings):
        with torch.device("meta"):
            return QuantModel(instantiate_from_config(config), QuantConfig(**settings))

    return make


@pytest.fixture(scope="module")
def sd_v1_facts():
    with open(GOLDENS / "sd_v1_qdiff_w4a8_state_dict.json") as file:
        return json.load(file)


def test_keys_and_shapes_of_stable_diffusion(sd_v1, sd_v1_facts):
    qnn = sd_v1()
    expected = {key: tuple(shape) for key, shape in sd_v1_facts["keys"].items()}
    assert len(expected) == 2412
    assert expected_shapes(qnn) == expected
    assert split_layers(qnn) == sd_v1_facts["splits"]


def test_keys_and_shapes_of_stable_diffusion_without_activations(sd_v1, sd_v1_facts):
    expected = {key: tuple(shape) for key, shape in sd_v1_facts["keys"].items() if "act" not in key}
    assert len(expected) == 1568
    assert expected_shapes(sd_v1(quant_act=False)) == expected


@pytest.fixture(scope="module")
def weights_only_file(golden_tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights_only") / "w4.pth"
    torch.save({key: value for key, value in golden_tensors.items() if "act" not in key}, path)
    return path


def test_header_of_a_weights_only_file(weights_only_file):
    header = read_cali_header(weights_only_file)
    assert header.config == QuantConfig(weight_bit=4, quant_act=False)
    assert header.inferred == ("weight_bit",)


@torch.no_grad()
def test_weights_only_file_does_what_the_full_file_does(make_qnn, resumed, golden, weights_only_file):
    qnn = make_qnn(quant_act=False)
    load_cali_ckpt(qnn, weights_only_file)
    assert torch.equal(qnn(*inputs(golden, "A")), resumed("qa0")(*inputs(golden, "A")))


def test_weights_only_file_is_refused_for_activations(resumed, witness, weights_only_file):
    witness(resumed("qa1")).assert_refuses(weights_only_file, r"lacks model\..*act_quantizer")


def test_bits_are_inferred(golden_ckpt):
    header = read_cali_header(golden_ckpt)
    assert header.config == QuantConfig(weight_bit=4, act_bit=8, sm_abit=16, quant_act=True, split=True)
    assert header.inferred == ("weight_bit", "act_bit", "sm_abit")
    assert header.format == "qdiff"
    halves = {f"model.output_blocks.{i}.0.skip_connection": h for i, h in enumerate((64, 64, 64, 32))}
    assert header.splits == halves


def test_bits_of_other_widths_are_inferred(make_small, tmp_path, subtests):
    for bits in [(2, 3, 8), (3, 2, 10), (8, 6, 12), (16, 16, 4)]:
        with subtests.test(bits=bits):
            settings = dict(zip(("weight_bit", "act_bit", "sm_abit"), bits, strict=True))
            save_cali_ckpt(make_small(**settings), tmp_path / "x.pth", format="qdiff")
            assert read_cali_header(tmp_path / "x.pth").config == QuantConfig(**settings)


def test_bits_that_are_given_are_not_inferred(golden_ckpt):
    assert read_cali_header(golden_ckpt, weight_bit=4, act_bit=8, sm_abit=16).inferred == ()
    assert read_cali_header(golden_ckpt, act_bit=8).inferred == ("weight_bit", "sm_abit")


REFUSED_BITS = [
    ("weight_bit", 8, "weight_bit 8 contradicts .* weight_bit 4"),
    ("weight_bit", 3, "weight_bit 3 contradicts .* weight_bit 4"),
    ("act_bit", 4, "act_bit 4 contradicts .* act_bit 8"),
    ("sm_abit", 8, r"sm_abit 8 contradicts .* sm_abit 16"),  # 255 steps of 1.5e-5
]


def test_bits_that_the_file_contradicts_are_refused(golden_ckpt, subtests):
    for name, value, match in REFUSED_BITS:
        with (
            subtests.test(name=name, value=value, match=match),
            pytest.raises(ValueError, match=match),
        ):
            read_cali_header(golden_ckpt, **{name: value})


def test_model_of_other_bits_is_refused(make_small, witness, golden_ckpt, subtests):
    for name, value, match in REFUSED_BITS:
        with subtests.test(name=name, value=value, match=match):
            witness(make_small(**{name: value})).assert_refuses(golden_ckpt, match)


# --- files that do not fit, or are broken ------------------------------------------------------------------


def drop(part):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]


def put(key, change):
    return lambda tensors: tensors.update({key: change(tensors.get(key))})


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


DAMAGES = {
    "split keys missing": (drop("quantizer_0."), r"lacks model\.output_blocks\.0\.0\.skip_connection\..*quantizer_0"),
    "bias missing": (drop("model.out.2.bias"), r"lacks model\.out\.2\.bias: "),
    "norm missing": (drop("model.out.0.weight"), r"lacks model\.out\.0\.weight: "),
    "range missing": (drop("model.out.2.act_quantizer.delta"), r"lacks model\.out\.2\.act_quantizer\.delta: "),
    "unknown key": (put("model.out.3.weight", lambda _: torch.ones(4)), r"has unknown model\.out\.3\.weight: "),
    "bias too long": (put("model.out.2.bias", lambda x: torch.cat([x, x])), r"model\.out\.2\.bias .*\(8,\).*\(4,\)"),
    "alpha too narrow": (
        put("model.out.2.weight_quantizer.alpha", lambda x: x[:, 1:]),
        r"alpha .*\(4, 31, 3, 3\).*\(4, 32, 3, 3\)",
    ),
    "range of one activation per channel": (
        put("model.out.2.act_quantizer.delta", lambda x: x.expand(32)),
        r"model\.out\.2\.act_quantizer\.delta .*\(32,\)",
    ),
    "NaN in a weight": (put("model.out.2.weight", with_nan), r"model\.out\.2\.weight .*not finite"),
    "NaN in alpha": (put("model.out.2.weight_quantizer.alpha", with_nan), r"alpha .*not finite"),
    "NaN in a step size": (put("model.out.2.weight_quantizer.delta", with_nan), r"delta .*positive and finite"),
    "NaN in a norm": (put("model.out.0.weight", with_nan), r"model\.out\.0\.weight .*not finite"),
    "no roundings": (drop(".alpha"), "no Q-Diffusion cali_ckpt: it has no weight_quantizer.alpha"),
}


def write_changed(tensors, path):
    """Other ranges and biases: loading any of them would show."""
    differs = (".act_quantizer.delta", ".weight_quantizer.delta", ".bias")
    torch.save({key: value * 1.5 if key.endswith(differs) else value for key, value in tensors.items()}, path)


def test_file_that_does_not_fit_is_refused(small, small_tensors, tmp_path, subtests):
    for damage in DAMAGES:
        with subtests.test(damage=damage):
            edit, match = DAMAGES[damage]
            tensors = dict(small_tensors)
            edit(tensors)
            write_changed(tensors, tmp_path / "x.pth")
            small.assert_refuses(tmp_path / "x.pth", match)


def test_file_without_damage_is_loaded(make_small, small_tensors, tmp_path):
    """What `write_changed` does to a file is no reason to refuse it."""
    write_changed(small_tensors, tmp_path / "x.pth")
    qnn = make_small()
    load_cali_ckpt(qnn, tmp_path / "x.pth")
    for name, value in (("bias", qnn.model.out[2].bias), ("act_quantizer.delta", qnn.model.out[2].act_quantizer.delta)):
        assert torch.equal(value, 1.5 * small_tensors[f"model.out.2.{name}"])


def test_truncated_file_is_refused(small, small_tensors, tmp_path, subtests):
    for left in [0, 1, 1000, 0.5, -1]:
        with subtests.test(left=left):
            torch.save(small_tensors, tmp_path / "x.pth")
            whole = (tmp_path / "x.pth").read_bytes()
            (tmp_path / "x.pth").write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
            small.assert_refuses(tmp_path / "x.pth", "x.pth' is no (readable )?checkpoint")


def test_anything_but_a_dictionary_of_tensors_is_refused(small, tmp_path, subtests):
    for content in [
        [torch.ones(2)],
        torch.ones(2),
        {"model.out.2.weight_quantizer.alpha": 1},
        {1: torch.ones(2)},
        {"state_dict": {}},
    ]:
        with subtests.test(content=content):
            torch.save(content, tmp_path / "x.pth")
            small.assert_refuses(tmp_path / "x.pth", "x.pth' is no Q-Diffusion cali_ckpt: a dictionary")


def test_missing_file(small, tmp_path):
    small.assert_refuses(tmp_path / "none.pth", r"No such file: .*none\.pth", FileNotFoundError)


class Hostile:
    """Copies the file `source` to `target` when it is unpickled."""

    def __init__(self, source, target):
        self.source, self.target = str(source), str(target)

    def __reduce__(self):
        return shutil.copyfile, (self.source, self.target)


def write_zip(content, path):
    torch.save(content, path)


def write_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def test_nothing_in_a_file_is_executed(small, tmp_path, subtests):
    for write in [write_zip, write_legacy, write_pickle]:
        with subtests.test(write=write):
            harmless, trace, path = (tmp_path / name for name in ("harmless", "trace", "x.pth"))
            harmless.touch()
            write({"model.out.2.weight_quantizer.alpha": Hostile(harmless, trace)}, path)
            small.assert_refuses(path, "x.pth' is no (readable )?checkpoint")
            assert not trace.exists()
            # The trap works: a careless reader does run it.
            if write is write_pickle:
                pickle.loads(path.read_bytes())
            else:
                torch.load(path, weights_only=False)
            assert trace.exists()
            trace.unlink()
