"""The small quantized UNet of the recorded reference data."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.util import instantiate_from_config
from qdiff import QuantConfig, QuantModel, load_cali_ckpt

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDENS / "q_ckpt_golden.safetensors")


@pytest.fixture(scope="session")
def golden_facts():
    with open(GOLDENS / "q_ckpt_golden.json") as file:
        return json.load(file)


@pytest.fixture(scope="session")
def golden_ckpt():
    return GOLDENS / "q_cali_w4a8.pth"


@pytest.fixture(scope="session")
def golden_tensors(golden_ckpt):
    return torch.load(golden_ckpt, weights_only=True)


@pytest.fixture
def make_unet(golden_tensors):
    """() -> the float UNet of the golden cali_ckpt, anew."""

    def make():
        unet = instantiate_from_config(OmegaConf.load(GOLDENS / "q_unet.yaml"))
        names = unet.state_dict().keys()
        unet.load_state_dict({name: golden_tensors[f"model.{name}"] for name in names})
        return unet.eval()

    return make


@pytest.fixture
def make_qnn(make_unet):
    """(**settings) -> that UNet quantized, without ranges."""

    def make(**settings):
        return QuantModel(make_unet(), QuantConfig(**settings))

    return make


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def assert_close():
    def check(actual, expected, rtol=1e-5):
        assert actual.shape == expected.shape
        error = relative_error(actual, expected)
        assert error <= rtol, f"relative error {error:.2e}"

    return check


class Witness:
    """A model, with what it held and computed when it was handed over."""

    def __init__(self, qnn, inputs):
        self.qnn, self.inputs = qnn, inputs
        self.state = {name: value.clone() for name, value in qnn.state_dict().items()}
        with torch.no_grad():
            self.output = qnn(*inputs)

    def assert_unchanged(self):
        state = self.qnn.state_dict()
        assert state.keys() == self.state.keys()
        assert [name for name, value in state.items() if not torch.equal(value, self.state[name])] == []
        with torch.no_grad():
            assert torch.equal(self.qnn(*self.inputs), self.output)

    def assert_refuses(self, path, match, error=ValueError):
        """Loading raises an error of one line, and the model stays as it is."""
        with pytest.raises(error, match=match) as raised:
            load_cali_ckpt(self.qnn, path)
        assert "\n" not in str(raised.value)
        self.assert_unchanged()


@pytest.fixture(scope="session")
def witness(golden):
    """(qnn) -> its Witness."""
    return lambda qnn: Witness(qnn, tuple(golden[f"in_B1/{name}"] for name in ("x", "t", "context")))
