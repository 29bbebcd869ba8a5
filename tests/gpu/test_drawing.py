"""Pictures of the embedded model drawn on a GPU, against those of the CPU from the same seeds."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dsdiff
from dsdiff.draw_settings import SAMPLERS
from dsdiff.models.cuda_graph import GraphedUNet
from dsdiff.models.held import HeldModel
from dsdiff.models.registry import CHECKPOINTS, EMBEDDED
from dsdiff.options import DrawOptions, InitOptions, MergeOptions, QuantizationOptions
from ldm.modules.diffusionmodules.tiny import TinyDecoder
from scripts import img2img, txt2img

PROMPTS = ["a red circle on a blue background", "a green square"]
SEEDS = [3, 4]


def drawn(pipeline, **options):
    """Return the pictures of PROMPTS, uint8 [2, H, W, 3]."""
    given = DrawOptions(steps=4, vae="float32", **options)
    pictures = pipeline.draw(PROMPTS, seeds=SEEDS, options=given, batch_size=2)
    return torch.stack([torch.from_numpy(np.array(picture.image)) for picture in pictures])


@pytest.fixture(scope="module")
def both():
    """The float model on the CPU and on the GPU."""
    return dsdiff.load(device="cpu"), dsdiff.load(device="cuda")


def test_the_device_is_chosen_and_autocast_its_default(both):
    assert dsdiff.load().device.type == "cuda"
    assert both[1].resolve(DrawOptions()).precision == "autocast" and both[1].resolve(DrawOptions()).vae == "float32"


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_picture_of_each_sampler_is_the_cpus(both, psnr, sampler):
    expected, found = (drawn(each, sampler=sampler, precision="full") for each in both)
    assert expected.float().std() > 5
    assert psnr(found, expected) > 45


def test_pictures_in_half_precision(both, psnr, monkeypatch):
    expected = drawn(both[0], precision="full")
    assert psnr(drawn(both[1], precision="autocast"), expected) > 25
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)  # then in float16
    assert psnr(drawn(both[1], precision="autocast"), expected) > 30


def test_merged_tokens_are_the_cpus(both, psnr):
    for merge in (MergeOptions(ratio=0.5), MergeOptions(ratio=0.3, merge_kv=True)):
        expected, found = (drawn(each, precision="full", merge=merge) for each in both)
        # A token whose two nearest are equally near may go to the other one.
        assert psnr(found, expected) > 25, merge


def test_cached_features_are_the_cpus(both, psnr):
    expected, found = (drawn(each, precision="full", cache=2) for each in both)
    assert psnr(found, expected) > 45


def test_a_batch_changes_no_picture(both, psnr):
    pictures = both[1].draw(PROMPTS, seeds=SEEDS, options=DrawOptions(steps=4, precision="full", vae="float32"))
    single = torch.stack([torch.from_numpy(np.array(picture.image)) for picture in pictures])
    assert psnr(single, drawn(both[1], precision="full")) > 45


def test_other_decoders(both, psnr, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file({f"decoder.{name}": value for name, value in TinyDecoder(width=8).state_dict().items()}, path)
    for more in ({"vae": "bf16"}, {"vae": "tiny", "tiny_decoder": path}):
        options = DrawOptions(steps=2, precision="full", **more)
        found = [np.array(next(iter(each.draw(PROMPTS[0], options=options))).image) for each in both]
        assert psnr(*(torch.from_numpy(picture) for picture in found[::-1])) > 30, more


def test_decoding_in_stripes(both, psnr):
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    for tiling in (False, True):
        settings = [each.resolve(DrawOptions(vae="float32", vae_tiling=tiling)) for each in both]
        found = [pipe.decode(latents.to(pipe.device), each) for pipe, each in zip(both, settings, strict=True)]
        assert psnr(found[1], found[0]) > 60


@pytest.mark.parametrize("engine", ["int8", "simulate"])
def test_quantized_pictures(psnr, engine):
    expected = drawn(dsdiff.load(engine="simulate", device="cpu"), precision="full")
    pipeline = dsdiff.load(engine=engine, device="cuda")
    assert psnr(drawn(pipeline, precision="full"), expected) > 20
    assert psnr(drawn(pipeline, precision="autocast"), expected) > 18
    merged = drawn(pipeline, merge=MergeOptions(ratio=0.5))
    assert merged.float().std() > 5 and torch.isfinite(merged.float()).all()


@pytest.mark.parametrize("name", ["cali_w4a8", "cali_w8a8", "cali_w4a8_dynamic"])
def test_integers_are_drawn_by_graphs(psnr, monkeypatch, name):
    """The pictures are those of calls that Python launches; merging adds in no fixed order."""
    pipeline = dsdiff.load(cali_ckpt=CHECKPOINTS[EMBEDDED][0].with_name(f"{name}.safetensors"), device="cuda")
    assert pipeline.quantization.engine == "int8"
    ways = {"plain": {}, "merged": {"merge": MergeOptions(ratio=0.5, proportional=True)}, "cached": {"cache": 2}}
    found = {way: drawn(pipeline, **options) for way, options in ways.items()}
    again = drawn(pipeline)
    with pipeline.recorded() as unet:
        assert isinstance(unet, GraphedUNet) and len(unet._recorded) == 1
    monkeypatch.setattr(HeldModel, "_can_be_recorded", False)
    launched = dsdiff.load(cali_ckpt=pipeline.quantization.cali_ckpt, device="cuda")
    expected = {way: drawn(launched, **options) for way, options in ways.items()}
    for way in ("plain", "cached"):
        assert torch.equal(found[way], expected[way]), way
    assert torch.equal(again, expected["plain"])
    assert psnr(found["merged"], expected["merged"]) > 20


def test_graphs_follow_loras(lora, psnr):
    pipeline = dsdiff.load(engine="int8", device="cuda")
    plain = drawn(pipeline)
    pipeline.set_lora((lora, 0.7))
    assert psnr(drawn(pipeline), drawn(dsdiff.load(engine="int8", lora=[(lora, 0.7)], device="cuda"))) > 60
    pipeline.set_lora()
    assert torch.equal(drawn(pipeline), plain)


def test_packed_weights_are_drawn_without_graphs(psnr):
    options = QuantizationOptions(engine="int8", low_memory=True)
    pipeline = dsdiff.load(quantization=options, device="cuda")
    assert psnr(drawn(pipeline), drawn(dsdiff.load(engine="int8", device="cuda"))) > 30


def test_a_picture_from_a_picture(both, psnr):
    start, mask = Image.new("RGB", (256, 256), "navy"), Image.new("L", (256, 256))
    mask.paste(255, (32, 32, 96, 96))
    options = DrawOptions(steps=5, precision="full", vae="float32", init=InitOptions(strength=0.6))
    found = []
    for pipeline in both:
        (picture,) = pipeline.img2img(PROMPTS[0], start, mask=mask, seeds=[1], options=options)
        found.append(torch.from_numpy(np.array(picture.image)))
    assert psnr(found[1], found[0]) > 40


# --- commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The file of a LoRA for the embedded model: a layer of the text encoder, two of the UNet."""
    layers = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (512, 128),
        "lora_unet_conv_in": (_channels(), 4, 3, 3),
    }
    generator, tensors = torch.Generator().manual_seed(0), {}
    for stem, shape in layers.items():
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=generator) * 0.2
        tensors[f"{stem}.lora_up.weight"] = torch.randn(shape[0], 2, *[1] * len(shape[2:]), generator=generator) * 0.2
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(tensors, path)
    return path


def _channels():
    from omegaconf import OmegaConf

    return OmegaConf.load(EMBEDDED).model.params.unet_config.params.model_channels


def test_loras_merged_and_as_branches(both, lora, psnr):
    plain = drawn(both[1], precision="full")
    merged = [drawn(dsdiff.load(lora=[(lora, 0.7)], device=device), precision="full") for device in ("cpu", "cuda")]
    assert psnr(merged[1], merged[0]) > 40 and not torch.equal(merged[1], plain)
    pipeline = dsdiff.load(engine="int8", lora=[(lora, 0.7)], device="cuda")
    assert psnr(drawn(pipeline, precision="full"), merged[0]) > 15
    pipeline.set_lora()
    assert psnr(drawn(pipeline, precision="full"), plain) > 15


SHORT = ["--ddim_steps", "3", "--device", "cuda", "--prompt", PROMPTS[0]]


def test_txt2img_and_img2img(tmp_path):
    txt2img.main([*SHORT, "--n_iter", "1", "--n_samples", "2", "--outdir", str(tmp_path / "float")])
    txt2img.main(
        [*SHORT, "--n_iter", "1", "--n_samples", "2", "--ptq", "--ratio", "0.5", "--outdir", str(tmp_path / "int8")]
    )
    picture = tmp_path / "float/samples/00000.png"
    img2img.main(
        [*SHORT, "--n_iter", "1", "--init", str(picture), "--strength", "0.7", "--outdir", str(tmp_path / "again")]
    )
    for name in ("float", "int8", "again"):
        assert np.asarray(Image.open(tmp_path / name / "samples/00000.png")).std() > 5, name
        assert "cuda" in (tmp_path / name / "settings.yaml").read_text(), name
