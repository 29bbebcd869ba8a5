"""The memory that an engine needs to run, measured in a process of its own, where nothing else is counted."""

from pathlib import Path

from dsdiff.benchmark.peers import start
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.source import Source
from dsdiff.memory import PeakMemory


def peak_alone(name: str, source: Source, *, weight_bit: int, outdir: Path, seconds: float) -> int:
    """Return the most bytes that are held during calls of an engine or peer, without merging.

    On a GPU it is the memory that torch holds there, else the resident memory of the whole process, mapped files
    included. What was held before, to build the engine, does not count. Raises WorkerError if the process fails.
    """
    with start(source, weight_bit=weight_bit, outdir=outdir) as process:
        try:
            process.ask("build", name=name)
            if source.device.type == "cuda":
                return process.ask("gpu_peak")
            with PeakMemory(process.pid) as peak:
                process.ask("time", ratio=0.0, seconds=seconds, warm=False, profiled=False)
        except WorkerError as error:
            raise WorkerError(f"the memory of {name} cannot be measured: {error}") from error
    return peak.bytes
