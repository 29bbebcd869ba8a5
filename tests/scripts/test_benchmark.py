"""What scripts/benchmark.py measures, how it compares, and what it refuses. Nothing here depends on the time taken."""

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
import yaml

from dsdiff.benchmark import memory as benchmark_memory
from dsdiff.benchmark import peers as benchmark_peers
from dsdiff.benchmark import roofline as benchmark_floor
from dsdiff.benchmark import timing as benchmark_measure
from dsdiff.benchmark import variants as benchmark_engines
from dsdiff.benchmark.source import Source, random_unet
from dsdiff.benchmark.timing import BASELINE, Measured, Setting
from dsdiff.pipeline import CHECKPOINTS, STABLE_DIFFUSION
from scripts import benchmark as script

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [2, 1],
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "context_dim": 12,
        "legacy": False,
    },
}
CPU = torch.device("cpu")
RUN_HERE = benchmark_engines.choose_engines(None, script.QuantConfig(), CPU)[0]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny work, shared by threads, is slow on a machine that does other work, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def each_measurement_takes_one_call():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_measure, "MIN_SECONDS", 0)
        patch.setattr(benchmark_floor, "PEAK_SECONDS", 0)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a config with a tiny UNet."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    encoder = {"target": "torch.nn.Identity", "params": {"max_length": 5}}
    params = {"image_size": 8, "channels": 4, "unet_config": UNET, "cond_stage_config": encoder}
    path.write_text(yaml.safe_dump({"model": {"params": params}, "sampling": {"steps": 20}}))
    return path


def run(config, outdir, *flags):
    script.main(["--config", str(config), "--random_weights", "--device", "cpu", "--outdir", str(outdir), *flags])
    return json.loads((outdir / "benchmark.json").read_text())


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as left:
        script.main([str(flag) for flag in flags])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# The report


@pytest.fixture(scope="module")
def outdir(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def report(config, outdir):
    """Of all engines that run here; what was printed is in its "printed"."""
    with redirect_stdout(io.StringIO()) as printed:
        report = run(config, outdir, "--repeats", "2", "--ratio", "0", "0.5", "--threads", "1")
    return report | {"printed": printed.getvalue()}


def test_report_of_a_tiny_model(report):
    rows = report["settings"]
    assert [(row["engine"], row["ratio"]) for row in rows] == [(name, r) for name in RUN_HERE for r in (0.0, 0.5)]
    for row in rows:
        assert len(row["seconds_by_repeat"]) == 2 and min(row["seconds_by_repeat"]) > 0
        # 3 blocks of 64 tokens, which merge to 32, and 3 of 16, which are too coarse, with the one in the middle.
        assert row["tokens"] == pytest.approx((3 * 32 + 4 * 16) / (3 * 64 + 4 * 16) if row["ratio"] else 1)
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert bool(row["shares"]["merging"]) == bool(row["ratio"])
    assert rows[0]["speedup"] == {"median": 1, "min": 1, "max": 1} and rows[0]["merging"] is None
    assert (report["repeats"], report["steps"]) == (2, 20)
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["threads"] == 1
    assert report["machine"]["cpu"] and report["machine"]["cores"] >= 1
    parameters = sum(parameter.numel() for parameter in random_unet(UNET).parameters())
    assert report["model"] == {
        "config": "tiny.yaml",
        "random_weights": True,
        "parameters": parameters,
        "latents": [2, 4, 8, 8],
        "context": [2, 5, 12],
        "bits": "W4A8",
        "ranges": "ranges fitted to noise",
    }
    sizes = {name: engine["weight_bytes"] for name, engine in report["engines"].items()}
    assert (sizes["float32"], sizes["bf16"]) == (4 * parameters, 2 * parameters)
    assert parameters / 2 < sizes["simulate"] < parameters  # 4 bits, and what is beside them
    assert all(engine["peak_bytes"] is None for engine in report["engines"].values())


def test_operations_and_floor_of_a_tiny_model(report):
    none, half = (counted["operations"] for counted in report["operations"])
    assert none["convolutions"] == half["convolutions"] and none["attention"] > half["attention"]
    assert "merging" not in none and half["merging"] > 0
    if "int8" not in RUN_HERE:
        assert report["floor"] is None
        return
    floor = report["floor"]
    assert set(floor["peaks"]) == {"convolutions", "linear layers", "attention"}
    int8 = {row["ratio"]: row["seconds"]["median"] for row in report["settings"] if row["engine"] == "int8"}
    for of, operations in zip(floor["ratios"], (none, half), strict=True):
        seconds = sum(operations[kind] / rate for kind, rate in floor["peaks"].items())
        assert of["seconds"] == pytest.approx(seconds)
        assert of["times"] == pytest.approx(int8[of["ratio"]] / seconds)


def test_what_is_written_and_printed(report, outdir):
    printed = report["printed"].splitlines()
    assert printed[0].startswith("tiny.yaml: UNet of") and "[2, 4, 8, 8]" in printed[0]
    (head,) = (line for line in printed if line.startswith("engine"))
    assert "UNet s/picture (20 steps)" in head
    written = (outdir / "benchmark.md").read_text().splitlines()
    for name in RUN_HERE:
        for lines in (printed, [line.removeprefix("| ") for line in written]):
            assert sum(line.split()[:1] == [name] for line in lines) == 4  # ratios, in both tables
    assert (outdir / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_baseline_is_measured_even_if_not_asked_for(config, tmp_path):
    report = run(config, tmp_path / "out", "--engine", "simulate", "--ratio", "0.5", "--repeats", "1")
    assert [(row["engine"], row["ratio"]) for row in report["settings"]] == [("float32", 0), ("simulate", 0.5)]
    assert [counted["ratio"] for counted in report["operations"]] == [0.5]
    assert report["settings"][1]["speedup_bf16"] is None and report["floor"] is None


def test_peers_take_part(config, tmp_path, monkeypatch, capsys):
    installed = benchmark_peers.util.find_spec
    absent = ("openvino", "nncf")
    monkeypatch.setattr(benchmark_peers.util, "find_spec", lambda name: None if name in absent else installed(name))
    report = run(config, tmp_path / "out", "--engine", "float32", "--ratio", "0", "--repeats", "1", "--peers")
    assert [row["engine"] for row in report["settings"]] == ["float32", "diffusers-float32", "diffusers-bf16"]
    assert report["engines"]["diffusers-bf16"]["weight_bytes"] == 2 * report["model"]["parameters"]
    assert report["left_out"]["openvino-float32"] == "not installed: pip install openvino"
    assert "openvino-int8 is left out: not installed: pip install openvino nncf." in capsys.readouterr().out
    assert not (tmp_path / "out/openvino").exists()


# Turns, and what is compared


def test_speedups_are_taken_within_a_repeat():
    bf16, merged = Setting(engine="bf16", ratio=0.0), Setting(engine="bf16", ratio=0.5)
    found = {
        BASELINE: Measured(seconds=[2.0, 4.0, 9.0]),
        bf16: Measured(seconds=[2.0, 2.0, 6.0]),
        merged: Measured(seconds=[1.0, 4.0, 3.0], tokens=0.5),
    }
    row = benchmark_measure.rows_of(found)[2]
    assert row["speedup"] == {"median": 2.0, "min": 1.0, "max": 3.0}  # not 4 / 3, the ratio of the medians
    assert row["speedup_bf16"] == row["merging"] == {"median": 2.0, "min": 0.5, "max": 2.0}
    assert row["seconds"] == {"median": 3.0, "min": 1.0, "max": 4.0}


def test_settings_are_those_asked_for_after_the_baseline():
    settings = benchmark_measure.settings_of(["int8"], [0.5, 0.5], ["diffusers-bf16"])
    assert settings == [BASELINE, Setting(engine="int8", ratio=0.5), Setting(engine="diffusers-bf16", ratio=0.0)]


def test_settings_take_turns_and_leave_no_trace(config):
    source = Source.read(config, True, CPU)
    engines = {name: benchmark_engines.build(name, source, script.QuantConfig()) for name in ("float32", "bf16")}
    with engines["float32"].running(0.0) as call:
        before = call()
    order = []
    for engine in engines.values():
        engine.unet.register_forward_pre_hook(lambda unet, args: order.append(unet))
    settings = benchmark_measure.settings_of(engines, [0.0, 0.3])
    benchmark_measure.measure(engines, settings, 3, CPU)
    turns = [engines[setting.engine].unet for setting in settings]
    calls = [unet for unet in [*turns, *turns[::-1]] for _ in range(2)]  # one untimed, one timed
    assert order == calls + [unet for unet in turns for _ in range(3)]  # and one profiled
    with engines["float32"].running(0.0) as call:
        assert torch.equal(call(), before) and before.any()


def test_slow_calls_are_warmed_up_once(config, monkeypatch):
    monkeypatch.setattr(benchmark_measure, "SLOW_SECONDS", 0.0)
    engine = benchmark_engines.build("float32", Source.read(config, True, CPU), script.QuantConfig())
    calls = []
    engine.unet.register_forward_pre_hook(lambda unet, args: calls.append(unet))
    benchmark_measure.measure({"float32": engine}, [BASELINE], 3, CPU)
    assert len(calls) == 1 + 3 + 1  # warm-up, timed, profiled


# Memory


def test_peak_memory_is_of_a_process_of_its_own(config, tmp_path):
    flags = ["--config", str(config), "--random_weights", "--device", "cpu", "--outdir", str(tmp_path / "out")]
    peak = benchmark_memory.peak_alone("bf16", [*flags, "--memory"])
    assert peak is None or 50e6 < peak < 5e9
    assert not (tmp_path / "out").exists()


def test_peak_memory_reaches_the_report(config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(script, "peak_alone", lambda name, argv: asked.append((name, "--memory" in argv)) or 7)
    report = run(config, tmp_path / "out", "--memory", "--engine", "bf16", "--ratio", "0", "--repeats", "1")
    assert asked == [("float32", True), ("bf16", True)]
    assert [engine["peak_bytes"] for engine in report["engines"].values()] == [7, 7]


def test_a_process_that_fails_is_told(config, tmp_path, monkeypatch, capsys):
    killed = benchmark_memory.subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(benchmark_memory.subprocess, "run", lambda *args, **kwargs: killed)
    flags = ["--config", config, "--random_weights", "--device", "cpu", "--outdir", tmp_path / "out", "--memory"]
    assert "the memory of float32 cannot be measured: it ended with status -9" in refusal(capsys, *flags)
    assert not (tmp_path / "out").exists()


# What is refused


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--random_weights"], "--random_weights contradicts the embedded model"),
        (["--model", "embedded", "--random_weights"], "--random_weights contradicts the embedded model"),
        (["--config", "some.yaml"], "add --random_weights"),
        (["--config", "some.yaml", "--model", "sd-v1"], "not allowed with"),
        (["--config", "none.yaml", "--random_weights"], "No such file or directory"),
        (["--ratio", "1.5"], "in 0..1"),
        (["--ratio", "0.8"], "ratio is 0.8"),
        (["--repeats", "0"], "whole number of 1 or more"),
        (["--device", "tpu"], "device 'tpu' is not supported"),
        (["--engine", "int4"], "invalid choice: 'int4'"),
        (["--peers", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--weight_bit", "3"], "invalid choice: 3"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *flags)
    assert not list(tmp_path.iterdir())


def test_threads_are_refused_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(script, "choose_device", lambda name: torch.device("cuda"))
    assert "--threads 2 has no effect on a GPU" in refusal(capsys, "--threads", 2)


def test_an_engine_without_kernels_is_refused(config, tmp_path, monkeypatch, capsys):
    def none(config, device):
        raise ValueError("no kernels here")

    monkeypatch.setattr(benchmark_engines, "kernels_for", none)
    flags = ["--config", config, "--random_weights", "--device", "cpu", "--outdir", tmp_path / "out"]
    line = refusal(capsys, *flags, "--engine", "bf16", "int8")
    assert "--engine int8: no kernels here; leave it out" in line and not (tmp_path / "out").exists()
    names, reasons = benchmark_engines.choose_engines(None, script.QuantConfig(), CPU)
    assert names == ["float32", "bf16", "simulate"] and reasons == {"int8": "no kernels here"}


def test_a_missing_checkpoint_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CHECKPOINTS, STABLE_DIFFUSION, (tmp_path / "model.ckpt",))
    line = refusal(capsys, "--model", "sd-v1", "--device", "cpu", "--outdir", tmp_path / "out")
    assert "no checkpoint at" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["model: 3", "model: {params: {image_size: 8}}", "[1", ""])
def test_configs_of_other_things_are_refused(tmp_path, capsys, text):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    line = refusal(capsys, "--config", path, "--random_weights", "--outdir", tmp_path / "out")
    assert "other.yaml" in line and ("describes no latent diffusion model" in line or "no valid yaml" in line)


@pytest.mark.parametrize("steps", ["0", "fast", "[5]"])
def test_steps_that_are_none_are_refused(config, tmp_path, capsys, steps):
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("steps: 20", f"steps: {steps}"))
    line = refusal(capsys, "--config", other, "--random_weights", "--outdir", tmp_path / "out")
    assert "sampling.steps must be a whole number of 1 or more" in line
