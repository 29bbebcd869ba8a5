"""A whole benchmark of a tiny model: the report, and how it is told. Nothing here depends on the time taken."""

import json
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch
import yaml

from dsdiff.benchmark import peers, report, run, variants
from dsdiff.benchmark.options import BenchmarkOptions
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.source import Source, random_unet
from dsdiff.models import registry

CPU = torch.device("cpu")
RUN_HERE = variants.choose_engines(None, variants.quant_config(4), CPU)[0]


def options(config, outdir, **given):
    given = {"ratios": (0.0,), "repeats": 1, **given}
    return BenchmarkOptions(config=config, random_weights=True, device="cpu", seconds=0, outdir=outdir, **given)


@pytest.fixture(scope="module")
def measured(tiny_config, tmp_path_factory):
    """The report of all engines that run here."""
    outdir = tmp_path_factory.mktemp("out")
    return run.benchmark(options(tiny_config, outdir, repeats=2, ratios=(0.0, 0.5), threads=1))


def test_report_of_a_tiny_model(measured, tiny_config):
    rows = measured.settings
    assert [(row.engine, row.ratio) for row in rows] == [(name, r) for name in RUN_HERE for r in (0.0, 0.5)]
    for row in rows:
        assert len(row.seconds_by_repeat) == 2 and min(row.seconds_by_repeat) > 0, row
        # 3 blocks of 64 tokens, which merge to 32, and 3 of 16, which are too coarse, with the one in the middle.
        assert row.tokens == pytest.approx((3 * 32 + 4 * 16) / (3 * 64 + 4 * 16) if row.ratio else 1), row
        assert sum(row.shares.values()) == pytest.approx(1), row
        assert bool(row.shares["merging"]) == bool(row.ratio), row
    assert asdict(rows[0].speedup) == {"median": 1, "min": 1, "max": 1} and rows[0].merging is None
    assert (measured.repeats, measured.steps) == (2, 20)
    assert measured.machine["torch"] == torch.__version__ and measured.machine["threads"] == 1
    assert measured.machine["cpu"] and measured.machine["cores"] >= 1
    unet_config = yaml.safe_load(tiny_config.read_text())["model"]["params"]["unet_config"]
    parameters = sum(parameter.numel() for parameter in random_unet(unet_config).parameters())
    assert asdict(measured.model) == {
        "config": "tiny.yaml",
        "random_weights": True,
        "parameters": parameters,
        "latents": [2, 4, 8, 8],
        "context": [2, 5, 12],
        "bits": "W4A8",
        "ranges": "ranges fitted to noise",
    }
    sizes = {name: engine.weight_bytes for name, engine in measured.engines.items()}
    assert (sizes["float32"], sizes["bf16"]) == (4 * parameters, 2 * parameters)
    assert parameters / 2 < sizes["simulate"] < parameters  # 4 bits, and scales, biases and norms
    assert all(engine.peak_bytes is None for engine in measured.engines.values())


def test_operations_and_floor_of_a_tiny_model(measured):
    none, half = (counted.operations for counted in measured.operations)
    assert none["convolutions"] == half["convolutions"] and none["attention"] > half["attention"]
    assert "merging" not in none and half["merging"] > 0
    if "int8" not in RUN_HERE:
        assert measured.floor is None
        return
    peaks = measured.floor.peaks
    assert set(peaks) == {"convolutions", "linear layers", "attention"}
    int8 = {row.ratio: row.seconds.median for row in measured.settings if row.engine == "int8"}
    for floor, operations in zip(measured.floor.ratios, (none, half), strict=True):
        seconds = sum(operations[kind] / rate for kind, rate in peaks.items())
        assert floor.seconds == pytest.approx(seconds)
        assert floor.times == pytest.approx(int8[floor.ratio] / seconds)


def test_what_is_told_and_written(measured, tmp_path):
    told = report.text(measured).splitlines()
    assert told[0].startswith("tiny.yaml: UNet of") and "[2, 4, 8, 8]" in told[0]
    (head,) = (line for line in told if line.startswith("engine"))
    assert "UNet s/picture (20 steps)" in head
    report.write(measured, tmp_path)
    written = (tmp_path / "benchmark.md").read_text().splitlines()
    for name in RUN_HERE:
        for lines in (told, [line.removeprefix("| ") for line in written]):
            assert sum(line.split()[:1] == [name] for line in lines) == 4, name  # ratios, in both tables
    assert json.loads((tmp_path / "benchmark.json").read_text()) == asdict(measured)
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_baseline_is_measured_even_if_not_asked_for(tiny_config, tmp_path):
    measured = run.benchmark(options(tiny_config, tmp_path, engines=("simulate",), ratios=(0.5,)))
    assert [(row.engine, row.ratio) for row in measured.settings] == [("float32", 0), ("simulate", 0.5)]
    assert [counted.ratio for counted in measured.operations] == [0.5]
    assert measured.settings[1].speedup_bf16 is None and measured.floor is None


@pytest.mark.slow
def test_peers_take_part(tiny_config, tmp_path, monkeypatch):
    absent = ("openvino", "nncf")
    monkeypatch.setattr(peers.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    names = ("diffusers-bf16", "openvino-float32", "openvino-int8")
    measured = run.benchmark(options(tiny_config, tmp_path / "out", engines=("float32",), peers=names))
    assert [row.engine for row in measured.settings] == ["float32", "diffusers-bf16"]
    assert measured.engines["diffusers-bf16"].weight_bytes == 2 * measured.model.parameters
    assert measured.left_out["openvino-float32"] == "not installed: pip install openvino"
    assert "openvino-int8 is left out: not installed: pip install openvino nncf." in report.text(measured)
    assert not (tmp_path / "out").exists()


def test_a_peer_that_cannot_be_built_is_left_out(tiny_config, tmp_path, monkeypatch):
    def fail(name, source, **others):
        raise WorkerError("its process ended by SIGSEGV")

    monkeypatch.setattr(run, "Peer", fail)
    measured = run.benchmark(options(tiny_config, tmp_path, engines=("float32",), peers=("diffusers-bf16",)))
    assert [row.engine for row in measured.settings] == list(measured.engines) == ["float32"]
    assert measured.left_out["diffusers-bf16"] == "its process ended by SIGSEGV"


def test_peak_memory_reaches_the_report(tiny_config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "peak_alone", lambda name, source, **others: asked.append(name) or 7)
    measured = run.benchmark(options(tiny_config, tmp_path, memory=True, engines=("bf16",)))
    assert asked == ["float32", "bf16"]
    assert [engine.peak_bytes for engine in measured.engines.values()] == [7, 7]


# What is refused


def test_our_own_engines_must_work(tiny_config, tmp_path, monkeypatch):
    def fail(name, source, **others):
        raise WorkerError(f"the memory of {name} cannot be measured: its process ended by SIGKILL")

    monkeypatch.setattr(run, "peak_alone", fail)
    with pytest.raises(WorkerError, match="the memory of float32"):
        run.benchmark(options(tiny_config, tmp_path, memory=True))


def test_threads_are_refused_on_a_gpu():
    with pytest.raises(ValueError, match="--threads 2 has no effect on a GPU"):
        run.set_threads(2, torch.device("cuda"))


def test_an_engine_without_kernels_is_refused(monkeypatch):
    def none(config, device):
        raise ValueError("no kernels here")

    monkeypatch.setattr(variants, "backend_for", none)
    config = variants.quant_config(4)
    with pytest.raises(ValueError, match="engine int8 cannot run: no kernels here; leave it out"):
        variants.choose_engines(["bf16", "int8"], config, CPU)
    with pytest.raises(ValueError, match="engine fp16-compile cannot run: it computes on a GPU; leave it out"):
        variants.choose_engines(["fp16-compile"], config, CPU)
    names, reasons = variants.choose_engines(None, config, CPU)
    assert names == ["float32", "bf16", "simulate"] and reasons == {"int8": "no kernels here"}


def test_a_missing_checkpoint_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.CHECKPOINTS, registry.STABLE_DIFFUSION, (tmp_path / "model.ckpt",))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        Source.read(registry.STABLE_DIFFUSION, False, CPU)


def test_configs_of_other_things_are_refused(tiny_config, tmp_path):
    path = tmp_path / "other.yaml"
    for text in ("model: 3", "model: {params: {image_size: 8}}", "[1", ""):
        path.write_text(text)
        with pytest.raises(ValueError) as refused:
            Source.read(path, True, CPU)
        message = str(refused.value)
        assert "other.yaml" in message, text
        assert "describes no latent diffusion model" in message or "no valid yaml" in message, text
    for steps in ("0", "fast", "[5]"):
        path.write_text(tiny_config.read_text().replace("steps: 20", f"steps: {steps}"))
        with pytest.raises(ValueError, match=r"sampling\.steps must be a whole number of 1 or more"):
            Source.read(path, True, CPU)
