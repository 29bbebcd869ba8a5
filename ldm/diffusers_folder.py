"""Read the weights of a folder as diffusers saves it: a network a subfolder, its weights in one file or in shards."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.diffusers_names import PREFIXES, our_names
from ldm.fileio import json_object
from ldm.weight_files import read_weights

INDEX_FILE = "model_index.json"
CONFIG_FILE = "config.json"
# A network's folder -> the possible begins of its files' names.
STEMS: Mapping[str, tuple[str, ...]] = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
KINDS = ("safetensors", "bin")  # in the order of preference
# Variants of weights, in the order of preference; "" is the whole precision. Others come last.
VARIANTS = ("", "fp16", "bf16")


def is_diffusers_folder(path: str | Path) -> bool:
    """Tell whether `path` is the folder of a whole pipeline."""
    folder = Path(path)
    return (folder / INDEX_FILE).is_file() or (folder / "unet" / CONFIG_FILE).is_file()


def choose_weights(network: str, names: Collection[str]) -> str | None:
    """Return which of the files `names` in a network's folder to read: a file of weights, or an index of shards.

    None if there is none. safetensors come before .bin, and whole precision before variants.
    """
    found = []
    for stem in STEMS[network]:
        pattern = rf"{stem}(\.(?P<a>[\w-]+))?\.(?P<kind>{'|'.join(KINDS)})(\.index(\.(?P<b>[\w-]+))?\.json)?"
        for name in names:
            match = re.fullmatch(pattern, name)
            if match:
                variant = match["a"] or match["b"] or ""
                rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
                found.append((KINDS.index(match["kind"]), rank, variant, name))
    return min(found)[-1] if found else None


def weight_files(folder: Path, network: str) -> list[Path]:
    """Return the files that hold a network's weights. `folder`: the network's.

    Raises FileNotFoundError if there are none, ValueError for a damaged index.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    chosen = choose_weights(network, names)
    if chosen is None:
        wanted = " or ".join(f"{STEMS[network][0]}.{kind}" for kind in KINDS)
        raise FileNotFoundError(f"no weights in {str(folder)!r}: {wanted} is expected there")
    if not chosen.endswith(".json"):
        return [folder / chosen]
    shards = read_json(folder / chosen).get("weight_map")
    if not isinstance(shards, dict) or not shards or any(Path(str(name)).name != name for name in shards.values()):
        raise ValueError(f"{str(folder / chosen)!r} is damaged: it must map weights to files beside it")
    return [folder / name for name in sorted(set(shards.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file. Raises FileNotFoundError, or ValueError if it is no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {str(path.parent)!r}: a folder as diffusers saves it has one")
    try:
        return json_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def read_network(folder: Path, network: str) -> dict[str, Tensor]:
    """Return the weights in a network's own folder under their names there, memory-mapped. Errors as `weight_files`."""
    return {name: tensor for path in weight_files(folder, network) for name, tensor in read_weights(path).items()}


def read_folder(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a pipeline's folder under our names in a LatentDiffusion, memory-mapped.

    Names that the table does not have stay, behind the network's prefix. Errors as `weight_files`.
    """
    found: dict[str, Tensor] = {}
    for network, prefix in PREFIXES.items():
        keys = model.get_submodule(prefix.rstrip(".")).state_dict()
        tensors = read_network(folder / network, network)
        ours = our_names(network, keys, tensors)
        found |= {prefix + ours[name]: tensor for name, tensor in tensors.items()}
    return found


def read_vae(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of an autoencoder under our names in a LatentDiffusion, memory-mapped.

    path: a file in CompVis's layout, of an autoencoder alone or of a whole model; one in diffusers' layout; its folder,
    or that of a whole pipeline. Errors as `weight_files`; ValueError for a file without an autoencoder.
    """
    prefix = PREFIXES["vae"]
    tensors = read_network(vae_folder(path), "vae") if path.is_dir() else read_weights(path)
    whole = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    tensors = whole or tensors
    if "decoder.conv_in.weight" not in tensors:
        raise ValueError(f"{str(path)!r} holds no autoencoder")
    if any(".mid_block." in name for name in tensors):
        ours = our_names("vae", model.get_submodule(prefix.rstrip(".")).state_dict(), tensors)
        tensors = {ours[name]: tensor for name, tensor in tensors.items()}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def vae_folder(folder: Path) -> Path:
    """Return the folder of the autoencoder: that within a pipeline's, or the folder itself."""
    return folder / "vae" if (folder / "vae").is_dir() else folder


def files_read(path: Path, networks: Collection[str] = tuple(PREFIXES)) -> list[Path]:
    """Return the files of weights that loading reads of a file, or of a folder. Errors as `weight_files`."""
    if not path.is_dir():
        return [path]
    folders = {name: path / name for name in networks}
    if tuple(networks) == ("vae",):
        folders = {"vae": vae_folder(path)}
    return [file for name, folder in folders.items() for file in weight_files(folder, name)]
