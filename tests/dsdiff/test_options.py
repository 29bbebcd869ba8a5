"""Options check themselves, and flags become options."""

import pytest

from dsdiff.cli import arguments, flags
from dsdiff.cli.console import ArgumentParser
from dsdiff.options import SAMPLERS, DrawOptions, MergeOptions, ModelOptions, QuantizationOptions


def test_values_that_cannot_be_are_refused():
    for kind, values, said in (
        (DrawOptions, {"sampler": "heun"}, "sampler is 'heun': it must be one of ddim, plms, dpm_solver"),
        (DrawOptions, {"precision": "half"}, "precision is 'half'"),
        (DrawOptions, {"height": 0}, "height is 0: it must be a whole number of 1 or more"),
        (DrawOptions, {"steps": 2.5}, "steps is 2.5"),
        (DrawOptions, {"steps": True}, "steps is True"),
        (DrawOptions, {"eta": 1.5}, r"eta is 1.5: it must lie in \[0, 1\]"),
        (DrawOptions, {"scale": float("nan")}, "scale is nan"),
        (DrawOptions, {"scale": -1.0}, "scale is -1.0"),
        (DrawOptions, {"sampler": "plms", "eta": 0.5}, "eta 0.5 has no effect with plms"),
        (DrawOptions, {"sampler": "euler", "eta": 0.5}, "eta 0.5 has no effect with euler"),
        (DrawOptions, {"guidance_start": 0.5, "guidance_stop": 0.2}, "guidance_start is 0.5 and guidance_stop 0.2"),
        (DrawOptions, {"guidance_stop": 0.5, "scale": 1}, "guidance_stop have no effect with scale 1"),
        (DrawOptions, {"negative_prompt": "x", "scale": 1}, "negative prompt has no effect with scale 1"),
        (QuantizationOptions, {"weight_bit": 1}, "weight_bit is 1: it must be a whole number in 2..16"),
        (QuantizationOptions, {"quant_mode": "best"}, "quant_mode is 'best'"),
        (QuantizationOptions, {"engine": "int4"}, "engine is 'int4'"),
        (MergeOptions, {"ratio": 0.9}, "ratio is 0.9"),
    ):
        with pytest.raises(ValueError, match=said):
            kind(**values)


def test_options_are_frozen_and_refuse_typos():
    with pytest.raises(AttributeError):
        DrawOptions().steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        DrawOptions(stpes=3)  # pyright: ignore[reportCallIssue]


def parse(*argv):
    parser = ArgumentParser("a command")
    arguments.add_model_arguments(parser)
    arguments.add_sampler_arguments(parser)
    arguments.add_size_arguments(parser)
    arguments.add_tome_arguments(parser)
    arguments.add_quantization_arguments(parser)
    return parser.parse_args(argv)


def test_flags_become_options():
    args = parse("--plms", "--ddim_steps", "20", "--scale", "3", "--H", "64", "--ratio", "0.5", "--merge_mlp")
    merge = MergeOptions(ratio=0.5, merge_mlp=True)
    assert flags.draw_options(args) == DrawOptions(sampler="plms", steps=20, scale=3.0, height=64, merge=merge)
    assert flags.model_options(args) == ModelOptions() and flags.quantization_options(args) is None
    args = parse("--ptq", "--weight_bit", "4", "--quant_act", "--low_memory", "--engine", "int8")
    wanted = QuantizationOptions(weight_bit=4, quant_act=True, low_memory=True, engine="int8")
    assert flags.quantization_options(args) == wanted
    assert flags.draw_options(parse()) == DrawOptions()
    args = parse(
        "--sampler", "tcd", "--ddim_eta", "0.5", "--scale", "2", "--guidance_start", "0", "--guidance_stop", "0.5"
    )
    assert flags.draw_options(args) == DrawOptions(sampler="tcd", eta=0.5, scale=2.0, guidance_stop=0.5)
    for name in SAMPLERS:
        assert flags.draw_options(parse("--sampler", name)) == DrawOptions(sampler=name)


def test_flags_without_effect_are_refused():
    for argv, said in (
        (["--weight_bit", "4"], "without --ptq nothing is quantized, so --weight_bit has no effect: add --ptq"),
        (["--merge_mlp"], "so --merge_mlp has no effect: add --ratio"),
        (["--plms", "--ddim_eta", "0"], "--ddim_eta 0 has no effect with --plms"),
        (["--sampler", "unipc", "--ddim_eta", "0"], "--ddim_eta 0 has no effect with --sampler unipc: it is for ddim"),
        (["--guidance_stop", "0.5", "--scale", "1"], "--guidance_stop has no effect with --scale 1"),
        (["--guidance_start", "0.5", "--guidance_stop", "0.2"], "guidance_start is 0.5 and guidance_stop 0.2"),
        (["--negative_prompt", "", "--scale", "1"], "--negative_prompt has no effect with --scale 1"),
    ):
        with pytest.raises(ValueError, match=said):
            args = parse(*argv)
            flags.quantization_options(args), flags.draw_options(args)
