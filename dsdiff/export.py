"""Export: a calibrated model, or random weights of Stable Diffusion v1, in one file that draws alone (a bundle).

A float model is exported as a folder of diffusers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsdiff.benchmark.source import Source
from dsdiff.benchmark.variants import fit
from dsdiff.jobs import read_prompt_file
from dsdiff.models.bundle import save_bundle
from dsdiff.models.configs import look_up, read_config
from dsdiff.models.lora import calibrated_for, resolve_loras
from dsdiff.models.quantized import cali_ckpt_of
from dsdiff.models.registry import CALI_PROMPTS_NAME, STABLE_DIFFUSION, TOKENIZER
from dsdiff.models.spec import find_model
from dsdiff.options import DrawOptions, LoraOptions, ModelOptions, QuantizationOptions
from dsdiff.pipeline import Pipeline
from ldm.diffusers_save import save_folder
from ldm.fileio import check_new_folder
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import for_inference, instantiate_from_config
from qdiff.checkpoint import CaliHeader, load_cali_ckpt, read_cali_header, split_layers
from qdiff.config import QuantConfig
from qdiff.decoder_ranges import Ranges, fit_decoder
from qdiff.engine.cpu import has_bfloat16
from qdiff.quant_model import QuantModel

VAE_PICTURES = 12  # from which the ranges of a decoder are fitted
STEPS = 20  # of an ordinary one
# Samplers and numbers of steps that draw them, in turn. The latents of few steps are larger, most of all PLMS's.
DRAWN = (("dpm_solver", STEPS), ("plms", 4), ("dpm_solver", 2))
MARGIN = 1.3  # by which latents of few steps are enlarged, as other pictures' latents are larger than those drawn
RANDOM_SIZE = 32  # of the latents that take their place where weights are random

logger = logging.getLogger(__name__)


def export_calibrated(
    file: Path,
    model: ModelOptions,
    cali_ckpt: Path | None = None,
    weight_bit: int | None = None,
    *,
    lora: Sequence[LoraOptions] = (),
    vae_pictures: int = VAE_PICTURES,
) -> None:
    """Write the bundle of a model with a calibration of it.

    cali_ckpt: the file of the calibration. None: the one that comes with the model for the LoRAs, or else that of
    `weight_bit` bits, or of the fewest.
    lora: the LoRAs that the calibration was made with; they become part of the bundle.
    vae_pictures: from how many pictures the ranges of the decoder are fitted, 0 for a bundle without them.
    The checkpoint and the cali_ckpt are read, and not changed. Raises ValueError or FileNotFoundError for files that do
    not belong together, or where `file` is one of those that are read.
    """
    spec = find_model(model, accept_bundle=False)
    options = QuantizationOptions(cali_ckpt=cali_ckpt, weight_bit=weight_bit)
    path = cali_ckpt_of(calibrated_for(options, spec, lora).cali_ckpt, weight_bit, spec.cali_ckpts)
    for source in (spec.ckpt, path):
        if file.resolve() == source.resolve():
            raise ValueError(f"{str(file)!r} is what is read: give another name to write to")
    header = read_cali_header(path, weight_bit=weight_bit)
    logger.info("%s, %s", spec, path)
    loras = resolve_loras(lora, path)
    if loras.merged < len(loras.records):
        raise ValueError(
            f"LoRA {loras.records[loras.merged]} is not what {str(path)!r} was made with: calibrate with it, or "
            "leave it out here and draw with it"
        )
    pipeline = Pipeline(spec, device="cpu", tokenizer=model.tokenizer, lora=loras.options)
    network = pipeline.model
    ranges = fit_to_pictures(pipeline, vae_pictures) if vae_pictures else None
    qnn = QuantModel(network.model.diffusion_model, header.config)
    load_cali_ckpt(qnn, path)
    network.model.diffusion_model = qnn
    facts = {"ckpt": spec.ckpt.name, "config": spec.config_path.name, **spec.hashes, **header.source}
    _write(file, network, spec.config, replace(header, splits=split_layers(qnn), source=facts), ranges)


def export_diffusers(folder: Path, model: ModelOptions, *, lora: Sequence[LoraOptions] = ()) -> None:
    """Write a float model as a folder that diffusers loads, in float32, complete or not at all.

    lora: LoRAs to merge into it. Raises ValueError or FileNotFoundError for a quantized model, for one that diffusers'
    classes cannot hold, and where `folder` has content.
    """
    check_new_folder(folder)
    spec = find_model(model, accept_bundle=False)
    logger.info("%s", spec)
    pipeline = Pipeline(spec, device="cpu", tokenizer=model.tokenizer, lora=lora)
    save_folder(pipeline.model, look_up(spec.config, "model.params.first_stage_config.params.ddconfig"), folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    logger.info("written to %s (%.4g MB)", folder, size / 1e6)


def fit_to_pictures(pipeline: Pipeline, count: int) -> Ranges:
    """Return the ranges of a float model's decoder, fitted to pictures of prompts that it draws.

    One in three is an ordinary picture. The others are drawn in few steps, so that these do not leave the ranges.
    """
    path = pipeline.spec.cali_prompts or STABLE_DIFFUSION.parent / CALI_PROMPTS_NAME
    prompts = read_prompt_file(path, "prompts")
    precision = "autocast" if has_bfloat16() else "full"
    network, autoencoder, latents = pipeline.model, pipeline.model.first_stage_model, []
    with tqdm(total=2 * count, desc="ranges of the decoder", unit="picture") as bar:
        for i in range(count):
            sampler, steps = DRAWN[i % len(DRAWN)]
            settings = pipeline.resolve(DrawOptions(sampler=sampler, steps=steps, precision=precision))
            z = pipeline.sample([prompts[i * len(prompts) // count]], [i], settings) / network.scale_factor
            latents.append(z if steps == STEPS else MARGIN * z)
            bar.update()
        return fit_decoder(autoencoder.decoder, autoencoder.post_quant_conv, torch.cat(latents), bar.update)


def export_random(file: Path) -> None:
    """Write a bundle of Stable Diffusion v1's shapes with random weights, at W4A8, to measure it.

    Its tokenizer is the embedded model's.
    """
    config = QuantConfig(weight_bit=4, quant_act=True, act_bit=8, sm_abit=16, split=True)
    whole = read_config(STABLE_DIFFUSION)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = whole["model"]["params"]
        # A small UNet first, which is replaced below: the large one is never there twice.
        small = {**params["unet_config"]["params"], "model_channels": 32, "num_heads": 1}
        node = {**whole["model"], "params": {**params, "unet_config": {**params["unet_config"], "params": small}}}
        network = instantiate_from_config(for_inference(node)).eval()
        latents = torch.randn(1, network.channels, RANDOM_SIZE, RANDOM_SIZE)
    network.cond_stage_model.set_tokenizer(TOKENIZER)
    autoencoder = network.first_stage_model
    ranges = fit_decoder(autoencoder.decoder, autoencoder.post_quant_conv, latents)
    source = Source.read(STABLE_DIFFUSION, random_weights=True, device=torch.device("cpu"))
    qnn = QuantModel(source.unet(), config)
    fit(qnn, source)
    network.model.diffusion_model = qnn
    header = CaliHeader(config=config, splits=split_layers(qnn), source={"random_weights": True})
    _write(file, network, whole, header, ranges)


def _write(
    file: Path, network: LatentDiffusion, config: Mapping[str, Any], header: CaliHeader, ranges: Ranges | None
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_bundle(network, config, header, file, ranges)
    logger.info("written to %s (%.4g MB)", file, file.stat().st_size / 1e6)
