"""Which inputs get more bits: the estimate of their errors, the choice, and a calibration that makes it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qdiff.calibrate import Step, calibrate, calibration_steps, step_work
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache
from qdiff.checkpoint import load_cali_ckpt, read_cali_header, save_cali_ckpt
from qdiff.config import MixConfig
from qdiff.observers import fit_activations
from qdiff.resume import ProgressFolder
from qdiff.sensitivity import act_sensitivities, mix_activations, most_sensitive

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    tensors = load_file(GOLDENS / "q_cali_data.safetensors")
    return CalibrationSet(tensors["xs"][:6], tensors["ts"][:6], tensors["cs"][:6])


@pytest.fixture
def fitted(make_qnn, data):
    qnn = make_qnn(act_bit=5)
    qnn.requires_grad_(False)
    qnn.fit_weights()
    fit_activations(qnn, data, 6)
    return qnn


@torch.no_grad()
def error_of(qnn, name, data, step):
    """The squared error of eps by differences: with `step` times the error of the quantized input, over step^2."""
    quantizer = qnn.input_quantizers()[name]
    with qnn.quant_state(True, False):
        exact = qnn(*data.batch(slice(0, 6), CPU)).double()
        quantizer.enabled = True
        hook = quantizer.register_forward_hook(lambda _, args, output: args[0] + step * (output - args[0]))
        moved = qnn(*data.batch(slice(0, 6), CPU)).double()
        hook.remove()
        quantizer.enabled = False
    return ((moved - exact) / step).square().sum().item() / len(data)


@pytest.mark.slow
def test_sensitivities_are_the_errors_of_eps_to_first_order(fitted, data):
    before = fitted(*data.batch(slice(0, 6), CPU))
    estimates = act_sensitivities(fitted, data, 3, probes=40)
    assert estimates.keys() == fitted.input_quantizers().keys()
    for name in (
        "model.input_blocks.0.0.act_quantizer",
        "model.middle_block.1.transformer_blocks.0.ff.net.2.act_quantizer",
        "model.output_blocks.0.0.skip_connection.act_quantizer_0",
        "model.middle_block.0.emb_layers.1.act_quantizer",
    ):
        exact = error_of(fitted, name, data, 0.02)
        assert exact > 0 and abs(estimates[name] / exact - 1) < 0.3, (name, estimates[name], exact)
    assert torch.equal(fitted(*data.batch(slice(0, 6), CPU)), before)  # no hook and no switch is left


def test_the_same_estimates_with_gradient_checkpointing(fitted, data):
    plain = act_sensitivities(fitted, data, 6, probes=1)
    for module in fitted.modules():
        for name in ("use_checkpoint", "checkpoint"):
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, True)
    again = act_sensitivities(fitted, data, 6, probes=1)
    assert all(abs(again[name] - value) <= 1e-4 * value for name, value in plain.items())


def test_the_choice():
    errors = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 1.0}
    for amount, chosen in ((1, "b"), (2, "bc"), (3, "bca"), (9, "bcad"), (0.5, "b"), (0.51, "bc"), (0.85, "bca")):
        assert "".join(most_sensitive(errors, amount)) == chosen, amount


def test_more_bits_where_they_count_make_the_error_smaller(fitted, data):
    batch = data.batch(slice(0, 6), CPU)

    @torch.no_grad()
    def errors():
        with fitted.quant_state(True, False):
            exact = fitted(*batch)
        fit_activations(fitted, data, 6)
        with fitted.quant_state(True, True):
            return (fitted(*batch) - exact).square().mean().item()

    before = errors()
    shares = mix_activations(fitted, data, MixConfig(amount=20, bits=12, samples=6), 6)
    assert len(shares) == 20 and fitted.config.mixed_act == dict.fromkeys(shares, 12)
    assert list(shares.values()) == sorted(shares.values(), reverse=True) and sum(shares.values()) > 0.5
    chosen = errors()
    fitted.mix_act(dict.fromkeys(list(set(fitted.input_quantizers()) - set(shares))[:20], 12))
    assert chosen < 0.7 * before and chosen < 0.8 * errors()


def test_a_calibration_mixes_and_resumes(make_qnn, data, tmp_path):
    mix, files = MixConfig(amount=3, samples=4, probes=1), []
    steps = [Step(phase="fitting"), Step(phase="mixing"), Step(phase="ranges")]
    for stopped in (False, True):
        qnn, folder = make_qnn(), ProgressFolder(tmp_path / "progress")
        assert calibration_steps(qnn, None, mix) == steps
        folder.begin({})
        work = dict.fromkeys(steps, 0)

        def count(step, n, work=work):
            work[step] += n

        options = {"cache": Cache(10**9, tmp_path), "mix": mix, "batch_size": 4, "folder": folder}
        for step, _ in calibrate(qnn, data, None, **options, progress=count):
            if stopped and step.phase == "mixing":
                break
        if stopped:
            qnn = make_qnn()
            for _ in calibrate(qnn, data, None, **options, progress=count):
                pass
        assert work == {step: step_work(step, None, len(data), mix, layers=len(qnn.layers())) for step in steps}
        files.append(tmp_path / f"{stopped}.safetensors")
        save_cali_ckpt(qnn, files[-1])
    assert files[0].read_bytes() == files[1].read_bytes()
    config = read_cali_header(files[0]).config
    assert len(config.mixed_act) == 3 and set(config.mixed_act.values()) == {12}
    fresh = make_qnn(mixed_act=config.mixed_act)
    load_cali_ckpt(fresh, files[0])
    assert torch.equal(fresh(*data.batch(slice(0, 6), CPU)), qnn(*data.batch(slice(0, 6), CPU)))
