"""Make objects from configs, by the `target:` / `params:` convention of CompVis's yaml files, and load models."""

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint import averaged_weights, fill, is_plain, read_metadata, read_weights
from ldm.config_checks import NOT_BUILT, check_parts, check_sizes, check_types
from ldm.diffusers_folder import files_read, is_diffusers_folder, read_folder, read_vae
from ldm.diffusers_names import PREFIXES
from ldm.half_storage import drop_mapped
from ldm.messages import first_line, some

T = TypeVar("T")
PACKAGES = ("ldm.", "torch.nn.")  # whose classes a config may name
NETWORKS = ("ldm.models.", "ldm.modules.")  # whose modules the config of a model to draw with may name
NO_NETWORK = "torch.nn.Identity"  # in the place of one
ALL = tuple(PREFIXES)  # the networks of a model, by their folders in diffusers

logger = logging.getLogger(__name__)


def exists(value: Any) -> bool:
    """Tell whether `value` is not None. Third-party code written for CompVis's package calls it."""
    return value is not None


def default(value: T | None, fallback: T | Callable[[], T]) -> T:
    """Return `value`, or the fallback if it is None (what the fallback returns, if it is a function)."""
    if value is not None:
        return value
    return cast(T, fallback() if callable(fallback) else fallback)


def get_obj_from_str(path: str) -> Any:
    """Return the class or function that a dotted path names, such as "torch.nn.Identity".

    Raises ValueError if the path has no dot, or the module does not exist or does not have that name.
    """
    module_name, _, name = str(path).rpartition(".")
    if not module_name:
        raise ValueError(f"target {path!r} is not a dotted path such as 'torch.nn.Identity'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"target {path!r}: no module named {error.name!r}") from error
    if not hasattr(module, name):
        raise ValueError(f"target {path!r}: module {module_name!r} has no {name!r}")
    return getattr(module, name)


def instantiate_from_config(config: Mapping[str, Any]) -> Any:
    """Call `config["target"]` with the keyword arguments `config["params"]`, and return the result.

    `config` is a dict or an OmegaConf node; `params` may be absent or empty. Nested configs are passed on as they
    are. A target is a class of this project or of torch.nn: a config runs no other code. Raises ValueError without a
    target, for another target, for params that are no mapping, and for params whose names or types do not fit.
    """
    if not isinstance(config, Mapping) and not hasattr(config, "keys"):
        raise ValueError(f"a config with 'target' and 'params' is expected, got {type(config).__name__}")
    if "target" not in config:
        raise ValueError(f"config has no 'target' (its keys: {', '.join(map(str, config.keys())) or 'none'})")
    params = config.get("params")
    params = {} if params is None else params
    if not hasattr(params, "keys"):
        raise ValueError(f"params of {config['target']} must be a mapping, got {type(params).__name__}")
    target = _class_of(config["target"])
    arguments = {str(key): params[key] for key in params}
    _check_arguments(config["target"], target, arguments)
    return target(**arguments)


def _class_of(path: Any) -> type:
    """Return the class of a target. Raises ValueError for one that is not of PACKAGES, and imports nothing else."""
    found = get_obj_from_str(path) if str(path).startswith(PACKAGES) else None
    if not isinstance(found, type) or not f"{found.__module__}.".startswith(PACKAGES):
        raise ValueError(f"target {str(path)[:100]!r} is no class of ldm or of torch.nn: refused")
    return found


def _check_arguments(name: str, target: Any, arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(target)
    except ValueError:  # some builtin types have no signature
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"params of {name}: {error}") from error
    check_types(name, target, arguments)


class _NoInitialWeights(TorchFunctionMode):
    """Turn functions that draw initial weights into no-ops within the block, and count on the CPU.

    On the meta device both would import PyTorch's compiler, which takes from a quarter of a second to a whole one.
    """

    DRAWING = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.nn.init.normal_, torch.nn.init.uniform_)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWING:
            return args[0] if args else kwargs["tensor"]
        if func is torch.arange:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build networks within the block on the meta device: their parameters have shapes, but no numbers.

    No initial weights are drawn.
    """
    with torch.device("meta"), _NoInitialWeights():
        yield


def build_model(config: Mapping[str, Any], shapes: Iterable[Sequence[int]] | None, source: str) -> Any:
    """Return the model of a config, for drawing, without the numbers of its weights.

    config: a whole config, or its `model` node. shapes: of the weights that will fill it, None where they are not
    known. source: names the config in messages. Raises ValueError, in one line, for sizes that the weights cannot have,
    for a class that is no network of this project, and for a config that describes no model.
    """
    node = config.get("model", config)
    check_sizes(node, shapes, source)
    try:
        node = for_inference(node)
        _check_networks(node)
        with without_weights():  # they come from a file; the noise schedule is computed
            model = instantiate_from_config(node)
    except Exception as error:  # values that fit their types, but not each other, lead to errors of many kinds
        raise ValueError(f"{source} describes no model: {first_line(error)}") from error
    check_parts(model, source)
    return model


def _check_networks(node: Any) -> None:
    """Raise ValueError if a config names a class that is no network: a data set, say, reads and writes files."""
    if isinstance(node, Mapping):
        target = str(node.get("target", NO_NETWORK))
        if target != NO_NETWORK and not (target.startswith(NETWORKS) and issubclass(_class_of(target), nn.Module)):
            raise ValueError(f"target {target[:100]!r} is no network of ldm: refused")
        node = [value for name, value in node.items() if name != NOT_BUILT]
    if isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            _check_networks(value)


def load_model_from_config(
    config: Mapping[str, Any],
    ckpt: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    vae_ckpt: str | Path | None = None,
    use_ema: bool = True,
    verbose: bool = False,
) -> nn.Module:
    """Return the LatentDiffusion of `config`, filled from the checkpoint `ckpt`, on `device`, in eval mode.

    config: a whole config, or its `model` node.
    ckpt: a file in CompVis's layout, or a folder as diffusers saves it.
    dtype: type of the weights (None: float32). Tensors of that type are used where they are in the memory-mapped
        file; others are converted one by one. The noise schedule is computed from the config.
    tokenizer: directory of the tokenizer's files. None: the folder `tokenizer` beside the checkpoint, or the
        checkpoint's own, or else the hub's files for the text encoder's version.
    vae_ckpt: a file or folder whose autoencoder replaces the checkpoint's, see `ldm.diffusers_folder.read_vae`.
    use_ema: use the averaged weights (EMA) of a network if the file has all of them. Those of a file without others are
        used in any case.
    verbose: log the names of unused entries at INFO.

    Raises FileNotFoundError or ValueError, in one line, for a file that is missing, unreadable, hostile or of another
    model, and for weights that are not finite; see `ldm.checkpoint`.
    """
    source = str(ckpt)
    tensors = {} if is_diffusers_folder(ckpt) else read_weights(ckpt)
    shapes = None if is_diffusers_folder(ckpt) else [each.shape for each in tensors.values() if is_plain(each)]
    model = build_model(config, shapes, f"config for {source!r}")
    _place_tokenizer(model, Path(ckpt), tokenizer)
    if is_diffusers_folder(ckpt):
        tensors = read_folder(Path(ckpt), model)
    averages = averaged_weights(tensors, source, model.state_dict())
    tensors |= averages if use_ema else {name: averages[name] for name in averages if name not in tensors}
    if vae_ckpt is not None:
        tensors = _with_vae(tensors, Path(vae_ckpt), model)
    try:
        ignored = fill(model, tensors, source)
        _check_schedule(model, tensors, source)
    except ValueError as error:
        raise ValueError(f"{error}{_written_for(ckpt, config)}") from error
    logger.log(logging.INFO if verbose else logging.DEBUG, "%s: ignored %s", source, ", ".join(ignored) or "nothing")
    files = [
        file for path, parts in ((ckpt, ALL), (vae_ckpt, ("vae",))) if path for file in files_read(Path(path), parts)
    ]
    for part in model.children():  # the networks alone, because the schedule stays float32
        part.to(device=device, dtype=dtype or torch.float32)
        for file in files:  # its pages would count beside the converted weights
            drop_mapped(file)
    check_weights(model, source)
    return model.to(device).eval()


def _with_vae(tensors: dict[str, Tensor], path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights with the autoencoder of `path`. Raises ValueError if that does not fit the model."""
    prefix = PREFIXES["vae"]
    vae = read_vae(path, model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    lacking = [name for name in shapes if name not in vae]
    if lacking:
        raise ValueError(f"{str(path)!r} holds another autoencoder than the model's: {some(lacking)} is missing")
    own = {name: tensor for name, tensor in vae.items() if name in shapes}  # the rest is training's
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)} | own


def check_weights(model: nn.Module, source: str) -> None:
    """Raise ValueError if a weight is NaN or infinite, which would make all pictures black.

    The least and the largest number tell both, in float16 in a thirtieth of the time of a sum in float32. Weights on
    the meta device have no numbers and pass. source: names the file in the message.
    """
    held = ((name, weight) for name, weight in model.named_parameters() if weight.numel() and not weight.is_meta)
    bad = [name for name, weight in held if not all(end.isfinite() for end in torch.aminmax(weight.detach()))]
    if bad:
        raise ValueError(f"checkpoint {source!r} is damaged: NaN or infinite numbers in {some(bad)}")


def for_inference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model node `config` without averaged weights, which only training needs."""
    params = config.get("params") or {}
    target = {"target": config["target"]} if "target" in config else {}
    return target | {"params": {key: params[key] for key in params} | {"use_ema": False}}


def _place_tokenizer(model: nn.Module, ckpt: Path, directory: str | Path | None) -> None:
    encoder: Any = model.cond_stage_model
    if hasattr(encoder, "set_tokenizer_candidates"):
        folder = ckpt if ckpt.is_dir() else ckpt.parent
        encoder.set_tokenizer_candidates((folder / "tokenizer", folder))
        if directory is not None:
            encoder.set_tokenizer(directory)
    elif directory is not None:
        raise ValueError(f"tokenizer {str(directory)!r} given, but {type(encoder).__name__} takes none")


def _check_schedule(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    stored, own = tensors.get("alphas_cumprod"), model.get_buffer("alphas_cumprod")
    if stored is None:
        return
    if not is_plain(stored) or not stored.is_floating_point():
        raise ValueError(f"checkpoint {source!r} is damaged: its alphas_cumprod are no floating-point numbers")
    if getattr(model, "rescale_betas_zero_snr", False):  # files hold the schedule as it was before, or after
        return
    if stored.shape != own.shape or not (stored.float() - own).abs().max() <= 0.01:  # "not", so that NaN is refused
        raise ValueError(
            f"checkpoint {source!r} was trained with another noise schedule than the config's: "
            f"check timesteps, linear_start, linear_end and beta_schedule"
        )


def _written_for(ckpt: str | Path, config: Mapping[str, Any]) -> str:
    """Return the end of an error message that names the config in the file's header, unless it is `config`."""
    name = read_metadata(ckpt).get("config")
    if not name or _is_config(name, config):
        return ""
    return f"; it was written for {name!r}, give it with --config"


def _is_config(path: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the file at `path` describes the same networks and schedule as `config`."""
    if not path.endswith(".yaml") or not os.path.isfile(path):
        return False
    from omegaconf import OmegaConf  # only to explain an error: not worth its time at every start

    try:
        theirs, ours = OmegaConf.load(path).model.params, config.get("model", config)["params"]
        networks = {*theirs, *ours} - {"cond_stage_config"}  # its tokenizer's directory may have been replaced
        return all(theirs[key] == ours[key] for key in networks)
    except Exception:  # the header may name any file: one that raises is not the config
        return False
