"""scripts/train.py on a GPU, in bfloat16: each stage, a run that goes on from its checkpoint, and what it exports."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from scripts import train
from tests.dsdiff.training.conftest import configs  # noqa: F401


def run(config, steps, *flags):
    train.main(["--config", config, "--device", "cuda", "--max_steps", str(steps), *flags])
    return torch.load(f"runs/{config.removesuffix('.yaml')}/checkpoints/last.ckpt", map_location="cpu")


@pytest.fixture
def in_bfloat16(configs):  # noqa: F811
    for path in configs.glob("*.yaml"):
        content = OmegaConf.load(path)
        content.trainer.precision = "bf16-mixed"
        OmegaConf.save(content, path)
    return configs


def test_the_stages_and_a_run_that_goes_on(in_bfloat16):
    for config in ("autoencoder.yaml", "reader.yaml", "txt2img.yaml"):
        assert run(config, 3)["global_step"] == 3, config
    first = load_file("model.safetensors")
    assert run("txt2img.yaml", 5)["global_step"] == 5
    later = load_file("model.safetensors")
    assert first.keys() == later.keys() and all(value.isfinite().all() for value in later.values())
    assert any(not torch.equal(first[name], later[name]) for name in first)
