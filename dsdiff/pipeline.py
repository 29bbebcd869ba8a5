"""Pipeline: prompts and options in, pictures out. It knows no flags, and writes no files."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import tomesd
from dsdiff.conditioning import PromptContexts, rows_by_length
from dsdiff.draw_settings import SAMPLERS, DrawSettings, resolve_settings
from dsdiff.environment import choose_device, precision_context
from dsdiff.images.init import InitPicture, drawn_latents, init_picture, pasted, to_tensor
from dsdiff.images.png import to_pictures
from dsdiff.models.bundle import decoder_ranges
from dsdiff.models.decoder import FLOAT32, Decoders, choose_vae
from dsdiff.models.embeddings import EmbeddingRecord, read_embeddings
from dsdiff.models.held import HeldModel
from dsdiff.models.lora import LoraRecord, Loras, resolve_loras
from dsdiff.models.quantized import resolve_quantization
from dsdiff.models.registry import CONFIGS
from dsdiff.models.spec import ModelSpec, find_model
from dsdiff.options import (
    DrawOptions,
    EmbeddingOptions,
    InitOptions,
    LoraOptions,
    MergeOptions,
    ModelOptions,
    QuantizationOptions,
)
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.sampler import Init, seeded_generators
from qdiff.engine import step_cache
from qdiff.engine.cpu import has_bfloat16
from qdiff.engine.lower import fits_bytes

logger = logging.getLogger(__name__)

FIRST_SEED = 42  # of pictures whose seeds are not given

Lora = LoraOptions | str | Path | tuple[str | Path, float]  # a LoRA's file, or file and scale
Embedding = EmbeddingOptions | str | Path | tuple[str | Path, str]  # an embedding's file, or file and name


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn picture: the image (RGB), its prompt, the seed of its noise, and the settings it was drawn with."""

    image: Image.Image
    prompt: str
    seed: int
    settings: DrawSettings


class Pipeline:
    """A model that draws pictures.

    The headers of its files are read at once, so that errors come early; the weights are read at first use.

    spec: the model, as `find_model` returns it.
    device: a torch device, or a name for `choose_device`.
    tokenizer: the folder with the tokenizer's files. None looks beside the checkpoint.
    quantization: how to read a calibrated model. None draws with the float model, or with a bundle as it is.
    merge: the token merging for DrawOptions that have none.
    lora: LoRAs that change the model, see `set_lora`.
    embeddings: embeddings of textual inversion, whose names prompts may use.
    Raises ValueError or FileNotFoundError for files and options that cannot work together.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: torch.device | str = "auto",
        tokenizer: Path | None = None,
        quantization: QuantizationOptions | None = None,
        merge: MergeOptions | None = None,
        lora: Sequence[Lora] = (),
        embeddings: Sequence[Embedding] = (),
    ):
        self.spec = spec
        self.device = choose_device(device) if isinstance(device, str) else device
        self.tokenizer = tokenizer
        self.notes: list[str] = []  # lines to tell the user
        self.quantization = resolve_quantization(quantization, spec, self.device, self.notes.append)
        self.merge = merge
        loras = self._resolve_loras(lora)
        named = read_embeddings([EmbeddingOptions.of(each) for each in embeddings], spec)
        self._held = HeldModel(spec, self.device, tokenizer, self.quantization, loras, named)
        self.decoder_ranges = decoder_ranges(spec.ckpt) if spec.bundle else {}
        self._contexts = PromptContexts(self.device)
        self._decoders = Decoders(spec.channels, self.decoder_ranges, self._held.give_back)

    def __str__(self) -> str:
        parts = (self.spec, *([] if self.quantization is None else [self.quantization]), *self.lora, *self.embeddings)
        return ", ".join(map(str, parts))

    # --- settings -----------------------------------------------------------------------------------------

    def resolve(self, options: DrawOptions) -> DrawSettings:
        """Return the settings that options mean for this model. Reads no weights.

        Raises ValueError for a value that the model cannot have and for options that would have no effect.
        """
        return resolve_settings(
            options,
            self.spec,
            precision=self.default_precision,
            vae=choose_vae(options.vae, self.decoder_ranges, self.device),
            merge=self.merge,
            quantization=self.quantization,
            lora=self.lora,
            embeddings=self.embeddings,
        )

    @property
    def default_precision(self) -> str:
        """autocast on a GPU, and for integers, simulated ones too, on a CPU that computes in bfloat16; else full."""
        integers = self.quantization is not None and fits_bytes(self.quantization.effective)
        return "autocast" if self.device.type == "cuda" or (integers and has_bfloat16()) else "full"

    # --- the model ----------------------------------------------------------------------------------------

    @property
    def model(self) -> LatentDiffusion:
        """The LatentDiffusion, read at first use: quantized as asked, with tokens merged as last drawn."""
        return self._held.model

    def prepare(self, settings: DrawSettings) -> LatentDiffusion:
        """Return the model, its tokens merged as the settings say, and read the tiny decoder, if they have one.

        Raises ValueError for settings of other LoRAs, and for a file that is no tiny decoder of this model.
        """
        if settings.lora != self.lora:
            raise ValueError("these settings are of other LoRAs than the pipeline has now: resolve the options again")
        if settings.tiny_decoder is not None:  # before the model, which takes longer, and before pictures are drawn
            self._decoders.tiny(settings.tiny_decoder, self.device)
        return self._held.merged(settings.merge)

    def recorded(self) -> AbstractContextManager[nn.Module]:
        """Return a context in which the UNet is called as while drawing, and which yields it: on a GPU by CUDA graphs.

        Outside of it, `model` calls it kernel by kernel. See `HeldModel.recorded`.
        """
        return self._held.recorded()

    @property
    def embeddings(self) -> tuple[EmbeddingRecord, ...]:
        """The records of the embeddings that prompts may name."""
        return self._held.embeddings.records

    # --- LoRAs --------------------------------------------------------------------------------------------

    @property
    def lora(self) -> tuple[LoraRecord, ...]:
        """The records of the LoRAs that change the model."""
        return self._held.loras.records

    @property
    def merged_lora(self) -> tuple[LoraOptions, ...]:
        """The LoRAs that are merged into the weights: all of a float model, those that a cali_ckpt was made with."""
        return self._held.loras.options[: self._held.loras.merged]

    def set_lora(self, *lora: Lora) -> None:
        """Replace the LoRAs of the model by these; without arguments remove them.

        lora: each a file, (file, scale), or LoraOptions. On a quantized model they are float branches beside its
        layers, and removing them restores its outputs bit for bit. Into a float model they are merged: it is read anew
        at the next use. Settings must be resolved again afterwards. Raises ValueError or FileNotFoundError, and changes
        nothing, for files that do not fit.
        """
        if self._held.set_loras(self._resolve_loras(lora)):
            self._decoders.clear()  # which are made of the model's
        self._contexts.clear()

    def _resolve_loras(self, lora: Sequence[Lora]) -> Loras:
        cali_ckpt = None if self.quantization is None else Path(self.quantization.cali_ckpt)
        return resolve_loras([LoraOptions.of(each) for each in lora], cali_ckpt, bundle=self.spec.bundle)

    # --- drawing ------------------------------------------------------------------------------------------

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        options: DrawOptions | None = None,
        batch_size: int = 1,
    ) -> Iterator[Picture]:
        """Yield a picture for each prompt, in order, `batch_size` drawn at a time.

        seeds: one for each prompt (None: 42, 43, ...). The same prompt, seed and options give the same picture; in
        another batch it differs by rounding at most (see `sample` for the exception). Raises ValueError for options
        that the model cannot draw with, before anything is drawn.
        """
        texts, numbers = _texts_and_seeds(prompts, seeds, batch_size)
        settings = self.resolve(options or DrawOptions())
        if settings.init is not None:
            raise ValueError("options.init is for pictures that are drawn from others: call img2img, with the pictures")
        return self._draw(texts, numbers, settings, batch_size)

    def img2img(
        self,
        prompts: str | Sequence[str],
        pictures: Image.Image | Sequence[Image.Image],
        *,
        mask: Image.Image | None = None,
        seeds: Sequence[int] | None = None,
        options: DrawOptions | None = None,
        batch_size: int = 1,
    ) -> Iterator[Picture]:
        """Yield a picture for each prompt, drawn from the picture of the same number, or all from a single picture.

        pictures: of any mode and size; options.init says how they get the size that is drawn, and the strength (None:
        InitOptions()). mask: of the pictures' size; white is drawn anew, black stays. The other arguments are those of
        `draw`. Raises ValueError for other numbers of pictures and prompts, and for a mask of another size.
        """
        texts, numbers = _texts_and_seeds(prompts, seeds, batch_size)
        images = [pictures] * len(texts) if isinstance(pictures, Image.Image) else list(pictures)
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} pictures for {len(texts)} prompts: give one picture, or one a prompt")
        options = options or DrawOptions()
        settings = self.resolve(replace(options, init=options.init or InitOptions()))
        assert settings.init is not None
        inits = [init_picture(each, mask, (settings.width, settings.height), settings.init) for each in images]
        return self._draw(texts, numbers, settings, batch_size, inits)

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawSettings,
        batch_size: int,
        inits: Sequence[InitPicture] = (),
    ) -> Iterator[Picture]:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            init = self.start_from(inits[part], settings) if inits else None
            images = to_pictures(self.decode(self.sample(prompts[part], seeds[part], settings, init=init), settings))
            if inits and settings.init is not None:
                images = [pasted(*pair, settings.init) for pair in zip(images, inits[part], strict=True)]
            for prompt, seed, image in zip(prompts[part], seeds[part], images, strict=True):
                yield Picture(image=image, prompt=prompt, seed=seed, settings=settings)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawSettings,
        *,
        init: Init | None = None,
        verbose: bool = False,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
    ) -> Tensor:
        """Return latents [B, C, h, w] for `decode`, one a prompt, each from the noise of its own seed.

        A picture depends on its prompt, its seed and the settings alone; in another batch it differs by rounding.
        (The exception is token merging without guidance: batches of an odd size merge other tokens.) Prompts with
        different numbers of chunks are sampled separately.
        init: what `start_from` returns, for settings that have an init. verbose: show a bar of steps. callback(i) and
        img_callback(pred_x0, i) are called after step i, pred_x0 being the x_0 [B, C, h, w] that the step predicts; an
        exception in them ends the sampling. Raises ValueError for latents that become NaN or infinite.
        """
        if (init is None) != (settings.init is None):
            raise ValueError("settings with an init need pictures to start from, and others take none: see img2img")
        model = self.prepare(settings)
        groups = rows_by_length(self._contexts.lengths(model, prompts, settings))
        latents: list[Tensor] = [torch.empty(0)] * len(prompts)
        for length, rows in groups.items():
            part = init if init is None or len(groups) == 1 else _rows(init, rows)
            texts, numbers = [prompts[row] for row in rows], [seeds[row] for row in rows]
            reporting = {"verbose": verbose, "callback": callback, "img_callback": img_callback}
            drawn = self._sample(model, texts, numbers, settings, length, part, **reporting)
            for row, latent in zip(rows, drawn, strict=True):
                latents[row] = latent
        return torch.stack(latents)

    @torch.no_grad()
    def _sample(
        self,
        model: LatentDiffusion,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawSettings,
        length: int,
        init: Init | None,
        **reporting: Any,
    ) -> Tensor:
        """Return the latents of prompts whose contexts have `length` chunks."""
        if settings.merge is not None:  # the same destinations for all batches, whatever was drawn before
            tomesd.reseed(model, settings.merge.seed)
        context, unconditional = self._conditioning(model, prompts, settings, length)
        sampler = SAMPLERS[settings.sampler](model)
        strength = 1.0 if init is None else init.strength
        times = sampler.schedule_from(settings.steps, settings.eta, strength)
        unet, factor = model.model.diffusion_model, self.spec.factor
        merging = nullcontext() if settings.merge is None else tomesd.walk(model, len(times))
        with (
            precision_context(self.device, settings.precision),
            step_cache.walk(unet, times),
            merging,
            settings.keeping(unet),
            self.recorded(),
        ):
            latents, _ = sampler.sample(
                settings.steps,
                len(prompts),
                (self.spec.channels, settings.height // factor, settings.width // factor),
                context,
                eta=settings.eta,
                unconditional_guidance_scale=settings.scale,
                unconditional_conditioning=unconditional,
                guidance_interval=(settings.guidance_start, settings.guidance_stop),
                generator=seeded_generators(seeds),
                init=init,
                **reporting,
            )
        return latents

    def _conditioning(
        self, model: LatentDiffusion, prompts: Sequence[str], settings: DrawSettings, length: int
    ) -> tuple[Conditioning, Conditioning]:
        """Return the conditioning with the prompts, and the one without that guidance needs; None if it needs none."""
        context = self._contexts.encode(model, prompts, settings, length)
        if self.spec.embeds_guidance:
            scales = torch.full((len(prompts),), settings.scale, device=self.device)
            return {"c_crossattn": [context], "guidance": scales}, None
        if not settings.guides:
            return context, None
        negative = [settings.negative_prompt] * len(prompts)
        return context, self._contexts.encode(model, negative, settings, length)

    def start_from(self, inits: Sequence[InitPicture], settings: DrawSettings) -> Init:
        """Return the `init` of `sample`: the latents of pictures, and where their masks let them be drawn anew.

        Raises ValueError for settings without an init.
        """
        if settings.init is None:
            raise ValueError("these settings draw from noise alone: resolve options that have an init")
        x0 = torch.cat([self.encode(to_tensor(each.image)) for each in inits])
        drawn = drawn_latents([each.mask for each in inits], self.spec.factor)
        return Init(x0=x0, strength=settings.init.strength, drawn=None if drawn is None else drawn.to(x0.device))

    @torch.no_grad()
    def decode(self, latents: Tensor, settings: DrawSettings | None = None) -> Tensor:
        """Return pictures [B, 3, H, W], float32 in [0, 1] on the CPU, of latents [B, C, h, w].

        settings: they choose the decoder; None takes the autoencoder's in float32. Pictures are decoded one at a time,
        which needs little memory. Raises ValueError for NaN or infinite pixels.
        """
        kinds = (
            (FLOAT32, False, None) if settings is None else (settings.vae, settings.vae_tiling, settings.tiny_decoder)
        )
        with precision_context(self.device, "full"):
            images = self._decoders.decode(self.model, latents, *kinds)
        if not bool(images.sum().isfinite()):
            raise ValueError(f"the decoder ({kinds[0]}) made NaN or infinite pixels: use another one, as float32 is")
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return latents [B, C, h, w], the posterior's mean, of pictures [B, 3, H, W] in [0, 1]."""
        with precision_context(self.device, "full"):
            posterior = self.model.encode_first_stage(images.to(self.device) * 2 - 1)
            return self.model.get_first_stage_encoding(posterior.mode())


def _texts_and_seeds(
    prompts: str | Sequence[str], seeds: Sequence[int] | None, batch_size: int
) -> tuple[list[str], list[int]]:
    """Return prompts and seeds, one each. Raises ValueError for numbers that do not match."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    numbers = list(range(FIRST_SEED, FIRST_SEED + len(texts))) if seeds is None else list(seeds)
    if len(numbers) != len(texts):
        raise ValueError(f"{len(numbers)} seeds for {len(texts)} prompts: give one seed a prompt")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be 1 or more")
    return texts, numbers


def _rows(init: Init, rows: Sequence[int]) -> Init:
    return replace(init, x0=init.x0[rows], drawn=None if init.drawn is None else init.drawn[rows])


def load(
    model: str | Path = "embedded",
    *,
    cali_ckpt: str | Path | None = None,
    engine: str | None = None,
    ratio: float = 0.0,
    quantization: QuantizationOptions | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vae_ckpt: str | Path | None = None,
    lora: Sequence[Lora] = (),
    embeddings: Sequence[Embedding] = (),
    device: torch.device | str = "auto",
) -> Pipeline:
    """Load a model that draws: `for picture in dsdiff.load().draw(["a red circle"]): picture.image.show()`.

    model: "embedded", "sd-v1", the path of a checkpoint, of a folder as diffusers saves it or of a bundle, or a name on
        the hub.
    cali_ckpt: a calibration of the model. With `engine` alone it is the one that comes with the model; with neither of
        them the model is float, or a bundle as it is.
    engine: "int8" or "simulate"; None takes int8 where it can run.
    ratio: the share of the tokens to merge; 0 merges none.
    quantization: all options of quantization, in place of `cali_ckpt` and `engine`.
    config: the yaml of a checkpoint that is not Stable Diffusion v1's.
    vae_ckpt: another autoencoder for the model: a file, a folder or a name on the hub.
    lora: files of LoRAs, or (file, scale) of each, see `Pipeline.set_lora`.
    embeddings: files of textual inversion, or (file, name) of each.
    tokenizer, device: see Pipeline.
    Raises ValueError or FileNotFoundError, in one line, for files and options that cannot work together.
    """
    if quantization is not None and (cali_ckpt is not None or engine is not None):
        raise ValueError("give cali_ckpt and engine, or quantization, which holds both")
    if quantization is None and (cali_ckpt is not None or engine is not None):
        path = None if cali_ckpt is None else Path(cali_ckpt)
        quantization = QuantizationOptions(cali_ckpt=path, engine=engine)
    files: Mapping[str, Any] = {"config": CONFIGS[str(model)]} if str(model) in CONFIGS else {"ckpt": Path(model)}
    if config is not None:
        files = {**files, "config": Path(config)}
    folder = None if tokenizer is None else Path(tokenizer)
    autoencoder = None if vae_ckpt is None else Path(vae_ckpt)
    spec = find_model(ModelOptions(**files, tokenizer=folder, vae_ckpt=autoencoder))
    pipeline = Pipeline(
        spec,
        device=device,
        tokenizer=folder,
        quantization=quantization,
        merge=MergeOptions(ratio=ratio) if ratio else None,
        lora=lora,
        embeddings=embeddings,
    )
    for note in pipeline.notes:
        logger.info("%s", note)
    pipeline.prepare(pipeline.resolve(DrawOptions()))
    return pipeline
