"""A tiny UNet for the tests of benchmarks."""

from pathlib import Path

import pytest
import torch
import yaml

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [2, 1],
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "context_dim": 12,
        "legacy": False,
    },
}


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """The path of a config with a tiny UNet."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    encoder = {"target": "torch.nn.Identity", "params": {"max_length": 5}}
    params = {"image_size": 8, "channels": 4, "unet_config": UNET, "cond_stage_config": encoder}
    path.write_text(yaml.safe_dump({"model": {"params": params}, "sampling": {"steps": 20}}))
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work on small tensors in one thread: more threads are slow on a machine that does other work, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
