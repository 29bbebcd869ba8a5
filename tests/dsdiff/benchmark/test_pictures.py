"""Whole pictures: how their time is divided, which rows there are, and real processes. No time is compared."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dsdiff
from dsdiff.benchmark.figures import Spread
from dsdiff.benchmark.options import BenchmarkOptions, Draw
from dsdiff.benchmark.pictures import by_openvino, figures, report, request, run
from dsdiff.benchmark.pictures.figures import Drawn, Row, RowMeasured
from dsdiff.benchmark.pictures.files import TINY_RANDOM, Files, make
from dsdiff.benchmark.pictures.request import PHASES, PROMPT, SEED, Clock
from dsdiff.benchmark.process import WorkerError
from dsdiff.benchmark.source import Source
from dsdiff.models.registry import CHECKPOINTS, EMBEDDED, STABLE_DIFFUSION
from dsdiff.options import MergeOptions
from ldm.models.tiny_decoder import read_tiny_decoder

CPU = torch.device("cpu")
PLMS, FEW = Draw(sampler="plms", steps=50), Draw(sampler="dpm_solver", steps=2, scale=1.0)


def options(outdir, **given):
    return BenchmarkOptions(pictures=True, device="cpu", threads=1, outdir=outdir, **given)


def row(name="float32", ratio=0.0, draw=FEW):
    return Row(name=name, ratio=ratio, draw=draw, steps=draw.steps, measured=2)


def drawn(seconds):
    return Drawn(phases=dict.fromkeys(PHASES, seconds / len(PHASES)), peak_bytes=10**9, facts="facts")


# Time


def test_laps_leave_no_time_out(monkeypatch):
    times = iter([10.0, 10.5, 11.0, 14.0, 15.0, 15.25, 15.5])
    clock_of = SimpleNamespace(perf_counter=lambda: next(times), time=lambda: 100.0)
    monkeypatch.setattr(request, "time", clock_of)
    clock = Clock()
    clock.ready()
    clock.lap("text")
    clock.lap("text")  # of the prompt that guidance leads away from
    clock.step()
    clock.step()
    clock.lap("decoding")
    clock.lap("png")
    told = clock.told("facts")
    assert told.phases == {"text": 1.0, "decoding": 0.25, "png": 0.25} and told.steps == [3.0, 1.0]
    assert told.ready == told.done == 100.0
    assert figures.drawn_of(told, 97.5, 2).phases == {"start": 2.5, **told.phases, "steps": 4.0}
    assert told.peak_bytes is None or told.peak_bytes > 10**7


def test_steps_that_were_not_taken_count_as_the_median_without_the_first():
    assert figures.seconds_of_steps([9.0, 1.0, 2.0, 3.0], 50) == 15.0 + 46 * 2.0
    assert figures.seconds_of_steps([9.0, 1.0, 2.0], 3) == 12.0
    assert figures.seconds_of_steps([9.0], 1) == 9.0
    with pytest.raises(ValueError, match="1 of 4 steps were measured"):
        figures.seconds_of_steps([9.0], 4)


def test_ratios_are_of_the_same_way_to_draw_and_within_a_repeat():
    found = {
        row(): RowMeasured(file_bytes=1, drawn=[drawn(8.0), drawn(10.0)]),
        row("openvino-int8"): RowMeasured(file_bytes=1, drawn=[drawn(4.0), drawn(4.0)]),
        row("int8", 0.5): RowMeasured(file_bytes=7, drawn=[drawn(2.0), drawn(1.0)]),
        row("int8", 0.5, PLMS): RowMeasured(file_bytes=7, drawn=[drawn(2.0), drawn(1.0)]),
    }
    rows = figures.figures_of(found)
    assert rows[2].speedup == Spread(median=7.0, min=4.0, max=10.0)
    assert rows[2].speedup_openvino == Spread(median=3.0, min=2.0, max=4.0)
    assert rows[2].file_bytes == 7 and rows[2].peak_bytes == 10**9
    assert rows[3].speedup is None and rows[3].speedup_openvino is None


# Rows


def test_rows_and_how_many_steps_they_take(tmp_path):
    source = Source.read(EMBEDDED, False, CPU)
    draws = (Draw(sampler="plms", steps=30), FEW)
    names = ["float32", "openvino-int8", "openvino-int8-tome", "sdcpp-q4"]
    rows = run.rows_of(names, options(tmp_path, draws=draws), source)
    ways = [("float32", 0.0), ("float32", 0.5), ("openvino-int8", 0.0), ("openvino-int8-tome", 0.5), ("sdcpp-q4", 0.0)]
    assert [(each.name, each.ratio) for each in rows] == 2 * ways
    assert {each.steps for each in rows if each.draw == draws[0]} == {31}  # 30 does not divide 1000
    assert [each.measured for each in rows if each.draw == draws[0]] == [4, 4, 4, 4, 2]
    assert {(each.steps, each.measured) for each in rows if each.draw == FEW} == {(2, 2)}
    rows = run.rows_of(names, options(tmp_path, draws=draws, full=True), source)
    assert {each.measured for each in rows} == {31, 2}


def test_a_tiny_decoder_is_for_us_and_openvino(tmp_path):
    source, draw = Source.read(EMBEDDED, False, CPU), Draw.parse("lcm:4:tiny")
    assert draw == Draw(sampler="lcm", steps=4, tiny=True) and str(draw) == "4 lcm, tiny decoder"
    names = ["int8", "diffusers-bf16", "openvino-int8", "sdcpp-q4"]
    rows = run.rows_of(names, options(tmp_path, draws=(draw,)), source)
    assert [each.name for each in rows] == ["int8", "int8", "openvino-int8"]
    random = Files(options(tmp_path, model="sd-v1", random_weights=True), Source.read(STABLE_DIFFUSION, True, CPU))
    path = tmp_path / "tiny.safetensors"
    make(TINY_RANDOM, random.source, tmp_path, path)
    assert sum(tensor.numel() for tensor in read_tiny_decoder(path).parameters()) == 1_222_531  # TAESD's


def test_models_that_cannot_be_drawn_are_told(tmp_path):
    embedded = Files(options(tmp_path), Source.read(EMBEDDED, False, CPU))
    assert embedded.why_not("int8") is None and "sizes of Stable Diffusion" in str(embedded.why_not("sdcpp-q4"))
    random = options(tmp_path, model="sd-v1", random_weights=True, weight_bit=8)
    files = Files(random, Source.read(STABLE_DIFFUSION, True, CPU))
    assert files.why_not("sdcpp-q4") is None and "has 4 bits, not 8" in str(files.why_not("int8"))


def test_files_of_the_embedded_model_are_those_that_are_shipped(tmp_path):
    files = Files(options(tmp_path), Source.read(EMBEDDED, False, CPU))
    (ckpt,) = CHECKPOINTS[EMBEDDED]
    assert files.of("bf16", 4.0).bytes == ckpt.stat().st_size
    quantized = files.of("int8", 4.0)
    assert [path.name for path in quantized.stored] == ["model.safetensors", "cali_w4a8.safetensors"]
    assert list(tmp_path.iterdir()) == []


# A run


@pytest.fixture
def asked(monkeypatch):
    """The names and steps of the pictures that a run asks for; none is drawn."""
    pictures = []

    def draw_alone(request, steps=0):
        pictures.append((request.name, request.ratio, request.steps))
        if request.name == "openvino-int8":
            raise WorkerError("its process ended (-11)")
        return drawn(4.0)

    monkeypatch.setattr(run, "draw_alone", draw_alone)
    monkeypatch.setattr(run.peers, "choose_peers", lambda names, device, pictures: (list(names), {}))
    monkeypatch.setattr(run.Files, "_openvino", lambda self, name, scale, tiny: self.of("float32", scale))
    return pictures


def test_rows_take_turns_and_a_peer_that_fails_is_left_out(asked, tmp_path):
    given = options(tmp_path, engines=("float32", "bf16"), peers=("openvino-int8",), draws=(PLMS,), repeats=2)
    measured = run.benchmark(given)
    ours = [(name, ratio, 4) for name in ("float32", "bf16") for ratio in (0.0, 0.5)]
    assert asked == [*ours, ("openvino-int8", 0.0, 4), *ours[::-1]]
    assert [(each.name, each.ratio) for each in measured.rows] == [each[:2] for each in ours]
    assert measured.left_out == {"openvino-int8": "its process ended (-11)"}
    assert measured.rows[0].speedup == Spread(median=1.0, min=1.0, max=1.0)


def test_what_is_told_and_written(asked, tmp_path):
    measured = run.benchmark(options(tmp_path, engines=("float32",), peers=("openvino-int8",), repeats=1))
    told = report.text(measured)
    assert "50 plms (4 measured)" in told and "4 dpm_solver without guidance  " in told
    assert "Steps that were not measured" in told and "openvino-int8 is left out: its process ended" in told
    report.write(measured, tmp_path)
    assert told.count("float32") <= (tmp_path / "pictures.md").read_text().count("float32")
    assert json.loads((tmp_path / "pictures.json").read_text())["rows"] == [asdict(each) for each in measured.rows]
    assert (tmp_path / "pictures.png").read_bytes().startswith(b"\x89PNG")


def test_our_own_engines_must_work(tmp_path, monkeypatch):
    def fail(request, steps=0):
        raise WorkerError("its process ended (-9)")

    monkeypatch.setattr(run, "draw_alone", fail)
    with pytest.raises(WorkerError, match="its process ended"):
        run.benchmark(options(tmp_path, engines=("float32",), repeats=1))


# Real processes


def drawn_for(name, tmp_path, draw=FEW, ratio=0.0):
    """Draw a picture in a process; return it, and what was told of it."""
    given = options(tmp_path, engines=("float32",))
    files = Files(given, Source.read(EMBEDDED, False, CPU))
    asked = run.request_of(
        row(name, ratio, draw), files.of(name, draw.scale or 4.0, tiny=draw.tiny), given, EMBEDDED, 4.0
    )
    told = run.draw_alone(asked, draw.steps)
    return Image.open(asked.png).convert("RGB"), told


def pixels(image):
    return torch.tensor(list(image.getdata())).float()


@pytest.mark.slow
def test_a_process_draws_the_picture_that_the_api_draws(tmp_path):
    """The times are of the code that users run: the picture tells."""
    for name, engine, precision, ratio in (("bf16", None, "autocast", 0.5), ("simulate", "simulate", None, 0.0)):
        image, told = drawn_for(name, tmp_path, ratio=ratio)
        merge = MergeOptions(ratio=ratio) if ratio else None
        how = dsdiff.DrawOptions(sampler="dpm_solver", steps=2, scale=1.0, precision=precision, merge=merge)
        (expected,) = dsdiff.load(engine=engine, device="cpu").draw(PROMPT, seeds=[SEED], options=how)
        assert torch.equal(pixels(image), pixels(expected.image)), name
        assert list(told.phases) == list(PHASES) and min(told.phases.values()) > 0, name
        assert told.peak_bytes is None or 10**8 < told.peak_bytes < 5 * 10**9, name


def test_a_process_that_fails_is_told_in_one_line(tmp_path):
    given = options(tmp_path)
    files = Files(given, Source.read(EMBEDDED, False, CPU)).of("float32", 4.0)
    asked = asdict(run.request_of(row(), files, given, EMBEDDED, 4.0)) | {"ckpt": str(tmp_path / "none.ckpt")}
    with pytest.raises(WorkerError) as failed:
        run.draw_alone(request.PictureRequest(**asked))
    assert "no checkpoint at" in str(failed.value) and "\n" not in str(failed.value)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_draws_our_picture(tmp_path):
    """With PLMS, whose timesteps are whole; DPM-Solver's are rounded for OpenVINO."""
    draw = Draw(sampler="plms", steps=4)
    ours, _ = drawn_for("float32", tmp_path, draw)
    theirs, told = drawn_for("openvino-float32", tmp_path, draw)
    assert (pixels(ours) - pixels(theirs)).abs().max() <= 1  # of 255
    assert min(told.phases.values()) > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_diffusers_draws_a_picture_of_the_same_size(tmp_path):
    image, told = drawn_for("diffusers-float32", tmp_path, Draw(sampler="plms", steps=3))
    assert image.size == (256, 256) and min(told.phases.values()) > 0


# OpenVINO


def test_openvino_computes_all_networks(tmp_path, monkeypatch):
    """Requests in OpenVINO's place count; a Pipeline that drew with networks of its own would leave them at 0."""
    shapes, called = {}, []

    class Request:
        def __init__(self, xml):
            self.name = xml.stem

        def infer(self, inputs):
            called.append(self.name)
            size = {"text": (1, 32, 128), "unet": inputs[0].shape}.get(self.name)
            size = size or (1, 3, 8 * inputs[0].shape[2], 8 * inputs[0].shape[3])
            return {"out": np.full(size, 0.25, np.float32)}

    def compiled(xml, precision, inputs):
        shapes[xml.stem] = [tuple(size) for size in inputs]
        return Request(xml), None

    monkeypatch.setattr(by_openvino.peers_openvino, "compiled", compiled)
    source = Source.read(EMBEDDED, False, CPU)
    for scale, batch in ((1.0, 1), (4.0, 2)):
        called.clear()
        asked = request.PictureRequest(
            name="openvino-int8",
            ratio=0.0,
            sampler="dpm_solver",
            steps=3,
            scale=scale,
            config=str(EMBEDDED),
            ckpt=str(source.ckpt),
            tokenizer=None,
            files={name: f"{name}.xml" for name in ("text", "unet", "decoder")},
            png=str(tmp_path / "picture.png"),
            device="cpu",
            threads=None,
        )
        clock = Clock()
        assert by_openvino.draw(asked, clock) == "the rest, text encoder and decoder in bf16"
        assert called == ["text"] * batch + ["unet"] * 3 + ["decoder"] and len(clock.steps) == 3
        assert shapes["unet"] == [(batch, 4, 32, 32), (batch,), (batch, 32, 128)]
        picture = np.asarray(Image.open(tmp_path / "picture.png"))
        assert picture.shape == (256, 256, 3) and (picture == 159).all()  # 0.25 of [-1, 1]
