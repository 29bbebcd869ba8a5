"""LoRA (Hu et al. 2021): low-rank changes to the layers of a model, read from a file, written, merged into weights.

A file changes weights W of some layers by W + scale (alpha / rank) up down, with down [rank, inputs, *kernel] and
up [outputs, rank]. Files of kohya's scripts, of diffusers and of peft are read (see `ldm.lora_names`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import is_plain, read_weights, save_checkpoint
from ldm.lora_names import TEXT, UNET, context_kind, foreign_kind, kohya_names, names_in_files, split_key
from ldm.lora_settings import PeftSettings
from ldm.messages import some
from ldm.modules.low_rank import LowRank

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight", "label_emb.weight")


@dataclass(kw_only=True)
class _Parts:
    """The tensors of a file for one layer. key: the file's name of the layer."""

    key: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


# --- layers ------------------------------------------------------------------------------------------------


def layer_shapes(unet: nn.Module, text_encoder: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a LoRA can change, by our names of their layers.

    unet, text_encoder: a LatentDiffusion's `model.diffusion_model` and `cond_stage_model`; quantized layers count as
    well. Embeddings and norms are left out.
    """
    named = [(UNET + name, weight) for name, weight in unet.named_parameters()]
    tower = getattr(text_encoder, "transformer", None)
    named += [] if tower is None else [(TEXT + name, weight) for name, weight in tower.named_parameters()]
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in named
        if name.endswith(".weight") and weight.ndim > 1 and not name.endswith(EMBEDDINGS)
    }


# --- reading -----------------------------------------------------------------------------------------------


def read_lora(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
    """Return the changes that a file makes, by our names of the layers. Tensors are memory-mapped.

    shapes: of the model's weights, see `layer_shapes`. Runs no code of the file.
    Raises FileNotFoundError without a file. Raises ValueError, in one line, for a file that is damaged or no LoRA, keys
    that name no layer of the model, factors that do not fit the layer or each other, and values that are not finite.
    """
    path, source = Path(path), repr(str(path))
    if path.is_dir():
        raise ValueError(f"LoRA {source} is a folder: give the file in it, such as adapter_model.safetensors")
    if not path.exists():
        raise FileNotFoundError(f"no LoRA at {source}")
    tensors = read_weights(path)
    found = _by_layer(tensors, shapes, source)
    settings = PeftSettings.read(path, tensors)
    changes = {name: _low_rank(parts, shapes[name], settings, source) for name, parts in found.items()}
    if not changes:
        raise ValueError(f"LoRA {source} changes no layer")
    return changes


def _by_layer(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, _Parts]:
    """Return the tensors by our names of the layers. Raises ValueError for keys that name none."""
    names, found, unknown = names_in_files(shapes), {}, []
    for key, tensor in tensors.items():
        layer, part = split_key(key) or ("", "")
        ours = names.get(layer)
        if ours is None:
            unknown.append(key)
            continue
        parts = found.setdefault(ours, _Parts(key=layer))
        if parts.key != layer or part in parts.tensors:
            raise ValueError(f"LoRA {source} changes one layer twice: {parts.key} and {key}")
        parts.tensors[part] = tensor
    if unknown:
        kind = foreign_kind(tensors) or context_kind({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        raise ValueError(f"LoRA {source} has keys that name no layer of this model: {some(unknown)}{kind}")
    return found


def _low_rank(parts: _Parts, shape: tuple[int, ...], settings: PeftSettings, source: str) -> LowRank:
    """Return the change to a layer whose weight has this shape."""
    missing = [name for name in ("down", "up") if name not in parts.tensors]
    if missing:
        raise ValueError(f"LoRA {source} is incomplete: {parts.key} has no {' and no '.join(missing)} factor")
    for part, tensor in parts.tensors.items():
        _check_numbers(f"{parts.key} ({part})", tensor, source)
    down, up, mid = (parts.tensors.get(part) for part in ("down", "up", "mid"))
    assert down is not None and up is not None
    if mid is not None:
        down = _folded(down, mid, parts.key, source)
    down = _as_of(down, len(shape))
    rank = len(down)
    up_fits = up.ndim >= 2 and tuple(up.shape) == (shape[0], rank, *[1] * (up.ndim - 2))
    if tuple(down.shape[1:]) != shape[1:] or not up_fits or rank == 0:
        kind = context_kind({parts.key: tuple(down.shape)}) if down.shape[1:] != shape[1:] else ""
        raise ValueError(
            f"LoRA {source} does not fit this model: {parts.key} has factors {list(up.shape)} and {list(down.shape)} "
            f"for a weight {list(shape)}{kind}"
        )
    strength = settings.strength(parts.key, rank, parts.tensors.get("alpha"))
    if not math.isfinite(strength):
        raise ValueError(f"LoRA {source}: alpha of {parts.key} is {strength * rank}, no finite number")
    return LowRank(down=down, up=up.flatten(1), strength=strength)


def _check_numbers(name: str, tensor: Tensor, source: str) -> None:
    if not is_plain(tensor) or (tensor.dtype not in DTYPES and not name.endswith("(alpha)")):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"LoRA {source}: {name} is {kind}, where float16, bfloat16 or float32 is needed")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"LoRA {source}: {name} holds NaN or infinite values")
    if name.endswith("(alpha)") and tensor.numel() != 1:
        raise ValueError(f"LoRA {source}: {name} has {tensor.numel()} numbers, where one is needed")


def _folded(down: Tensor, mid: Tensor, key: str, source: str) -> Tensor:
    """Return `mid` after `down` as one factor [rank, inputs, *kernel]. mid: [rank, rank, *kernel], down 1x1."""
    pointwise = down.ndim >= 2 and all(size == 1 for size in down.shape[2:])
    if mid.ndim < 2 or not pointwise or mid.shape[1] != len(down):
        raise ValueError(
            f"LoRA {source}: lora_mid {list(mid.shape)} of {key} does not fit its lora_down {list(down.shape)}"
        )
    return torch.einsum("mr...,ri->mi...", mid.float(), down.float().flatten(1))


def _as_of(down: Tensor, ndim: int) -> Tensor:
    """Return a factor with so many dimensions if those that are added or lost have size 1; else as it is."""
    if down.ndim < ndim and down.ndim >= 2:
        return down.view(*down.shape, *[1] * (ndim - down.ndim))
    if down.ndim > ndim and all(size == 1 for size in down.shape[ndim:]):
        return down.flatten(ndim - 1)
    return down


# --- writing -----------------------------------------------------------------------------------------------


def save_lora(
    changes: Mapping[str, LowRank], path: str | Path, modules: Iterable[str], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write changes to a UNet as a LoRA file in kohya's format, float16, which diffusers reads as well.

    changes: by our names of the layers. modules: our names of all of the UNet's layers, see `layer_shapes`.
    metadata: facts for the header. Raises ValueError for another suffix than .safetensors.
    """
    names, tensors = kohya_names(modules), {}
    for name, change in changes.items():
        key, around = names[name], [1] * (change.down.ndim - 2)
        tensors[f"{key}.lora_down.weight"] = change.down
        tensors[f"{key}.lora_up.weight"] = change.up.reshape(*change.up.shape, *around)
        tensors[f"{key}.alpha"] = torch.tensor(change.strength * len(change.down))
    save_checkpoint(tensors, path, metadata=metadata)


# --- merging -----------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_lora(model: nn.Module, changes: Mapping[str, LowRank], scale: float) -> None:
    """Add scale times the changes to the weights of a float LatentDiffusion, in float32, one layer after the other."""
    for name, change in changes.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data = (weight.float() + scale * change.delta().to(weight.device)).to(weight.dtype)
