"""scripts/eval_quantization.py: its figures, its tables, and what it does not do twice."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.shapes import ShapesDataset, parse_caption
from qdiff.checkpoint import quantized_bytes
from scripts import eval_quantization as script


@pytest.fixture
def args(tmp_path):
    return script.parse_args(["--n", "4", "--outdir", str(tmp_path), "--device", "cpu"])


def rendered(captions):
    """Real pictures of the captions that `captions_of` gives: uint8 [N, H, W, 3]."""
    half = len(captions) - len(captions) // 2
    parts = [
        (ShapesDataset(len(captions), split, 128, 0), n)
        for split, n in (("test", half), ("heldout", len(captions) - half))
    ]
    return torch.stack([torch.from_numpy(np.array(data.picture(i))) for data, n in parts for i in range(n)])


def test_psnr_of_known_errors():
    reference = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    assert script.psnr(reference, reference) == math.inf
    assert script.psnr(reference + 10, reference) == pytest.approx(20 * math.log10(255 / 10))
    pictures = reference.clone()
    pictures[1, 0, 0, 0] = 101  # one of 2 * 8 * 8 * 3 values
    assert script.psnr(pictures, reference) == pytest.approx(20 * math.log10(255) + 10 * math.log10(384))


def test_captions_are_half_of_each_kind():
    captions = script.captions_of(6, 0)
    test, heldout = (ShapesDataset(6, split, 128, 0) for split in ("test", "heldout"))
    assert [parse_caption(text) for text in captions] == [
        *(parse_caption(script.caption(test.spec(i))) for i in range(3)),
        *(parse_caption(script.caption(heldout.spec(i))) for i in range(3)),
    ]


def test_variants_share_a_calibration_exactly_where_its_flags_are_equal():
    variants = [variant for variant in (*script.TABLE, *script.ABLATION) if variant.cali]
    pairs = {(v.cali, v.cali_name) for v in variants}
    assert len(pairs) == len({flags for flags, _ in pairs}) == len({name for _, name in pairs})
    assert all("/" not in v.cali_name and " " not in v.cali_name for v in variants)


def test_real_pictures_have_their_attributes_and_noise_has_not():
    reader = script.ShapesReader.from_file(script.READER)
    captions = script.captions_of(8, 0)
    right, asked = script.attributes_right(rendered(captions), captions, reader, 4)
    assert asked > 20 and right / asked > 0.95
    noise = torch.randint(256, (8, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert script.attributes_right(noise, captions, reader, 4)[0] / asked < 0.6


def test_pictures_that_are_there_are_not_drawn_again(args, monkeypatch):
    captions = script.captions_of(args.n, args.seed)
    monkeypatch.setattr(script, "draw_missing", draw_numbers)
    variant = script.TABLE[0]
    first = script.pictures_of(variant, args, captions)
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    folders = list((args.outdir / "pictures").iterdir())
    script.pictures_of(variant, args, captions)
    assert list((args.outdir / "pictures").iterdir()) == folders
    script.pictures_of(variant, args, captions[::-1])  # other captions, other pictures
    assert len(list((args.outdir / "pictures").iterdir())) == 2


def draw_numbers(build, prompts, seeds, paths, batch_size, title):
    """In place of draw_missing: picture i is of colour i."""
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)


def test_tables_are_written(args, monkeypatch, capsys):
    def pictures_of(variant, args, captions):
        pictures = rendered(captions)
        return pictures if variant.cali is None else 255 - pictures

    monkeypatch.setattr(script, "pictures_of", pictures_of)
    monkeypatch.setattr(script, "cali_ckpt_of", lambda variant, args: variant.cali and "cali")
    monkeypatch.setattr(script, "bytes_of", lambda cali: 1_000_000 if cali else 8_000_000)
    script.main(["--n", "4", "--outdir", str(args.outdir)])
    rows = json.loads((args.outdir / "quantization.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [variant.name for variant in script.TABLE]
    assert rows[0]["psnr"] is None and rows[0]["attributes"] > 90 and rows[0]["bytes"] == 8_000_000
    assert rows[1]["psnr"] < 15 and rows[1]["attributes"] < rows[0]["attributes"]
    table = (args.outdir / "quantization.md").read_text()
    assert table in capsys.readouterr().out + "\n" and table.count("\n") == len(script.TABLE) + 2
    sheet = Image.open(args.outdir / "quantization.png")
    assert sheet.size == (4 * (128 + 4), len(script.TABLE) * (128 + 16))


def test_bytes_of_a_quantized_unet(make_calibrated):
    qnn = make_calibrated(4)
    plain = sum(p.numel() for name, p in qnn.named_parameters())
    weights = sum(layer.weight.numel() for layer in qnn.layers().values())
    channels = sum(2 * part.shape[0] for layer in qnn.layers().values() for part in layer.weight_parts().values())
    padded = sum(
        part.shape[0] * math.ceil(part[0].numel() / 8) * 4
        for layer in qnn.layers().values()
        for part in layer.weight_parts().values()
    )
    expected = padded + 4 * (channels + 2 * len(qnn.act_quantizers()) + plain - weights)
    assert quantized_bytes(qnn) == expected


@pytest.fixture
def make_calibrated():
    """(bits) -> a quantized UNet with ranges."""
    from omegaconf import OmegaConf

    from ldm.util import instantiate_from_config
    from qdiff import QuantConfig, QuantModel

    def make(bits):
        unet = instantiate_from_config(OmegaConf.load("tests/goldens/q_unet.yaml"))
        qnn = QuantModel(unet, QuantConfig(weight_bit=bits))
        qnn.fit_weights()
        for quantizer in qnn.act_quantizers().values():
            quantizer.set(torch.tensor(0.1), torch.tensor(0.0))
        return qnn

    return make
