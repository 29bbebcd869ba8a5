"""A small model with random weights, and options of a calibration that takes a second."""

import pytest

from dsdiff.calibration import CalibrationOptions
from dsdiff.options import DrawOptions, ModelOptions


@pytest.fixture(scope="package")
def options(small_model, tmp_path_factory):
    """The options of a calibration that learns a little, with data of two prompts. Replace `outdir` in it."""
    config, ckpt = small_model
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "prompts.txt").write_text("a red circle\n\na blue star\n")
    return CalibrationOptions(
        model=ModelOptions(config=config, ckpt=ckpt),
        draw=DrawOptions(steps=2, height=32, width=32),
        prompts=folder / "prompts.txt",
        cali_st=2,
        cali_n=2,
        cond=True,
        quant_act=True,
        split=True,
        rounding="adaround",
        iters_w=2,
        iters_a=2,
        batch_size=4,
        no_grad_ckpt=True,
        device="cpu",
        outdir=folder / "out",
    )
