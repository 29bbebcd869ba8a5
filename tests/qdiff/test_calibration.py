"""Calibration data, what is captured with it, and the ranges fitted to it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tomesd
from qdiff.calibration_set import CalibrationSet, chosen_calls, from_qdiffusion, recorded_inputs
from qdiff.capture import Cache, capture
from qdiff.observers import Observer, fit_activations
from qdiff.quantizers import UniformAffineQuantizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    tensors = load_file(Path(__file__).resolve().parents[1] / "goldens" / "q_cali_data.safetensors")
    return CalibrationSet(tensors["xs"][:6], tensors["ts"][:6], tensors["cs"][:6])


def test_saved_data_comes_back(data, tmp_path):
    path = tmp_path / "data.safetensors"
    CalibrationSet(data.x, data.t, data.context, {"seed": 3}).save(path)
    loaded = CalibrationSet.load(path)
    assert torch.equal(loaded.x, data.x) and torch.equal(loaded.t, data.t) and torch.equal(loaded.context, data.context)
    assert loaded.facts == {"seed": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["data.safetensors"]


def test_qdiffusion_layout_counts_both_branches_at_spread_timesteps(tmp_path):
    x = torch.arange(4.0)[:, None, None, None, None].expand(4, 3, 4, 2, 2).clone()  # [steps, samples, C, h, w]
    content = {
        "xs": list(x),
        "ts": [torch.full((3,), 100.0 * i) for i in range(4)],
        "cs": [torch.ones(3, 5, 8)] * 4,
        "ucs": [torch.zeros(3, 5, 8)] * 4,
    }
    torch.save(content, tmp_path / "data.pt")
    data = CalibrationSet.load(tmp_path / "data.pt", steps=2, per_step=2)
    assert len(data) == 8
    assert data.t.tolist() == [0, 0, 200, 200] * 2
    assert data.x[:, 0, 0, 0].tolist() == [0, 0, 2, 2] * 2
    assert data.context.mean(dim=[1, 2]).tolist() == [1] * 4 + [0] * 4


def test_other_content_is_refused(subtests):
    for content, message in [
        ({"xs": [torch.zeros(1, 4, 2, 2)]}, "xs and ts"),
        ([1, 2], "xs and ts"),
        ({"xs": [torch.zeros(1, 4, 2, 2)], "ts": [torch.zeros(2)]}, "as many"),
        ({"xs": [None], "ts": [torch.zeros(2)]}, "damaged"),
    ]:
        with (
            subtests.test(content=content, message=message),
            pytest.raises(ValueError, match=message),
        ):
            from_qdiffusion(content, "file.pt")


def test_data_with_nan_is_refused(data):
    x = data.x.clone()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        CalibrationSet(x, data.t, data.context)


def test_foreign_safetensors_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no calibration data"):
        CalibrationSet.load(tmp_path / "a.safetensors")


def test_a_subset_is_reproducible_and_within_the_data(data):
    subset = data.subset(3, seed=5)
    assert torch.equal(subset.x, data.subset(3, seed=5).x)
    places = [int((data.x == x).flatten(1).all(1).nonzero()) for x in subset.x]
    assert len(set(places)) == 3 and places == sorted(places)
    assert data.subset(100, seed=5) is data


def test_shuffled_data_has_the_same_samples_in_an_order_of_the_seed(data):
    orders = []
    for seed in (0, 0, 1, 2):
        shuffled = data.shuffled(seed)
        places = [int((data.x == x).flatten(1).all(1).nonzero()) for x in shuffled.x]
        assert sorted(places) == list(range(len(data)))
        assert torch.equal(shuffled.t, data.t[places]) and torch.equal(shuffled.context, data.context[places])
        orders.append(places)
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3


def test_chosen_calls_are_spread(subtests):
    for calls, steps, chosen in [(10, 5, [0, 2, 4, 6, 8]), (4, 9, [0, 1, 2, 3]), (51, 2, [0, 25])]:
        with subtests.test(calls=calls, steps=steps, chosen=chosen):
            assert chosen_calls(calls, steps) == chosen


def test_recorded_inputs_are_those_of_the_wanted_calls(make_unet, data):
    unet = make_unet()
    with torch.no_grad(), recorded_inputs(unet, [1]) as kept:
        for i in range(3):
            unet(data.x[i : i + 1], data.t[i : i + 1], context=data.context[i : i + 1])
    assert len(kept) == 1 and torch.equal(kept[0][0], data.x[1:2]) and torch.equal(kept[0][2], data.context[1:2])
    assert not unet._forward_pre_hooks


@torch.no_grad()
def test_captured_inputs_give_the_captured_output(make_qnn, data, tmp_path, assert_close, subtests):
    for limit in [0, 10**9]:
        with subtests.test(limit=limit):
            qnn = make_qnn()
            for name in ("model.middle_block.1.transformer_blocks.0", "model.output_blocks.0.0", "model.out.2"):
                cache = Cache(limit, tmp_path / "cache")
                unit = qnn.units()[name]
                inputs = capture(qnn, unit, data, 4, cache)
                (output,) = capture(qnn, unit, data, 4, cache, output=True)
                assert len(output) == len(data)
                assert_close(unit(*inputs), output)
                cache.clear()
            assert not (tmp_path / "cache").exists()


def test_files_that_killed_processes_left_are_swept(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for rank in range(3):  # there were more of them
        (folder / f"activations-{rank}-0.bin").write_bytes(bytes(8))
    Cache(0, folder).clear()
    assert len(list(folder.iterdir())) == 2  # other processes may be using theirs
    Cache(0, folder).sweep()
    assert not folder.exists()


@torch.no_grad()
def test_every_sample_is_captured_the_last_batch_included(make_qnn, data, tmp_path):
    qnn = make_qnn()
    (x,) = capture(qnn, qnn.units()["model.input_blocks.0.0"], data, 4, Cache(10**9, tmp_path))
    assert torch.equal(x, data.x)


@torch.no_grad()
def test_a_merged_unit_gives_the_captured_output_odd_batches_included(make_qnn, data, tmp_path, assert_close):
    qnn = make_qnn()
    tomesd.apply_patch(qnn, ratio=0.5)
    unit = qnn.units()["model.output_blocks.3.1.transformer_blocks.0"]
    odd = CalibrationSet(data.x[:5], data.t[:5], data.context[:5])
    with tomesd.pinned(qnn, 7):
        inputs = capture(qnn, unit, odd, 2, Cache(10**9, tmp_path))
        (output,) = capture(qnn, unit, odd, 2, Cache(10**9, tmp_path), output=True)
        for part in (slice(0, 5), slice(0, 3), slice(1, 5)):
            assert_close(unit(*(x[part] for x in inputs)), output[part])
    with tomesd.pinned(qnn, 8):
        (other,) = capture(qnn, unit, odd, 2, Cache(10**9, tmp_path), output=True)
    assert not torch.equal(other, output)


@torch.no_grad()
def test_full_ranges_span_all_batches(make_qnn, data, tmp_path):
    qnn = make_qnn(act_scale_method="max")
    qnn.fit_weights()
    fit_activations(qnn, data, 4)
    with qnn.quant_state(True, False):
        for name in ("model.input_blocks.2.0.op", "model.out.2"):
            (x,) = capture(qnn, qnn.units()[name], data, 4, Cache(10**9, tmp_path))
            low, high = min(x.min().item(), 0), max(x.max().item(), 0)
            quantizer = qnn.units()[name].act_quantizer
            torch.testing.assert_close(quantizer.delta.item(), (high - low) / 255, rtol=1e-6, atol=0)
    assert all(quantizer.is_set for quantizer in qnn.act_quantizers().values())


@torch.no_grad()
def test_running_ranges_are_averages_over_batches(make_qnn, data):
    qnn = make_qnn()
    qnn.fit_weights()
    fit_activations(qnn, data, 2, running=True, seed=3)
    low = high = None
    for x in data.shuffled(3).x.split(2):
        low = x.min() if low is None else 0.95 * low + 0.05 * x.min()
        high = x.max() if high is None else 0.95 * high + 0.05 * x.max()
    quantizer = qnn.layers()["model.input_blocks.0.0"].act_quantizer
    torch.testing.assert_close(quantizer.delta, (high - low) / 255)
    assert quantizer.zero_point == (-low / quantizer.delta).round()


@torch.no_grad()
def test_running_ranges_do_not_depend_on_the_order_of_timesteps(make_qnn, data):
    scale = torch.linspace(0.1, 2, 24)[:, None, None, None]  # samples grow with the timestep
    places = torch.arange(24) % len(data)
    growing = CalibrationSet(data.x[places] * scale, data.t[places], data.context[places])
    shrinking = CalibrationSet(growing.x.flip(0), growing.t.flip(0), growing.context.flip(0))
    ranges = []
    for samples in (growing, shrinking):
        qnn = make_qnn()
        qnn.fit_weights()
        fit_activations(qnn, samples, 4, running=True)
        ranges.append(qnn.layers()["model.input_blocks.0.0"].act_quantizer.delta)
    widest = CalibrationSet(growing.x[-4:], growing.t[-4:], growing.context[-4:])
    fit_activations(qnn, widest, 4)
    full = qnn.layers()["model.input_blocks.0.0"].act_quantizer.delta
    for delta in ranges:
        assert 0.6 * full < delta <= full


@torch.no_grad()
def test_fitting_leaves_the_model_as_it_was(make_qnn, data, monkeypatch):
    monkeypatch.setattr("qdiff.observers.SAMPLED_VALUES", 128)
    qnn = make_qnn(act_scale_method="mse")
    qnn.fit_weights()
    before = {name: type(module) for name, module in qnn.named_modules()}
    states = {name: quantizer.enabled for name, quantizer in qnn.act_quantizers().items()}
    fit_activations(qnn, data, 4)
    assert {name: type(module) for name, module in qnn.named_modules()} == before
    assert {name: quantizer.enabled for name, quantizer in qnn.act_quantizers().items()} == states


@torch.no_grad()
def test_ranges_of_least_error_beat_full_ranges_on_outliers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator)
    x[0] = 12.0
    errors = {}
    for method in ("max", "mse"):
        quantizer = UniformAffineQuantizer(4, scale_method=method)
        observer = Observer(quantizer, 2000, 0, running=False)
        for part in x.split(1000):
            assert observer(part) is part
            observer.end_batch()
        observer.fit()
        errors[method] = (quantizer(x) - x).abs().pow(2.4).mean()
    assert errors["mse"] < 0.8 * errors["max"]
