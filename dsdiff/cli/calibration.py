"""The flags of scripts/calibrate.py that say what is quantized, from which data, and how it is learned."""

import argparse
from pathlib import Path

from dsdiff.calibration.options import PRESETS, CalibrationOptions, Effort
from dsdiff.cli import arguments
from dsdiff.cli.console import number
from dsdiff.options import QUANT_MODES
from qdiff.config import ROUNDINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags. They have no defaults, since CalibrationOptions has them."""
    _add_quantization(parser)
    _add_data(parser)
    _add_learning(parser)


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "quantization (default: 4-bit weights and float activations; with --quant_act 8 bits, 16 for the softmax)"
    )
    arguments.add_bit_arguments(group)
    group.add_argument(
        "--quant_mode",
        choices=QUANT_MODES,
        help="qdiff learns; linear, the baseline, rounds to nearest between minimum and maximum (default: qdiff)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("calibration data").add_argument
    add("--prompts", type=Path, metavar="FILE", help="a prompt per line (default: cali_prompts.txt beside the config)")
    add(
        "--data_path",
        type=Path,
        metavar="FILE",
        help="ready data: OUTDIR/data-*.safetensors of an earlier calibration, or a .pt in Q-Diffusion's layout",
    )
    add("--cali_st", type=number(int, 1), metavar="N", help="number of timesteps, spread over the trajectory")
    add("--cali_n", type=number(int, 1), metavar="N", help="number of pictures, each recorded at all these timesteps")
    add("--cond", action="store_true", default=None, help="keep both branches of guidance: with prompt and without")
    add(
        "--num_samples",
        type=number(int, 1),
        metavar="N",
        help="take only N of the samples, at random (default: all)",
    )


def _in_words(effort: Effort) -> str:
    """Return a preset as the flags that it stands for."""
    return " ".join(f"--{name} {value}" for name, value in vars(effort).items())


def _add_learning(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("learning (defaults: those of --preset, then Q-Diffusion's)").add_argument
    presets = "; ".join(f"{name} is {_in_words(effort)}" for name, effort in PRESETS.items())
    add(
        "--preset",
        choices=list(PRESETS),
        help=f"how much is collected and learned: {presets} (default: {CalibrationOptions.preset})",
    )
    add("--batch_size", type=number(int, 1), metavar="N", help="samples per step, over all processes")
    add("--rounding", choices=ROUNDINGS, help="how weights are rounded: learned, by GPTQ, or to nearest")
    add("--samples_w", type=number(int, 1), metavar="N", help="samples for GPTQ; memory grows with N (default: 128)")
    add(
        "--damp",
        type=number(float, 0),
        metavar="X",
        help="added to the diagonal of GPTQ's Hessian, as a share of its mean (default: 0.01)",
    )
    add(
        "--no_act_order",
        action="store_true",
        default=None,
        help="let GPTQ round columns in their own order, not those of the largest inputs first",
    )
    add("--iters_w", type=number(int, 0), metavar="N", help="iterations of AdaRound per unit; 0 rounds to nearest")
    add("--iters_a", type=number(int, 0), metavar="N", help="iterations of LSQ per unit; 0 leaves ranges as fitted")
    add("--lr_w", type=number(float, 0), metavar="X", help="learning rate of AdaRound")
    add("--lr", type=number(float, 0), metavar="X", help="learning rate of LSQ, on the logarithm of step sizes")
    add("--p", type=number(float, 1), metavar="X", help="exponent of LSQ's loss |error|^X (default: 2.4)")
    add("--weight", type=number(float, 0), metavar="X", help="weight of AdaRound's regulariser (default: 0.01)")
    add("--b_start", type=number(float, 1), metavar="X", help="exponent of the regulariser at first (default: 20)")
    add("--b_end", type=number(float, 1), metavar="X", help="exponent of the regulariser at last (default: 2)")
    add(
        "--warmup",
        type=number(float, 0, 1),
        metavar="X",
        help="share of AdaRound's iterations without the regulariser (default: 0.2)",
    )
    add(
        "--mixed_act",
        type=number(float, 0),
        metavar="N|SHARE",
        help="more bits for the N most sensitive inputs, or for the fewest that cause SHARE (below 1) of the error",
    )
    add("--mixed_act_bit", type=number(int, 9, 16), metavar="BITS", help="bits of these inputs, 9..16 (default: 12)")
    add(
        "--running_stat",
        action="store_true",
        default=None,
        help="take the ranges of activations from running averages of minimum and maximum",
    )
    add("--sym", action="store_true", default=None, help="feed units (with GPTQ layers) the float model's inputs")
    add(
        "--no_grad_ckpt",
        action="store_true",
        default=None,
        help="learn without gradient checkpointing: faster, more memory",
    )
