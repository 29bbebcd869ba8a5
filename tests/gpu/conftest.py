"""Tests that compute on a GPU, and compare with the CPU. Without CUDA all of them are skipped."""

from pathlib import Path

import pytest
import torch

# The golden UNet, quantized.
from tests.qdiff.conftest import golden, golden_ckpt, golden_tensors, make_qnn, make_unet  # noqa: F401

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def psnr():
    return _psnr


def _psnr(actual, expected):
    """Return the peak signal-to-noise ratio in dB of tensors on any device; the peak is the range of `expected`."""
    actual, expected = (each.detach().double().cpu() for each in (actual, expected))
    assert actual.shape == expected.shape and actual.isfinite().all()
    error = (actual - expected).square().mean()
    span = expected.max() - expected.min()
    return float("inf") if error == 0 else (20 * span.log10() - 10 * error.log10()).item()
