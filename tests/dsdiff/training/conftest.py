"""Config files of networks with a few channels, on which training takes seconds."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[3]
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "norm_groups": 2,
}
SHAPES = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 8, "split": "train", "resolution": 32}}
DATA = {"batch_size": 4, "num_workers": 0, "validation": SHAPES}
TRAINER = {
    "max_steps": 2,
    "precision": "32-true",
    "gradient_clip_val": 1.0,
    "checkpoint_every": 2,
    "log_images_every": 2,
}


def autoencoder(loss: str) -> dict:
    params = {"embed_dim": 4, "ddconfig": DDCONFIG, "lossconfig": {"target": loss}}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def first_stage() -> dict:
    return {
        "model": {"base_learning_rate": 1e-3} | autoencoder("ldm.modules.losses.ReconstructionLoss"),
        "data": DATA | {"train": {"target": "ldm.data.crops.RandomCrops", "params": {"size": 16, "dataset": SHAPES}}},
        "trainer": TRAINER | {"export": "autoencoder.safetensors"},
    }


def second_stage() -> dict:
    """Return the embedded model's config with small networks, on the latents of `first_stage`."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/shapes/txt2img.yaml"))
    params = config["model"]["params"]
    params["first_stage_config"] = autoencoder("torch.nn.Identity")
    params["unet_config"]["params"] |= {"model_channels": 8, "channel_mult": [1, 1], "num_heads": 2, "context_dim": 16}
    params["unet_config"]["params"] |= {"attention_resolutions": [1], "norm_groups": 2}
    encoder = params["cond_stage_config"]["params"]
    encoder["tokenizer"] = str(ROOT / "models/ldm/shapes/tokenizer")
    encoder["text_config"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    latents = {"dataset": SHAPES, "autoencoder": "autoencoder.yaml", "ckpt": "autoencoder.safetensors"}
    train = {"target": "ldm.data.latents.CachedLatents", "params": latents | {"folder": "latents"}}
    init_from = {"first_stage_model.": "autoencoder.safetensors"}
    return config | {
        "data": DATA | {"train": train},
        "trainer": TRAINER | {"export": "model.safetensors", "init_from": init_from},
    }


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """An empty folder, the present one, with the configs autoencoder.yaml, txt2img.yaml and reader.yaml."""
    monkeypatch.chdir(tmp_path)
    reader = {"target": "ldm.data.reader.ReaderDataset", "params": {"size": 8, "resolution": 64}}
    third = {
        "model": {
            "base_learning_rate": 4e-3,
            "target": "ldm.data.reader.ShapesReader",
            "params": {"width": 8, "features": 8},
        },
        "data": {"batch_size": 4, "train": reader, "validation": reader},
        "trainer": TRAINER | {"log_images_every": 0, "export": "reader.safetensors"},
    }
    for name, content in (("autoencoder", first_stage()), ("txt2img", second_stage()), ("reader", third)):
        OmegaConf.save(content, f"{name}.yaml")
    return tmp_path
