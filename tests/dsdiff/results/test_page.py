"""The table of results as text: cells, notes, and what an infinite score looks like."""

import math
from dataclasses import replace

from dsdiff.benchmark.comparison import UNetFigures
from dsdiff.benchmark.figures import Spread
from dsdiff.metrics.report import ScoringProtocol
from dsdiff.metrics.scores import Score
from dsdiff.options import DrawOptions
from dsdiff.results import page
from dsdiff.results.picture_time import PictureTime
from dsdiff.results.record import Change, Results, RowResult
from dsdiff.results.table import Row


def row_of(name, notes, ratio=0.0):
    facts = {"source": "folder x", "n": 4, "size": [8, 8], "content_sha256": "0"}
    protocol = ScoringProtocol(
        pictures=facts, reference=facts, paired=None, resize="none", features=None, seed=0, kid_and_is_seed=None
    )
    speed = Spread(median=1.5, min=1.25, max=1.75)
    return RowResult(
        row=Row(name=name, ratio=ratio),
        n=4,
        features="shapes features",
        scores={"fid": Score(name="FID", value=2.0, n=4, better="lower")},
        notes=notes,
        protocol=protocol,
        engine="float",
        precision="full",
        unet=UNetFigures(weight_bytes=1_234_000, seconds=0.5, speed=speed),
        pictures="pictures/x",
        change=None,
    )


def test_notes_of_all_rows_are_told_once():
    rows = [
        row_of("base", ["few pictures"]),
        row_of("first", ["few pictures", "no LPIPS", "biased by 1"]),
        row_of("second", ["few pictures", "no LPIPS", "biased by 2"]),
    ]
    expected = ["few pictures", "no LPIPS", "first, ratio 0: biased by 1", "second, ratio 0: biased by 2"]
    assert page.notes(rows) == expected


def test_cells_of_a_row():
    row = replace(row_of("W4A8", [], ratio=0.5), change=Change(value=-1.25, low=-2.0, high=0.5))
    psnr = Score(name="PSNR, dB", value=math.inf, n=4, better="higher")
    row = replace(row, scores={**row.scores, "psnr": psnr})
    cells = dict(zip(page.head(row), page.cells(row), strict=True))
    assert cells[""] == "W4A8, ratio 0.5" and cells["FID (shapes features)"] == "2"
    assert cells["FID against FP32"] == "-1.2% [-2.0, +0.5]" and cells["CLIP score"] == "-"
    assert cells["PSNR to FP32, dB"] == "inf" and row.to_dict()["scores"]["psnr"]["value"] is None
    assert cells["UNet, MB"] == "1.23" and cells["speed of a UNet call, FP32 = 1"] == "1.50 (1.25..1.75)"
    assert page.plot([row], "psnr", "PSNR").startswith("<svg")  # without the infinite one
    assert cells["seconds a picture; speed, FP32 = 1"] == "-"


def test_quality_is_plotted_against_the_seconds_of_a_picture():
    plain = row_of("FP32", [])
    speed = Spread(median=5.0, min=4.0, max=6.0)
    timed = replace(
        row_of("W4A8", []),
        row=Row(name="W4A8", ratio=0.5, sampler="lcm", steps=4),
        picture=PictureTime(seconds=0.1234, speed=speed),
    )
    assert page.picture_cell(timed) == "0.123; 5.00 (4.00..6.00)"
    svg = page.against_time([plain, timed])
    assert svg.count("<svg") == 1 and "sampler lcm, steps 4" in svg and "seconds a picture" in svg  # of the FID alone
    assert svg == page.against_time([plain, timed])
    assert "sampler lcm" not in page.plot([plain, timed], "fid", "FID")


def test_the_text_says_how_pictures_were_drawn():
    results = Results(
        model="embedded",
        machine={"cpu": "a CPU", "cores": 2, "torch": "2"},
        drawing=DrawOptions(sampler="dpm_solver", steps=20, precision="full"),
        calibration={},
        batch_size=16,
        seed=3,
        repeats=5,
        versions={},
        shown=[0],
        prompts=["a red circle"],
        rows=[row_of("FP32", ["a note"])],
    )
    said = page.protocol(results)
    assert said.startswith("4 pictures a row (sampler dpm_solver, steps 20, precision full, seed 3) against 4")
    assert "Computed by float, precision full: FP32." in said and page.markdown(results).endswith(
        "- FP32, ratio 0: a note"
    )
    assert results.to_dict()["drawing"]["steps"] == 20 and "height" not in results.to_dict()["drawing"]
