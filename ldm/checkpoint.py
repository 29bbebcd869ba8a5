"""Read and write checkpoint files: every format in which Stable Diffusion's weights are published.

Files are memory-mapped: a tensor costs no memory until it is used. No code in a file is run.
"""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.fileio import write_atomically

logger = logging.getLogger(__name__)

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")
SAFETENSORS_SUFFIX = ".safetensors"
ZIP_MAGIC = b"PK\x03\x04"

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
)

# Parts of keys that identify other kinds of files, each with the words for the error message.
FOREIGN_KEYS = (
    ("weight_quantizer", "a cali_ckpt, which goes on top of a float model: give it with --ptq --cali_ckpt"),
    ("lora_", "a LoRA, which holds changes to a model and no model"),
    ("down_blocks.", "a file in the diffusers layout, where CompVis's single-file layout is needed"),
    ("conditioner.embedders.", "a Stable Diffusion XL checkpoint"),
    ("joint_blocks.", "a Stable Diffusion 3 checkpoint"),
    ("double_blocks.", "a Flux checkpoint"),
    ("cond_stage_model.model.", "a Stable Diffusion 2 checkpoint (OpenCLIP, context of 1024)"),
)
CONTEXT_KEY = ".attn2.to_k.weight"  # [channels, context_dim]

# Packages whose classes training stores beside the weights: callbacks, settings, scalars. When a file is read,
# stand-ins replace them.
HARMLESS_PACKAGES = frozenset({"pytorch_lightning", "lightning", "omegaconf", "numpy", "typing"})
HARMLESS_TYPES = frozenset(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple"))
DEFAULT_DICT = "collections.defaultdict"


class _StandIn:
    """Replace an object of a pickle that we do not need: accept its state and ignore it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*args: Any) -> dict:
    """Return a plain dict in place of a defaultdict, for the unpickler to fill."""
    return {}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .ckpt, .pt, .pth (torch zip) or .safetensors file by name, memory-mapped, on the CPU.

    The file's content decides which of the two formats it is, not its name (a zip named .safetensors is read, but
    not mapped). If the file holds a `state_dict`, its tensors are returned. Entries that are no tensors, or have no
    string as their key, are left out.

    Raises FileNotFoundError for a missing path. Raises ValueError, in one line, for a directory, another kind of
    file, an empty, truncated or corrupt file, a file without tensors, and a pickle that refers to unknown code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file: give the path of a checkpoint")
    if path.stat().st_size == 0:
        raise ValueError(f"checkpoint {str(path)!r} is empty")
    tensors = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    if not tensors:
        raise ValueError(f"checkpoint {str(path)!r} holds no tensors")
    return tensors


def _is_safetensors(path: Path) -> bool:
    """Tell safetensors (True) from a torch zip (False) by the first bytes, or by the suffix where these are neither.

    Raises ValueError if neither content nor suffix is that of a checkpoint.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(ZIP_MAGIC):
        return False
    if start[8:] == b"{":  # the header, in JSON, after its length in 8 bytes
        return True
    if path.suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        suffixes = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
        raise ValueError(f"{str(path)!r} is no known kind of checkpoint: its name must end in {suffixes}")
    return path.suffix == SAFETENSORS_SUFFIX


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the facts in a file's header, as `save_checkpoint` writes them; empty for a torch zip, which has none.

    Raises ValueError for a file that cannot be read.
    """
    if not _is_safetensors(Path(path)):
        return {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except Exception as error:  # the library has its own exception type beside OSError
        raise _unreadable(Path(path), error) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # the library has its own exception type beside OSError
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"checkpoint {str(path)!r} is corrupt, truncated, or no torch zip file")
    try:
        classes = get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # whatever a damaged archive or pickle leads to
        raise _unreadable(path, error) from error
    foreign = sorted(name for name in classes if not _is_harmless(name))
    if foreign:
        raise ValueError(f"checkpoint {str(path)!r} wants to run code ({_some(foreign)}): refused")
    try:
        with safe_globals([(_empty_dict if name == DEFAULT_DICT else _StandIn, name) for name in classes]):
            content = _load_zip(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(content).__name__}, not named tensors")
    named = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return {name: value.detach() for name, value in named.items()}


def _load_zip(path: Path) -> Any:
    if path.suffix != SAFETENSORS_SUFFIX:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file:  # given this name, torch.load would expect safetensors; a file object is not mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def _is_harmless(name: str) -> bool:
    return name.split(".")[0] in HARMLESS_PACKAGES or name in {*HARMLESS_TYPES, DEFAULT_DICT}


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"checkpoint {str(path)!r} cannot be read, it is corrupt or truncated: {reason}")


def averaged_weights(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the averaged (EMA) weights in `tensors`, under the names of the weights that they are averages of.

    The average of `model.a.b` is stored as `model_ema.ab`, without the dots. The result is empty for a file without
    averages. If some averages of a network are missing, none of that network is used; a warning names the file
    (`source`).
    """
    averages = {}
    for prefix, ema_prefix in EMA_PREFIXES.items():
        if any(name.startswith(ema_prefix) and name not in EMA_BOOKKEEPING for name in tensors):
            own = [name for name in tensors if name.startswith(prefix) and tensors[name].is_floating_point()]
            stored = {name: ema_prefix + name.removeprefix(prefix).replace(".", "") for name in own}
            lacking = [name for name in own if stored[name] not in tensors]
            if lacking:
                logger.warning("%s: averages not used, those of %s are missing", source, _some(lacking))
            else:
                averages |= {name: tensors[stored[name]] for name in own}
    return averages


def is_training_only(name: str) -> bool:
    """Tell whether only training needs the entry `name`."""
    return any(name == entry or name.startswith(entry + ".") for entry in TRAINING_ONLY)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> list[str]:
    """Put `tensors` into a model built on the meta device, without a copy; return the names that it does not need.

    The noise schedule is not touched. Raises ValueError if a weight is missing, unexpected, of another shape, integer
    in place of floating point (or the reverse), or no plain tensor; the message names the file, `source`.
    """
    known = model.state_dict()
    ignored = [name for name in tensors if name not in known and is_training_only(name)]
    skipped = {*ignored, *SCHEDULE_KEYS}
    weights = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    strange = [f"{name} is no plain tensor" for name, tensor in weights.items() if not is_plain(tensor)]
    strange += _other_kind(weights, {name: tensor for name, tensor in known.items() if tensor.is_floating_point()})
    if strange:
        raise ValueError(f"checkpoint {source!r} does not fit the config: {_some(strange)}")
    hint = _other_architecture(weights, known)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # torch lists every mismatch with both shapes, one to a line
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ValueError(f"checkpoint {source!r} does not fit the config{hint}: {_some(lines, 2)}") from error
    missing = [name for name in missing if name not in SCHEDULE_KEYS]
    problems = {"missing": missing, "unexpected": unexpected}
    listed = [f"{what} keys: {len(names)} ({_some(names)})" for what, names in problems.items() if names]
    if listed:
        raise ValueError(f"checkpoint {source!r} does not fit the config{hint}: {', '.join(listed)}")
    mistyped = _other_kind(model.state_dict(), known)  # again, because a module may rename weights while loading
    if mistyped:
        raise ValueError(f"checkpoint {source!r} does not fit the config: {_some(mistyped)}")
    return ignored


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


def _other_architecture(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> str:
    """Return what kind of file this seems to be, to end an error message with; empty if nothing identifies it."""
    for mark, what in FOREIGN_KEYS:
        if any(mark in name for name in tensors) and not any(mark in name for name in known):
            return f": it looks like {what}"
    for name in tensors:
        if name.endswith(CONTEXT_KEY) and name in known and tensors[name].ndim == 2:
            found, expected = tensors[name].shape[1], known[name].shape[1]
            if found == expected:
                continue
            return f": its text encoder has {found} channels, the config's {expected} (SD 1: 768, SD 2: 1024)"
    return ""


def _some(names: list[str], limit: int = 4) -> str:
    """Join the first names with commas and count the rest."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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
    write_atomically(path, lambda temporary: save_file(stored, temporary, metadata=header))


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.is_floating_point() and name not in SCHEDULE_KEYS
    return tensor.detach().to(device="cpu", dtype=dtype if cast else tensor.dtype).contiguous()
