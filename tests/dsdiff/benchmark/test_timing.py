"""How measurements take turns, and what is compared with what. Nothing here depends on the time taken."""

import pytest
import torch

from dsdiff.benchmark import timing, variants
from dsdiff.benchmark.figures import Setting, Spread
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.source import Source
from dsdiff.benchmark.timing import BASELINE, Measured, Timing

CPU = torch.device("cpu")
CONFIG = variants.quant_config(4)


def test_speedups_are_taken_within_a_repeat():
    bf16, merged = Setting(engine="bf16", ratio=0.0), Setting(engine="bf16", ratio=0.5)
    found = {
        BASELINE: Measured(seconds=[2.0, 4.0, 9.0]),
        bf16: Measured(seconds=[2.0, 2.0, 6.0]),
        merged: Measured(seconds=[1.0, 4.0, 3.0], tokens=0.5),
    }
    row = timing.figures_of(found)[2]
    assert row.speedup == Spread(median=2.0, min=1.0, max=3.0)  # not 4 / 3, the ratio of the medians
    assert row.speedup_bf16 == row.merging == Spread(median=2.0, min=0.5, max=2.0)
    assert row.seconds == Spread(median=3.0, min=1.0, max=4.0)
    assert row.speedup_openvino is None


def test_openvino_is_the_faster_one_of_its_variants():
    ours = Setting(engine="int8", ratio=0.5)
    found = {
        ours: Measured(seconds=[1.0, 2.0]),
        Setting(engine="openvino-int8", ratio=0.0): Measured(seconds=[4.0, 4.0]),
        Setting(engine="openvino-int8-float32", ratio=0.0): Measured(seconds=[2.0, 6.0]),
        Setting(engine="openvino-int8-tome", ratio=0.5): Measured(seconds=[1.0, 1.0]),
    }
    rows = timing.figures_of(found)
    assert rows[0].speedup_openvino == Spread(median=2.5, min=2.0, max=3.0)  # 2 and 3; the other is at 4 and 2
    assert rows[3].merging == Spread(median=4.0, min=4.0, max=4.0)


def test_a_gpus_engines_are_compared_in_the_faster_order_of_feature_maps():
    found = {
        Setting(engine="fp16", ratio=0.0): Measured(seconds=[4.0]),
        Setting(engine="fp16-channels-last", ratio=0.0): Measured(seconds=[3.0]),
        Setting(engine="fp16-compile", ratio=0.0): Measured(seconds=[2.0]),
        Setting(engine="int8", ratio=0.5): Measured(seconds=[1.0]),
    }
    row = timing.figures_of(found)[3]
    assert (row.speedup_fp16.median, row.speedup_compiled.median) == (3.0, 2.0)


def test_the_compiled_unet_merges_nothing():
    settings = timing.settings_of(["fp16-compile", "int8"], [0.0, 0.5])
    assert [(each.engine, each.ratio) for each in settings[1:]] == [("fp16-compile", 0), ("int8", 0), ("int8", 0.5)]


def test_calls_on_a_gpu_are_queued_and_waited_for_at_the_end(monkeypatch):
    now, events = [0.0], []

    def call():
        events.append("call")
        now[0] += 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda device: events.append("wait"))
    assert timing.seconds_per_call(call, torch.device("cuda"), seconds=3.5) == 1.0
    assert events == ["call", *["wait", "call", "wait"], *["wait", "call", "call", "call", "wait"]]


def test_settings_are_those_asked_for_after_the_baseline():
    settings = timing.settings_of(["int8"], [0.5, 0.5], ["diffusers-bf16", "openvino-int8-tome"])
    others = [("int8", 0.5), ("diffusers-bf16", 0.0), ("openvino-int8-tome", 0.5)]
    assert settings == [BASELINE, *(Setting(engine=engine, ratio=ratio) for engine, ratio in others)]


def test_settings_take_turns_and_leave_no_trace(tiny_config):
    source = Source.read(tiny_config, True, CPU)
    engines = {name: variants.build(name, source, CONFIG) for name in ("float32", "bf16")}
    with engines["float32"].running(0.0) as call:
        before = call()
    order = []
    for engine in engines.values():
        engine.unet.register_forward_pre_hook(lambda unet, args: order.append(unet))
    settings = timing.settings_of(list(engines), [0.0, 0.3])
    timing.measure(engines, settings, 3, seconds=0)
    turns = [engines[setting.engine].unet for setting in settings]
    calls = [unet for unet in [*turns, *turns[::-1]] for _ in range(2)]  # one untimed, one timed
    assert order == calls + [unet for unet in turns for _ in range(3)]  # and one profiled
    with engines["float32"].running(0.0) as call:
        assert torch.equal(call(), before) and before.any()


def test_slow_calls_are_warmed_up_once(tiny_config, monkeypatch):
    monkeypatch.setattr(timing, "SLOW_SECONDS", 0.0)
    engine = variants.build("float32", Source.read(tiny_config, True, CPU), CONFIG)
    calls = []
    engine.unet.register_forward_pre_hook(lambda unet, args: calls.append(unet))
    timing.measure({"float32": engine}, [BASELINE], 3, seconds=0)
    assert len(calls) == 1 + 3 + 1  # warm-up, timed, profiled


class Fake:
    """Takes one second a call; fails from the call `fails_at` on."""

    def __init__(self, fails_at=None):
        self.fails_at, self.calls = fails_at, 0

    def time(self, ratio, *, seconds, warm, profiled):
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise WorkerError("its process ended by SIGSEGV")
        return Timing(seconds=1.0, shares={"attention": 1.0} if profiled else None)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_peer_that_fails_is_left_out_and_the_others_go_on(fails_at):
    engines = {"float32": Fake(), "openvino-int8": Fake(fails_at)}
    settings = timing.settings_of([], [], ["openvino-int8"])
    found, failed = timing.measure(engines, settings, 3, seconds=0)
    assert failed == {"openvino-int8": "its process ended by SIGSEGV"}
    assert list(found) == [BASELINE]
    assert found[BASELINE].seconds == [1.0] * 3 and found[BASELINE].shares == {"attention": 1.0}
    assert engines["openvino-int8"].calls == fails_at
