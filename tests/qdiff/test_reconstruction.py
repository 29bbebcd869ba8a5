"""Reconstruction: its loss, that it helps, that it can be resumed, and that processes share it."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import tomesd
from qdiff import ReconConfig
from qdiff.adaptive_rounding import AdaRoundQuantizer, round_exponent, round_penalty
from qdiff.calibrate import Step, calibrate, calibration_steps
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache
from qdiff.checkpoint import load_cali_ckpt, save_cali_ckpt
from qdiff.observers import fit_activations
from qdiff.quantizers import FrozenQuantizer, UniformAffineQuantizer, lp_loss
from qdiff.recomputation import Recomputed, recomputed
from qdiff.reconstruction import block_reconstruction, layer_reconstruction, unit_reconstruction
from qdiff.resume import ProgressFolder

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
UNITS = ("model.input_blocks.0.0", "model.input_blocks.1.0", "model.input_blocks.1.1.transformer_blocks.0")
SETTINGS = {"iters_w": 30, "iters_a": 12, "batch_size": 4, "lr_w": 1e-2, "lr": 1e-2, "grad_checkpoint": False}


@pytest.fixture(scope="module")
def unit_golden():
    return load_file(GOLDENS / "q_unit.safetensors")


@pytest.fixture(scope="module")
def data():
    tensors = load_file(GOLDENS / "q_cali_data.safetensors")
    return CalibrationSet(tensors["xs"][:6], tensors["ts"][:6], tensors["cs"][:6])


@pytest.fixture
def only(monkeypatch):
    """(qnn) -> the model with but a few units, so that a calibration is short."""

    def reduce(qnn):
        units = {name: unit for name, unit in qnn.units().items() if name in UNITS}
        monkeypatch.setattr(qnn, "units", lambda: units)
        return qnn

    return reduce


def test_exponent_falls_linearly_after_the_warm_up(unit_golden):
    recorded = unit_golden["loss/temp_decay_tmax100_start0.2_b20_2"]
    config = ReconConfig(b_start=20, b_end=2, warmup=0.2)
    for step in range(100):
        b = round_exponent(step, 100, config)
        assert (b is None) == (step < 20)
        if b is not None:
            assert b == pytest.approx(recorded[step].item(), rel=1e-6)


def test_loss_of_a_whole_layer(unit_golden):
    golden = {key.split("/")[-1]: value for key, value in unit_golden.items() if key.startswith("loss/layer/")}
    weight, x, alpha = golden["weight"], golden["x"], golden["alpha"]
    quantizer = UniformAffineQuantizer(4, channel_wise=True).fit(weight)
    adaround = AdaRoundQuantizer.from_uniform(quantizer, weight)
    adaround.alpha.data.copy_(alpha)
    adaround.soft = True
    target = torch.nn.functional.linear(x, weight, golden["bias"])
    with torch.no_grad():
        output = torch.nn.functional.linear(x, adaround(weight), golden["bias"])
        config = ReconConfig()
        for count, expected in enumerate(golden["total_loss_by_count"], start=1):
            penalty = round_penalty([adaround], round_exponent(count, 50, config), config.weight)
            torch.testing.assert_close(lp_loss(output, target, 2.0) + penalty, expected, rtol=1e-5, atol=1e-6)


def learn(qnn, data, tmp_path, name, phase, **settings):
    config = ReconConfig(**{**SETTINGS, **settings})
    return unit_reconstruction(qnn, name, data, config, phase=phase, cache=Cache(10**9, tmp_path))


def test_learned_rounding_is_better_than_nearest(make_qnn, data, tmp_path):
    qnn = make_qnn(quant_act=False)
    qnn.fit_weights()
    for name in UNITS:
        report = learn(qnn, data, tmp_path, name, "weights")
        assert report.improved and report.after < report.before, name
        unit = qnn.units()[name]
        layers = [layer for other, layer in qnn.layers().items() if other == name or other.startswith(f"{name}.")]
        assert layers and all(isinstance(layer.weight_quantizer, FrozenQuantizer) for layer in layers), name
        assert not any(parameter.requires_grad for parameter in unit.parameters()), name


def test_a_unit_never_ends_worse(make_qnn, data, tmp_path, monkeypatch):
    qnn = make_qnn()
    qnn.fit_weights()
    fit_activations(qnn, data, 6)
    name = UNITS[1]
    layer = qnn.units()[name].in_layers[2]
    nearest, delta = layer.weight_quantizer.codes(layer.weight), layer.act_quantizer.delta.clone()

    def learn_rubbish(forward, samples, parameters, *args, **kwargs):
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(3.0)

    monkeypatch.setattr("qdiff.reconstruction.minimize", learn_rubbish)
    for phase in ("weights", "activations"):
        report = learn(qnn, data, tmp_path, name, phase)
        assert not report.improved and report.after == report.before
    assert torch.equal(layer.weight_quantizer.codes(None), nearest)
    assert torch.equal(layer.act_quantizer.delta, delta)


def test_both_halves_of_a_split_layer_learn(make_qnn, data, tmp_path):
    qnn = make_qnn(quant_act=False)
    qnn.fit_weights()
    layer = qnn.layers()["model.output_blocks.0.0.skip_connection"]
    nearest = {name: getattr(layer, name).codes(part) for name, part in layer.weight_parts().items()}
    learn(qnn, data, tmp_path, "model.output_blocks.0.0", "weights")
    for name, codes in nearest.items():
        assert not torch.equal(getattr(layer, name).codes(None), codes), name


def test_step_sizes_learn_and_stay_positive(make_qnn, data, tmp_path, golden_ckpt):
    qnn = make_qnn()
    load_cali_ckpt(qnn, golden_ckpt)
    name = UNITS[2]
    for quantizer in qnn.act_quantizers().values():  # far too wide: there is much to gain
        quantizer.delta = quantizer.delta * 4
    before = {n: q.delta.clone() for n, q in qnn.act_quantizers().items()}
    report = learn(qnn, data, tmp_path, name, "activations", iters_a=30, lr=5e-2)
    assert report.improved and report.after < 0.95 * report.before
    for n, quantizer in qnn.act_quantizers().items():
        assert quantizer.delta > 0
        assert torch.equal(quantizer.delta, before[n]) != n.startswith(name), n  # attention operands included


def test_the_rest_of_the_model_is_left_as_it_was(make_qnn, data, tmp_path):
    qnn = make_qnn(quant_act=False)
    qnn.fit_weights()
    qnn.train()
    states = {name: quantizer.enabled for name, quantizer in qnn.weight_quantizers().items()}
    others = {n: q for n, q in qnn.weight_quantizers().items() if not n.startswith(f"{UNITS[1]}.")}
    learn(qnn, data, tmp_path, UNITS[1], "weights", iters_w=2)
    assert {name: quantizer.enabled for name, quantizer in qnn.weight_quantizers().items()} == states
    assert all(qnn.weight_quantizers()[n] is q for n, q in others.items())
    assert qnn.training and qnn.units()[UNITS[1]].training


def test_gradient_checkpointing_changes_nothing(make_qnn, data, tmp_path):
    results = []
    for checkpointing in (False, True):
        qnn = make_qnn(quant_act=False)
        qnn.fit_weights()
        report = learn(qnn, data, tmp_path, UNITS[1], "weights", iters_w=4, grad_checkpoint=checkpointing)
        results.append(report.after)
    assert results[0] == results[1]


def test_parts_are_recomputed_and_put_back(make_qnn, golden):
    qnn = make_qnn()
    unit = qnn.units()[UNITS[1]]
    parts, names = dict(unit.named_children()), [name for name, _ in qnn.named_modules()]
    x, emb = torch.randn(2, unit.channels, 4, 4), torch.randn(2, unit.emb_layers[1].weight.shape[1])
    expected = unit(x, emb)
    seen = []
    handle = unit.out_layers[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match="stop"), recomputed(unit):
        assert isinstance(unit.in_layers, Recomputed) and unit.in_layers[-1] is parts["in_layers"][-1]
        assert list(unit.out_layers[1:]) == list(parts["out_layers"][1:])
        with pytest.raises(TypeError, match="no layers"):
            Recomputed(nn.Linear(2, 2))[0]
        output = unit(x.requires_grad_(), emb)
        assert torch.equal(output, expected) and len(seen) == 1
        output.sum().backward()
        assert len(seen) == 2  # computed anew
        raise RuntimeError("stop")
    handle.remove()
    assert dict(unit.named_children()) == parts
    assert [name for name, _ in qnn.named_modules()] == names


def test_merged_tokens_are_merged_alike_in_the_recomputation(make_qnn, data, tmp_path):
    results = []
    for checkpointing in (False, True):
        qnn = make_qnn(quant_act=False)
        qnn.fit_weights()
        tomesd.apply_patch(qnn, ratio=0.5, merge_crossattn=True, merge_mlp=True, max_downsample=8)
        with tomesd.pinned(qnn, seed=0):
            report = learn(qnn, data, tmp_path, UNITS[2], "weights", iters_w=6, grad_checkpoint=checkpointing)
        counts = {count.name: count for count in tomesd.token_report(qnn)}
        assert any(0 < count.tokens_processed < count.tokens_in for count in counts.values())
        unit = qnn.units()[UNITS[2]]
        codes = [m.weight_quantizer.codes(None) for m in unit.modules() if hasattr(m, "weight_quantizer")]
        results.append((report.before, report.after, codes))
    (*errors, codes), (*other_errors, other_codes) = results
    assert errors == other_errors
    assert all(torch.equal(one, other) for one, other in zip(codes, other_codes, strict=True))


def test_blocks_and_layers_are_told_apart(make_qnn, data, tmp_path):
    qnn = make_qnn(quant_act=False)
    options = {"phase": "weights", "cache": Cache(10**9, tmp_path)}
    with pytest.raises(ValueError, match="no block"):
        block_reconstruction(qnn, UNITS[0], data, ReconConfig(), **options)
    with pytest.raises(ValueError, match="no layer"):
        layer_reconstruction(qnn, UNITS[1], data, ReconConfig(), **options)
    with pytest.raises(ValueError, match="phase"):
        unit_reconstruction(qnn, UNITS[1], data, ReconConfig(), phase="both", cache=options["cache"])


# --- whole calibrations ------------------------------------------------------------------------------------


def test_steps_are_weights_then_ranges_then_activations(make_qnn):
    qnn = make_qnn()
    units = list(qnn.units())
    expected = [Step(phase="weights", unit=unit) for unit in units]
    expected.insert(0, Step(phase="fitting"))
    expected += [Step(phase="ranges"), *(Step(phase="activations", unit=unit) for unit in units)]
    assert calibration_steps(qnn, ReconConfig()) == expected
    assert calibration_steps(qnn, None) == [Step(phase="fitting"), Step(phase="ranges")]
    assert calibration_steps(make_qnn(quant_act=False), None) == [Step(phase="fitting")]


def whole(qnn, data, tmp_path, folder=None, stop_after=None):
    config = ReconConfig(**{**SETTINGS, "iters_w": 3, "iters_a": 2})
    options = {"cache": Cache(10**9, tmp_path / "cache"), "batch_size": 4, "folder": folder}
    for number, _ in enumerate(calibrate(qnn, data, config, **options), start=1):
        if number == stop_after:
            return None
    path = tmp_path / "cali.safetensors"
    save_cali_ckpt(qnn, path)
    return path.read_bytes()


def test_a_resumed_calibration_ends_with_the_same_file(make_qnn, only, data, tmp_path):
    uninterrupted = whole(only(make_qnn()), data, tmp_path)
    for stop_after in (1, 2, 4, 5, 7):
        folder = ProgressFolder(tmp_path / "progress")
        folder.begin({"seed": 1})
        assert whole(only(make_qnn()), data, tmp_path, folder, stop_after) is None, stop_after
        assert whole(only(make_qnn()), data, tmp_path, folder) == uninterrupted, stop_after


def test_finished_steps_are_not_done_again(make_qnn, only, data, tmp_path, monkeypatch):
    folder = ProgressFolder(tmp_path / "progress")
    folder.begin({"seed": 1})
    whole(only(make_qnn()), data, tmp_path, folder)
    monkeypatch.setattr("qdiff.calibrate.unit_reconstruction", None)
    monkeypatch.setattr("qdiff.calibrate.fit_activations", None)
    monkeypatch.setattr("qdiff.quant_layer.QuantModule.fit_weight", None)
    assert whole(only(make_qnn()), data, tmp_path, folder)


def test_a_damaged_step_and_those_after_it_are_done_again(make_qnn, only, data, tmp_path, caplog):
    uninterrupted = whole(only(make_qnn()), data, tmp_path)
    folder = ProgressFolder(tmp_path / "progress")
    for number in (0, 2, 3):
        folder.begin({"seed": 1})
        whole(only(make_qnn()), data, tmp_path, folder)
        (tmp_path / "progress" / f"step-{number:04}.safetensors").write_bytes(b"rubbish")
        caplog.clear()
        assert whole(only(make_qnn()), data, tmp_path, folder) == uninterrupted, number
        assert [record.message.split(":")[0].split("/")[-1] for record in caplog.records] == [
            f"step-{number:04}.safetensors is damaged"
        ]
        assert folder.load(number) is not None


def test_other_settings_are_refused(tmp_path):
    folder = ProgressFolder(tmp_path / "progress")
    folder.begin({"seed": 1, "samples": 8})
    folder.check({"seed": 1, "samples": 8})
    with pytest.raises(ValueError, match="seed \\(1 there, 2 here\\)"):
        folder.check({"seed": 2, "samples": 8})
    folder.save(0, {"a": torch.zeros(2)}, {"unit": "x"})
    assert folder.load(0)[1] == {"unit": "x"} and folder.load(1) is None
    settings = tmp_path / "progress" / "settings.json"
    settings.write_text(settings.read_text().replace('"layout": 2', '"layout": 1'))
    with pytest.raises(ValueError, match="layout \\(1 there, 2 here\\)"):  # of an earlier version
        folder.check({"seed": 1, "samples": 8})
    folder.remove()
    assert not (tmp_path / "progress").exists()


def test_the_baseline_rounds_to_nearest(make_qnn, data, tmp_path):
    qnn = make_qnn()
    expected = {}
    for name, layer in qnn.layers().items():
        for part_name, part in layer.weight_parts().items():
            quantizer = UniformAffineQuantizer(4, channel_wise=True).fit(part)
            expected[f"{name}.{part_name}"] = quantizer.codes(part)
    list(calibrate(qnn, data, None, cache=Cache(10**9, tmp_path), batch_size=4))
    for name, codes in expected.items():
        assert torch.equal(qnn.weight_quantizers()[name].codes(None), codes), name
    assert all(quantizer.enabled for quantizer in qnn.act_quantizers().values())


WORKER = """
import json, sys
import torch, torch.distributed as dist
from safetensors.torch import load_file
from omegaconf import OmegaConf
from ldm.util import instantiate_from_config
from qdiff import QuantConfig, QuantModel, ReconConfig
from qdiff import reconstruction
from qdiff.calibration_set import CalibrationSet
from qdiff.capture import Cache
from pathlib import Path

torch.set_num_threads(1)
if "RANK" in __import__("os").environ:
    dist.init_process_group("gloo")
torch.manual_seed(0)
unet = instantiate_from_config(OmegaConf.load(sys.argv[3] + "/q_unet.yaml")).eval()
for parameter in unet.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
tensors = load_file(sys.argv[3] + "/q_cali_data.safetensors")
data = CalibrationSet(tensors["xs"][:6], tensors["ts"][:6], tensors["cs"][:6])
qnn = QuantModel(unet, QuantConfig(quant_act=False))
qnn.fit_weights()
learned = []
plain = reconstruction.minimize
def noted(forward, samples, parameters, *args, **kwargs):
    plain(forward, samples, parameters, *args, **kwargs)
    learned.extend(torch.cat([parameter.detach().flatten() for parameter in parameters]).tolist())
reconstruction.minimize = noted
config = ReconConfig(iters_w=8, batch_size=4, lr_w=1e-2, grad_checkpoint=False)
cache = Cache(10**9, Path(sys.argv[1]))
report = reconstruction.unit_reconstruction(
    qnn, "model.input_blocks.1.0", data, config, phase="weights", cache=cache, batch_size=4
)
if not dist.is_initialized() or dist.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps({"learned": learned, "before": report.before, "after": report.after}))
"""


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}

    def start(name, **more):
        command = [sys.executable, str(script), str(tmp_path), str(tmp_path / name), str(GOLDENS)]
        return subprocess.Popen(command, env={**environment, **more}, stderr=subprocess.PIPE, text=True)

    processes = [start("one.json"), *(start("two.json", RANK=str(i), **address) for i in range(2))]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert len(one["learned"]) > 1000
    differences = torch.tensor(two["learned"]) - torch.tensor(one["learned"])
    assert differences.abs().mean() < 1e-4  # of steps of 1e-2
    assert two["before"] == pytest.approx(one["before"], rel=1e-4)
    assert two["after"] == pytest.approx(one["after"], rel=1e-2)  # a rounding may tip over
