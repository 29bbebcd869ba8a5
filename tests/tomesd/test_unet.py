"""Token merging in our UNet, against recorded outputs of the reference implementation."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tomesd
from ldm.modules.diffusionmodules.openaimodel import UNetModel

GOLDENS = Path(__file__).parents[1] / "goldens"
RUNS = json.loads((GOLDENS / "tome.json").read_text())["unet"]


@pytest.fixture
def unet():
    config = yaml.safe_load((GOLDENS / "tiny_ldm.yaml").read_text())["model"]["params"]["unet_config"]["params"]
    unet = UNetModel(**config)
    prefix = "model.diffusion_model."
    weights = load_file(GOLDENS / "tiny_ldm.safetensors")
    unet.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})
    return unet.eval()


@pytest.fixture(scope="module")
def goldens():
    return load_file(GOLDENS / "tome.safetensors")


def inputs_of(name, goldens):
    x, t, context = (goldens[f"unet/in_{RUNS[name]['input']}/{part}"] for part in ("x", "t", "context"))
    return {"x": x, "timesteps": t, "context": context}


def close(out, expected):
    return (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_unet_equals_the_goldens(unet, goldens, no_grad):
    for name, run in RUNS.items():
        inputs = inputs_of(name, goldens)
        # One run asked for 0.9 and got 0.75, all there is to merge in 2 x 2 tiles; here 0.75 is the most one may ask.
        kwargs = run["kwargs"] | {"ratio": min(run["kwargs"]["ratio"], 0.75)}
        unpatched = unet(**inputs)
        tomesd.apply_patch(unet, **kwargs, seed=run["seed"])
        assert close(unet(**inputs), goldens[f"unet/{name}/out"]), name
        counts = tomesd.token_report(unet)
        if f"unet/{name}/out_second_call" in goldens:
            assert close(unet(**inputs), goldens[f"unet/{name}/out_second_call"]), name
        tomesd.remove_patch(unet)
        assert len(counts) == run["patched_blocks"], name
        assert sum(count.tokens_processed < count.tokens_in for count in counts) == run["blocks_that_merge"], name
        assert torch.equal(unet(**inputs), unpatched), name


def test_gradients_with_and_without_checkpointing_are_equal(unet, goldens):
    inputs = inputs_of(next(iter(RUNS)), goldens)
    blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    tomesd.apply_patch(unet, max_downsample=4, merge_crossattn=True, merge_mlp=True)
    gradients = []
    for enabled in (False, True):
        for block in blocks:
            block.checkpoint = enabled
        unet.train().zero_grad()
        tomesd.reseed(unet, 0)
        unet(**inputs).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    assert len(blocks) > 1 and any(count.tokens_processed < count.tokens_in for count in tomesd.token_report(unet))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
