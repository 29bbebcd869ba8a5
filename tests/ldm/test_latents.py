"""The cache of a data set's latents."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.checkpoint import save_checkpoint
from ldm.data import shapes
from ldm.data.latents import CachedLatents
from ldm.util import instantiate_from_config

SHAPES = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 8, "split": "train", "resolution": 32}}
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


@pytest.fixture
def arguments(tmp_path):
    """Arguments of CachedLatents for a small autoencoder with random weights, and an empty folder."""
    params = {"embed_dim": 4, "ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}}
    config = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    OmegaConf.save({"model": config}, tmp_path / "autoencoder.yaml")
    save_checkpoint(instantiate_from_config(config), tmp_path / "autoencoder.safetensors")
    return {
        "dataset": SHAPES,
        "autoencoder": str(tmp_path / "autoencoder.yaml"),
        "ckpt": str(tmp_path / "autoencoder.safetensors"),
        "folder": str(tmp_path / "latents"),
    }


def test_latents_are_encoded_once_and_depend_on_the_weights(arguments, tmp_path):
    data = CachedLatents(**arguments)
    (cache,) = (tmp_path / "latents").glob("*.npy")
    written = cache.stat().st_mtime_ns
    assert len(data) == 8 and data[0]["moments"].shape == (8, 16, 16)
    again = CachedLatents(**arguments)
    assert cache.stat().st_mtime_ns == written and again[3]["caption"] == data[3]["caption"]
    other = instantiate_from_config(OmegaConf.load(arguments["autoencoder"]).model)
    save_checkpoint(other, arguments["ckpt"])
    CachedLatents(**arguments)
    assert len(list((tmp_path / "latents").glob("*.npy"))) == 2


def test_latents_are_the_moments_of_the_pictures(arguments):
    data = CachedLatents(**arguments)
    model = instantiate_from_config(OmegaConf.load(arguments["autoencoder"]).model)
    model.load_state_dict({name: value.float() for name, value in load_file(arguments["ckpt"]).items()})
    picture = shapes.ShapesDataset(**SHAPES["params"])[5]["image"]
    with torch.no_grad():
        expected = model.encode(picture.permute(2, 0, 1)[None]).parameters[0]
    assert (data[5]["moments"] - expected).abs().max() < 0.05 * expected.abs().max()  # encoded in bfloat16


def test_a_changed_renderer_and_an_interrupt_leave_no_stale_latents(arguments, tmp_path, monkeypatch):
    CachedLatents(**arguments)
    render = shapes.render
    monkeypatch.setattr(shapes, "render", lambda scene, resolution: render(scene, resolution).rotate(90))
    monkeypatch.setattr(CachedLatents, "_encode_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CachedLatents(**arguments)
    assert len(list((tmp_path / "latents").iterdir())) == 2  # of the first: moments and captions


def interrupted(self, *arguments):
    raise KeyboardInterrupt


def test_after_an_interruption_only_the_missing_parts_are_encoded(arguments, tmp_path, monkeypatch):
    whole, encode_part, started = CachedLatents(**arguments), CachedLatents._encode_part, []

    def encode(self, start, *rest):
        started.append(start)
        if start == 6 and started.count(6) == 1:
            raise KeyboardInterrupt
        return encode_part(self, start, *rest)

    monkeypatch.setattr(CachedLatents, "_encode_part", encode)
    with pytest.raises(KeyboardInterrupt):
        CachedLatents(**arguments, part_size=3)
    data = CachedLatents(**arguments, part_size=3)
    assert started == [0, 3, 6, 6] and len(data) == len(whole) == 8
    for i in range(8):
        assert data[i]["caption"] == whole[i]["caption"]
        assert (data[i]["moments"] - whole[i]["moments"]).abs().max() < 0.05, i  # batches of other sizes round apart
