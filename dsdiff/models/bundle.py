"""A bundle: one .safetensors file that draws alone, with a calibrated UNet at its bits and all that goes with it.

unet.NAME                    the UNet's quantizers, as in a cali_ckpt (`qdiff.quant_state`)
model.diffusion_model.NAME   its biases and norms, float32
first_stage_model.NAME       the autoencoder, cond_stage_model.NAME the text encoder, both float16
tokenizer.NAME               the tokenizer's files, as bytes
decoder.NAME.delta, .zero_point   the ranges of the autoencoder's decoder, for `--vae int8`; older files have none

Its header is a cali_ckpt's, with the model's config in it.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdiff.models.configs import config_for_drawing
from ldm.checkpoint import fill, is_plain, read_metadata, read_weights
from ldm.fileio import json_object, write_atomically
from ldm.half_storage import keep_in_half
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.tensor_files import save_tensors
from ldm.util import build_model, check_weights
from qdiff.checkpoint import HEADER, CaliHeader, header_metadata, read_cali_header, split_layers
from qdiff.decoder_ranges import HIGH, Ranges
from qdiff.engine.quant_params import QuantParams
from qdiff.quant_model import QuantModel
from qdiff.quant_state import activation_tensors, check_keys, expected_keys, load_tensors, weight_tensors

ENTRY = "model"  # of the header, with the config
QUANTIZERS, UNET, TOKENIZER, DECODER = "unet.", "model.diffusion_model.", "tokenizer.", "decoder."
RANGE = (".delta", ".zero_point")  # the ends of the names of a range's two numbers
PARTS = ("first_stage_model", "cond_stage_model")


def bundle_config(path: Path) -> dict[str, Any] | None:
    """Return the config of the model in a bundle; None for a file of another kind.

    Raises ValueError for a damaged bundle.
    """
    try:
        text = read_metadata(path).get(HEADER)
    except ValueError:  # loading the file will tell why
        return None
    try:
        return json_object(text).get(ENTRY) if text else None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} has a damaged header: {error}") from error


def is_bundle(path: Path) -> bool:
    """Return True for a bundle. Raises ValueError for a damaged one."""
    return path.is_file() and bundle_config(path) is not None


# --- writing -----------------------------------------------------------------------------------------------


def save_bundle(
    model: LatentDiffusion, config: Mapping[str, Any], header: CaliHeader, path: Path, ranges: Ranges | None = None
) -> None:
    """Write a LatentDiffusion whose UNet is a calibrated QuantModel.

    config: the whole config of the model, plain. header: of the calibration. ranges: of the decoder, None for none.
    The file is complete or not there.
    """
    qnn: QuantModel = model.model.diffusion_model
    tensors = {QUANTIZERS + name: tensor for name, tensor in (weight_tensors(qnn) | activation_tensors(qnn)).items()}
    tensors |= {UNET + name: tensor.detach().float() for name, tensor in float_parameters(qnn).items()}
    for part in PARTS:
        for name, tensor in getattr(model, part).state_dict().items():
            tensors[f"{part}.{name}"] = tensor.half() if tensor.is_floating_point() else tensor
    tensors |= {TOKENIZER + name: data for name, data in tokenizer_files(model).items()}
    for name, params in (ranges or {}).items():
        for end, value in zip(RANGE, (params.delta, params.zero_point), strict=True):
            tensors[f"{DECODER}{name}{end}"] = torch.tensor(float(value))
    metadata = header_metadata(header, **{ENTRY: config_for_drawing(config)})
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_tensors(tensors, temporary, metadata))


def float_parameters(qnn: QuantModel) -> dict[str, nn.Parameter]:
    """Return the UNet's parameters that are not quantized, by name: biases and norms."""
    quantized = {id(layer.weight) for layer in qnn.layers().values()}
    return {
        name: parameter
        for name, parameter in qnn.model.named_parameters()
        if id(parameter) not in quantized and ".alpha" not in name
    }


def tokenizer_files(model: LatentDiffusion) -> dict[str, Tensor]:
    """Return the files of the model's tokenizer as bytes, by name; none for an encoder without a tokenizer."""
    tokenizer = getattr(model.cond_stage_model, "tokenizer", None)
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.name: torch.from_numpy(np.fromfile(path, dtype=np.uint8)) for path in files}


# --- reading -----------------------------------------------------------------------------------------------


def load_bundle(path: Path, device: torch.device) -> tuple[LatentDiffusion, QuantModel]:
    """Return the LatentDiffusion of a bundle, and its calibrated UNet, which is not in its place yet.

    The file is mapped. The float UNet is never built: its weights have shapes and no numbers. Raises ValueError for a
    damaged file.
    """
    source, config, header = str(path), bundle_config(path), read_cali_header(path)
    if config is None:
        raise ValueError(f"{source!r} is no bundle: scripts/export.py makes one")
    tensors = read_weights(path)
    shapes = [each.shape for each in tensors.values() if is_plain(each)]
    try:
        model = build_model(config_for_drawing(config)["model"], shapes, "its config")
        kinds = {LatentDiffusion: model, UNetModel: model.model.diffusion_model, AutoencoderKL: model.first_stage_model}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source!r} is damaged: {error}") from error
    if not all(isinstance(part, kind) for kind, part in kinds.items()):
        raise ValueError(f"{source!r} is damaged: its config describes no latent diffusion model")
    for part in PARTS:
        network = getattr(model, part)
        fill(network, _below(tensors, f"{part}."), source)
        keep_in_half(network)
    place_tokenizer(model, _below(tensors, TOKENIZER), source)
    qnn = QuantModel(model.model.diffusion_model, header.config)
    model.model.diffusion_model = nn.Identity()  # so that what is left can be moved
    for network in model.children():
        network.to(device)
    fill_unet(qnn, path, header, device)
    for network in (*model.children(), qnn):
        check_weights(network, source)
    return model.to(device).eval(), qnn


def decoder_ranges(path: Path) -> Ranges:
    """Return the ranges of the decoder in a bundle; none from a file that was made without them.

    Raises ValueError for damaged ones.
    """
    numbers = {name: float(tensor) for name, tensor in _below(read_weights(path), DECODER).items()}
    names = dict.fromkeys(name.removesuffix(RANGE[0]) for name in numbers if name.endswith(RANGE[0]))
    try:
        return {
            name: QuantParams(delta=numbers[name + RANGE[0]], zero_point=int(numbers[name + RANGE[1]]), high=HIGH)
            for name in names
        }
    except (KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} is damaged: the ranges of its decoder ({error})") from error


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fill_unet(qnn: QuantModel, path: Path, header: CaliHeader, device: torch.device) -> None:
    """Fill a UNet that has no numbers yet from the file."""
    if header.splits != split_layers(qnn):
        raise ValueError(f"{str(path)!r} is damaged: its header and its config do not belong together")
    tensors = read_weights(path)  # by a mapping of their own, which ends when the codes are unpacked
    floats, own = _below(tensors, UNET), float_parameters(qnn)
    if {name: tensor.shape for name, tensor in floats.items()} != {name: p.shape for name, p in own.items()}:
        raise ValueError(f"{str(path)!r} is damaged: biases and norms are not those of its config")
    for name in own:
        parent, _, child = name.rpartition(".")
        parameter = nn.Parameter(floats[name].to(device, torch.float32, copy=True), requires_grad=False)
        setattr(qnn.model.get_submodule(parent), child, parameter)
    quantizers = _below(tensors, QUANTIZERS)
    check_keys(set(quantizers), expected_keys(qnn), str(path))
    for quantizer in qnn.act_quantizers().values():
        quantizer.delta = quantizer.zero_point = torch.tensor(float("nan"), device=device)
    try:
        # Ranges are copied, for which the mapping would stay, and with it the pages of the codes.
        load_tensors(
            qnn, {name: tensor.to(device, copy=not name.endswith(".codes")) for name, tensor in quantizers.items()}
        )
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    qnn.set_quant_state(True, qnn.config.quant_act)


def place_tokenizer(model: LatentDiffusion, files: Mapping[str, Tensor], source: str) -> None:
    """Give the text encoder the tokenizer that these bytes are."""
    if not hasattr(model.cond_stage_model, "set_tokenizer"):
        return
    if any(Path(name).name != name or not name for name in files):
        raise ValueError(f"{source!r} is damaged: a file of its tokenizer lies outside of it")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data.to(torch.uint8).numpy().tobytes())
        try:
            model.cond_stage_model.set_tokenizer(folder)
            model.cond_stage_model.tokenizer  # noqa: B018 (read now, before the folder goes)
        except (OSError, ValueError) as error:
            raise ValueError(f"{source!r} is damaged: it holds no tokenizer ({error})") from error
