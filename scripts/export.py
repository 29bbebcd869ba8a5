#!/usr/bin/env python
"""Packs a calibrated model into one file that runs alone: python scripts/export.py outputs/shapes-w4a8.safetensors

The file holds the UNet at its few bits, autoencoder and text encoder in float16, the config, the tokenizer and what
calibration says of itself. scripts/txt2img.py --ckpt FILE needs nothing else, and loads it without ever building the
float UNet. The float model's checkpoint and the cali_ckpt are read, and not changed.
"""

# ruff: noqa: E402
import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its parent is not

from dsdiff.benchmark.source import Source
from dsdiff.benchmark.variants import fit
from dsdiff.cli.console import ArgumentParser, command, logger, logs, number
from dsdiff.cli.flags import add_model_arguments
from dsdiff.models.bundle import save_packed
from dsdiff.models.quantized import cali_ckpt_of
from dsdiff.pipeline import STABLE_DIFFUSION, choose_model, read_config
from ldm.fileio import check_writable
from ldm.util import for_inference, instantiate_from_config, load_model_from_config
from qdiff.checkpoint import CaliHeader, load_cali_ckpt, read_cali_header, splits_of
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel

TOKENIZER = ROOT / "models/ldm/shapes/tokenizer"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="to write, a .safetensors")
    add("--cali_ckpt", metavar="FILE", help="of scripts/calibrate.py, or Q-Diffusion's (default: the embedded model's)")
    add("--weight_bit", type=number(int, 2, 16), metavar="BITS", help="which of the embedded model's (default: 4)")
    add("--random_weights", action="store_true", help="Stable Diffusion v1's shapes without a checkpoint, to measure")
    add("--verbose", action="store_true", help="tell details, and where errors come from")
    add_model_arguments(parser, precision=False)
    args = parser.parse_args(argv)
    if args.file.suffix != ".safetensors":
        parser.error(f"{str(args.file)!r} must end in .safetensors")
    given = [name for name in ("config", "ckpt", "tokenizer", "cali_ckpt", "weight_bit") if getattr(args, name)]
    if args.random_weights and given:
        parser.error(f"--{given[0]} has no effect with --random_weights: leave it out")
    return args


def export(args: argparse.Namespace) -> None:
    check_writable(args.file.parent)
    if args.file.is_dir():
        raise ValueError(f"{str(args.file)!r} is a directory: give the name of a file")
    model, config, header = random_model() if args.random_weights else calibrated_model(args)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    save_packed(model, config, header, args.file)
    logger.info("written to %s (%.4g MB)", args.file, args.file.stat().st_size / 1e6)


def calibrated_model(args: argparse.Namespace) -> tuple[nn.Module, Mapping[str, Any], CaliHeader]:
    """The model that the flags mean, its config, and what its calibration says of itself."""
    choice = choose_model(args)
    path = cali_ckpt_of(args, choice.cali_ckpts)
    for source in (choice.ckpt, path):
        if args.file.resolve() == source.resolve():
            raise ValueError(f"{str(args.file)!r} is what is read: give another name to write to")
    header = read_cali_header(path, **({} if args.weight_bit is None else {"weight_bit": args.weight_bit}))
    logger.info("%s, %s", choice, path)
    model = load_model_from_config(choice.config, choice.ckpt, "cpu", tokenizer=args.tokenizer, verbose=args.verbose)
    qnn = QuantModel(model.model.diffusion_model, header.config)
    load_cali_ckpt(qnn, path)
    model.model.diffusion_model = qnn
    source = {"ckpt": choice.ckpt.name, "config": choice.config_path.name, **choice.hashes, **header.source}
    return model, choice.config, replace(header, splits=splits_of(qnn), source=source)


def random_model() -> tuple[nn.Module, Mapping[str, Any], CaliHeader]:
    """Stable Diffusion v1 with random weights, at W4A8, with the embedded model's tokenizer: for its size alone."""
    config = QuantConfig(weight_bit=4, quant_act=True, act_bit=8, sm_abit=16, split=True)
    whole = read_config(STABLE_DIFFUSION)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = whole["model"]["params"]
        small = {**params["unet_config"]["params"], "model_channels": 32, "num_heads": 1}  # its place is taken below
        node = {**whole["model"], "params": {**params, "unet_config": {**params["unet_config"], "params": small}}}
        model = instantiate_from_config(for_inference(node)).eval()
    model.cond_stage_model.set_tokenizer(TOKENIZER)
    source = Source.read(STABLE_DIFFUSION, random_weights=True, device=torch.device("cpu"))
    qnn = QuantModel(source.unet(), config)
    fit(qnn, source)
    model.model.diffusion_model = qnn
    return model, whole, CaliHeader(config=config, splits=splits_of(qnn), source={"random_weights": True})


@command
def main(argv: list[str]) -> None:
    args = parse_args(argv)
    with logs(args.verbose):
        export(args)


if __name__ == "__main__":
    main()
