"""Seconds of UNet calls, by turns, and on what kind of machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import tomesd
from dsdiff.benchmark.operations import shares
from dsdiff.benchmark.variants import Engine

MIN_SECONDS = 0.5  # a measurement is the mean of as many calls as fit, and of one at least
SLOW_SECONDS = 10.0  # a call that takes longer needs no warm-up but the first


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured. engine: its name; ratio: part of the tokens to merge, 0 is none."""

    engine: str
    ratio: float


BASELINE = Setting(engine="float32", ratio=0.0)


@dataclass(kw_only=True)
class Measured:
    """A setting's figures. seconds: per call, one a repeat. tokens: share that the transformer blocks process of those
    they get. shares: of kinds of operators in the time, see `benchmark_operations`."""

    seconds: list[float] = field(default_factory=list)
    tokens: float = 1.0
    shares: dict[str, float] | None = None


def settings_of(engines: Sequence[str], ratios: Sequence[float], peers: Sequence[str] = ()) -> list[Setting]:
    """The baseline, then all others; peers do not merge. ValueError for a ratio that cannot be merged."""
    for ratio in ratios:
        tomesd.MergeOptions(ratio=ratio)
    wanted = [Setting(engine=engine, ratio=ratio) for engine in engines for ratio in ratios]
    return list(dict.fromkeys([BASELINE, *wanted, *(Setting(engine=peer, ratio=0.0) for peer in peers)]))


# --- time --------------------------------------------------------------------------------------------------


def seconds_per_call(call: Callable[[], Any], device: torch.device, *, warm: bool = False) -> float:
    """Mean over at least MIN_SECONDS, after one untimed call unless it is `warm` already."""

    def finished_call() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if not warm:
        finished_call()
    start, calls, seconds = time.perf_counter(), 0, 0.0
    while not calls or seconds < MIN_SECONDS:
        finished_call()
        calls, seconds = calls + 1, time.perf_counter() - start
    return seconds / calls


def measure(
    engines: Mapping[str, Engine], settings: Sequence[Setting], repeats: int, device: torch.device
) -> dict[Setting, Measured]:
    """All settings in turn, every second time backwards, so that a slow drift of the machine favours none.

    Each begins with an untimed call; where one takes longer than SLOW_SECONDS, in the first repeat only. The last
    repeat ends with one more measurement, under the profiler.
    """
    found = {setting: Measured() for setting in settings}
    rounds = [setting for i in range(repeats) for setting in (settings if i % 2 == 0 else settings[::-1])]
    for setting in tqdm(rounds, unit="measurement"):
        engine, of = engines[setting.engine], found[setting]
        slow = bool(of.seconds) and of.seconds[-1] > SLOW_SECONDS
        with engine.running(setting.ratio) as call:
            of.seconds.append(seconds_per_call(call, device, warm=slow))
            of.tokens = engine.tokens() if setting.ratio else 1.0
            if len(of.seconds) == repeats:
                of.shares = shares(lambda: seconds_per_call(call, device, warm=True), device)
    return found


# --- comparison --------------------------------------------------------------------------------------------


def rows_of(found: Mapping[Setting, Measured]) -> list[dict[str, Any]]:
    """Each setting's figures as plain values, with its speed against others; None where they were not measured.

    speedup, speedup_bf16: against float32 and bf16 without merging; merging: against the same engine without.
    """
    return [
        {
            **asdict(setting),
            "tokens": of.tokens,
            "seconds": spread(of.seconds),
            "seconds_by_repeat": of.seconds,
            "speedup": speedup(found, BASELINE, of),
            "speedup_bf16": speedup(found, Setting(engine="bf16", ratio=0.0), of),
            "merging": speedup(found, Setting(engine=setting.engine, ratio=0.0), of) if setting.ratio else None,
            "shares": of.shares,
        }
        for setting, of in found.items()
    ]


def speedup(found: Mapping[Setting, Measured], other: Setting, of: Measured) -> dict[str, float] | None:
    """The other's seconds over these, within each repeat."""
    if other not in found:
        return None
    return spread([theirs / own for theirs, own in zip(found[other].seconds, of.seconds, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# --- where -------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What kind of machine this is; nothing that tells one from another of its kind."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = {
        "cpu": cpu_model(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device.type,
    }
    return kind | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
