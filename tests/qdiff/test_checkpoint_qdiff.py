"""Q-Diffusion's published format: the golden checkpoint gives the golden outputs."""

import pytest
import torch
from safetensors.torch import load_file

import tomesd
from qdiff.checkpoint import load_cali_ckpt, read_cali_header, save_cali_ckpt


def inputs(golden, name):
    return golden[f"in_{name}/x"], golden[f"in_{name}/t"], golden[f"in_{name}/context"]


@pytest.mark.parametrize("name", ["A", "R", "B1"])
@torch.no_grad()
def test_weights_only_outputs(make_qnn, golden, golden_ckpt, assert_close, name):
    qnn = make_qnn(quant_act=False)
    load_cali_ckpt(qnn, golden_ckpt)
    assert_close(qnn(*inputs(golden, name)), golden[f"resumed_qa0/{name}"])


@pytest.mark.parametrize("name", ["R", "B1"])  # those that no rounding noise changes
@torch.no_grad()
def test_outputs_with_activations(make_qnn, golden, golden_ckpt, assert_close, name):
    qnn = make_qnn()
    load_cali_ckpt(qnn, golden_ckpt)
    assert_close(qnn(*inputs(golden, name)), golden[f"resumed_qa1/{name}"])
