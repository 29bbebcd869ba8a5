"""Records diffusers' schedulers, and its UNet with an embedding of guidance: python tests/goldens/make_diffusers.py

Writes diffusers_samplers.safetensors and diffusers_lcm_unet.safetensors beside this file. The tests compare ours with
the files, and with diffusers itself where it is installed.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from ldm.models.diffusion.sampler import seeded_generators  # noqa: E402
from ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 8)
SEEDS = (42, 43)
# (sampler, steps, eta); the eta of None is the sampler's own
CASES = (
    *((name, steps, None) for name in ("euler", "euler_a", "dpmpp_2m_karras", "unipc") for steps in (2, 3, 7, 20)),
    *(("lcm", steps, None) for steps in (1, 2, 4, 7)),
    *(("tcd", 4, eta) for eta in (0.0, 0.3, 0.7, 1.0)),
    *(("tcd", steps, None) for steps in (1, 2, 7)),
)

# --- samplers ----------------------------------------------------------------------------------------------


def smooth_eps(x: Tensor, t: Tensor) -> Tensor:
    """Return a noise prediction that depends on everything, row by row. x [B, C, H, W], t [B]."""
    return torch.tanh(0.5 * x) * (0.5 + t.view(-1, 1, 1, 1) / 1000)


def start(generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(*SHAPE, generator=generator) for generator in generators])


def title(name: str, steps: int, eta: float | None) -> str:
    return f"{name}/S{steps}" + ("" if eta is None else f"/eta{eta:g}")


def scheduler(name: str):
    import diffusers

    make = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
        "dpmpp_2m_karras": lambda **betas: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **betas),
        "unipc": diffusers.UniPCMultistepScheduler,
        "lcm": diffusers.LCMScheduler,
        "tcd": diffusers.TCDScheduler,
    }
    return make[name](**BETAS)


def walk(name: str, steps: int, eta: float | None) -> tuple[Tensor, Tensor]:
    """Return the samples [2, *SHAPE] and the times [S] of diffusers' scheduler, as a pipeline of diffusers calls it."""
    theirs, generators = scheduler(name), seeded_generators(SEEDS)
    theirs.set_timesteps(steps)
    x = start(generators) * theirs.init_noise_sigma
    options = {} if name in ("unipc", "dpmpp_2m_karras") else {"generator": generators}
    if eta is not None:
        options["eta"] = eta
    for t in theirs.timesteps:
        eps = smooth_eps(theirs.scale_model_input(x, t), t.expand(len(x)).float())
        x = theirs.step(eps, t, x, **options).prev_sample
    return x, theirs.timesteps.float()


# --- a UNet with an embedding of guidance ------------------------------------------------------------------

UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "context_dim": 24,
    "legacy": False,
    "time_cond_proj_dim": 16,
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def our_unet() -> UNetModel:
    """Return the UNet with random weights, the same in each run; none is zero."""
    unet, generator = UNetModel(**UNET).eval(), torch.Generator().manual_seed(0)
    for name, parameter in sorted(unet.named_parameters()):
        normal = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        offset = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.data.copy_(offset + scale * normal)
    return unet


def unet_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(3, *SHAPE, generator=generator),
        "t": torch.tensor([999, 259, 19]),
        "context": torch.randn(3, 7, UNET["context_dim"], generator=generator),
        "guidance": torch.tensor([1.0, 4.0, 8.5]),
    }


def compvis_modules() -> dict[str, str]:
    """Return the modules of diffusers' UNet by their names there, with their names in CompVis's UNet."""
    levels, per_level = len(UNET["channel_mult"]), UNET["num_res_blocks"] + 1
    names = {f"time_embedding.{a}": f"time_embed.{b}" for a, b in (("linear_1", 0), ("linear_2", 2))}
    names |= {"time_embedding.cond_proj": "time_embed.cond_proj", "conv_in": "input_blocks.0.0"}
    names |= {"conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.attentions.0": "middle_block.1"}
    blocks = {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in (0, 1)}
    for level in range(levels):
        for j in range(per_level):
            blocks[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{level * per_level + j}.0"
            names[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{level * per_level + j}.1"
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{(level + 1) * per_level - 1}.2.conv"
        for j in range(per_level - 1):
            blocks[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{level * per_level + 1 + j}.0"
            names[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{level * per_level + 1 + j}.1"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * per_level}.0.op"
    return names | {f"{a}.{part}": f"{b}.{own}" for a, b in blocks.items() for part, own in RESNET.items()}


def compvis_key(theirs: str) -> str:
    module = next(name for name in compvis_modules() if theirs.startswith(f"{name}."))
    return compvis_modules()[module] + theirs[len(module) :]


def diffusers_unet_output() -> Tensor:
    """Return what diffusers' UNet makes of `unet_inputs` with the weights of `our_unet`."""
    import diffusers
    from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
        LatentConsistencyModelPipeline,
    )

    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=UNET["context_dim"],
        attention_head_dim=UNET["num_heads"],
        time_cond_proj_dim=UNET["time_cond_proj_dim"],
    ).eval()
    ours = our_unet().state_dict()
    unet.load_state_dict({name: ours[compvis_key(name)] for name in unet.state_dict()})
    values = unet_inputs()
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    w = embed(None, values["guidance"] - 1, embedding_dim=UNET["time_cond_proj_dim"])
    with torch.no_grad():
        return unet(values["x"], values["t"], encoder_hidden_states=values["context"], timestep_cond=w).sample


def main() -> None:
    import diffusers

    tensors = {}
    for case in CASES:
        tensors[f"{title(*case)}/samples"], tensors[f"{title(*case)}/times"] = walk(*case)
    facts = {"facts": json.dumps({"diffusers": diffusers.__version__, "torch": torch.__version__})}
    save_file(tensors, HERE / "diffusers_samplers.safetensors", facts)
    save_file({"out": diffusers_unet_output()}, HERE / "diffusers_lcm_unet.safetensors", facts)


if __name__ == "__main__":
    main()
