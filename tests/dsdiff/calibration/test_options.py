"""The options of a calibration: what they mean, and what they refuse."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsdiff.calibration import PRESETS, CalibrationOptions
from dsdiff.calibration.options import LEARNING, OF_RECON_CONFIG, Effort
from dsdiff.options import DrawOptions, MergeOptions, ModelOptions
from qdiff.config import QuantConfig, ReconConfig

ROOT = Path(__file__).resolve().parents[3]


def test_a_preset_says_what_is_not_given():
    options = CalibrationOptions(preset="paper", iters_w=7, lr=0.5, quant_act=True)
    assert options.effort == replace(PRESETS["paper"], iters_w=7, lr=0.5)
    assert CalibrationOptions().effort == PRESETS["fast"]
    assert CalibrationOptions(iters_w=0).effort.iters_w == 0  # which is given, though false


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
        iters_w=300, iters_a=100, batch_size=16, lr_w=3e-2, lr=2e-3, sym=True, seed=3
    )
    learning = CalibrationOptions(quant_act=True, p=3.0, weight=0.5, b_start=9.0, b_end=3.0, warmup=0.1)
    assert [getattr(learning.recon_config(), name) for name in OF_RECON_CONFIG] == [3.0, 0.5, 9.0, 3.0, 0.1]
    linear = CalibrationOptions(quant_mode="linear", quant_act=True)
    assert linear.recon_config() is None
    assert (linear.quant_config().scale_method, linear.quant_config().act_scale_method) == ("max", "max")


def test_the_file_is_named_by_its_format():
    assert CalibrationOptions(outdir=Path("a")).target == Path("a/cali.safetensors")
    assert CalibrationOptions(outdir=Path("a"), format="qdiff").target == Path("a/cali.pth")
    assert CalibrationOptions().cache_bytes == 2 * 2**30 and CalibrationOptions(cache_gb=0.5).cache_bytes == 2**29


def test_options_without_effect_are_refused():
    ours, theirs = {"data_path": Path("x.safetensors")}, {"data_path": Path("x.pt")}
    cases = [
        ({"act_bit": 8}, "without --quant_act activations stay float, so --act_bit has no effect: leave it out"),
        ({"sm_abit": 8, "lr": 0.1}, "so --sm_abit, --lr has no effect"),
        ({"running_stat": True}, "--running_stat has no effect"),
        ({"iters_w": 0, "warmup": 0.1}, "with --iters_w 0 weights are rounded to nearest, so --warmup has no effect"),
        ({"quant_act": True, "iters_a": 0, "p": 2.0}, "no step size is learned, so --p has no effect"),
        (ours | {"cond": True}, "with --data_path nothing is drawn, so --cond has no effect"),
        (ours | {"cali_st": 5}, "--cali_st has no effect"),
        (ours | {"draw": DrawOptions(sampler="plms")}, "a sampler has no effect"),
        (theirs | {"draw": DrawOptions(steps=5, eta=0.5)}, "--ddim_steps, --ddim_eta has no effect"),
        (theirs | {"model": ModelOptions(tokenizer=Path("t"))}, "--tokenizer has no effect"),
        (theirs | {"prompts": Path("p.txt")}, "--prompts has no effect"),
    ]
    some = {"iters_w": 5, "iters_a": 5, "sym": True, "no_grad_ckpt": True, "cache_gb": 1.0, "warmup": 0.5}
    given = dict.fromkeys(LEARNING, 2.0) | some
    cases += [
        ({"quant_mode": "linear", "quant_act": True, name: given[name]}, f"learns nothing, so --{name} has no effect")
        for name in LEARNING
    ]
    for values, says in cases:
        with pytest.raises(ValueError) as error:
            CalibrationOptions(**values)
        assert says in str(error.value), (values, str(error.value))
    # What has an effect is taken: a part of Q-Diffusion's data is chosen, and a model of one's own has a tokenizer.
    CalibrationOptions(cali_st=5, cali_n=3, num_samples=4, **theirs)
    CalibrationOptions(model=ModelOptions(tokenizer=Path("t")), draw=DrawOptions(sampler="plms"))


def test_values_out_of_range_are_refused():
    cases = [
        ({"quant_mode": "best"}, "quant_mode is 'best': it must be one of qdiff, linear"),
        ({"preset": "slow"}, "one of fast, paper"),
        ({"format": "onnx"}, "one of dsdiff, qdiff"),
        ({"weight_bit": 1}, "weight_bit is 1"),
        ({"quant_act": True, "act_bit": 17}, "act_bit is 17"),
        ({"b_start": 1.0, "b_end": 5.0}, "b_start is 1.0"),
        ({"lr_w": 0.0}, "lr_w is 0.0"),
        ({"cali_n": 0}, "cali_n is 0: it must be a whole number of 1 or more"),
        ({"num_samples": 1.5}, "num_samples is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seed": 2**31}, "in 0..2147483647"),
        ({"cache_gb": -1.0}, "cache_gb is -1.0"),
        ({"draw": DrawOptions(merge=MergeOptions())}, "drawn without merging"),
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
