"""Quantizers and quantized layers against recorded outputs of the reference implementation."""

import json
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from qdiff.config import QuantConfig
from qdiff.quant_layer import (
    FrozenQuantizer,
    Quantizer,
    QuantModule,
    SplitQuantModule,
    UniformAffineQuantizer,
    lp_loss,
)

GOLDENS = "tests/goldens"
CASE = re.compile(r"uaq/[wa]_(?P<data>\w+)/b(?P<bits>\d+)_sym(?P<sym>\d)_cw(?P<cw>\d)_(?P<method>\w+)_az(?P<az>\d)")
with open(f"{GOLDENS}/q_unit.json") as file:
    FACTS = json.load(file)


@pytest.fixture(scope="module")
def golden():
    return load_file(f"{GOLDENS}/q_unit.safetensors")


def quantizer_of(case: re.Match) -> UniformAffineQuantizer:
    return UniformAffineQuantizer(
        int(case["bits"]),
        symmetric=case["sym"] == "1",
        channel_wise=case["cw"] == "1",
        scale_method=case["method"],
        always_zero=case["az"] == "1",
    )


def is_recorded_defect(case: re.Match, x: torch.Tensor, facts: dict) -> bool:
    """Whether the reference is known to be wrong here, or decided by a tie."""
    if case["method"] == "mse":
        return case["sym"] == "1" or facts["mse_margin"] < 1e-6
    if case["sym"] == "1":
        return False
    if case["az"] == "1" and bool(x.amin() != 0):  # the zero point is 0, but the range does not begin there
        return True
    one_sided = bool((x.amin() > 0) | (x.amax() < 0))
    if case["cw"] == "1":
        rows = x.flatten(1)
        one_sided = bool(((rows.amin(1) > 0) | (rows.amax(1) < 0)).any())
    scaled = case["method"] == "max_scale" and case["bits"] != "6"  # (6 + 2) / 8 is 1: nothing is scaled
    return one_sided or scaled


def recorded_cases():
    for name, facts in FACTS["uaq"].items():
        case = CASE.fullmatch(name)
        # Signed codes with the zero point pinned are the same as signed codes: refused as a contradiction.
        if case and not (case["sym"] == "1" and case["az"] == "1"):
            yield name, case, facts


def test_fitted_ranges_and_outputs_are_exact(golden):
    compared = 0
    for name, case, facts in recorded_cases():
        x = golden[f"uaq/x_{case['data']}"]
        if is_recorded_defect(case, x, facts):
            continue
        quantizer = quantizer_of(case).fit(x)
        for what in ("delta", "zero_point"):
            assert torch.equal(getattr(quantizer, what), golden[f"{name}/{what}"].float()), f"{name} {what}"
        assert torch.equal(quantizer(x), golden[f"{name}/out"]), name
        compared += 1
    assert compared > 300
