"""A UNet with an embedding of the guidance scale (full LCM checkpoints), against diffusers' and through the loader."""

import importlib.util
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm.models.diffusion.lcm import LCMSampler
from ldm.models.diffusion.sampler import seeded_generators
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import guidance_embedding
from ldm.util import instantiate_from_config, load_model_from_config
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel

GOLDENS = Path(__file__).parents[1] / "goldens"
spec = importlib.util.spec_from_file_location("make_diffusers", GOLDENS / "make_diffusers.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


def error(actual, expected):
    """Largest error relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_the_recorded_output_of_diffusers():
    expected = load_file(GOLDENS / "diffusers_lcm_unet.safetensors")["out"]
    unet, values = made.our_unet(), made.unet_inputs()
    assert error(unet(**_arguments(values)), expected) < 1e-5
    for other in (torch.tensor([1.0, 4.0, 8.0]), torch.ones(3)):
        assert error(unet(**_arguments(values | {"guidance": other})), expected) > 1e-3


def test_the_output_of_the_diffusers_that_is_installed():
    pytest.importorskip("diffusers")
    assert error(made.our_unet()(**_arguments(made.unet_inputs())), made.diffusers_unet_output()) < 1e-5


def _arguments(values):
    return {"timesteps" if name == "t" else name: value for name, value in values.items()}


def test_the_embedding_is_of_scale_minus_one():
    """Guidance of 1 is none, and is embedded as 0: sines of 0, then cosines of 0. An odd width ends with 0."""
    assert guidance_embedding(torch.ones(1), 5).tolist() == [[0, 0, 1, 1, 0]]
    (row,) = guidance_embedding(torch.tensor([1.002]), 4)
    angle = torch.tensor(2.0)  # 1000 (scale - 1), at the frequencies 1 and 1/10000
    expected = torch.stack([angle.sin(), (angle / 1e4).sin(), angle.cos(), (angle / 1e4).cos()])
    torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_keys_are_those_of_compvis_and_one_more():
    plain = {name: value for name, value in made.UNET.items() if name != "time_cond_proj_dim"}
    with torch.device("meta"):
        keys, own = (set(UNetModel(**params).state_dict()) for params in (plain, made.UNET))
    assert own - keys == {"time_embed.cond_proj.weight"} and keys < own


def test_scales_are_for_these_models_alone():
    values = _arguments(made.unet_inputs())
    scale = values.pop("guidance")
    with pytest.raises(ValueError, match="needed by them"):
        made.our_unet()(**values)
    plain = UNetModel(**{name: value for name, value in made.UNET.items() if name != "time_cond_proj_dim"})
    with pytest.raises(ValueError, match="guidance scales are for models with time_cond_proj_dim"):
        plain(**values, guidance=scale)
    with pytest.raises(ValueError, match="time_cond_proj_dim is 1"):
        UNetModel(**{**made.UNET, "time_cond_proj_dim": 1})
    with pytest.raises(ValueError, match="cannot be quantized: quantize the model from which it was distilled"):
        QuantModel(made.our_unet(), QuantConfig(weight_bit=8))


@pytest.fixture
def lcm(tmp_path):
    """(config, checkpoint) of a whole model whose UNet has the embedding."""
    config = OmegaConf.load(GOLDENS / "tiny_ldm.yaml")
    config.model.params.unet_config.params.time_cond_proj_dim = 16
    model = instantiate_from_config(config.model)
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file(model.state_dict(), tmp_path / "lcm.safetensors")
    return config, tmp_path / "lcm.safetensors", model


def test_a_checkpoint_loads_and_draws_with_one_sample_a_step(lcm):
    config, ckpt, original = lcm
    model = load_model_from_config(config, str(ckpt), "cpu")
    weight = model.model.diffusion_model.time_embed["cond_proj"].weight
    assert torch.equal(weight, original.model.diffusion_model.time_embed["cond_proj"].weight)
    sizes, drawn = [], []
    model.model.diffusion_model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    context = torch.randn(2, 7, 24)
    for scale in (1.0, 8.0):
        conditioning = {"c_crossattn": [context], "guidance": torch.full((2,), scale)}
        generators = seeded_generators((1, 2))
        drawn += LCMSampler(model).sample(4, 2, (4, 8, 8), conditioning, generator=generators, verbose=False)[:1]
    assert sizes == [2] * 8 and not torch.allclose(drawn[0], drawn[1], atol=1e-3)
    with pytest.raises(ValueError, match="conditioning of shape"):
        LCMSampler(model).sample(4, 2, (4, 8, 8), {"c_crossattn": [context], "guidance": torch.ones(3)}, verbose=False)


def test_a_checkpoint_needs_the_config_that_says_so(lcm):
    _, ckpt, _ = lcm
    with pytest.raises(ValueError, match=r"time_embed\.cond_proj\.weight"):
        load_model_from_config(OmegaConf.load(GOLDENS / "tiny_ldm.yaml"), str(ckpt), "cpu")
