"""QuantModel: against recorded outputs of the reference implementation, and against the float UNet it is made of."""

import gc
import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from omegaconf import OmegaConf
from safetensors.torch import load_file

import tomesd
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config
from qdiff import QuantConfig, QuantModel
from qdiff.adaptive_rounding import AdaRoundQuantizer, soft_rounding
from qdiff.exchange import put_module
from qdiff.quant_block import QuantAttentionBlock, QuantBasicTransformerBlock, QuantCrossAttention, QuantResBlock
from qdiff.quant_layer import QuantModule, SplitQuantModule
from qdiff.quantizers import FrozenQuantizer, Quantizer, UniformAffineQuantizer

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
with open(GOLDENS / "q_unet_tiny.json") as file:
    RUNS = json.load(file)
# The other run differs in its activations only, and no input of its own is robust to rounding noise.
WEIGHT_RUNS = [name for name, facts in RUNS.items() if not facts.get("a_sym")]
ROBUST_RUNS = [name for name, facts in RUNS.items() if facts["wa_B_input_robust_to_1e-7_noise"]]
with open(GOLDENS / "q_tome.json") as file:
    TOME = json.load(file)


def inputs(tensors, name):
    return [tensors[f"{name}/{what}"] for what in ("x", "t", "context")]


def some_inputs(height=8, width=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(batch, *size, generator=generator) for size in ((4, height, width), (11, 24)))
    return x, torch.tensor([3, 700][:batch]), context


def load_weights(qnn, tensors):
    """Ranges and roundings of a Q-Diffusion checkpoint."""
    for name, layer in qnn.layers().items():
        for part in layer.weight_parts():
            values = [tensors[f"{name}.{part}.{what}"] for what in ("delta", "zero_point", "alpha")]
            setattr(layer, part, AdaRoundQuantizer(qnn.config.weight_bit, False, *values))


def load_act_ranges(qnn, tensors, prefix=""):
    for name, quantizer in qnn.act_quantizers().items():
        quantizer.set(*(tensors[f"{prefix}{name}.{what}"].float() for what in ("delta", "zero_point")))


def convert_to_adaround(qnn):
    for layer in qnn.layers().values():
        for name, part in layer.weight_parts().items():
            setattr(layer, name, AdaRoundQuantizer.from_uniform(getattr(layer, name), part))


@pytest.fixture
def fitted(make_qnn):
    """With weights fitted, and the activations of one forward."""
    qnn = make_qnn()
    qnn.fit_weights()
    for quantizer in qnn.act_quantizers().values():
        quantizer.set(torch.tensor(0.01), torch.tensor(0.0 if quantizer.always_zero else 128.0))
    return qnn


@pytest.fixture(scope="module")
def kept():
    return []


@pytest.fixture
def calibrated(kept, make_qnn, golden_tensors):
    """As the golden cali_ckpt says; built once, and only switched by the tests on it."""
    if not kept:
        qnn = make_qnn()
        load_weights(qnn, golden_tensors)
        load_act_ranges(qnn, golden_tensors)
        kept.append(qnn)
    kept[0].set_quant_state(False, False)
    return kept[0]


def kinds_of(module):
    return [(name, type(part)) for name, part in module.named_modules()]


def states_of(qnn):
    return {name: part.enabled for name, part in qnn.named_modules() if isinstance(part, Quantizer)}


# --- against the reference: a UNet of three levels ---------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return load_file(GOLDENS / "q_unet_tiny.safetensors")


@pytest.fixture(scope="module")
def make_tiny(tiny):
    """(run, anew=False) -> its UNet quantized: fitted weights, recorded ranges of activations. Built once, or anew."""
    params = OmegaConf.load(GOLDENS / "tiny_ldm.yaml").model.params.unet_config
    prefix = "model.diffusion_model."
    weights = {
        key.removeprefix(prefix): value.float()
        for key, value in load_file(GOLDENS / "tiny_ldm.safetensors").items()
        if key.startswith(prefix)
    }
    built = {}

    def make(run, anew=False):
        if anew:
            return build(run)
        if run not in built:
            built[run] = build(run)
        return built[run]

    def build(run):
        facts = RUNS[run]
        config = QuantConfig(
            weight_bit=facts["wb"],
            act_bit=facts["ab"],
            sm_abit=facts["sm"],
            split=facts["split"],
            scale_method=facts["method"],
            act_scale_method=facts["method"],
        )
        unet = instantiate_from_config(params)
        unet.load_state_dict(weights)
        qnn = QuantModel(unet.eval(), config)
        if facts["method"] == "mse":
            set_large_weights(qnn, run)
        qnn.fit_weights()
        load_act_ranges(qnn, tiny, f"{run}/quantizers/")
        return qnn

    def set_large_weights(qnn, run):
        """The search over all of them takes its time; `fit_weights` does the rest."""
        for name, layer in qnn.layers().items():
            if layer.weight.numel() > 2500:
                for part in layer.weight_parts():
                    table = f"{run}/quantizers/{name}.{part}"
                    getattr(layer, part).set(tiny[f"{table}.delta"], tiny[f"{table}.zero_point"].float())

    return make


def test_recorded_ranges_of_weights(make_tiny, tiny, subtests):
    for run in WEIGHT_RUNS:
        with subtests.test(run=run):
            for name, quantizer in make_tiny(run).weight_quantizers().items():
                assert torch.equal(quantizer.delta, tiny[f"{run}/quantizers/{name}.delta"]), name
                assert torch.equal(quantizer.zero_point, tiny[f"{run}/quantizers/{name}.zero_point"].float()), name


def test_quantizers_stand_where_the_reference_has_them(make_tiny, tiny, subtests):
    for run in WEIGHT_RUNS:
        with subtests.test(run=run):
            qnn, prefix = make_tiny(run), f"{run}/quantizers/"
            recorded = {key.removeprefix(prefix).rsplit(".", 1)[0] for key in tiny if key.startswith(prefix)}
            assert qnn.weight_quantizers().keys() | qnn.act_quantizers().keys() == recorded
            assert not qnn.weight_quantizers().keys() & qnn.act_quantizers().keys()


@torch.no_grad()
def test_recorded_outputs_of_quantized_weights(make_tiny, tiny, assert_close, subtests):
    for run in WEIGHT_RUNS:
        with subtests.test(run=run):
            qnn = make_tiny(run)
            with qnn.quant_state(True, False):
                for name in ("A", "B"):
                    assert_close(qnn(*inputs(tiny, f"in_{name}")), tiny[f"{run}/w_{name}"])


@torch.no_grad()
def test_recorded_outputs_of_quantized_activations(make_tiny, tiny, assert_close, subtests):
    for run in ROBUST_RUNS:
        with subtests.test(run=run):
            qnn = make_tiny(run)
            with qnn.quant_state(True, True):
                assert_close(qnn(*inputs(tiny, f"{run}/in_B")), tiny[f"{run}/wa_B"])


@torch.no_grad()
def test_recorded_outputs_switched_off(make_tiny, tiny, assert_close):
    run = WEIGHT_RUNS[0]
    assert_close(make_tiny(run)(*inputs(tiny, "in_A")), tiny[f"{run}/fp_A"])


def test_recorded_splits(make_tiny):
    for run in WEIGHT_RUNS:
        layers = make_tiny(run).layers()
        splits = {name: layer.split for name, layer in layers.items() if isinstance(layer, SplitQuantModule)}
        assert splits == RUNS[run]["splits"]
        assert len(layers) == RUNS[run]["n_quantmodules"]


@torch.no_grad()
def test_recorded_outputs_of_adaptive_rounding(make_tiny, tiny, assert_close):
    run = "w8a8_max_split_sm8"
    qnn = make_tiny(run, anew=True)
    convert_to_adaround(qnn)
    with qnn.quant_state(True, False):
        assert_close(qnn(*inputs(tiny, "in_A")), tiny[f"{run}/w_adaround_hard_A"])
        with soft_rounding(qnn):
            assert_close(qnn(*inputs(tiny, "in_A")), tiny[f"{run}/w_adaround_soft_A"])


# --- against the reference: a calibrated UNet --------------------------------------------------------------


@torch.no_grad()
def test_every_unit_and_layer_on_recorded_inputs(calibrated, golden, assert_close, subtests):
    for quant_act in [False, True]:
        with subtests.test(quant_act=quant_act):
            calibrated.set_quant_state(True, quant_act)
            prefix = f"resumed_qa{quant_act:d}/teacher_B1/"
            names = sorted({key.removeprefix(prefix).rsplit("/", 1)[0] for key in golden if key.startswith(prefix)})
            assert set(calibrated.units()) <= set(names)
            for name in names:
                recorded = {what: golden.get(f"{prefix}{name}/{what}") for what in ("in0", "in1", "in_context", "out")}
                arguments = [recorded[what] for what in ("in0", "in1") if recorded[what] is not None]
                options = {} if recorded["in_context"] is None else {"context": recorded["in_context"]}
                assert_close(calibrated.get_submodule(name)(*arguments, **options), recorded["out"], rtol=2e-6)


@torch.no_grad()
def test_recorded_outputs_of_a_calibrated_model(calibrated, golden, assert_close, subtests):
    for name in ["R", "B1"]:
        for quant_act in [False, True]:
            with subtests.test(name=name, quant_act=quant_act):
                calibrated.set_quant_state(True, quant_act)
                assert_close(calibrated(*inputs(golden, f"in_{name}")), golden[f"resumed_qa{quant_act:d}/{name}"])


def test_units_are_reconstructed_in_the_recorded_order(calibrated, golden_facts):
    units = [
        ["layer" if isinstance(unit, QuantModule) else f"block:{type(unit).__name__}", name]
        for name, unit in calibrated.units().items()
    ]
    assert units == golden_facts["recon_order_weights"]


def test_units_hold_every_layer_once(calibrated):
    held = [layer for unit in calibrated.units().values() for layer in unit.modules() if isinstance(layer, QuantModule)]
    assert len(held) == len(set(held)) == len(calibrated.layers())


def test_keys_of_the_recorded_checkpoint(make_qnn, golden_facts):
    """Those of the float UNet, under `model.`, and delta and zero_point of each quantizer."""
    keys = {key for key in golden_facts["ckpt_keys"] if not key.endswith(".alpha")}
    assert set(make_qnn().state_dict()) == keys


# --- Stable Diffusion v1 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_v1():
    """Without memory: on the meta device."""
    config = OmegaConf.load(ROOT / "configs/stable-diffusion/v1-inference.yaml").model.params.unet_config
    with torch.device("meta"):
        return QuantModel(instantiate_from_config(config), QuantConfig())


@pytest.fixture(scope="module")
def sd_v1_facts():
    with open(GOLDENS / "sd_v1_qdiff_w4a8_state_dict.json") as file:
        return json.load(file)


def test_splits_of_stable_diffusion(sd_v1, sd_v1_facts):
    layers = sd_v1.layers()
    splits = {name: layer.split for name, layer in layers.items() if isinstance(layer, SplitQuantModule)}
    assert splits == sd_v1_facts["splits"]


def test_weight_parts_of_stable_diffusion(sd_v1, sd_v1_facts):
    shapes = {
        f"{name}.{part}.alpha": list(weight.shape)
        for name, layer in sd_v1.layers().items()
        for part, weight in layer.weight_parts().items()
    }
    assert shapes == {key: shape for key, shape in sd_v1_facts["keys"].items() if key.endswith(".alpha")}


def test_act_quantizers_of_stable_diffusion(sd_v1, sd_v1_facts):
    ranges = {key for key in sd_v1_facts["keys"] if "act_quantizer" in key and key.endswith(".delta")}
    assert {f"{name}.delta" for name in sd_v1.act_quantizers()} == ranges


def test_float_weights_of_stable_diffusion(sd_v1, sd_v1_facts):
    expected = {key: shape for key, shape in sd_v1_facts["keys"].items() if "quantizer" not in key}
    actual = {key: list(value.shape) for key, value in sd_v1.state_dict().items() if "quantizer" not in key}
    assert actual == expected


# --- switched off, it is the float UNet --------------------------------------------------------------------


@torch.no_grad()
def test_off_at_first(make_unet, subtests):
    for settings in [{}, {"split": False}, {"quant_act": False}]:
        with subtests.test(settings=settings):
            unet = make_unet()
            expected = unet(*some_inputs())
            qnn = QuantModel(unet, QuantConfig(**settings))
            assert torch.equal(qnn(*some_inputs()), expected)


@torch.no_grad()
def test_off_again(fitted, make_unet):
    expected = make_unet()(*some_inputs())
    for weights, acts in ((True, False), (False, True), (True, True)):
        fitted.set_quant_state(weights, acts)
        assert not torch.equal(fitted(*some_inputs()), expected)
    fitted.set_quant_state(False, False)
    assert torch.equal(fitted(*some_inputs()), expected)


@torch.no_grad()
def test_pictures_that_are_not_square(fitted, make_unet):
    x, t, context = some_inputs(6, 10)
    assert torch.equal(fitted(x, t, context), make_unet()(x, t, context))
    fitted.set_quant_state(True, True)
    assert fitted(x, t, context=context).shape == x.shape


SETTINGS = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
}
OTHERS = {
    "without a context": {},
    "with classes": {"num_classes": 5},
    "resampling in ResBlocks": {"resblock_updown": True, "use_scale_shift_norm": True},
    "three widths": {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "use_new_attention_order": True},
}


@pytest.fixture(params=OTHERS)
def other_unet(request):
    """Of another architecture; nothing in it is zero."""
    torch.manual_seed(0)
    unet = UNetModel(**(SETTINGS | OTHERS[request.param])).eval()
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet


@torch.no_grad()
def test_other_architectures(other_unet):
    x, t, _ = some_inputs()
    y = None if other_unet.num_classes is None else torch.tensor([1, 4])
    expected = other_unet(x, t, y=y)
    qnn = QuantModel(other_unet, QuantConfig(weight_bit=8, quant_act=False))
    assert torch.equal(qnn(x, t, y=y), expected)
    assert any(isinstance(unit, QuantAttentionBlock) for unit in qnn.units().values())
    qnn.fit_weights()
    qnn.set_quant_state(True, False)
    change = (qnn(x, t, y=y) - expected).abs().max() / expected.abs().max()
    assert 0 < change < 0.1


@torch.no_grad()
def test_splits_are_the_widths_before_the_concatenations(other_unet):
    widths = []  # of what each module in turn leaves behind
    modules = [other_unet.middle_block, *other_unet.output_blocks]
    hooks = [module.register_forward_hook(lambda _, __, out: widths.append(out.shape[1])) for module in modules]
    x, t, _ = some_inputs()
    other_unet(x, t, y=None if other_unet.num_classes is None else torch.tensor([1, 4]))
    for hook in hooks:
        hook.remove()
    layers = QuantModel(other_unet, QuantConfig()).layers()
    splits = {name: layer.split for name, layer in layers.items() if isinstance(layer, SplitQuantModule)}
    assert len(splits) == len(other_unet.output_blocks)
    for i, width in enumerate(widths[:-1]):
        assert splits[f"model.output_blocks.{i}.0.skip_connection"] == width


def test_blocks_and_layers_are_of_quantized_kinds(calibrated):
    kinds = {type(module) for module in calibrated.modules()}
    assert {QuantResBlock, QuantBasicTransformerBlock, QuantCrossAttention, SplitQuantModule} <= kinds
    layers = [module for module in calibrated.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    assert not layers


# --- names and their order: files, and the seeds of units, depend on them -----------------------------------


def digest(names):
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def test_names_are_those_of_the_float_unet_and_of_quantizers(make_unet):
    unets = (make_unet(), UNetModel(**SETTINGS), UNetModel(**(SETTINGS | OTHERS["resampling in ResBlocks"])))
    for unet in unets:
        modules, keys = ([name for name, _ in unet.named_modules()], list(unet.state_dict()))
        qnn = QuantModel(unet, QuantConfig())
        quantized = [name for name, _ in qnn.model.named_modules()]
        assert [name for name in quantized if "quantizer" not in name] == modules
        assert [name for name in qnn.model.state_dict() if "quantizer" not in name] == keys
        for name, layer in qnn.layers().items():  # the quantizers of a layer follow its weight and bias
            first = list(layer.state_dict())
            assert first[: len(first) - 2 * len([*layer.children()])] == [n for n, _ in layer.named_parameters()], name


def test_names_and_classes_stand_in_the_order_of_earlier_versions(make_unet):
    """Recorded when blocks were quantized in place, by another mechanism."""
    recorded = [
        (make_unet(), 651, "aa8763e2103fb953", "f3c2079e65236f61"),
        (UNetModel(**(SETTINGS | OTHERS["resampling in ResBlocks"])), 310, "505efa8f0c8ab317", "26f107f6cc2db378"),
    ]
    for unet, count, modules, keys in recorded:
        qnn = QuantModel(unet, QuantConfig())
        names = [f"{name} {type(module).__name__}" for name, module in qnn.named_modules()]
        assert (len(names), digest(names), digest(qnn.state_dict())) == (count, modules, keys)


# --- weights are shared, not copied ------------------------------------------------------------------------


def test_parameters_are_those_of_the_unet(make_unet):
    unet = make_unet()
    before = dict(unet.named_parameters())
    after = dict(QuantModel(unet, QuantConfig()).model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def bytes_of(module):
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def test_frozen_codes_are_small(fitted, make_unet):
    fitted.freeze()
    assert bytes_of(fitted) <= 1.2 * bytes_of(make_unet())


# --- restore -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_restore_gives_back_the_unet(make_unet, golden_tensors, subtests):
    for state in ["new", "calibrated", "frozen"]:
        with subtests.test(state=state):
            unet = make_unet()
            kinds, modules = kinds_of(unet), list(unet.modules())
            tensors = {key: value.clone() for key, value in unet.state_dict().items()}
            addresses = {key: value.data_ptr() for key, value in unet.state_dict().items()}
            out = unet(*some_inputs())
            qnn = QuantModel(unet, QuantConfig())
            if state != "new":
                load_weights(qnn, golden_tensors)
                load_act_ranges(qnn, golden_tensors)
                qnn.set_quant_state(True, True)
            if state == "frozen":
                qnn.freeze()
            restored = qnn.restore()
            assert restored is unet
            assert kinds_of(unet) == kinds
            assert all(now is before for now, before in zip(unet.modules(), modules, strict=True))
            assert list(unet.state_dict()) == list(tensors)
            assert all(torch.equal(value, tensors[key]) for key, value in unet.state_dict().items())
            assert {key: value.data_ptr() for key, value in unet.state_dict().items()} == addresses
            assert torch.equal(unet(*some_inputs()), out)


def test_restored_other_architectures(other_unet):
    kinds, keys = kinds_of(other_unet), list(other_unet.state_dict())
    QuantModel(other_unet, QuantConfig()).restore()
    assert kinds_of(other_unet) == kinds
    assert list(other_unet.state_dict()) == keys


@torch.no_grad()
def test_a_restored_unet_can_be_quantized_again(fitted):
    fitted.set_quant_state(True, False)
    expected = fitted(*some_inputs())
    again = QuantModel(fitted.restore(), QuantConfig())
    again.fit_weights()
    again.set_quant_state(True, False)
    assert torch.equal(again(*some_inputs()), expected)


# --- refusals ----------------------------------------------------------------------------------------------


def test_quantizing_twice_is_refused(fitted):
    kinds = kinds_of(fitted.model)
    with pytest.raises(ValueError, match=r"quantized already: build it anew, or restore\(\) it first"):
        QuantModel(fitted.model, QuantConfig())
    assert kinds_of(fitted.model) == kinds


def test_a_patched_unet_is_refused(make_unet):
    unet = make_unet()
    tomesd.apply_patch(unet)
    kinds = kinds_of(unet)
    with pytest.raises(ValueError, match="quantize first, merge tokens last"):
        QuantModel(unet, QuantConfig())
    assert kinds_of(unet) == kinds
    QuantModel(tomesd.remove_patch(unet), QuantConfig())


def test_unknown_ranges_are_refused(make_qnn):
    qnn = make_qnn()
    before, count = states_of(qnn), len(qnn.weight_quantizers())
    with pytest.raises(
        ValueError, match=rf"^{count} quantizers have no range yet, such as model\.time_embed\.0\.weight"
    ):
        qnn.set_quant_state(True, False)
    qnn.fit_weights()
    count = len(qnn.act_quantizers())
    with pytest.raises(ValueError, match=rf"^{count} quantizers have no range yet, such as .*act_quantizer"):
        qnn.set_quant_state(True, True)
    assert states_of(qnn) == before
    qnn.set_quant_state(True, False)


def test_a_single_unknown_range_is_refused(fitted):
    layer = fitted.layers()["model.output_blocks.0.0.skip_connection"]
    layer.act_quantizer_0 = UniformAffineQuantizer(8)
    with pytest.raises(
        ValueError, match=r"^1 quantizers .* model\.output_blocks\.0\.0\.skip_connection\.act_quantizer_0"
    ):
        fitted.set_quant_state(True, True)


def test_activations_of_a_weights_only_model_are_refused(make_qnn):
    qnn = make_qnn(quant_act=False)
    qnn.fit_weights()
    before = states_of(qnn)
    assert not qnn.act_quantizers()
    with pytest.raises(ValueError, match=r"quantizes weights only \(quant_act is False\)"):
        qnn.set_quant_state(True, True)
    assert states_of(qnn) == before
    qnn.set_quant_state(True, False)


# --- states ------------------------------------------------------------------------------------------------


def test_set_quant_state_switches_all_quantizers(calibrated):
    for weights, acts in ((True, True), (False, True), (True, False), (False, False)):
        calibrated.set_quant_state(weights, acts)
        expected = dict.fromkeys(calibrated.weight_quantizers(), weights)
        expected |= dict.fromkeys(calibrated.act_quantizers(), acts)
        assert states_of(calibrated) == expected


def mixed(qnn):
    """Every third quantizer on."""
    quantizers = [module for module in qnn.modules() if isinstance(module, Quantizer)]
    for i, quantizer in enumerate(quantizers):
        quantizer.enabled = i % 3 == 0
    return states_of(qnn)


def test_quant_state_ends_with_its_block(calibrated):
    before = mixed(calibrated)
    for acts in (False, True):
        with calibrated.quant_state(True, acts):
            inside = states_of(calibrated)
            assert all(inside[name] for name in calibrated.weight_quantizers())
            assert all(inside[name] is acts for name in calibrated.act_quantizers())
        assert states_of(calibrated) == before


def test_quant_state_ends_with_an_exception(calibrated):
    before = mixed(calibrated)
    with pytest.raises(RuntimeError, match="on purpose"), calibrated.quant_state(False, True):
        raise RuntimeError("on purpose")
    assert states_of(calibrated) == before


def test_quant_state_ends_for_what_took_a_slot(fitted):
    before = mixed(fitted)
    with fitted.quant_state(True, False):
        fitted.freeze()
    assert all(isinstance(quantizer, FrozenQuantizer) for quantizer in fitted.weight_quantizers().values())
    assert states_of(fitted) == before


def test_a_refused_quant_state_changes_nothing(make_qnn):
    qnn = make_qnn()
    before = mixed(qnn)
    with pytest.raises(ValueError, match="no range yet"), qnn.quant_state(True, True):
        pass
    assert states_of(qnn) == before


@torch.no_grad()
def test_soft_rounding_leaves_no_state_behind(fitted):
    convert_to_adaround(fitted)
    with fitted.quant_state(True, False):
        hard = fitted(*some_inputs())
        with pytest.raises(RuntimeError, match="on purpose"), soft_rounding(fitted):
            assert not torch.equal(fitted(*some_inputs()), hard)
            raise RuntimeError("on purpose")
        assert torch.equal(fitted(*some_inputs()), hard)


def test_the_model_is_for_inference(make_unet):
    assert not any(module.training for module in QuantModel(make_unet(), QuantConfig()).modules())


def test_fitted_weights_are_left_alone(fitted):
    layer = fitted.layers()["model.time_embed.0"]
    layer.weight_quantizer.set(torch.tensor(0.5), torch.tensor(3.0))
    quantizers = fitted.weight_quantizers()
    fitted.fit_weights()
    assert layer.weight_quantizer.delta == 0.5
    assert fitted.weight_quantizers() == quantizers


@pytest.mark.parametrize("adaround", [False, True])
@torch.no_grad()
def test_freezing_changes_no_output(fitted, adaround):
    if adaround:
        convert_to_adaround(fitted)
    fitted.set_quant_state(True, True)
    expected = fitted(*some_inputs())
    fitted.freeze()
    assert {type(quantizer) for quantizer in fitted.weight_quantizers().values()} == {FrozenQuantizer}
    assert torch.equal(fitted(*some_inputs()), expected)


def test_freezing_twice_is_freezing_once(fitted):
    fitted.freeze()
    quantizers = fitted.weight_quantizers()
    fitted.freeze()
    assert fitted.weight_quantizers() == quantizers


def test_freezing_keeps_what_is_off_off(fitted):
    before = mixed(fitted)
    fitted.freeze()
    assert states_of(fitted) == before


# --- with merged tokens ------------------------------------------------------------------------------------


@torch.no_grad()
def test_recorded_outputs_with_merged_tokens(calibrated, assert_close, subtests):
    for variant in ["default", "ds2", "all"]:
        for quant_act in [False, True]:
            with subtests.test(variant=variant, quant_act=quant_act):
                recorded = load_file(GOLDENS / "q_tome.safetensors")
                assert TOME[f"input_{variant}"]["robust_to_rounding_noise"]
                case = f"qa{quant_act:d}/tome_{variant}"
                calibrated.set_quant_state(True, quant_act)
                arguments = inputs(recorded, f"in_{variant}")
                unmerged = calibrated(*arguments)
                tomesd.apply_patch(calibrated, **TOME[case]["kwargs"])
                merged, counts = calibrated(*arguments), tomesd.token_report(calibrated)
                tomesd.remove_patch(calibrated)
                assert len(counts) == TOME[case]["patched_blocks"]
                assert_close(merged, recorded[case])
                assert torch.equal(calibrated(*arguments), unmerged)


def test_merging_finds_every_transformer_block(make_qnn):
    qnn = make_qnn()
    blocks = [name for name, module in qnn.model.named_modules() if isinstance(module, BasicTransformerBlock)]
    tomesd.apply_patch(qnn)
    assert [count.name for count in tomesd.token_report(qnn)] == blocks
    assert len(blocks) == 7
    for name in blocks:
        assert isinstance(qnn.model.get_submodule(name), QuantBasicTransformerBlock)
        assert isinstance(qnn.model.get_submodule(name).attn1, QuantCrossAttention)


def test_merging_can_be_taken_off(make_qnn):
    qnn = make_qnn()
    kinds = kinds_of(qnn)
    tomesd.remove_patch(tomesd.apply_patch(qnn))
    assert kinds_of(qnn) == kinds


def test_restore_is_refused_while_patched(make_qnn):
    qnn = make_qnn()
    tomesd.apply_patch(qnn, ratio=0.5)
    with pytest.raises(ValueError, match="remove_patch"):
        qnn.restore()
    tomesd.remove_patch(qnn)
    assert type(qnn.restore().middle_block[1].transformer_blocks[0]) is BasicTransformerBlock


@torch.no_grad()
def test_restore_gives_back_hooks(make_unet):
    unet, calls = make_unet(), []
    for name in ("input_blocks.1.0", "middle_block.1.transformer_blocks.0.attn1", "out.2"):
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    unet(*some_inputs())
    before = list(calls)
    calls.clear()
    QuantModel(unet, QuantConfig()).restore()(*some_inputs())
    assert calls == before and len(before) == 3


def test_no_float_weight_is_kept_once_it_is_forgotten(make_unet):
    unet = make_unet()
    blocks = [weakref.ref(module) for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    weights = [weakref.ref(module.weight) for module in unet.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    qnn = QuantModel(unet, QuantConfig())
    del unet
    for name in qnn.layers():  # as lowering does
        put_module(qnn, name, nn.Identity())
    gc.collect()
    assert all(reference() is not None for reference in (*blocks, *weights))
    qnn.forget_float()
    gc.collect()
    assert not [reference for reference in (*blocks, *weights) if reference() is not None]
    with pytest.raises(ValueError, match="the model is lowered, its float weights are gone: load it anew"):
        qnn.restore()


def test_restore_gives_back_the_training_mode(make_unet):
    unet = make_unet().train()
    unet.middle_block[0].eval()
    before = {name: module.training for name, module in unet.named_modules()}
    qnn = QuantModel(unet, QuantConfig())
    assert not unet.input_blocks[1][0].training
    assert {name: module.training for name, module in qnn.restore().named_modules()} == before


def test_a_layer_that_cannot_be_quantized_leaves_the_unet_alone(make_unet):
    unet = make_unet()
    unet.out[2].padding_mode = "reflect"
    with pytest.raises(ValueError, match="zero padding"):
        QuantModel(unet, QuantConfig())
    assert not any("Quant" in type(module).__name__ for module in unet.modules())


def test_ranges_stay_in_float32_when_the_model_is_cast(make_qnn):
    qnn = make_qnn()
    quantizer = qnn.layers()["model.out.2"].act_quantizer
    quantizer.set(torch.tensor(1e-3), torch.tensor(65535.0))
    qnn.half()
    assert qnn.layers()["model.out.2"].weight.dtype == torch.float16
    assert quantizer.delta == torch.tensor(1e-3) and quantizer.zero_point == 65535
