"""Checkpoints: fill a model with the weights of a file, and write one. `weight_files` reads the formats."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.architectures import other_file
from ldm.fileio import write_atomically
from ldm.messages import some
from ldm.tensor_files import save_tensors
from ldm.weight_files import SAFETENSORS_SUFFIX, read_metadata, read_weights

__all__ = ["averaged_weights", "fill", "is_plain", "read_metadata", "read_weights", "save_checkpoint"]

logger = logging.getLogger(__name__)

# Prefix of a network's weights -> prefix of their running averages (EMA). The bookkeeping of the averages may be in
# a file from which the averages themselves were removed.
EMA_PREFIXES = {"model.": "model_ema.", "cond_stage_model.": "cond_stage_ema."}
EMA_BOOKKEEPING = frozenset(f"{ema}{name}" for ema in EMA_PREFIXES.values() for name in ("decay", "num_updates"))

# The noise schedule. It is computed from the config in full precision, and not read from the file.
SCHEDULE_KEYS = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    }
)

# Entries of a file that only training needs. A key that is one of these, or continues one after a dot, is dropped
# unless the model has it.
TRAINING_ONLY = (
    "model_ema",
    "cond_stage_ema",
    "loss",
    "first_stage_model.loss",
    "first_stage_model.model_ema",
    "lvlb_weights",
    "logvar",
    "optimizer",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "cond_stage_model.logit_scale",
    "cond_stage_model.text_projection",
    *("v_pred", "ztsnr"),  # marks of a model that predicts v, and of its schedule, see `dsdiff.models.spec`
    *("denoiser", "sigmas", "log_sigmas", "snr"),  # other trainers' noise schedules
    "embedding_manager",  # of textual inversion
)

# The factor of latents, which files of models hold whose training measured it. The config's is used.
SCALE = "scale_factor"

# The rest of a whole CLIP: the projections and the tower of pictures.
OTHER_HALF = tuple(
    f"cond_stage_model.transformer.{name}"
    for name in ("logit_scale", "text_projection", "visual_projection", "vision_model")
)
# 1x1 convolutions, whose weights some files hold as [C, C] and some biases as [C, 1, 1].
POINTWISE = re.compile(r"^first_stage_model\..*\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.|\.proj_(in|out)\.(weight|bias)$")


def averaged_weights(
    tensors: Mapping[str, Tensor], source: str, known: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the averaged (EMA) weights in `tensors`, under the names of the weights that they are averages of.

    The average of `model.a.b` is stored as `model_ema.ab`, without the dots. The result is empty for a file without
    averages. If some averages of a network are missing, none of that network is used; a warning names the file
    (`source`). known: the weights of the model; None takes the file's, for a file that has averages beside them all.
    """
    averages = {}
    known = tensors if known is None else known
    for prefix, ema_prefix in EMA_PREFIXES.items():
        if any(name.startswith(ema_prefix) and name not in EMA_BOOKKEEPING for name in tensors):
            own = [name for name in known if name.startswith(prefix) and known[name].is_floating_point()]
            stored = {name: ema_prefix + name.removeprefix(prefix).replace(".", "") for name in own}
            lacking = [name for name in own if stored[name] not in tensors]
            if lacking:
                logger.warning("%s: averages not used, those of %s are missing", source, some(lacking))
            else:
                averages |= {name: tensors[stored[name]] for name in own}
    return averages


def is_training_only(name: str) -> bool:
    """Tell whether only training needs the entry `name`."""
    return _is_of(name, TRAINING_ONLY)


def _is_of(name: str, entries: Iterable[str]) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in entries)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> list[str]:
    """Put `tensors` into a model built on the meta device, without a copy; return the names that it does not need.

    The noise schedule is not touched. Raises ValueError if a weight is missing, unexpected, of another shape, integer
    in place of floating point (or the reverse), or no plain tensor; the message names the file, `source`.
    """
    known = model.state_dict()
    dispensable = (*TRAINING_ONLY, *OTHER_HALF, *_own_scale(model, tensors, source))
    ignored = [name for name in tensors if name not in known and _is_of(name, dispensable)]
    skipped = {*ignored, *SCHEDULE_KEYS}
    weights = {name: _in_shape(name, tensor, known) for name, tensor in tensors.items() if name not in skipped}
    strange = [f"{name} is no plain tensor" for name, tensor in weights.items() if not is_plain(tensor)]
    strange += _other_kind(weights, {name: tensor for name, tensor in known.items() if tensor.is_floating_point()})
    if strange:
        raise ValueError(f"checkpoint {source!r} does not fit the config: {some(strange)}")
    hint = other_file(weights, known)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # torch lists every mismatch with both shapes, one to a line
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ValueError(f"checkpoint {source!r} does not fit the config{hint}: {some(lines, 2)}") from error
    missing = [name for name in missing if name not in SCHEDULE_KEYS]
    problems = {"missing": missing, "unexpected": unexpected}
    listed = [f"{what} keys: {len(names)} ({some(names)})" for what, names in problems.items() if names]
    if listed:
        raise ValueError(f"checkpoint {source!r} does not fit the config{hint}: {', '.join(listed)}")
    mistyped = _other_kind(model.state_dict(), known)  # again, because a module may rename weights while loading
    if mistyped:
        raise ValueError(f"checkpoint {source!r} does not fit the config: {some(mistyped)}")
    return ignored


def _own_scale(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> tuple[str, ...]:
    """Return the name of the factor of latents if the file holds it. Raises ValueError if the model has another one."""
    own, stored = getattr(model, SCALE, None), tensors.get(SCALE)
    if own is None or stored is None or not is_plain(stored) or stored.numel() != 1:
        return ()
    if not math.isclose(float(stored), own, rel_tol=1e-3):  # it may have been rounded to float16
        raise ValueError(
            f"checkpoint {source!r} does not fit the config: it was trained with {SCALE} {float(stored):g}, and the "
            f"config has {own:g}"
        )
    return (SCALE,)


def _in_shape(name: str, tensor: Tensor, known: Mapping[str, Tensor]) -> Tensor:
    """Return a weight of a 1x1 convolution in the model's shape, where it only lacks axes of 1 or has more of them."""
    if name not in known or not POINTWISE.search(name) or not is_plain(tensor):
        return tensor
    sizes, wanted = list(tensor.shape), list(known[name].shape)
    short, long = sorted((sizes, wanted), key=len)
    return tensor.reshape(wanted) if long == short + [1] * (len(long) - len(short)) else tensor


def is_plain(tensor: Tensor) -> bool:
    """Tell whether `tensor` is an ordinary strided one: not sparse, nested, quantized or without data (meta)."""
    plain_layout = tensor.layout == torch.strided and not tensor.is_nested
    return plain_layout and not tensor.is_quantized and not tensor.is_meta


def _other_kind(state: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> list[str]:
    """List the names whose tensors are floating point in only one of the two, each with both types."""
    return [
        f"{name} is {str(state[name].dtype).removeprefix('torch.')}, not {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in known.items()
        if name in state and state[name].is_floating_point() != tensor.is_floating_point()
    ]


def save_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a .safetensors file atomically, with floating-point tensors as `dtype` (the schedule keeps its own).

    metadata: short facts for the file's header, kept as strings. The folder is created if it does not exist.
    Raises ValueError for another suffix.
    """
    path = Path(path)
    if path.suffix != SAFETENSORS_SUFFIX:
        raise ValueError(f"{str(path)!r} must end in {SAFETENSORS_SUFFIX}")
    tensors = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    stored = {name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {str(key): str(value) for key, value in (metadata or {}).items()}
    write_atomically(path, lambda temporary: save_tensors(stored, temporary, header))


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.is_floating_point() and name not in SCHEDULE_KEYS
    return tensor.detach().to(device="cpu", dtype=dtype if cast else tensor.dtype).contiguous()
