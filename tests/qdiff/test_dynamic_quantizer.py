"""Quantizers that take their ranges from each input, alone and in a model."""

import pytest
import torch
from torch import nn

from qdiff import QuantConfig, load_cali_ckpt, save_cali_ckpt
from qdiff.calibrate import calibrate, calibration_steps
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache
from qdiff.config import MixConfig, ReconConfig
from qdiff.quant_layer import QuantModule, SplitQuantModule
from qdiff.quant_state import activation_tensors
from qdiff.quantizers import DynamicQuantizer

LAST = "model.out.2.act_quantizer"


@pytest.fixture
def data(golden):
    x, t, context = (golden[f"in_B1/{name}"] for name in ("x", "t", "context"))
    noise = torch.randn(4, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    return CalibrationSet(noise, t[:1].repeat(4), context[:1].repeat(4, 1, 1))


def by_hand(values, bits, symmetric):
    """Quantize a list of numbers by one range."""
    low, high = min(0.0, *values), max(0.0, *values)
    steps = 2**bits - 1
    if symmetric:
        delta, zero, first = max(-low, high) / (steps // 2), 0, -(steps + 1) // 2
    else:
        delta, first = (high - low) / steps, 0
        zero = round(-low / delta)
    codes = [min(max(round(x / delta) + zero, first), first + steps) for x in values]
    return [(code - zero) * delta for code in codes]


def test_each_token_and_each_sample_has_the_range_of_its_extremes_and_0():
    x = torch.tensor([[[-1.1, 0.3, 2.0], [5.0, 7.0, 6.1]], [[-0.02, -0.05, -0.03], [0.001, 0.0, -0.004]]])
    for bits in (4, 8, 12):
        for symmetric in (False, True):
            tokens = DynamicQuantizer(bits, symmetric, per="token")(x)
            samples = DynamicQuantizer(bits, symmetric, per="sample")(x)
            for i in range(2):
                expected = torch.tensor(by_hand(x[i].flatten().tolist(), bits, symmetric))
                torch.testing.assert_close(samples[i].flatten(), expected, rtol=1e-5, atol=1e-7)
                for j in range(2):
                    expected = torch.tensor(by_hand(x[i, j].tolist(), bits, symmetric))
                    torch.testing.assert_close(tokens[i, j], expected, rtol=1e-5, atol=1e-7)


def test_zeros_stay_zeros_and_dtypes_stay():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for per in ("token", "sample"):
            y = DynamicQuantizer(per=per)(torch.zeros(2, 3, 4, dtype=dtype))
            assert y.dtype == dtype and not y.any()


def test_gradients_go_straight_through():
    x = torch.randn(3, 5, requires_grad=True)
    DynamicQuantizer(4, per="token")(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones(3, 5))


def test_it_needs_no_fitting_and_can_be_switched_off():
    quantizer, x = DynamicQuantizer(per="token"), torch.randn(2, 3)
    assert quantizer.is_set
    quantizer.enabled = False
    assert quantizer(x) is x
    with pytest.raises(ValueError, match="must be token or sample"):
        DynamicQuantizer(per="batch")


def test_linear_layers_have_ranges_of_tokens_and_convolutions_of_samples():
    config = QuantConfig(act_range="dynamic", act_bit=6, act_symmetric=True)
    for layer, per in ((nn.Linear(3, 2), "token"), (nn.Conv2d(3, 2, 1), "sample"), (nn.Conv1d(3, 2, 1), "sample")):
        quantizer = QuantModule(layer, config).act_quantizer
        assert isinstance(quantizer, DynamicQuantizer)
        assert (quantizer.per, quantizer.n_bits, quantizer.symmetric) == (per, 6, True)
    split = SplitQuantModule(nn.Conv2d(4, 2, 1), config, 1)
    split.weight_quantizer.enabled = split.weight_quantizer_0.enabled = False
    x = torch.cat([torch.randn(1, 1, 4, 4), 1000 * torch.randn(1, 3, 4, 4)], dim=1)
    error = (split.quantized_input(x) - x).abs().amax((0, 2, 3))
    assert error[0] < 0.1 < error[1:].max()  # the halves have ranges of their own
    assert isinstance(
        QuantModule(nn.Linear(3, 2), QuantConfig(act_range="dynamic", quant_act=False)).act_quantizer, nn.Identity
    )


def test_a_file_holds_the_setting_and_no_ranges_of_dynamic_inputs(make_qnn, data, tmp_path):
    qnn = make_qnn(act_range="dynamic", mixed_act={LAST: 12})
    steps = list(calibrate(qnn, data, None, cache=Cache(2**30, tmp_path)))
    assert [step.phase for step, _ in steps] == ["fitting", "ranges"]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in activation_tensors(qnn)} == {
        f"act_quantizer_{operand}" for operand in "qkvw"
    }
    file = tmp_path / "cali.safetensors"
    save_cali_ckpt(qnn, file)
    other = make_qnn(act_range="dynamic", mixed_act={LAST: 12})
    assert load_cali_ckpt(other, file).config == qnn.config
    inputs = data.batch(slice(0, 2), torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(other(*inputs), qnn(*inputs))
    with pytest.raises(ValueError, match=r"the model has act_range static, but .* was made with act_range dynamic"):
        load_cali_ckpt(make_qnn(mixed_act={LAST: 12}), file)
    with pytest.raises(ValueError, match="has a fixed range for each activation"):
        save_cali_ckpt(qnn, tmp_path / "cali.pth", format="qdiff")
    weights = make_qnn(quant_act=False)  # a file with activations serves a model without
    load_cali_ckpt(weights, file)


def test_a_file_of_q_diffusion_is_static(make_qnn, golden_ckpt):
    qnn = make_qnn(act_range="dynamic")
    with pytest.raises(ValueError, match="has static ranges of activations, and the model's are dynamic"):
        load_cali_ckpt(qnn, golden_ckpt)


def test_step_sizes_are_learned_where_ranges_are_static(make_qnn):
    recon = ReconConfig(rounding="nearest", iters_a=1)
    learned = [
        {step.unit for step in calibration_steps(make_qnn(act_range=act_range), recon) if step.unit}
        for act_range in ("static", "dynamic")
    ]
    assert learned[1] and learned[1] < learned[0]
    assert "model.out.2" in learned[0] - learned[1]
    assert all("transformer_blocks" in name for name in learned[1])  # their attention has static operands


def test_mixing_ranks_dynamic_inputs(make_qnn, data, tmp_path):
    qnn = make_qnn(act_range="dynamic")
    mix = MixConfig(amount=2, samples=2, probes=1)
    _, (_, report), _ = calibrate(qnn, data, None, cache=Cache(2**30, tmp_path), mix=mix)
    assert len(report["shares"]) == 2 and set(qnn.config.mixed_act) == set(report["shares"])
    assert {qnn.input_quantizers()[name].n_bits for name in report["shares"]} == {12}


def test_rounding_sees_dynamic_inputs(make_qnn, data, tmp_path):
    """Weights are rounded for the inputs that they will get, by GPTQ and by AdaRound."""
    for settings in (
        {"rounding": "gptq"},
        {"rounding": "gptq", "sym": True},
        {"rounding": "adaround", "iters_w": 3, "lr_w": 0.5},
    ):
        recon = ReconConfig(iters_a=0, batch_size=2, **settings)
        codes = []
        for act_range in ("static", "dynamic"):
            qnn = make_qnn(act_range=act_range, act_bit=3)
            list(calibrate(qnn, data, recon, cache=Cache(2**30, tmp_path), batch_size=4))
            codes.append([quantizer.packed for quantizer in qnn.weight_quantizers().values()])
        assert any(not torch.equal(a, b) for a, b in zip(*codes, strict=True)), settings
