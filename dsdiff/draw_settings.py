"""How pictures are drawn: the settings that options mean for a model, with all defaults filled in."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dsdiff.cache_schedule import CacheSchedule
from dsdiff.models.decoder import TINY, TinyFile, find_tiny
from dsdiff.models.embeddings import EmbeddingRecord
from dsdiff.models.lora import LoraRecord
from dsdiff.models.quantized import Quantization
from dsdiff.models.spec import ModelSpec
from dsdiff.options import FEW_STEP, DrawOptions, InitOptions, MergeOptions
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverKarrasSampler, DPMSolverSampler
from ldm.models.diffusion.euler import EulerAncestralSampler, EulerSampler
from ldm.models.diffusion.guidance import guided_steps
from ldm.models.diffusion.lcm import LCMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler, steps_from
from ldm.models.diffusion.tcd import TCDSampler
from ldm.models.diffusion.unipc import UniPCSampler
from ldm.modules.diffusionmodules.feature_cache import cached_features, every, in_steps

logger = logging.getLogger(__name__)

SAMPLERS: Mapping[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "plms": PLMSSampler,
    "dpm_solver": DPMSolverSampler,
    "euler": EulerSampler,
    "euler_a": EulerAncestralSampler,
    "dpmpp_2m_karras": DPMSolverKarrasSampler,
    "unipc": UniPCSampler,
    "lcm": LCMSampler,
    "tcd": TCDSampler,
}
FEW_STEPS = 4  # of samplers of FEW_STEP, where none are asked for


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How pictures are drawn, with all defaults of DrawOptions resolved.

    steps, steps_taken: the number of steps asked for, and the number taken (see `make_ddim_timesteps`).
    guidance_start, guidance_stop: the shares of the steps between which there is guidance, see DrawOptions.
    cache, cache_depth: how deep features are kept from step to step, see DrawOptions. If a file named the whole steps,
        `cache` holds their numbers.
    quantization: how the model is quantized; None for a float model.
    lora: the LoRAs that change the model. embeddings: those of textual inversion that prompts may name.
    init: how pictures are drawn from others; None draws them from noise alone. steps_taken counts its strength.
    """

    height: int
    width: int
    sampler: str
    steps: int
    steps_taken: int
    eta: float
    scale: float
    negative_prompt: str
    prompt_weights: bool = True
    long_prompts: str = "chunk"
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cache: int | tuple[int, ...] = 1
    cache_depth: int = 1
    precision: str
    vae: str
    vae_tiling: bool
    tiny_decoder: TinyFile | None = None
    merge: MergeOptions | None
    quantization: Quantization | None = None
    lora: tuple[LoraRecord, ...] = ()
    embeddings: tuple[EmbeddingRecord, ...] = ()
    init: InitOptions | None = None

    @property
    def keeps_features(self) -> bool:
        """True if there are steps in which the UNet is not computed as a whole."""
        return self.cache != 1

    def keeping(self, unet: nn.Module) -> AbstractContextManager[None]:
        """Return a context, for one run of the sampler, in which a UNet keeps its deep features as the settings say."""
        if not self.keeps_features:
            return nullcontext()
        whole = every(self.cache) if isinstance(self.cache, int) else in_steps(self.cache)
        return cached_features(unet, whole, self.cache_depth)

    @property
    def guides(self) -> bool:
        """True if any step is guided by a second sample of the UNet, or by the scale as its input."""
        return self.scale != 1 and any(guided_steps(self.steps_taken, (self.guidance_start, self.guidance_stop)))


def resolve_settings(
    options: DrawOptions,
    spec: ModelSpec,
    *,
    precision: str,
    vae: str,
    merge: MergeOptions | None = None,
    quantization: Quantization | None = None,
    lora: tuple[LoraRecord, ...] = (),
    embeddings: tuple[EmbeddingRecord, ...] = (),
) -> DrawSettings:
    """Return the settings that options mean for a model. Reads no weights.

    precision, merge: the defaults for options that have none. vae: the decoder chosen. quantization, lora, embeddings:
    those of the model. Raises ValueError for a value that the model cannot have and for options that would have no
    effect.
    """
    steps = options.steps or (FEW_STEPS if options.sampler in FEW_STEP else spec.steps)
    settings = DrawSettings(
        height=_side("height", options.height or spec.height, spec.factor),
        width=_side("width", options.width or spec.width, spec.factor),
        sampler=options.sampler,
        steps=steps,
        steps_taken=_steps_taken(options.sampler, steps, spec.timesteps, options.init),
        eta=(SAMPLERS[options.sampler].default_eta or 0.0) if options.eta is None else options.eta,
        scale=_scale(options, spec),
        negative_prompt=options.negative_prompt,
        prompt_weights=options.prompt_weights,
        long_prompts=options.long_prompts,
        guidance_start=float(options.guidance_start),
        guidance_stop=float(options.guidance_stop),
        cache=options.cache if isinstance(options.cache, int) else 1,
        cache_depth=options.cache_depth,
        precision=options.precision or precision,
        vae=vae,
        vae_tiling=options.vae_tiling,
        tiny_decoder=find_tiny(spec, options.tiny_decoder) if options.vae == TINY else None,
        merge=options.merge or merge,
        quantization=quantization,
        lora=lora,
        embeddings=embeddings,
        init=options.init,
    )
    return _with_cache(settings, options.cache, spec)


def _with_cache(settings: DrawSettings, cache: int | Path, spec: ModelSpec) -> DrawSettings:
    """Return the settings with the schedule of a file. Raises ValueError for one of other steps or another UNet."""
    if isinstance(cache, Path):
        schedule = CacheSchedule.read(cache)
        interval = (settings.guidance_start, settings.guidance_stop) if settings.guides else None
        schedule.check(str(cache), sampler=settings.sampler, steps=settings.steps_taken, guidance=interval)
        settings = replace(settings, cache=schedule.whole, cache_depth=schedule.depth)
    if settings.keeps_features and settings.cache_depth >= spec.output_blocks:
        raise ValueError(
            f"cache_depth is {settings.cache_depth}: this model's UNet has {spec.output_blocks} output blocks, so "
            f"{spec.output_blocks - 1} at most"
        )
    return settings


def _scale(options: DrawOptions, spec: ModelSpec) -> float:
    """Return the scale of guidance. Raises ValueError for options of guidance that would have no effect."""
    if spec.embeds_guidance:
        options.check_guidance("on a model that takes the scale as an input: leave it out")
    elif options.scale is None and options.sampler in FEW_STEP:
        options.check_guidance(f"with {options.sampler}, which draws without guidance: give a scale as well")
        return 1.0
    elif options.scale is None and spec.scale == 1:
        options.check_guidance("with scale 1, which is no guidance: use a larger scale")
    return float(spec.scale if options.scale is None else options.scale)


def _steps_taken(sampler: str, steps: int, timesteps: int, init: InitOptions | None) -> int:
    taken = SAMPLERS[sampler].steps_taken(steps, timesteps)
    if taken != steps:
        logger.info("%d steps do not divide the model's %d: %d are taken", steps, timesteps, taken)
    return taken if init is None else steps_from(taken, init.strength)


def _side(name: str, pixels: int, factor: int) -> int:
    if pixels % factor:
        below, above = pixels // factor * factor, (pixels // factor + 1) * factor
        nearest = f"{below} or {above}" if below else str(above)
        raise ValueError(f"{name} {pixels} is not a multiple of {factor}: use {nearest}")
    return pixels
