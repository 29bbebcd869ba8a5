"""Which engine draws a quantized model where nobody asks for one."""

import pytest
import torch

from dsdiff.models import quantized
from qdiff import QuantConfig

INTEGERS, FLOATS = (QuantConfig(weight_bit=4, act_bit=8, quant_act=each) for each in (True, False))


@pytest.mark.parametrize("kernels", [False, True])
def test_integers_are_the_default_on_gpus_with_our_kernels(monkeypatch, kernels):
    def backend_for(config, device):
        if not config.quant_act:
            raise ValueError("these activations are float")

    monkeypatch.setattr(quantized, "has_triton", lambda device: kernels)
    monkeypatch.setattr(quantized, "backend_for", backend_for)
    gpu, apple = torch.device("cuda"), torch.device("mps")
    assert quantized.choose_engine(None, INTEGERS, gpu) == ("int8" if kernels else "simulate")
    assert quantized.choose_engine("int8", INTEGERS, gpu) == "int8"  # on older GPUs if asked for
    assert quantized.choose_engine("simulate", INTEGERS, gpu) == "simulate"
    assert quantized.choose_engine(None, FLOATS, gpu) == "simulate"
    with pytest.raises(ValueError, match="--engine int8: these activations are float"):
        quantized.choose_engine("int8", FLOATS, gpu)
    if not kernels:
        assert quantized.choose_engine(None, INTEGERS, apple) == "simulate"
