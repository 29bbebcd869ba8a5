"""Time UNet calls of several settings in turn, and compare them within each repeat."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from tqdm import tqdm

from dsdiff.benchmark.figures import Setting, SettingFigures, Spread
from dsdiff.benchmark.options import COMPILED, GPU_ENGINES, MERGED_RATIO, MERGING, OPENVINO_INT8, TOME
from dsdiff.benchmark.process import WorkerError

SLOW_SECONDS = 10.0  # a call that takes longer is warmed up in the first repeat only
BASELINE = Setting(engine="float32", ratio=0.0)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One measurement.

    seconds: time of a call. tokens: the share of tokens that the transformer blocks process. shares: kind of operator
    (see `operations`) -> share of the time; None if not asked for, or not known.
    """

    seconds: float
    tokens: float = 1.0
    shares: dict[str, float] | None = None


class Timeable(Protocol):
    """A UNet that can be measured: ours (`variants.Engine`) or a peer in a process of its own (`peers.Peer`)."""

    def time(self, ratio: float, *, seconds: float, warm: bool, profiled: bool) -> Timing:
        """Measure calls with the share `ratio` of the tokens merged.

        seconds, warm: as in `seconds_per_call`. profiled: measure the shares of operators as well, by further calls.
        """
        ...


@dataclass(kw_only=True)
class Measured:
    """The measurements of a setting: seconds, one a repeat; tokens and shares as in Timing."""

    seconds: list[float] = field(default_factory=list)
    tokens: float = 1.0
    shares: dict[str, float] | None = None


def settings_of(engines: Sequence[str], ratios: Sequence[float], peers: Sequence[str] = ()) -> list[Setting]:
    """Return the baseline, then all engines with all ratios, then the peers, of which those of MERGING merge.

    The compiled UNet is measured without merging alone.
    """
    plain = {COMPILED: [0.0]}
    wanted = [Setting(engine=engine, ratio=ratio) for engine in engines for ratio in plain.get(engine, ratios)]
    others = [Setting(engine=peer, ratio=MERGED_RATIO if peer in MERGING else 0.0) for peer in peers]
    return list(dict.fromkeys([BASELINE, *wanted, *others]))


# --- time --------------------------------------------------------------------------------------------------


def seconds_per_call(call: Callable[[], Any], device: torch.device, *, seconds: float, warm: bool = False) -> float:
    """Return the mean time of the calls that fit into `seconds`, of one call at least.

    An untimed call comes first, unless the UNet is `warm` already. On a GPU calls are queued one behind the other, as
    the steps of a picture are, and the last one is waited for.
    """
    if not warm:
        call()
    if device.type == "cuda":
        return _seconds_queued(call, device, seconds)
    start, calls, passed = time.perf_counter(), 0, 0.0
    while not calls or passed < seconds:
        call()
        calls, passed = calls + 1, time.perf_counter() - start
    return passed / calls


def _seconds_queued(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the mean time of the calls that fit into `seconds`, as many as the time of one call tells."""

    def passed(calls: int) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once = passed(1)
    calls = int(seconds / once)
    return once if calls <= 1 else passed(calls) / calls


def in_turn(measures: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Return what each of `measures` returns, one value a repeat.

    Every second repeat goes backwards, so that a slow drift of the machine favours none.
    """
    found: list[list[float]] = [[] for _ in measures]
    for i in range(repeats):
        numbers = range(len(measures))
        for number in numbers if i % 2 == 0 else reversed(numbers):
            found[number].append(measures[number]())
    return found


def measure(
    engines: Mapping[str, Timeable], settings: Sequence[Setting], repeats: int, *, seconds: float
) -> tuple[dict[Setting, Measured], dict[str, str]]:
    """Measure all settings in turn; return the measurements, and for engines that failed the reasons.

    Every second repeat goes backwards, so that a slow drift of the machine favours none. Each measurement begins with
    an untimed call; where calls take longer than SLOW_SECONDS, in the first repeat only. In the last repeat the shares
    of operators are measured as well. A peer whose process fails is not measured again, and has no measurements.
    """
    found = {setting: Measured() for setting in settings}
    failed: dict[str, str] = {}
    rounds = [setting for i in range(repeats) for setting in (settings if i % 2 == 0 else settings[::-1])]
    for setting in tqdm(rounds, unit="measurement"):
        so_far = found[setting]
        if setting.engine in failed:
            continue
        try:
            timing = engines[setting.engine].time(
                setting.ratio,
                seconds=seconds,
                warm=bool(so_far.seconds) and so_far.seconds[-1] > SLOW_SECONDS,
                profiled=len(so_far.seconds) == repeats - 1,
            )
        except WorkerError as error:
            failed[setting.engine] = str(error)
            continue
        so_far.seconds.append(timing.seconds)
        so_far.tokens, so_far.shares = timing.tokens, timing.shares
    return {setting: measured for setting, measured in found.items() if setting.engine not in failed}, failed


# --- comparison --------------------------------------------------------------------------------------------


def figures_of(found: Mapping[Setting, Measured]) -> list[SettingFigures]:
    """Return the figures of each setting, with its speed against others."""
    return [
        SettingFigures(
            **asdict(setting),
            tokens=measured.tokens,
            seconds=Spread.over(measured.seconds),
            seconds_by_repeat=measured.seconds,
            speedup=speedup(found, BASELINE, measured),
            speedup_bf16=speedup(found, Setting(engine="bf16", ratio=0.0), measured),
            speedup_fp16=speedup_over(found, [name for name in GPU_ENGINES if name != COMPILED], measured),
            speedup_compiled=speedup_over(found, [COMPILED], measured),
            speedup_openvino=speedup_over(found, OPENVINO_INT8, measured),
            merging=speedup(found, unmerged(setting), measured) if setting.ratio else None,
            shares=measured.shares,
        )
        for setting, measured in found.items()
    ]


def unmerged(setting: Setting) -> Setting:
    """Return the setting of the same engine without merging."""
    return Setting(engine=setting.engine.removesuffix(TOME), ratio=0.0)


def speedup_over(found: Mapping[Setting, Measured], variants: Sequence[str], measured: Measured) -> Spread | None:
    """Return how many times as fast a setting is as the fastest of the `variants` of an engine, within each repeat.

    The variants merge no tokens. None if none was measured.
    """
    settings = [Setting(engine=name, ratio=0.0) for name in variants]
    speedups = [speedup(found, setting, measured) for setting in settings]
    return min((each for each in speedups if each is not None), key=lambda each: each.median, default=None)


def speedup(found: Mapping[Setting, Measured], other: Setting, measured: Measured) -> Spread | None:
    """Return the other's seconds divided by these, within each repeat; None if the other was not measured."""
    if other not in found:
        return None
    return Spread.over([theirs / own for theirs, own in zip(found[other].seconds, measured.seconds, strict=True)])
