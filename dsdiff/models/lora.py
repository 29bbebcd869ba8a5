"""Apply LoRAs to a model: merged into float weights, or as branches beside the layers of a quantized one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dsdiff.models.registry import LORA_CALI_CKPTS
from dsdiff.models.spec import ModelSpec
from dsdiff.options import LoraOptions, QuantizationOptions
from ldm.fileio import file_sha256
from ldm.lora import layer_shapes, merge_lora, read_lora
from ldm.lora_names import TEXT, UNET
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.low_rank import LowRank, LowRankBranch
from qdiff.checkpoint import read_cali_header
from qdiff.engine.lora import convolutions, set_branches

SOURCE_ENTRY = "lora"  # of the `source` in the header of a cali_ckpt or a bundle


@dataclass(frozen=True, kw_only=True)
class LoraRecord:
    """A LoRA as settings record it: the name and the SHA-256 of its file, and its scale."""

    name: str
    sha256: str
    scale: float

    def __str__(self) -> str:
        return f"{self.name}:{self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class Loras:
    """The LoRAs of a pipeline, in the order given.

    options, records: one each. merged: how many of the first are merged into the float weights before all else; the
    others are branches.
    """

    options: tuple[LoraOptions, ...] = ()
    records: tuple[LoraRecord, ...] = ()
    merged: int = 0


def record_of(options: LoraOptions) -> LoraRecord:
    """Return the record of a LoRA. Raises FileNotFoundError without its file."""
    if not options.path.is_file():
        missing = "is a folder: give the file in it" if options.path.is_dir() else "is not there"
        raise FileNotFoundError(f"LoRA {str(options.path)!r} {missing}")
    return LoraRecord(name=options.path.name, sha256=file_sha256(options.path), scale=float(options.scale))


def resolve_loras(options: Sequence[LoraOptions], cali_ckpt: Path | None, *, bundle: bool = False) -> Loras:
    """Return the LoRAs of a pipeline. Those that a cali_ckpt was made with come first, to be merged.

    cali_ckpt: the file that the model is quantized by; None for a float model, into which all LoRAs are merged.
    Raises FileNotFoundError for a file that is missing. Raises ValueError where one is missing, or has another scale,
    that the cali_ckpt was made with, and for one that a bundle has in it already.
    """
    known = [(each, record_of(each)) for each in options]
    if cali_ckpt is None:
        return Loras(options=tuple(options), records=tuple(record for _, record in known), merged=len(known))
    calibrated = calibrated_with(cali_ckpt)
    if bundle:
        inside = {record.sha256 for record in calibrated}
        twice = next((record for _, record in known if record.sha256 in inside), None)
        if twice is not None:
            raise ValueError(f"LoRA {twice.name!r} is in {str(cali_ckpt)!r} already: leave it out")
        return Loras(options=tuple(options), records=tuple(record for _, record in known))
    first = []
    for record in calibrated:
        same = [pair for pair in known if (pair[1].sha256, pair[1].scale) == (record.sha256, record.scale)]
        if not same:
            raise ValueError(
                f"cali_ckpt {str(cali_ckpt)!r} was made with LoRA {record.name} merged at scale {record.scale:g}: add "
                f"--lora FILE:{record.scale:g}"
            )
        first.append(same[0])
        known.remove(same[0])
    return Loras(
        options=tuple(each for each, _ in (*first, *known)),
        records=tuple(record for _, record in (*first, *known)),
        merged=len(first),
    )


def calibrated_for(
    quantization: QuantizationOptions, spec: ModelSpec, loras: Sequence[LoraOptions]
) -> QuantizationOptions:
    """Return the options with the cali_ckpt, of those that come with the model, that was made with some of the LoRAs.

    Integers that have a LoRA in them need no branches beside them. Options that name a cali_ckpt, or bits that it does
    not have, are returned as they are, and so are they without such a cali_ckpt. Raises FileNotFoundError for a LoRA
    that is missing.
    """
    if quantization.cali_ckpt is not None or spec.bundle or not loras:
        return quantization
    given = {(record.sha256, record.scale) for record in map(record_of, loras)}
    for path in LORA_CALI_CKPTS.get(spec.ckpt.resolve(), ()):
        if not path.is_file() or quantization.weight_bit not in (None, read_cali_header(path).config.weight_bit):
            continue
        if given >= {(record.sha256, record.scale) for record in calibrated_with(path)}:
            return replace(quantization, cali_ckpt=path)
    return quantization


def calibrated_with(cali_ckpt: Path) -> list[LoraRecord]:
    """Return the LoRAs that were merged when a cali_ckpt or bundle was made.

    Raises ValueError for a damaged header.
    """
    if cali_ckpt.suffix != ".safetensors":  # Q-Diffusion's format has no header
        return []
    entries = read_cali_header(cali_ckpt).source.get(SOURCE_ENTRY, [])
    try:
        return [LoraRecord(**entry) for entry in entries]
    except TypeError as error:
        raise ValueError(f"cali_ckpt {str(cali_ckpt)!r} has a damaged header: {error}") from error


def lora_facts(options: Sequence[LoraOptions]) -> list[dict[str, Any]]:
    """Return the records of LoRAs as plain values, as a header's `source` has them. Raises FileNotFoundError."""
    return [asdict(record_of(each)) for each in options]


# --- in a model --------------------------------------------------------------------------------------------


def merge_loras(model: LatentDiffusion, loras: Loras) -> None:
    """Merge into a float model what is to be merged. All files are read before the first weight changes."""
    shapes = layer_shapes(model.model.diffusion_model, model.cond_stage_model)
    read = [(read_lora(each.path, shapes), each.scale) for each in loras.options[: loras.merged]]
    for changes, scale in read:
        if scale:
            merge_lora(model, changes, scale)


class BranchSites:
    """The layers of a model that can have branches. It is made before the UNet is lowered.

    unet: the model's UNet, float or with quantized layers.
    """

    def __init__(self, model: LatentDiffusion, unet: nn.Module):
        self.shapes = layer_shapes(unet, model.cond_stage_model)
        self.options = {UNET + name: options for name, options in convolutions(unet).items()}

    def read(self, loras: Loras) -> list[tuple[dict[str, LowRank], float]]:
        """Read the LoRAs that are to be branches, each with its scale. Raises ValueError for one that does not fit."""
        return [(read_lora(each.path, self.shapes), each.scale) for each in loras.options[loras.merged :]]

    def set(self, model: LatentDiffusion, read: Sequence[tuple[Mapping[str, LowRank], float]]) -> None:
        """Put the branches of these LoRAs into a model, in place of those that are there."""
        changes: dict[str, list[tuple[LowRank, float]]] = {}
        for layers, scale in read:
            for name, change in layers.items() if scale else ():
                changes.setdefault(name, []).append((change, scale))
        branches = {
            name: LowRankBranch.of(own, self.options.get(name)).to(model.device) for name, own in changes.items()
        }
        networks = {UNET: model.model.diffusion_model.model, TEXT: getattr(model.cond_stage_model, "transformer", None)}
        for prefix, network in networks.items():
            own = {name.removeprefix(prefix): branch for name, branch in branches.items() if name.startswith(prefix)}
            if network is not None:
                set_branches(network, own)
