"""configs/eval/table.yaml, and tables that are none."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dsdiff.calibration.options import PRESETS
from dsdiff.models.registry import ROOT
from dsdiff.options import DrawOptions, MergeOptions, QuantizationOptions
from dsdiff.results.options import TABLE, ResultsOptions
from dsdiff.results.table import Row, choose_rows, read_table

CALI = Path("cali.safetensors")


def test_the_table_of_steps_is_read():
    rows, protocols = read_table(TABLE.with_name("table_steps.yaml"))
    assert list(protocols) == ["embedded"] and {row.steps for row in rows} == {None, 4, 8}
    for row in rows:
        row.options(protocols["embedded"].drawing)
        assert all(lora.path.is_file() for lora in row.loras)


def test_rows_are_chosen_by_their_keys():
    rows, _ = read_table(TABLE)
    assert choose_rows(rows, ()) == rows
    assert choose_rows(rows, ["W4A8-0.5", "FP32-0.5"]) == [rows[0], rows[1], rows[7]]
    with pytest.raises(ValueError, match=r"no row W4A8-0\.7 in the table: it has FP32-0, FP32-0\.5, W4A32-0"):
        choose_rows(rows, ["W4A8-0.7", "FP32-0"])


def test_shipped_table_is_that_of_the_original():
    rows, protocols = read_table(TABLE)
    assert [(row.name, row.ratio) for row in rows] == [
        *(("FP32", ratio) for ratio in (0, 0.5)),
        *(("W4A32", ratio) for ratio in (0, 0.5)),
        *(("W4A8", ratio) for ratio in (0, 0.1, 0.3, 0.5, 0.6)),
    ]
    assert [row.published for row in rows] == [33.77, 33.54, 33.71, 34.06, 33.31, 33.28, 33.90, 34.02, 34.20]
    sd, embedded = protocols["sd-v1"], protocols["embedded"]
    assert (sd.prompts, sd.pictures) == ("A high quality photograph of a {class}", 2000)
    assert sd.drawing == DrawOptions(sampler="plms", steps=50, scale=7.5, precision="full")
    assert embedded.drawing == DrawOptions(sampler="dpm_solver", steps=20, precision="full")
    assert (sd.scoring.reference, sd.scoring.resize, sd.scoring.size) == (None, "center-crop", 512)
    assert embedded.scoring.reference == "shapes" and not sd.rows
    assert [row.key for row in embedded.rows] == ["W4A8-dynamic-0", "W4A8-dynamic-0.5"]
    assert all((ROOT / row.cali_ckpt).is_file() for row in embedded.rows)


def test_a_calibration_is_w4a8_and_what_the_table_adds():
    _, protocols = read_table(TABLE)
    for name, draw, preset in (
        ("embedded", DrawOptions(sampler="dpm_solver", steps=20), "fast"),
        ("sd-v1", DrawOptions(sampler="plms", steps=50, scale=7.5), "paper"),
    ):
        made = protocols[name].calibration
        bits = (made.weight_bit, made.quant_act, made.act_bit, made.sm_abit, made.split, made.cond)
        assert bits == (4, True, 8, 16, True, True) and made.draw == draw, name
        assert made.effort == PRESETS[preset], name


def test_what_rows_ask_for():
    cases = [
        (Row(name="FP32", ratio=0.0), None, None),
        (Row(name="FP32", ratio=0.3), MergeOptions(ratio=0.3), None),
        (
            Row(name="W4A32", ratio=0.0, weight_bit=4),
            None,
            QuantizationOptions(cali_ckpt=CALI, weight_bit=4, quant_act=False),
        ),
        (
            Row(name="W4A8", ratio=0.6, weight_bit=4, act_bit=8),
            MergeOptions(ratio=0.6),
            QuantizationOptions(cali_ckpt=CALI, weight_bit=4, quant_act=True, act_bit=8),
        ),
        (
            Row(name="W4A8", ratio=0.0, weight_bit=4, act_bit=8, cali_ckpt="models/own.safetensors"),
            None,
            QuantizationOptions(cali_ckpt=ROOT / "models/own.safetensors", weight_bit=4, quant_act=True, act_bit=8),
        ),
    ]
    for row, merge, quantization in cases:
        assert row.merge == merge and row.quantization(CALI) == quantization, row.title


def edited(section, **values):
    """Return an edit of sd-v1's protocol."""

    def edit(table):
        protocol = table["models"]["sd-v1"]
        (protocol if section is None else protocol.setdefault(section, {})).update(values)

    return edit


BAD_TABLES = [
    (lambda table: table.pop("rows"), "lacks rows"),
    (lambda table: table["rows"].pop(0), "first row must be full precision"),
    (lambda table: table["rows"].append(table["rows"][0]), "two rows have the same name and ratio"),
    (lambda table: table["rows"][1].update(ratio=0.8), "row 2: ratio is 0.8"),
    (lambda table: table["rows"][1].update(ratio="half"), "row 2: ratio is 'half': it must be of type float"),
    (lambda table: table["rows"][1].pop("ratio"), "row 2 lacks ratio"),
    (lambda table: table["rows"][1].update(act_bit=8), "need a weight_bit"),
    (lambda table: table["rows"][1].update(cali_ckpt="x"), "FP32: cali_ckpt 'x' needs a weight_bit"),
    (edited(None, rows=[{"name": "FP32", "ratio": 0.5}]), "two rows have the same name and ratio"),
    (edited(None, rows=[{"name": "FP32"}]), "sd-v1, row 1 lacks ratio"),
    (lambda table: table["rows"][1].update(colour="red"), "row 2 has unknown colour"),
    (edited(None, prompts="a dog"), "prompts are 'a dog'"),
    (edited(None, pictures="many"), "pictures is 'many'"),
    (lambda table: table["models"]["sd-v1"].pop("seed"), "model sd-v1 lacks seed"),
    (edited(None, drawing=["--ddim_steps", 20]), "drawing of sd-v1 is ['--ddim_steps', 20]: it must be names"),
    (edited("drawing", seed=5), "drawing of sd-v1 has unknown seed: it takes "),
    (edited("drawing", merge={"ratio": 0.5}), "drawing of sd-v1 has merge, which the rows and the command say"),
    (edited("drawing", steps="20"), "drawing of sd-v1: steps is '20': it must be of type int or empty"),
    (edited("drawing", sampler="heun"), "drawing of sd-v1: sampler is 'heun': it must be one of ddim"),
    (edited("calibration", weight_bit=8), "calibration of sd-v1 has weight_bit, which the rows"),
    (edited("calibration", preset="slow"), "calibration of sd-v1: preset is 'slow'"),
    (edited("calibration", draw={"steps": 0}), "calibration of sd-v1: draw: steps is 0"),
    (edited("scoring", size=4), "scoring of sd-v1: size is 4"),
    (edited("scoring", resize="none"), "size has no effect"),
    (edited("scoring", paired="x"), "scoring of sd-v1 has paired, which the rows"),
]


def test_bad_tables_are_refused(tmp_path):
    path = tmp_path / "table.yaml"
    for edit, says in BAD_TABLES:
        table = yaml.safe_load(TABLE.read_text())
        edit(table)
        path.write_text(yaml.safe_dump(table))
        with pytest.raises(ValueError) as raised:
            read_table(path)
        assert says in str(raised.value) and "table.yaml" in str(raised.value), says


def test_options_out_of_range_are_refused():
    for name, value in (("pictures", 1), ("batch_size", 0), ("repeats", 0), ("shown", 2.5)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            ResultsOptions(**{name: value})


def test_rows_may_be_drawn_in_ways_of_their_own(tmp_path):
    base = DrawOptions(sampler="dpm_solver", steps=20, scale=4.0, guidance_stop=0.5)
    few = Row(name="W4A8", ratio=0.5, weight_bit=4, act_bit=8, sampler="lcm", steps=4, vae="tiny", lora="a/b.pt:0.5")
    assert few.title == "W4A8, ratio 0.5, sampler lcm, steps 4, vae tiny, lora b.pt:0.5"
    assert few.key == "W4A8-0.5-sampler_lcm-steps_4-vae_tiny-lora_b.pt_0.5"
    own = few.options(base)
    assert (own.sampler, own.steps, own.scale, own.guidance_stop, own.vae) == ("lcm", 4, None, 1.0, "tiny")
    assert own.merge == MergeOptions(ratio=0.5)
    (lora,) = few.loras
    assert (lora.path, lora.scale) == (ROOT / "a/b.pt", 0.5)
    cached = Row(name="FP32", ratio=0.0, cache=Path("x/cache.json"))
    assert cached.title == "FP32, ratio 0, cache cache.json" and cached.options(base) == replace(
        base, cache=Path("x/cache.json")
    )
    with pytest.raises(ValueError, match="FP32, ratio 0, cache 0: cache is 0"):
        Row(name="FP32", ratio=0.0, cache=0).options(base)
    merged = Row(name="FP32", ratio=0.75, sx=4, sy=4, merge_kv=True, proportional=True, steps=4)
    assert merged.title == "FP32, ratio 0.75, sx 4, sy 4, merge kv, proportional, steps 4"
    assert merged.key == "FP32-0.75-sx_4-sy_4-merge_kv-proportional-steps_4"
    assert merged.options(base).merge == MergeOptions(ratio=0.75, sx=4, sy=4, merge_kv=True, proportional=True)
    for ratio, given, says in ((0.0, {"sx": 4}, "sx needs a ratio above 0"), (0.5, {"sx": 0}, "sx")):
        with pytest.raises(ValueError, match=says):
            Row(name="FP32", ratio=ratio, **given)
    plain = Row(name="FP32", ratio=0.0)
    assert plain.drawn == {} and plain.options(base) == base and plain.loras == ()
