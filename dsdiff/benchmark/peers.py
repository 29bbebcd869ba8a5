"""Other libraries' UNets for comparison: diffusers, and OpenVINO with NNCF's 8-bit integers.

Each is built and run by a `worker`, a process of its own; this module imports none of the libraries. diffusers gets a
UNet of the same sizes with weights of its own, OpenVINO ours, converted.
"""

from collections.abc import Sequence
from importlib import util
from pathlib import Path

import torch

from dsdiff.benchmark import peers_openvino
from dsdiff.benchmark.options import DIFFUSERS, MERGING, OPENVINO, SDCPP
from dsdiff.benchmark.process import WorkerError, WorkerProcess
from dsdiff.benchmark.source import Source
from dsdiff.benchmark.timing import Timing


class Peer:
    """A UNet in a worker process. Raises WorkerError if it cannot be built. weight_bytes, precision: as of Engine."""

    def __init__(self, name: str, source: Source, *, weight_bit: int, outdir: Path):
        self.name = name
        self.process = start(source, weight_bit=weight_bit, outdir=outdir)
        try:
            facts = self.process.ask("build", name=name)
        except WorkerError:
            self.process.close()
            raise
        self.weight_bytes: int = facts["weight_bytes"]
        self.precision: str = facts["precision"]

    def time(self, ratio: float, *, seconds: float, warm: bool, profiled: bool) -> Timing:
        """Measure calls, see `timing.Timeable`. A UNet that was converted with merging merges by itself."""
        ratio = 0.0 if self.name in MERGING else ratio
        return Timing(**self.process.ask("time", ratio=ratio, seconds=seconds, warm=warm, profiled=profiled))

    def close(self) -> None:
        """End the process."""
        self.process.close()


def start(source: Source, *, weight_bit: int, outdir: Path) -> WorkerProcess:
    """Start a worker with the same source of UNets, and as many threads as torch has here."""
    process = WorkerProcess()
    try:
        process.ask(
            "start",
            config=str(source.config),
            random_weights=source.ckpt is None,
            device=str(source.device),
            threads=torch.get_num_threads(),
            weight_bit=weight_bit,
            outdir=str(outdir),
            batch=source.batch,
            latents=source.latents,
        )
    except WorkerError:
        process.close()
        raise
    return process


def convert(names: Sequence[str], source: Source, outdir: Path) -> dict[str, str]:
    """Let workers make the files that OpenVINO's peers need and that are not there yet.

    Returns why not, by name, for peers of which the files cannot be made.
    """
    reasons = {}
    for name in names:
        if name in OPENVINO and not peers_openvino.file_of(name, source, outdir).exists():
            try:
                with start(source, weight_bit=8, outdir=outdir) as process:
                    process.ask("convert", name=name)
            except WorkerError as error:
                reasons[name] = f"conversion failed: {error}"
    return reasons


def choose_peers(
    wanted: Sequence[str], device: torch.device, *, pictures: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Return the peers that can be measured here, and for the others the reasons by name.

    pictures: ask for whole pictures, in place of calls of a UNet.
    """
    reasons = {name: reason for name in wanted if (reason := why_not(name, device, pictures=pictures))}
    return [name for name in dict.fromkeys(wanted) if name not in reasons], reasons


def why_not(name: str, device: torch.device, *, pictures: bool = False) -> str | None:
    """Return why a peer cannot be measured; None if it can."""
    if name in SDCPP and not pictures:
        return "it draws whole pictures only: add --pictures"
    missing = [package for module, package in packages_of(name, pictures).items() if util.find_spec(module) is None]
    if missing:
        return f"not installed: pip install {' '.join(missing)}"
    if name in (*OPENVINO, *SDCPP) and device.type != "cpu":
        return "it is measured on the CPU alone: use --device cpu"
    return None


def packages_of(name: str, pictures: bool) -> dict[str, str]:
    """Return the modules that a peer needs, and the packages that hold them."""
    if name in SDCPP:
        return {"stable_diffusion_cpp": "stable-diffusion-cpp-python"}
    needed = ["diffusers", *(["transformers"] if pictures else [])] if name in DIFFUSERS else ["openvino"]
    return {module: module for module in [*needed, *(["nncf"] if "int8" in name else [])]}
