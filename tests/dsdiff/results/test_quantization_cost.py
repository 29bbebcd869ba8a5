"""What quantization costs: variants, calibrations, figures, and what is not done twice."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsdiff.images.png import write_png
from dsdiff.models.registry import READER
from dsdiff.results import drawing
from dsdiff.results import quantization_cost as cost
from dsdiff.results.variants import SHIPPED, TABLE, W4, W4_LINEAR, W4_MERGED, W8, ablation
from ldm.data.reader import ShapesReader
from ldm.data.shapes import ShapesDataset, caption, parse_caption


@pytest.fixture
def options(tmp_path):
    return cost.CostOptions(n=4, outdir=tmp_path, device="cpu")


def rendered(captions):
    """Real pictures of the captions that `captions_of` gives: uint8 [N, H, W, 3]."""
    half = len(captions) - len(captions) // 2
    parts = [
        (ShapesDataset(len(captions), split, 256, 0), n)
        for split, n in (("test", half), ("heldout", len(captions) - half))
    ]
    return torch.stack([torch.from_numpy(np.array(data.picture(i))) for data, n in parts for i in range(n)])


def test_captions_are_half_of_each_kind():
    captions = cost.captions_of(6, 0)
    test, heldout = (ShapesDataset(6, split, 256, 0) for split in ("test", "heldout"))
    expected = [caption(data.spec(i)) for data in (test, heldout) for i in range(3)]
    assert [parse_caption(text) for text in captions] == [parse_caption(text) for text in expected]


# --- calibrations ------------------------------------------------------------------------------------------


def calibrations(preset):
    """Return those of all variants, with what the preset sets."""
    variants = (*TABLE, *ablation(preset))
    return {variant.calibration.of(preset) for variant in variants if variant.calibration}


def test_variants_share_a_calibration_exactly_where_it_is_the_same():
    for preset in ("fast", "paper"):
        made = calibrations(preset)
        assert len(made) == len({calibration.key for calibration in made}) == 12
        assert all("/" not in calibration.key and " " not in calibration.key for calibration in made)


def test_an_ablation_names_each_calibration_once():
    fast, paper = ({variant.name for variant in ablation(preset)} for preset in ("fast", "paper"))
    assert fast ^ paper == {"by AdaRound", "with LSQ", "by GPTQ", "without LSQ"}  # each preset has two of them itself
    assert {"by AdaRound", "with LSQ"} < fast


def test_options_of_calibrations():
    for preset in ("fast", "paper"):
        for calibration in calibrations(preset):
            made = calibration.options(preset, "cpu", None)
            assert (made.quant_act, made.act_bit, made.sm_abit, made.cond) == (True, 8, 16, True), calibration
            assert made.draw.sampler == "dpm_solver" and made.draw.steps == 20, calibration
            assert made.no_grad_ckpt is bool(calibration.lsq or calibration.rounding == "adaround"), calibration
            assert made.iters_a == (0 if calibration.lsq is False else None), calibration
            again = calibration.options(preset, "cpu", Path("data.safetensors"))
            assert again.data_path == Path("data.safetensors") and not again.cond, calibration
    assert W4.options("fast", "cpu", None).rounding == "gptq" and W4.options("fast", "cpu", None).iters_a == 0
    assert W4.options("paper", "cpu", None).rounding == "adaround" and W4.options("paper", "cpu", None).iters_a is None
    assert W4_LINEAR.options("fast", "cpu", None).rounding is None
    assert W4_MERGED.options("paper", "cpu", None).merge.ratio == 0.5


def test_the_shipped_calibrations_are_taken_and_others_made_of_the_same_data(options, monkeypatch):
    made = []

    def ready_made(folder, given):
        folder.mkdir(parents=True)
        if given.data_path is None:
            (folder / "data-0.safetensors").touch()
        made.append((folder, given))
        return folder / "cali.safetensors"

    monkeypatch.setattr(cost, "ready_made", ready_made)
    variants = [cost.Variant(name="x", calibration=calibration) for calibration in (W4, W8, W4_LINEAR, W4_MERGED)]
    found = [cost.cali_ckpt_of(variant, options) for variant in variants]
    assert found[:2] == [SHIPPED[each.of("fast")] for each in (W4, W8)] and len(made) == 2
    root = options.outdir / "calibrations" / "fast"
    assert found[2:] == [
        root / calibration.key / "cali.safetensors" for calibration in (W4_LINEAR, W4_MERGED.of("fast"))
    ]
    assert made[0][1].data_path is None and made[1][1].data_path == made[0][0] / "data-0.safetensors"
    assert cost.cali_ckpt_of(TABLE[0], options) is None
    paper = cost.CostOptions(n=4, outdir=options.outdir, device="cpu", preset="paper")
    assert (
        cost.cali_ckpt_of(variants[0], paper)
        == options.outdir / "calibrations/paper" / W4.of("paper").key / "cali.safetensors"
    )


# --- pictures ----------------------------------------------------------------------------------------------


def test_pictures_that_are_there_are_not_drawn_again(options, monkeypatch):
    drawn = []

    def draw_missing(pipeline, prompts, seeds, paths, settings, batch_size, title):
        """Stand-in: picture i is of colour i."""
        drawn.append((list(seeds), settings.sampler, batch_size))
        for i, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, Image.new("RGB", (4, 4), (i, 0, 0)))

    monkeypatch.setattr(drawing, "draw_missing", draw_missing)
    captions = cost.captions_of(options.n, options.seed)
    first = cost.pictures_of(TABLE[0], None, captions, options)
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and drawn == [([0, 1, 2, 3], "dpm_solver", 16)]
    folders = list((options.outdir / "pictures").iterdir())
    cost.pictures_of(TABLE[0], None, captions, options)
    assert list((options.outdir / "pictures").iterdir()) == folders
    cost.pictures_of(TABLE[0], None, captions[::-1], options)  # other captions, other pictures
    assert len(list((options.outdir / "pictures").iterdir())) == 2


def test_variants_are_drawn_as_they_say(options):
    captions = cost.captions_of(4, 0)
    by_name = {variant.name: variant for variant in TABLE}
    for name, bits, ratio in (
        ("full precision", None, None),
        ("W4A32 qdiff", "W4A32 split", None),
        ("W4A8 qdiff, ratio 0.5", "W4A8 sm16 split", 0.5),
    ):
        variant = by_name[name]
        cali_ckpt = SHIPPED[W4.of("fast")] if variant.calibration else None
        settings = cost.plan(variant, cali_ckpt, captions, options).settings
        assert (None if settings.quantization is None else settings.quantization.bits) == bits, name
        assert (None if settings.merge is None else settings.merge.ratio) == ratio, name
        assert settings.precision == "full", name


# --- figures -----------------------------------------------------------------------------------------------


def test_real_pictures_have_their_attributes_and_noise_has_not():
    reader, captions = ShapesReader.from_file(READER), cost.captions_of(8, 0)
    right, asked = cost.attributes_right(rendered(captions), captions, reader, 4)
    assert asked > 20 and right / asked > 0.95
    noise = torch.randint(256, (8, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert cost.attributes_right(noise, captions, reader, 4)[0] / asked < 0.6


def test_costs_of_known_errors(options, monkeypatch):
    """Equal pictures have no finite PSNR; of others it is that of all pictures together, with an interval around it."""

    def pictures_of(variant, cali_ckpt, captions, options):
        pictures = rendered(captions).clone()
        for i in range(len(captions) if variant.merge else 0):
            pictures[i] ^= 2**i
        return pictures

    monkeypatch.setattr(cost, "pictures_of", pictures_of)
    monkeypatch.setattr(cost, "bytes_of", lambda cali_ckpt, device: 8_000_000)
    variants = [variant for variant in TABLE if variant.calibration is None]
    (plain, _), (merged, _) = cost.costs(variants, options)
    assert plain.psnr is plain.psnr_low is plain.psnr_high is None
    expected = -10 * math.log10(sum(4**i for i in range(4)) / 4 / 255**2)
    assert merged.psnr == pytest.approx(expected) and merged.psnr_low < merged.psnr < merged.psnr_high
    table = cost.markdown([plain, merged]).splitlines()
    assert table[2].startswith("| full precision | - |") and f"| {expected:.1f} [" in table[3]


@pytest.mark.slow
def test_bytes_of_the_embedded_model():
    full, packed = cost.bytes_of(None, "cpu"), cost.bytes_of(SHIPPED[W4.of("fast")], "cpu")
    assert full > 6 * packed > 0
