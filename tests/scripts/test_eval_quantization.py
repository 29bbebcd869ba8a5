"""scripts/eval_quantization.py: the files it writes, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED
from dsdiff.results import eps_error
from dsdiff.results import quantization_cost as cost
from dsdiff.results.variants import TABLE
from ldm.data.shapes import ShapesDataset
from ldm.fileio import only_run_in
from scripts import eval_quantization as script


def rendered(n):
    """Real pictures of the captions that `captions_of` gives: uint8 [N, H, W, 3]."""
    parts = [(ShapesDataset(n, "test", 256, 0), n - n // 2), (ShapesDataset(n, "heldout", 256, 0), n // 2)]
    return torch.stack([torch.from_numpy(np.array(data.picture(i))) for data, count in parts for i in range(count)])


def test_tables_are_written(tmp_path, monkeypatch, capsys):
    def pictures_of(variant, cali_ckpt, captions, options):
        pictures = rendered(len(captions))
        return pictures if variant.calibration is None else 255 - pictures

    monkeypatch.setattr(cost, "pictures_of", pictures_of)
    monkeypatch.setattr(cost, "cali_ckpt_of", lambda variant, options: variant.calibration and "cali")
    monkeypatch.setattr(cost, "bytes_of", lambda cali, device: 1_000_000 if cali else 8_000_000)
    script.main(["--n", "4", "--outdir", str(tmp_path), "--device", "cpu"])
    content = json.loads((tmp_path / "quantization.json").read_text())
    rows = content["rows"]
    assert content["drawing"]["sampler"] == "dpm_solver" and content["n"] == 4
    assert [row["variant"] for row in rows] == [variant.name for variant in TABLE]
    assert rows[0]["psnr"] is None and rows[0]["attributes"] > 90 and rows[0]["bytes"] == 8_000_000
    assert rows[1]["psnr_low"] <= rows[1]["psnr"] <= rows[1]["psnr_high"] < 15
    assert rows[1]["attributes"] < rows[0]["attributes"]
    table = (tmp_path / "quantization.md").read_text()
    assert table in capsys.readouterr().out + "\n" and table.count("\n") == len(TABLE) + 2
    sheet = Image.open(tmp_path / "quantization.png")
    assert sheet.size == (4 * (128 + 4), len(TABLE) * (128 + 16))


def test_one_run_at_a_time_writes_to_a_folder(tmp_path, capsys):
    cali = str(CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]][8])
    for flags in ([], ["--eps", cali]):
        with only_run_in(tmp_path / "out"), pytest.raises(SystemExit, match="2"):
            script.main([*flags, "--outdir", str(tmp_path / "out"), "--device", "cpu"])
        assert "another run is writing to" in capsys.readouterr().err, flags


def test_bad_flags_are_one_line(capsys):
    for flags in (["--n", "1"], ["--preset", "slow"], ["--n_samples", "4"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as leaving:
            script.main(flags)
        assert leaving.value.code == 2, flags
        assert len(capsys.readouterr().err.strip().splitlines()) == 1, flags


@pytest.mark.slow
def test_cali_ckpts_are_compared_by_the_error_of_eps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eps_error, "DRAWING", replace(eps_error.DRAWING, steps=2))
    files = [str(CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]][bits]) for bits in (8, 4)]
    outdir = tmp_path / "new"
    flags = ["--n", "2", "--outdir", str(outdir), "--device", "cpu"]
    script.main(["--eps", *files, *flags])
    eight, four = json.loads((outdir / "eps.json").read_text())
    assert (eight["bits"], four["bits"]) == ("W8A8", "W4A8")
    for row in (eight, four):
        assert 0 < row["weights"] < row["all"] and 0 < row["weights_error"] < row["weights"]
    assert eight["weights"] < 0.1 * four["weights"]
    assert (outdir / "eps.md").read_text().strip() in capsys.readouterr().out
    for more, says in ((["--ablation"], "choose one"), ([str(tmp_path / "none.pth")], "No such file")):
        with pytest.raises(SystemExit) as leaving:
            script.main(["--eps", *files, *more, *flags])
        assert leaving.value.code == 2 and says in capsys.readouterr().err
