"""configs/eval/table.yaml, and tables that are none."""

import pytest
import yaml

from dsdiff.results.table import TABLE, Row, read_table


def test_shipped_table_is_that_of_the_original():
    rows, protocols = read_table(TABLE)
    assert [(row.name, row.ratio) for row in rows] == [
        *(("FP32", ratio) for ratio in (0, 0.5)),
        *(("W4A32", ratio) for ratio in (0, 0.5)),
        *(("W4A8", ratio) for ratio in (0, 0.1, 0.3, 0.5, 0.6)),
    ]
    assert [row.published for row in rows] == [33.77, 33.54, 33.71, 34.06, 33.31, 33.28, 33.90, 34.02, 34.20]
    sd = protocols["sd-v1"]
    assert (sd.prompts, sd.pictures) == ("A high quality photograph of a {class}", 2000)
    assert sd.drawing[:5] == ["--plms", "--ddim_steps", "50", "--scale", "7.5"] and sd.reference is None
    assert all(protocol.drawing[-2:] == ["--precision", "full"] for protocol in protocols.values())


def test_flags_of_rows():
    assert Row(name="FP32", ratio=0.0).flags == []
    assert Row(name="FP32", ratio=0.3).flags == ["--ratio", "0.3"]
    assert Row(name="W4A32", ratio=0.0, weight_bit=4).flags == ["--ptq", "--weight_bit", "4", "--no-quant_act"]
    assert Row(name="W4A8", ratio=0.6, weight_bit=4, act_bit=8).flags == [
        *["--ratio", "0.6", "--ptq", "--weight_bit", "4", "--quant_act", "--act_bit", "8"]
    ]


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda table: table.pop("rows"), "rows"),
        (lambda table: table["rows"].pop(0), "first row must be full precision"),
        (lambda table: table["rows"].append(table["rows"][0]), "two rows have the same name and ratio"),
        (lambda table: table["rows"][1].update(ratio=0.8), "ratio is 0.8"),
        (lambda table: table["rows"][1].update(act_bit=8), "need a weight_bit"),
        (lambda table: table["rows"][1].update(colour="red"), "unknown colour"),
        (lambda table: table["models"]["sd-v1"].update(prompts="a dog"), "prompts are 'a dog'"),
        (lambda table: table["models"]["sd-v1"].pop("seed"), "seed"),
        (lambda table: table["models"]["sd-v1"].update(drawing=["--ddim_steps", 20]), "numbers in quotes"),
        (lambda table: table["models"]["sd-v1"].update(drawing=["--seed", "5"]), "drawing has --seed"),
    ],
)
def test_bad_tables_are_refused(tmp_path, edit, says):
    table = yaml.safe_load(TABLE.read_text())
    edit(table)
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match=says) as raised:
        read_table(path)
    assert "table.yaml" in str(raised.value)
