"""A process of its own that builds one UNet and answers requests about it: `python -m dsdiff.benchmark.worker`.

Other libraries (OpenVINO, NNCF, diffusers) run in such processes only, so that they cannot disturb ours; the peak
memory of our own engines is measured in one as well, as all else in this process would be counted.

Requests come as lines of JSON on stdin, {"ask": NAME, ...}; each is answered by a line of JSON on stdout, {"reply":
...} or {"error": "in one line"}. What libraries print goes to stderr. Between requests the process is idle; it ends
when stdin does.
"""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsdiff.benchmark import variants
from dsdiff.benchmark.options import DIFFUSERS, OPENVINO
from dsdiff.benchmark.source import Source
from dsdiff.benchmark.variants import Engine


class Worker:
    """The UNet of this process, and the answers about it."""

    def __init__(self) -> None:
        self.source: Source | None = None
        self.engine: Engine | None = None
        self.weight_bit, self.outdir = 0, Path()

    def start(self, *, config: str, random_weights: bool, device: str, threads: int, **others: Any) -> None:
        """Take the source of UNets and the number of threads. others: weight_bit and outdir; batch and latents."""
        torch.set_num_threads(threads)
        shape: dict[str, Any] = {name: others[name] for name in ("batch", "latents") if name in others}
        self.source = Source.read(Path(config), random_weights, torch.device(device), **shape)
        self.weight_bit, self.outdir = others["weight_bit"], Path(others["outdir"])

    def convert(self, *, name: str) -> None:
        """Make the files that a peer of OpenVINO needs."""
        from dsdiff.benchmark import peers_openvino

        assert self.source is not None
        peers_openvino.convert(name, self.source, self.outdir)

    def make(self, *, kind: str, ckpt: str, path: str) -> None:
        """Make a file that whole pictures are drawn from, see `pictures.files.make`."""
        from dsdiff.benchmark.pictures import files

        assert self.source is not None
        files.make(kind, self.source, Path(ckpt), Path(path))

    def build(self, *, name: str) -> dict[str, Any]:
        """Build an engine or a peer; return its weight_bytes and precision."""
        assert self.source is not None
        self.engine = build(name, self.source, self.weight_bit, self.outdir)
        give_back_memory()
        return {"weight_bytes": self.engine.weight_bytes, "precision": self.engine.precision}

    def time(self, *, ratio: float, seconds: float, warm: bool, profiled: bool) -> dict[str, Any]:
        """Measure calls; return a Timing."""
        assert self.engine is not None
        return asdict(self.engine.time(ratio, seconds=seconds, warm=warm, profiled=profiled))

    def gpu_peak(self) -> int:
        """Return the most GPU memory, in bytes, that torch holds during a call without merging."""
        assert self.engine is not None
        torch.cuda.reset_peak_memory_stats(self.engine.device)
        with self.engine.running(0.0) as call:
            call()
        return torch.cuda.max_memory_allocated(self.engine.device)

    def output(self, *, path: str) -> None:
        """Write the output of a call without merging, in float32, to a file for `torch.load`."""
        assert self.engine is not None
        with self.engine.running(0.0) as call:
            result = call()
        torch.save((result[0] if isinstance(result, tuple) else result).float().cpu(), path)


def build(name: str, source: Source, weight_bit: int, outdir: Path) -> Engine:
    """Build an engine, or a peer, whose library is imported here and nowhere else."""
    if name in DIFFUSERS:
        from dsdiff.benchmark import peers_diffusers

        return peers_diffusers.build(source, variants.DTYPES[name.removeprefix("diffusers-")])
    if name in OPENVINO:
        from dsdiff.benchmark import peers_openvino

        return peers_openvino.build(name, source, outdir)
    return variants.build(name, source, variants.quant_config(weight_bit))


def give_back_memory() -> None:
    """Return memory that was freed, but is still this process's, to the system (glibc keeps it)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def answer(asked: Mapping[str, Callable[..., Any]], line: str) -> dict[str, Any]:
    """Answer a request; an exception becomes an error in one line."""
    request = json.loads(line)
    try:
        return {"reply": asked[request.pop("ask")](**request)}
    except Exception as error:  # whatever a library raises is told to the process that asked
        return {"error": " ".join(f"{error}".split()) or type(error).__name__}


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not stand between the replies
    worker = Worker()
    asked = {
        "start": worker.start,
        "convert": worker.convert,
        "make": worker.make,
        "build": worker.build,
        "time": worker.time,
        "gpu_peak": worker.gpu_peak,
        "output": worker.output,
    }
    for line in sys.stdin:
        print(json.dumps(answer(asked, line)), file=replies, flush=True)


if __name__ == "__main__":
    main()
