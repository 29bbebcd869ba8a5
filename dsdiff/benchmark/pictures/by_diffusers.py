"""Pictures by diffusers, from a folder of the same sizes with weights of its own. Runs in a `child` only."""

import importlib
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.utils import logging

from dsdiff.benchmark import peers_diffusers
from dsdiff.benchmark.pictures.request import PROMPT, SEED, Clock, PictureRequest
from dsdiff.benchmark.source import Source
from dsdiff.benchmark.variants import DTYPES
from ldm.modules.encoders.clip import ClipTextConfig

DIFFUSERS: Any = StableDiffusionPipeline  # whose annotations leave out what it takes and returns
SPREAD = {"timestep_spacing": "linspace", "steps_offset": 0}
# Our sampler -> the scheduler, and its settings where they are not those of the pipeline.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
    "dpm_solver": (DPMSolverMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, SPREAD),
    "euler_a": (EulerAncestralDiscreteScheduler, SPREAD),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, SPREAD),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}


def draw(request: PictureRequest, clock: Clock) -> str:
    """Draw the picture of a request; return facts in words."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = DTYPES[request.name.removeprefix("diffusers-")]
    pipe = DIFFUSERS.from_pretrained(
        request.files["folder"], torch_dtype=dtype, local_files_only=True, safety_checker=None
    ).to(request.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(request.sampler, pipe.scheduler.config)
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    clock.ready()
    pipe.text_encoder.register_forward_hook(lambda *_: clock.lap("text"))

    def ended(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i > 0 or request.sampler != "plms":  # the first step of PLMS makes two calls, and is told as two
            clock.step()
        return tensors

    side = pipe.vae_scale_factor * pipe.unet.config.sample_size
    with torch.no_grad():
        latents = pipe(
            PROMPT,
            height=side,
            width=side,
            num_inference_steps=request.steps,
            guidance_scale=request.scale,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            callback_on_step_end=ended,
        ).images
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        (picture,) = pipe.image_processor.postprocess(image, output_type="pil")
    clock.lap("decoding")
    picture.save(request.png)
    clock.lap("png")
    return f"all in {request.name.removeprefix('diffusers-')}"


def scheduler(sampler: str, config: Any) -> Any:
    """Return diffusers' scheduler for one of our samplers."""
    kind, settings = SCHEDULERS[sampler]
    return kind.from_config(config, **settings)


def make_folder(source: Source, tokenizer: Path, folder: Path) -> None:
    """Write a pipeline of the source's sizes with random weights, float16, in diffusers' layout."""
    peers_diffusers.check_sizes(source)
    params = source.params
    text = (params["cond_stage_config"].get("params") or {}).get("text_config") or {}
    length = (params["cond_stage_config"].get("params") or {}).get("max_length", 77)
    transformers = importlib.import_module("transformers")
    tokens = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    tokens.model_max_length = length
    plan = {"beta_start": params["linear_start"], "beta_end": params["linear_end"], "beta_schedule": "scaled_linear"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = DIFFUSERS(
            vae=peers_diffusers.make_autoencoder(params["first_stage_config"]["params"], params.get("scale_factor", 1)),
            text_encoder=transformers.CLIPTextModel(
                transformers.CLIPTextConfig(**vars(ClipTextConfig.from_fields(text)))
            ),
            tokenizer=tokens,
            unet=peers_diffusers.make_unet(source.unet_config["params"], params["image_size"]),
            scheduler=PNDMScheduler(**plan, **SCHEDULERS["plms"][1]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.to(torch.float16)
    pipe.save_pretrained(folder)
