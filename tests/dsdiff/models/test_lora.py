"""LoRAs of a Pipeline: merged into a float model, beside the layers of a calibrated one, changed and taken away."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsdiff import DrawOptions, LoraOptions, Pipeline, QuantizationOptions
from dsdiff.benchmark.comparison import as_calibrated, weight_bytes
from dsdiff.models.lora import BranchSites, calibrated_for
from dsdiff.models.registry import CALI_CKPTS, CHECKPOINTS, EMBEDDED, LORA_CALI_CKPTS
from dsdiff.models.spec import find_model
from dsdiff.options import ModelOptions
from ldm.lora import layer_shapes
from ldm.lora_names import TEXT, UNET
from ldm.modules.low_rank import BranchedLayer
from qdiff import QuantConfig, QuantModel
from qdiff.calibrate import fit_activations
from qdiff.calibration_set import CalibrationSet
from qdiff.checkpoint import save_cali_ckpt
from qdiff.engine.lora import BranchedCodesLayer

(LCM_CALI_CKPT,) = LORA_CALI_CKPTS[CHECKPOINTS[EMBEDDED][0]]
LCM = LCM_CALI_CKPT.with_name("lcm.safetensors")
TINY = DrawOptions(height=32, width=48, steps=2, precision="full", vae="float32")


@pytest.fixture(scope="module")
def files(spec, tmp_path_factory):
    """Two LoRAs on all layers, in kohya's format, float16."""
    model, folder = Pipeline(spec, device="cpu").model, tmp_path_factory.mktemp("lora")
    shapes = layer_shapes(model.model.diffusion_model, model.cond_stage_model)
    generator = torch.Generator().manual_seed(0)
    paths = [folder / "one.safetensors", folder / "two.safetensors"]
    for path in paths:
        tensors = {}
        for name, shape in shapes.items():
            network, prefix = (UNET, "lora_unet_") if name.startswith(UNET) else (TEXT, "lora_te_")
            stem = prefix + name.removeprefix(network).replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=generator) * 0.1
            tensors[f"{stem}.lora_up.weight"] = (
                torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator) * 0.1
            )
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    return paths


@pytest.fixture(scope="module")
def cali_ckpt(spec, tmp_path_factory):
    """W8A8 of the small model, ranges of one input."""
    unet = Pipeline(spec, device="cpu").model.model.diffusion_model
    qnn = QuantModel(unet, QuantConfig(weight_bit=8, quant_act=True, act_bit=8, sm_abit=16, split=True))
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 4, 6, generator=generator), torch.randn(2, 32, 128, generator=generator)
    qnn.fit_weights()
    fit_activations(qnn, CalibrationSet(x, torch.tensor([900, 20]), context), 2, running=True)
    qnn.set_quant_state(True, True)
    path = tmp_path_factory.mktemp("cali") / "cali.safetensors"
    save_cali_ckpt(qnn, path)
    return path


def draw(pipeline, options=TINY):
    (picture,) = pipeline.draw("a red circle", seeds=[7], options=options)
    return np.asarray(picture.image).astype(int), picture.settings


def test_a_trailing_number_is_a_scale_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:2").touch()
    for text, path, scale in (
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("dir/a.safetensors:-1e-1", "dir/a.safetensors", -0.1),
        ("C:\\x\\a.safetensors", "C:\\x\\a.safetensors", 1.0),
        ("C:\\x\\a.safetensors:.25", "C:\\x\\a.safetensors", 0.25),
        ("C:/x/a.safetensors:0", "C:/x/a.safetensors", 0.0),
        ("odd:2", "odd:2", 1.0),
        ("odd:2:3", "odd:2", 3.0),
        ("odd:", "odd:", 1.0),
    ):
        assert LoraOptions.parse(text) == LoraOptions(path=Path(path), scale=scale), text
    for text in ("a.safetensors:nan", "a.safetensors:inf"):
        with pytest.raises(ValueError, match="finite"):
            LoraOptions.parse(text)
    for scale in (True, "1", float("inf")):
        with pytest.raises(ValueError, match="finite number"):
            LoraOptions(path=Path("a"), scale=scale)
    assert LoraOptions.of(("a", 0.5)) == LoraOptions(path=Path("a"), scale=0.5)


def test_loras_of_a_float_model_come_and_go(spec, files):
    pipeline = Pipeline(spec, device="cpu")
    plain, settings = draw(pipeline)
    assert settings.lora == ()
    pipeline.set_lora((files[0], 0.8), files[1])
    changed, settings = draw(pipeline)
    assert [(record.name, record.scale) for record in settings.lora] == [
        ("one.safetensors", 0.8),
        ("two.safetensors", 1),
    ]
    assert all(len(record.sha256) == 64 for record in settings.lora)
    assert np.abs(changed - plain).mean() > 1
    (fresh,) = [draw(Pipeline(spec, device="cpu", lora=[(files[0], 0.8), files[1]]))[0]]
    assert np.array_equal(fresh, changed)
    for nothing in ((), ((files[0], 0.0),)):
        pipeline.set_lora(*nothing)
        assert np.array_equal(draw(pipeline)[0], plain)


@pytest.mark.slow
def test_loras_of_a_calibrated_model_are_branches(spec, files, cali_ckpt):
    for engine in ("int8", "simulate", "calibration"):
        try:
            options = QuantizationOptions(cali_ckpt=cali_ckpt, engine=engine)
            pipeline = Pipeline(spec, device="cpu", quantization=options)
        except ValueError as error:  # a CPU without exact kernels
            assert engine == "int8" and "no exact integer kernels" in str(error)
            continue
        plain, _ = draw(pipeline)
        model = pipeline.model
        pipeline.set_lora((files[0], 0.6))
        changed, settings = draw(pipeline)
        assert pipeline.model is model, "nothing is read anew"
        assert np.abs(changed - plain).mean() > 1 and settings.lora[0].scale == 0.6
        pipeline.set_lora((files[0], 0.4), (files[0], 0.2))
        assert np.abs(draw(pipeline)[0] - changed).mean() < 0.5, "scales add up"
        kinds = {type(module) for module in model.modules()}
        assert BranchedLayer in kinds and (BranchedCodesLayer in kinds or engine == "calibration")
        fresh = Pipeline(spec, device="cpu", quantization=options, lora=[(files[0], 0.6)])
        assert np.array_equal(draw(fresh)[0], changed)
        for nothing in ((), ((files[0], 0.0), (files[1], 0.0))):
            pipeline.set_lora(*nothing)
            assert np.array_equal(draw(pipeline)[0], plain)
            assert not any(isinstance(module, BranchedCodesLayer | BranchedLayer) for module in model.modules())


@torch.no_grad()
def test_the_calibration_that_comes_with_a_lora_is_taken_for_it(tmp_path):
    embedded = find_model(ModelOptions(config=EMBEDDED))
    copy, plain = shutil.copy(LCM, tmp_path / "renamed.safetensors"), QuantizationOptions()
    own = QuantizationOptions(cali_ckpt=CALI_CKPTS[embedded.ckpt][8])
    given = [LoraOptions(path=Path(copy)), LoraOptions(path=LCM, scale=0.5)]
    assert calibrated_for(plain, embedded, given).cali_ckpt == LCM_CALI_CKPT
    assert calibrated_for(QuantizationOptions(weight_bit=4, split=True), embedded, given).cali_ckpt == LCM_CALI_CKPT
    for options, loras in ((plain, given[1:]), (plain, []), (QuantizationOptions(weight_bit=8), given), (own, given)):
        assert calibrated_for(options, embedded, loras) is options
    with pytest.raises(FileNotFoundError, match="is not there"):
        calibrated_for(plain, embedded, [LoraOptions(path=tmp_path / "none.safetensors")])
    pipeline = Pipeline(embedded, device="cpu", quantization=calibrated_for(plain, embedded, given[:1]), lora=given[:1])
    assert pipeline.merged_lora == (given[0],) and weight_bytes(as_calibrated(pipeline)) < 3.9e6
    pipeline.draw("a ring", seeds=[1], options=TINY)  # the weights are the file's
    assert not any(isinstance(each, BranchedCodesLayer) for each in pipeline.model.modules())


def test_branches_of_the_text_encoder_are_its_merged_weights(spec, files, cali_ckpt):
    options = QuantizationOptions(cali_ckpt=cali_ckpt, engine="simulate")
    lora = [(files[0], 0.6), (files[1], -0.5)]
    merged = Pipeline(spec, device="cpu", lora=lora).model.get_learned_conditioning(["a red circle"])
    branched = Pipeline(spec, device="cpu", quantization=options, lora=lora).model.get_learned_conditioning(
        ["a red circle"]
    )
    plain = Pipeline(spec, device="cpu").model.get_learned_conditioning(["a red circle"])
    torch.testing.assert_close(branched, merged, atol=1e-5, rtol=1e-4)
    assert (plain - merged).abs().max() > 0.1


def test_a_file_that_does_not_fit_changes_nothing(spec, files, cali_ckpt, tmp_path):
    bad = tmp_path / "bad.safetensors"
    save_file({"lora_unet_nowhere.lora_down.weight": torch.ones(2, 2)}, bad)
    for quantization in (None, QuantizationOptions(cali_ckpt=cali_ckpt, engine="simulate")):
        pipeline = Pipeline(spec, device="cpu", quantization=quantization, lora=files[:1])
        before, _ = draw(pipeline)
        for path, error, words in (
            (bad, ValueError, "lora_unet_nowhere"),
            (tmp_path / "none.safetensors", FileNotFoundError, "is not there"),
            (tmp_path, FileNotFoundError, "is a folder"),
        ):
            with pytest.raises(error, match=words):
                pipeline.set_lora(files[1], path)
            assert [record.name for record in pipeline.lora] == ["one.safetensors"]
            assert np.array_equal(draw(pipeline)[0], before)
    settings = pipeline.resolve(TINY)
    pipeline.set_lora()
    with pytest.raises(ValueError, match="resolve the options again"):
        pipeline.sample(["a ring"], [1], settings)
    pipeline.sample(["a ring"], [1], replace(settings, lora=()))


def test_sites_have_the_strides_of_convolutions(spec):
    model = Pipeline(spec, device="cpu").model
    sites = BranchSites(model, model.model.diffusion_model)
    convolution = f"{UNET}input_blocks.0.0"
    assert sites.options[convolution]["padding"] == (1, 1) and sites.shapes[convolution] == (32, 4, 3, 3)
