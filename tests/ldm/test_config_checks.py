"""Configs that ask for more than their weights bear out, and values of the wrong type."""

import copy

import pytest
from omegaconf import OmegaConf

from dsdiff.models.registry import EMBEDDED, STABLE_DIFFUSION
from ldm.config_checks import LARGEST_NUMBER, check_sizes, check_types
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.model import Decoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import build_model

SHAPES = [(64, 4, 3, 3)] * 300


def config_of(path):
    return OmegaConf.to_container(OmegaConf.load(path))["model"]


def test_sizes_beyond_the_weights_are_refused_and_named():
    cases = (
        ("timesteps", 2**31, "params.timesteps is 2.14748e"),
        ("timesteps", float("inf"), "params.timesteps is inf"),
        ("unet_config.params.transformer_depth", 10**6, "asks for"),
        ("unet_config.params.model_channels", 10**9, "model_channels is 1e"),
        ("unet_config.params.channel_mult", [1] * 2000, "layers"),
        ("cond_stage_config.params.text_config.num_hidden_layers", 10**5, "num_hidden_layers"),
        ("first_stage_config.params.ddconfig.ch_mult", [1] * 2000, "ddconfig asks for"),
        ("first_stage_config.params.lossconfig.params", {"num_hidden_layers": 10**5}, "num_hidden_layers"),
        ("unet_config.params.attention_resolutions", [1] * (LARGEST_NUMBER + 1), "entries"),
    )
    for path, value, message in cases:
        config = config_of(EMBEDDED)
        *parents, name = path.split(".")
        node = config["params"]
        for parent in parents:
            node = node[parent]
        node[name] = value
        with pytest.raises(ValueError, match=r"^a file: ") as caught:
            check_sizes(config, SHAPES, "a file")
        assert message in str(caught.value), path


def test_depths_multiply():
    node = {"channel_mult": [1, 2], "num_res_blocks": 60, "transformer_depth": 10}
    check_sizes(node, [(1,)] * 1200, "a file")
    with pytest.raises(ValueError, match="1200 layers"):
        check_sizes(node, [(1,)] * 1199, "a file")


def test_configs_of_real_models_pass():
    for path in (EMBEDDED, STABLE_DIFFUSION):
        check_sizes(config_of(path), None, path.name)
    check_sizes({"vocab_size": 400_000}, [(400_000, 8)], "a file")


def test_values_of_another_type_are_named():
    unet = config_of(EMBEDDED)["params"]["unet_config"]["params"]
    check_types("UNetModel", UNetModel, unet)
    autoencoder = config_of(EMBEDDED)["params"]["first_stage_config"]["params"]
    check_types("AutoencoderKL", AutoencoderKL, autoencoder)
    check_types("Decoder", Decoder, autoencoder["ddconfig"])
    for name, value in (
        ("model_channels", "many"),
        ("model_channels", None),
        ("channel_mult", 4),
        ("channel_mult", [1, "2"]),
        ("dropout", [0.0]),
        ("use_spatial_transformer", "yes"),
        ("context_dim", {"a": 1}),
    ):
        with pytest.raises(ValueError, match=rf"^params of UNetModel: {name} is .*: it must be of type [\w.|\[\], ]+$"):
            check_types("UNetModel", UNetModel, copy.deepcopy(unet) | {name: value})
    with pytest.raises(ValueError, match="params of AutoencoderKL: ddconfig is 3"):
        check_types("AutoencoderKL", AutoencoderKL, autoencoder | {"ddconfig": 3})


def test_models_that_cannot_be_are_refused():
    """Networks that do not fit each other, and classes that are no networks."""
    for path, value, message in (
        ("unet_config.params.in_channels", 9, r"in_channels is 9, and channels is 4"),
        ("unet_config.params.out_channels", 8, "out_channels is 8"),
        ("unet_config.params.context_dim", 64, r"context_dim is 64, and .*hidden_size is 128"),
        ("first_stage_config.params.embed_dim", 3, "embed_dim is 3"),
        ("channels", 16, "and channels is 16"),
        ("first_stage_config.target", "ldm.data.latents.CachedLatents", "is no network of ldm: refused"),
        ("unet_config.target", "torch.nn.Linear", "is no network of ldm: refused"),
        ("cond_stage_config.target", "ldm.modules.attention.rearrange", "is no class of ldm"),
        ("first_stage_config.params.lossconfig", {"target": "ldm.lr_scheduler.LambdaLinearScheduler"}, "is no network"),
    ):
        config = config_of(EMBEDDED)
        *parents, name = path.split(".")
        node = config["params"]
        for parent in parents:
            node = node[parent]
        node[name] = value
        del config["params"]["cond_stage_config"]["params"]["tokenizer"]
        with pytest.raises(ValueError, match=message):
            build_model(config, None, "a file")
