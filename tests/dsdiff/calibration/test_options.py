"""The options of a calibration: what they mean, and what they refuse."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsdiff.calibration import PRESETS, CalibrationOptions
from dsdiff.calibration.options import OF_RECON_CONFIG, QDIFF, Effort
from dsdiff.options import DrawOptions, MergeOptions, ModelOptions
from qdiff.config import QuantConfig, ReconConfig

ROOT = Path(__file__).resolve().parents[3]


def test_a_preset_says_what_is_not_given():
    options = CalibrationOptions(preset="paper", iters_w=7, lr=0.5, quant_act=True)
    assert options.effort == replace(PRESETS["paper"], iters_w=7, lr=0.5)
    assert CalibrationOptions().effort == PRESETS["fast"]
    assert CalibrationOptions(rounding="adaround", iters_w=0).effort.iters_w == 0  # which is given, though false


def test_the_paper_preset_has_the_defaults_of_qdiffusion():
    default = ReconConfig()
    effort = PRESETS["paper"]
    for name in ("iters_w", "iters_a", "batch_size", "lr_w", "lr"):
        assert getattr(effort, name) == getattr(default, name), name


def test_the_configs_of_qdiff_hold_what_is_given():
    options = CalibrationOptions(weight_bit=8, quant_act=True, act_bit=6, sm_abit=12, split=True, seed=3, sym=True)
    assert options.quant_config() == QuantConfig(
        weight_bit=8, act_bit=6, sm_abit=12, quant_act=True, split=True, scale_method="mse", act_scale_method="mse"
    )
    assert options.recon_config() == ReconConfig(
        rounding="gptq", iters_w=300, iters_a=100, batch_size=16, lr_w=3e-2, lr=2e-2, sym=True, seed=3
    )
    learning = CalibrationOptions(
        rounding="adaround", quant_act=True, p=3.0, weight=0.5, b_start=9.0, b_end=3.0, warmup=0.1
    )
    assert [getattr(learning.recon_config(), name) for name in OF_RECON_CONFIG[2:]] == [3.0, 0.5, 9.0, 3.0, 0.1]
    gptq = CalibrationOptions(rounding="gptq", samples_w=9, damp=0.5, no_act_order=True).recon_config()
    assert (gptq.rounding, gptq.samples_w, gptq.damp, gptq.act_order) == ("gptq", 9, 0.5, False)
    plain = ReconConfig()
    gptq = CalibrationOptions(rounding="gptq").recon_config()
    assert (gptq.samples_w, gptq.damp, gptq.act_order) == (plain.samples_w, plain.damp, plain.act_order)
    assert CalibrationOptions(rounding="nearest").recon_config().rounding == "nearest"
    assert CalibrationOptions(rounding="adaround", iters_w=0).recon_config().rounding == "nearest"
    linear = CalibrationOptions(quant_mode="linear", quant_act=True)
    assert linear.recon_config() is None
    assert (linear.quant_config().scale_method, linear.quant_config().act_scale_method) == ("max", "max")


def test_the_file_is_named_by_its_format():
    assert CalibrationOptions(outdir=Path("a")).target == Path("a/cali.safetensors")
    assert CalibrationOptions(outdir=Path("a"), format="qdiff", rounding="adaround").target == Path("a/cali.pth")
    assert (
        CalibrationOptions().cache_bytes == 2 * 2**30
        and CalibrationOptions(quant_act=True, cache_gb=0.5).cache_bytes == 2**29
    )


def test_options_without_effect_are_refused():
    ours, theirs = {"data_path": Path("x.safetensors")}, {"data_path": Path("x.pt")}
    cases = [
        ({"act_bit": 8}, "without --quant_act activations stay float, so --act_bit has no effect: leave it out"),
        ({"sm_abit": 8, "lr": 0.1}, "so --sm_abit, --lr has no effect"),
        ({"running_stat": True}, "--running_stat has no effect"),
        (
            {"rounding": "adaround", "iters_w": 0, "warmup": 0.1},
            "with --iters_w 0 weights are rounded to nearest, so --warmup has no effect",
        ),
        (
            {"rounding": "nearest", "iters_w": 9},
            "with --rounding nearest weights are rounded to nearest, so --iters_w has",
        ),
        ({"rounding": "nearest", "damp": 0.1}, "so --damp has no effect"),
        ({"rounding": "nearest", "sym": True}, "no steps for activations nothing is learned, so --sym has no effect"),
        (
            {"rounding": "gptq", "lr_w": 0.1, "iters_w": 3},
            "GPTQ learns nothing, as --rounding adaround does, so --iters_w, --lr_w has no",
        ),
        ({"rounding": "gptq", "cache_gb": 1.0}, "nothing is learned, so --cache_gb has no effect"),
        (
            {"rounding": "gptq", "quant_act": True, "iters_a": 0, "no_grad_ckpt": True},
            "so --no_grad_ckpt has no effect",
        ),
        (
            {"preset": "paper", "samples_w": 9},
            "with --rounding adaround there is no GPTQ, so --samples_w has no effect",
        ),
        ({"no_act_order": True, "rounding": "adaround"}, "so --no_act_order has no effect"),
        ({"quant_act": True, "iters_a": 0, "p": 2.0}, "no step size is learned, so --p has no effect"),
        (ours | {"cond": True}, "with --data_path nothing is drawn, so --cond has no effect"),
        (ours | {"cali_st": 5}, "--cali_st has no effect"),
        (ours | {"draw": DrawOptions(sampler="plms")}, "a sampler has no effect"),
        (theirs | {"draw": DrawOptions(steps=5, eta=0.5)}, "--ddim_steps, --ddim_eta has no effect"),
        (theirs | {"model": ModelOptions(tokenizer=Path("t"))}, "--tokenizer has no effect"),
        (theirs | {"prompts": Path("p.txt")}, "--prompts has no effect"),
    ]
    some = {"iters_w": 5, "iters_a": 5, "sym": True, "no_grad_ckpt": True, "cache_gb": 1.0, "warmup": 0.5}
    some |= {"rounding": "gptq", "no_act_order": True}
    given = dict.fromkeys(QDIFF, 2.0) | some
    cases += [
        ({"quant_mode": "linear", "quant_act": True, name: given[name]}, f"learns nothing, so --{name} has no effect")
        for name in QDIFF
    ]
    for values, says in cases:
        with pytest.raises(ValueError) as error:
            CalibrationOptions(**values)
        assert says in str(error.value), (values, str(error.value))
    # What has an effect is taken: a part of Q-Diffusion's data is chosen, and a model of one's own has a tokenizer.
    CalibrationOptions(cali_st=5, cali_n=3, num_samples=4, **theirs)
    CalibrationOptions(rounding="gptq", sym=True)
    CalibrationOptions(rounding="gptq", quant_act=True, cache_gb=1.0, no_grad_ckpt=True)
    CalibrationOptions(rounding="nearest", quant_act=True, sym=True)
    CalibrationOptions(model=ModelOptions(tokenizer=Path("t")), draw=DrawOptions(sampler="plms"))


def test_values_out_of_range_are_refused():
    cases = [
        ({"quant_mode": "best"}, "quant_mode is 'best': it must be one of qdiff, linear"),
        ({"preset": "slow"}, "one of fast, paper"),
        ({"rounding": "up"}, "rounding is 'up': it must be one of adaround, gptq, nearest"),
        ({"rounding": "gptq", "damp": 0.0}, "damp is 0.0"),
        ({"rounding": "gptq", "samples_w": 0}, "samples_w is 0"),
        ({"format": "onnx"}, "one of dsdiff, qdiff"),
        ({"weight_bit": 1}, "weight_bit is 1"),
        ({"quant_act": True, "act_bit": 17}, "act_bit is 17"),
        ({"rounding": "adaround", "b_start": 1.0, "b_end": 5.0}, "b_start is 1.0"),
        ({"rounding": "adaround", "lr_w": 0.0}, "lr_w is 0.0"),
        ({"cali_n": 0}, "cali_n is 0: it must be a whole number of 1 or more"),
        ({"num_samples": 1.5}, "num_samples is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seed": 2**31}, "in 0..2147483647"),
        ({"cache_gb": -1.0}, "cache_gb is -1.0"),
        ({"draw": DrawOptions(merge=MergeOptions())}, "drawn without merging"),
        *(
            ({"merge": MergeOptions(**options)}, "it cannot merge by merge_schedule, merge_every or merge_share")
            for options in ({"merge_schedule": "0:0.5"}, {"merge_every": 2}, {"merge_share": True})
        ),
    ]
    for values, says in cases:
        with pytest.raises(ValueError) as error:
            CalibrationOptions(**values)
        assert says in str(error.value), (values, str(error.value))


def test_every_value_of_a_preset_is_an_option():
    assert {*vars(PRESETS["fast"])} == {*Effort.__dataclass_fields__} <= {*CalibrationOptions.__dataclass_fields__}


def test_the_options_import_no_torch():
    code = "import sys; from dsdiff.calibration import CalibrationOptions as C; C(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
