"""Write and read cali_ckpts: files with the calibrated numbers of a model, in our format or in Q-Diffusion's.

Ours is a .safetensors that holds for every quantizer of a `QuantModel` the tensors that `qdiff.quant_state` describes,
and a header (`CaliHeader`) with all that is needed to read it. It holds no float weights: biases and norms are those of
the source model, which the header identifies by a fingerprint. Q-Diffusion's is described in `qdiff.checkpoint_qdiff`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.fileio import write_atomically
from ldm.tensor_files import check_whole, save_tensors
from qdiff import checkpoint_qdiff
from qdiff.config import QuantConfig
from qdiff.quant_layer import SplitQuantModule
from qdiff.quant_model import QuantModel
from qdiff.quant_state import activation_tensors, check_keys, expected_keys, load_tensors, weight_tensors

HEADER = "dsdiff_cali"  # the entry of the file's metadata that holds the header, as JSON
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CaliHeader:
    """The header of a cali_ckpt.

    config: how the model is quantized. splits: name of each split layer -> channels of its first part.
    merge: settings of the token merging that the model was calibrated with; None without.
    calibration: the settings of the calibration, for people to read. source: the "fingerprint" of the float UNet (see
    `fingerprint`) and other facts about it. format: "dsdiff", or "qdiff" for Q-Diffusion's.
    inferred: names of the settings in `config` that the file does not hold; they were inferred from its numbers.
    """

    config: QuantConfig
    splits: dict[str, int] = field(default_factory=dict)
    merge: dict[str, Any] | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    format: str = "dsdiff"
    inferred: tuple[str, ...] = ()


# --- writing -----------------------------------------------------------------------------------------------


def save_cali_ckpt(
    qnn: QuantModel,
    path: str | Path,
    *,
    format: str = "dsdiff",
    merge: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write the quantizers of a calibrated model, atomically.

    format: "dsdiff", or "qdiff" for Q-Diffusion's, which has no room for merge, calibration and source.
    Raises ValueError if a quantizer has no range yet, the format is unknown or has no room for `mixed_act` or dynamic
    ranges, or the suffix is not the format's (.safetensors for dsdiff, another such as .pth for qdiff).
    """
    path = Path(path)
    _check_complete(qnn)
    if format not in ("dsdiff", "qdiff"):
        raise ValueError(f"format is {format!r}: it must be dsdiff or qdiff")
    if (path.suffix == ".safetensors") != (format == "dsdiff"):
        raise ValueError(f"{path.name!r} is a name of the other format: dsdiff's end in .safetensors, qdiff's in .pth")
    if format == "qdiff" and qnn.config.quant_act and qnn.config.act_range == "dynamic":
        raise ValueError("Q-Diffusion's format has a fixed range for each activation: write dynamic ones in dsdiff's")
    if format == "qdiff" and qnn.config.mixed_act:
        raise ValueError("Q-Diffusion's format has one width for all activations: write mixed_act in dsdiff's")
    if format == "qdiff":
        write_atomically(path, lambda temporary: torch.save(checkpoint_qdiff.to_state_dict(qnn), temporary))
    else:
        header = CaliHeader(
            config=qnn.config,
            splits=split_layers(qnn),
            merge=dict(merge) if merge else None,
            calibration=dict(calibration or {}),
            source={"fingerprint": fingerprint(qnn), **(source or {})},
        )
        tensors = weight_tensors(qnn) | activation_tensors(qnn)
        write_atomically(path, lambda temporary: save_tensors(tensors, temporary, header_metadata(header)))


def header_metadata(header: CaliHeader, **more: Any) -> dict[str, str]:
    """Return a file's metadata: one entry, this header and the plain values `more` as JSON."""
    content = {
        "version": VERSION,
        "config": header.config.to_dict(),
        "splits": header.splits,
        "merge": header.merge,
        "calibration": header.calibration,
        "source": header.source,
    }
    return {HEADER: json.dumps(content | more)}


def split_layers(qnn: QuantModel) -> dict[str, int]:
    """Return the channels of the first part of each split layer, by its name."""
    return {name: layer.split for name, layer in qnn.layers().items() if isinstance(layer, SplitQuantModule)}


@torch.no_grad()
def fingerprint(qnn: QuantModel) -> str:
    """Return the SHA-256 of a sample of the float weights.

    Weights are rounded to float16 first, so that float32 and float16 files of one model have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(qnn.model.named_parameters()):
        if ".alpha" in name:
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, values.numel() // 4096)].to("cpu", torch.float16)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def quantized_bytes(qnn: QuantModel) -> int:
    """Return the size of a calibrated UNet in bytes: packed codes, ranges, and all other parameters in float32."""
    tensors = (weight_tensors(qnn) | activation_tensors(qnn)).values()
    quantized = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    weights = {f"{name}.weight" for name in qnn.layers()}
    rest = (p for name, p in qnn.named_parameters() if name not in weights and ".alpha" not in name)
    return quantized + sum(4 * parameter.numel() for parameter in rest)


def _check_complete(qnn: QuantModel) -> None:
    quantizers = qnn.weight_quantizers() | qnn.act_quantizers()
    unknown = [name for name, quantizer in quantizers.items() if not quantizer.is_set]
    if unknown:
        raise ValueError(f"{len(unknown)} quantizers have no range yet, such as {unknown[0]}: calibrate first")


# --- reading -----------------------------------------------------------------------------------------------


def read_cali_header(
    path: str | Path, *, weight_bit: int | None = None, act_bit: int | None = None, sm_abit: int | None = None
) -> CaliHeader:
    """Return the header of a cali_ckpt of either format.

    weight_bit, act_bit, sm_abit: bit widths that are known from elsewhere. Q-Diffusion's files do not hold them, so
    widths that are not given are inferred. Raises ValueError if the file contradicts them, is damaged, of another kind,
    or of a newer version; FileNotFoundError if there is none.
    """
    path = _existing(path)
    bits = {"weight_bit": weight_bit, "act_bit": act_bit, "sm_abit": sm_abit}
    if path.suffix != ".safetensors":
        return _header_of_qdiff(checkpoint_qdiff.read(path), path, bits)
    with _open(path) as file:
        header = _parse_header(path, file.metadata() or {})
    check_settings(header, bits, str(path))
    return header


def check_settings(header: CaliHeader, given: Mapping[str, Any], source: str) -> None:
    """Raise ValueError, naming both values, if a setting in `given` differs from the file's; None is "not given"."""
    for name, value in given.items():
        stored = getattr(header.config, name)
        if value is not None and value != stored:
            raise ValueError(
                f"{name} {value} contradicts {source!r}, which was made with {name} {stored}: leave it out, or choose "
                "another cali_ckpt"
            )


def load_cali_ckpt(qnn: QuantModel, path: str | Path, *, freeze: bool = True) -> CaliHeader:
    """Fill the quantizers of a model from a cali_ckpt of either format, and switch them on.

    Neither a forward pass nor data is needed. A file with ranges of activations also serves a model that quantizes
    weights only. freeze=False keeps AdaRound's alpha of a Q-Diffusion file, which takes as much memory as the weights.
    Raises ValueError, and leaves the model as it is, if the file is damaged, or is of another architecture, another
    source model or other settings.
    """
    path = _existing(path)
    config = qnn.config
    compared = ("weight_bit", "act_bit", "sm_abit", "split") if config.quant_act else ("weight_bit", "split")
    if path.suffix != ".safetensors":
        if config.quant_act and config.act_symmetric:
            raise ValueError(f"{str(path)!r} has unsigned activations, and the model's are signed")
        if config.quant_act and config.act_range == "dynamic":
            raise ValueError(f"{str(path)!r} has static ranges of activations, and the model's are dynamic")
        bits = {name: getattr(config, name) for name in compared if name != "split"}
        tensors = checkpoint_qdiff.read(path)
        header = _header_of_qdiff(tensors, path, bits)
        checkpoint_qdiff.load(qnn, tensors, str(path), freeze=freeze)
    else:
        header = read_cali_header(path)
        for name in (*compared, "act_symmetric", "mixed_act", "act_range") if config.quant_act else compared:
            value, stored = getattr(config, name), getattr(header.config, name)
            if value != stored:
                raise ValueError(f"the model has {name} {value}, but {str(path)!r} was made with {name} {stored}")
        if config.quant_act and not header.config.quant_act:
            raise ValueError(f"the model has quantized activations, but {str(path)!r} has weights only")
        _load_our_format(qnn, path, header)
    qnn.set_quant_state(True, config.quant_act)
    return header


def _load_our_format(qnn: QuantModel, path: Path, header: CaliHeader) -> None:
    if header.splits != split_layers(qnn):
        raise ValueError(f"{str(path)!r} splits other layers than this model has: it is of another architecture")
    check_whole(path)
    with _open(path) as file:
        found = {key for key in file.keys() if qnn.config.quant_act or "act_quantizer" not in key}  # noqa: SIM118
        check_keys(found, expected_keys(qnn), str(path))
        _check_source(qnn, header, str(path))
        try:
            load_tensors(qnn, {key: file.get_tensor(key) for key in found})
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"cali_ckpt {str(path)!r} is damaged: {error}") from error


def _check_source(qnn: QuantModel, header: CaliHeader, source: str) -> None:
    stored = header.source.get("fingerprint")
    if stored != fingerprint(qnn):
        made_from = header.source.get("ckpt") or "another model"
        raise ValueError(
            f"cali_ckpt {source!r} was made from {made_from} with other weights than this model's: calibrate this "
            "model, or load the checkpoint that it was made from"
        )


def _header_of_qdiff(tensors: Mapping[str, Tensor], path: Path, bits: Mapping[str, int | None]) -> CaliHeader:
    config, inferred = checkpoint_qdiff.infer_config(tensors, str(path), bits)
    splits = checkpoint_qdiff.split_layers_in(tensors)
    return CaliHeader(config=config, splits=splits, format="qdiff", inferred=tuple(inferred))


def _parse_header(path: Path, metadata: Mapping[str, str]) -> CaliHeader:
    if HEADER not in metadata:
        raise ValueError(f"{str(path)!r} is no cali_ckpt: give a file that scripts/calibrate.py wrote")
    try:
        content = json.loads(metadata[HEADER])
        version = content["version"]
        if version == VERSION:
            merge = content["merge"]
            return CaliHeader(
                config=QuantConfig.from_dict(content["config"]),
                splits=dict(content["splits"]),
                merge=None if merge is None else dict(merge),
                calibration=dict(content["calibration"]),
                source=dict(content["source"]),
            )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"cali_ckpt {str(path)!r} has a damaged header: {str(error)[:300]}") from error
    raise ValueError(
        f"cali_ckpt {str(path)!r} is of version {repr(version)[:60]}, this program reads {VERSION}: "
        "update, or calibrate again"
    )


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    return path


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no readable safetensors file: {error}") from error
