"""A UNet against a baseline, as in the table of results."""

import json

import pytest
import torch

from dsdiff import DrawOptions, Pipeline, QuantizationOptions
from dsdiff.benchmark import comparison
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED
from dsdiff.models.spec import find_model
from dsdiff.options import MergeOptions, ModelOptions


@pytest.fixture(scope="module")
def spec():
    return find_model(ModelOptions(config=EMBEDDED))


@pytest.fixture(autouse=True)
def one_call_a_measurement(monkeypatch):
    monkeypatch.setattr(comparison, "SECONDS", 0.0)
    monkeypatch.setattr(comparison, "usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def base(spec):
    return Pipeline(spec, device="cpu")


@pytest.fixture(scope="module")
def quantized(spec):
    return Pipeline(spec, device="cpu", quantization=QuantizationOptions(weight_bit=4, quant_act=True, act_bit=8))


def parameters_of(pipeline):
    return sum(parameter.numel() for parameter in pipeline.model.model.diffusion_model.parameters())


def test_weight_bytes_are_those_of_a_file(spec, base, quantized):
    assert comparison.weight_bytes(base) == 4 * parameters_of(base)
    calibrated = comparison.as_calibrated(quantized)
    size = comparison.weight_bytes(calibrated)
    # A cali_ckpt has the same quantizers, without biases and norms, and a header.
    file = CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]][4].stat().st_size
    assert size == pytest.approx(file, rel=0.2)
    assert comparison.as_calibrated(base) is base and comparison.as_calibrated(calibrated) is calibrated
    with pytest.raises(ValueError, match="calibration"):
        comparison.weight_bytes(quantized)


def test_weights_alone_have_the_same_bytes_of_weights(spec):
    options = QuantizationOptions(weight_bit=4, quant_act=False, engine="simulate")
    calibrated = comparison.as_calibrated(Pipeline(spec, device="cpu", quantization=options))
    assert calibrated.quantization.engine is None and not calibrated.quantization.quant_act


def test_figures_are_kept_while_nothing_they_depend_on_changes(tmp_path, base, quantized, monkeypatch):
    kept = tmp_path / "unet.json"
    settings = quantized.resolve(DrawOptions()), base.resolve(DrawOptions())
    before = torch.get_num_threads()
    figures = comparison.unet_figures(quantized, settings[0], base, settings[1], kept, 3)
    assert torch.get_num_threads() == before
    assert figures.seconds > 0 and figures.speed.min <= figures.speed.median <= figures.speed.max
    assert figures.weight_bytes < comparison.weight_bytes(base)
    assert json.loads(kept.read_text())["figures"]["weight_bytes"] == figures.weight_bytes
    measured = []

    def side_by_side(*args):
        measured.append(args)
        return [1.0, 2.0], [2.0, 2.0]

    monkeypatch.setattr(comparison, "side_by_side", side_by_side)
    assert comparison.unet_figures(quantized, settings[0], base, settings[1], kept, 3) == figures and not measured
    merged = quantized.resolve(DrawOptions(merge=MergeOptions(ratio=0.5)))
    changed = comparison.unet_figures(quantized, merged, base, settings[1], kept, 3)
    assert len(measured) == 1 and changed.seconds == 1.5
    assert (changed.speed.median, changed.speed.min, changed.speed.max) == (1.5, 1.0, 2.0)
    for damaged in ("", "[]", '{"facts": {}}', "\udcff"):
        kept.write_bytes(damaged.encode(errors="surrogateescape"))
        measured.clear()
        again = comparison.unet_figures(quantized, merged, base, settings[1], kept, 3)
        assert again == changed and len(measured) == 1, damaged


def test_both_unets_are_called_by_turns(base, quantized):
    order = []
    settings = {pipeline: pipeline.resolve(DrawOptions(height=64, width=32)) for pipeline in (base, quantized)}
    hooks = []
    for pipeline in (base, quantized):
        unet = pipeline.prepare(settings[pipeline]).model.diffusion_model
        note = lambda unet, args, kwargs, p=pipeline: order.append((p, tuple(kwargs["x"].shape)))  # noqa: E731
        hooks.append(unet.register_forward_pre_hook(note, with_kwargs=True))
    own, theirs = comparison.side_by_side(quantized, settings[quantized], base, settings[base], 2)
    for hook in hooks:
        hook.remove()
    assert len(own) == len(theirs) == 2
    # An untimed and a timed call each; the second repeat goes the other way round.
    turns = [quantized, base, base, quantized]
    assert order == [(pipeline, (2, 4, 8, 4)) for pipeline in turns for _ in range(2)]
