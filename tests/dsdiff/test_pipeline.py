"""The Python API: load, draw, options; and what a Pipeline refuses before it reads any weights."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dsdiff
from dsdiff import DrawOptions, MergeOptions, Pipeline, QuantizationOptions, conditioning
from dsdiff.models.held import HeldModel
from ldm.modules.attention import BasicTransformerBlock
from tomesd import token_report

ROOT = Path(__file__).resolve().parents[2]
TINY = DrawOptions(height=32, width=48, steps=2, vae="float32")  # bfloat16 would make rounding visible


def pixels(picture):
    return np.asarray(picture.image).astype(int)


def test_pictures_come_one_a_prompt_and_tell_how_they_were_drawn(spec):
    pipeline = Pipeline(spec, device="cpu")
    pictures = list(pipeline.draw(["a red circle", "a blue star"], seeds=[7, 8], options=TINY))
    assert [(picture.prompt, picture.seed) for picture in pictures] == [("a red circle", 7), ("a blue star", 8)]
    assert all(picture.image.size == (48, 32) and picture.settings.steps == 2 for picture in pictures)
    (alone,) = pipeline.draw("a blue star", seeds=[8], options=TINY)
    assert np.abs(pixels(alone) - pixels(pictures[1])).max() <= 1
    together = list(pipeline.draw(["a red circle", "a blue star"], seeds=[7, 8], options=TINY, batch_size=2))
    assert all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(pictures, together, strict=True))


def test_a_schedule_of_merging_goes_by_shares_of_the_steps_of_any_sampler(spec):
    pipeline, ratios = Pipeline(spec, device="cpu"), {}
    merge = MergeOptions(merge_schedule="0:0.75,0.5:0.25")
    unet = pipeline.model.model.diffusion_model

    def note(*_):
        count = token_report(unet)[0]
        found.append(1 - count.tokens_processed / count.tokens_in)

    hook = unet.register_forward_hook(note)
    for sampler, steps, scale in (("ddim", 4, 4.0), ("plms", 5, 4.0), ("dpm_solver", 3, 1.0)):
        found = ratios[sampler] = []
        options = replace(TINY, sampler=sampler, steps=steps, scale=scale, merge=merge)
        (first,) = pipeline.draw("a ring", options=options)
        (again,) = pipeline.draw("a ring", options=options)
        assert first.image.tobytes() == again.image.tobytes(), sampler
    hook.remove()
    assert ratios["ddim"] == [0.75, 0.75, 0.25, 0.25] * 2
    assert ratios["plms"] == [0.75, 0.75, 0.75, 0.25, 0.25, 0.25] * 2  # the first step calls the model twice
    assert ratios["dpm_solver"] == [0.75, 0.75, 0.25] * 2


def test_matchings_are_kept_within_a_picture(spec):
    """A picture depends on its prompt, seed and settings alone, also while matchings are kept over its steps."""
    options = replace(TINY, steps=5, merge=MergeOptions(ratio=0.5, merge_every=3, merge_share=True, proportional=True))
    pipeline = Pipeline(spec, device="cpu")
    first, second = pipeline.draw(["a ring", "a blue star"], seeds=[7, 8], options=options)
    (alone,) = Pipeline(spec, device="cpu").draw("a blue star", seeds=[8], options=options)
    assert np.abs(pixels(alone) - pixels(second)).max() <= 1 and first.image.tobytes() != second.image.tobytes()
    plain = replace(options, merge=replace(options.merge, merge_every=1))
    (fresh,) = pipeline.draw("a blue star", seeds=[8], options=plain)
    assert fresh.image.tobytes() != second.image.tobytes()


def test_a_picture_that_is_not_finite_is_no_black_picture(spec):
    pipeline = Pipeline(spec, device="cpu")
    latents = torch.zeros(1, 4, 4, 4)
    assert pipeline.decode(latents).isfinite().all()
    latents[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"decoder \(float32\) made NaN or infinite pixels"):
        pipeline.decode(latents)


def test_prompts_are_encoded_once(spec, monkeypatch):
    encoded, encode = [], conditioning._encode

    def noted(model, prompts, *how):
        encoded.append((tuple(prompts), torch.is_autocast_enabled("cpu")))
        return encode(model, prompts, *how)

    monkeypatch.setattr(conditioning, "_encode", noted)
    monkeypatch.setattr(conditioning, "CONTEXTS", 3)
    monkeypatch.setattr(conditioning, "has_bfloat16", lambda: True)
    monkeypatch.setattr("dsdiff.pipeline.has_bfloat16", lambda: True)
    options = DrawOptions(height=32, width=48, steps=2, vae="float32", precision="full")
    pipeline = Pipeline(spec, device="cpu")
    pictures = list(pipeline.draw(["a ring", "a star", "a ring"], seeds=[7, 8, 7], options=options))
    assert encoded == [(("a ring",), False), (("",), False), (("a star",), False)]
    assert pictures[0].image.tobytes() == pictures[2].image.tobytes() != pictures[1].image.tobytes()
    (alone,) = Pipeline(spec, device="cpu").draw("a ring", seeds=[7], options=options)
    assert alone.image.tobytes() == pictures[0].image.tobytes()
    del encoded[:]
    assert list(pipeline.draw(["a heart", "a ring", "a star"], options=options))  # a star's was used longest ago
    assert encoded == [(("a heart",), False), (("a star",), False)]
    del encoded[:]
    assert list(pipeline.draw("a star", options=replace(options, precision="autocast")))
    assert encoded == [(("a star",), True), (("",), True)]
    for context in pipeline._contexts._kept.values():
        assert context.dtype == torch.float32


def test_tokens_are_merged_for_as_long_as_the_options_say(spec):
    pipeline = Pipeline(spec, device="cpu")
    (plain,) = pipeline.draw("a ring", options=TINY)
    merged = DrawOptions(height=32, width=48, steps=2, merge=MergeOptions(ratio=0.5))
    (other,) = pipeline.draw("a ring", options=merged)
    counts = token_report(pipeline.model)
    assert counts and all(0 < count.tokens_processed < count.tokens_in for count in counts)
    (again,) = pipeline.draw("a ring", options=TINY)
    assert (pixels(plain) == pixels(again)).all() and (pixels(plain) != pixels(other)).any()
    blocks = [module for module in pipeline.model.modules() if isinstance(module, BasicTransformerBlock)]
    assert blocks and not any(hasattr(block, "token_merging") for block in blocks)


def test_the_pipelines_own_merging_holds_where_the_options_have_none(spec):
    pipeline = Pipeline(spec, device="cpu", merge=MergeOptions(ratio=0.25))
    assert pipeline.resolve(TINY).merge == MergeOptions(ratio=0.25)
    assert pipeline.resolve(DrawOptions(merge=MergeOptions(ratio=0.5))).merge == MergeOptions(ratio=0.5)


def test_load_draws_with_the_calibration_that_comes_with_the_model():
    pipeline = dsdiff.load("embedded", engine="simulate", ratio=0.5, device="cpu")
    assert pipeline.quantization is not None and pipeline.quantization.bits == "W4A8 sm16 split"
    assert str(pipeline).startswith("embedded shapes model (") and str(pipeline).endswith(", W4A8 sm16 split")
    (picture,) = pipeline.draw("a red circle", options=DrawOptions(steps=2))
    assert picture.image.size == (256, 256) and picture.settings.merge == MergeOptions(ratio=0.5)


def test_what_cannot_be_is_told_before_weights_are_read(spec, monkeypatch):
    monkeypatch.setattr(HeldModel, "_load", lambda *args: pytest.fail("weights were read"))
    pipeline = Pipeline(spec, device="cpu")
    for options, said in (
        (DrawOptions(height=100), "100 is not a multiple of 8: use 96 or 104"),
        (DrawOptions(steps=1001), "1..1000, got 1001"),
        (DrawOptions(width=3), "3 is not a multiple of 8: use 8"),
    ):
        with pytest.raises(ValueError, match=said):
            pipeline.draw("a ring", options=options)
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        pipeline.draw(["a", "b"], seeds=[1])
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipeline.draw("a", batch_size=0)
    with pytest.raises(ValueError, match="comes with no calibration"):
        Pipeline(spec, device="cpu", quantization=QuantizationOptions())
    with pytest.raises(FileNotFoundError, match="no checkpoint at 'missing'"):
        dsdiff.load("missing")
    with pytest.raises(ValueError, match="give cali_ckpt and engine, or quantization"):
        dsdiff.load(engine="int8", quantization=QuantizationOptions())
    with pytest.raises(ValueError, match="device 'mps' is not supported"):
        Pipeline(spec, device="mps")


def test_importing_the_package_and_asking_for_help_import_no_torch():
    scripts = sorted((ROOT / "scripts").glob("[!_]*.py"))
    assert len(scripts) >= 9
    code = (
        "import sys, runpy; import dsdiff, dsdiff.options, tomesd.options\n"
        "import dsdiff.cli.arguments, dsdiff.cli.flags, dsdiff.cli.console\n"
        "assert 'torch' not in sys.modules, 'the package'\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as exit:\n"
        "        assert not exit.code, script\n"
        "    assert 'torch' not in sys.modules, script\n"
    )
    command = [sys.executable, "-c", code, *map(str, scripts)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-500:]


def test_drawing_imports_only_what_it_needs():
    code = (
        "import sys, dsdiff\n"
        "options = dsdiff.DrawOptions(steps=1)\n"
        "list(dsdiff.load('embedded', engine='simulate', device='cpu').draw('a ring', options=options))\n"
        "heavy = {'pytorch_lightning', 'lightning', 'torchmetrics', 'torchvision', 'transformers', 'matplotlib', "
        "'torch_fidelity', 'diffusers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-500:]
