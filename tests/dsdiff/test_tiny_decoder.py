"""--vae tiny: which file it takes, what it makes of latents, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsdiff import DrawOptions, ModelOptions, Pipeline, find_model
from dsdiff.models import decoder as decoders
from dsdiff.models.registry import EMBEDDED, STABLE_DIFFUSION, TINY_DECODERS
from ldm.models.tiny_decoder import read_tiny_decoder
from ldm.modules.diffusionmodules.tiny import TinyDecoder
from qdiff.engine.backends import onednn
from qdiff.engine.decoder.tiny import IntegerTinyDecoder

OPTIONS = DrawOptions(height=32, width=48, steps=2, precision="full", vae="tiny")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny decoder whose pictures are of latents, although it has learnt nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file({f"decoder.{name}": value for name, value in TinyDecoder(width=8).state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(find_model(ModelOptions(config=Path(EMBEDDED))), device="cpu")


def test_pictures_are_those_of_the_tiny_decoder(pipeline, file):
    settings = pipeline.resolve(replace(OPTIONS, tiny_decoder=file))
    assert (settings.vae, settings.tiny_decoder.path) == ("tiny", str(file))
    latents = pipeline.sample(["a red circle"], [3], settings)
    with torch.no_grad():
        expected = (read_tiny_decoder(file)(latents) / 2 + 0.5).clamp(0, 1)
    got = pipeline.decode(latents, settings)
    assert got.shape == (1, 3, 32, 48) and got.dtype == torch.float32 and expected.std() > 0
    assert (got - expected).abs().max() < 0.02  # integers, or bfloat16, where the CPU computes in them
    picture = next(iter(pipeline.draw("a red circle", seeds=[3], options=replace(OPTIONS, tiny_decoder=file))))
    drawn = torch.from_numpy(np.asarray(picture.image).copy()).permute(2, 0, 1)[None] / 255
    assert (drawn - expected).abs().max() < 0.03
    other = replace(settings, vae="float32", tiny_decoder=None)
    assert (pipeline.decode(latents, other) - got).abs().max() > 0.05


def test_it_computes_in_integers_where_kernels_are_exact(file, monkeypatch):
    found = decoders.TinyFile(path=str(file), sha256="")
    exact = onednn.largest_exact_weight() >= onednn.LARGEST
    kind = type(decoders.load_tiny(found, 4, torch.device("cpu")))
    assert kind is (IntegerTinyDecoder if exact else TinyDecoder)
    monkeypatch.setattr(onednn, "largest_exact_weight", lambda: onednn.LARGEST_IN_16_BITS)
    assert type(decoders.load_tiny(found, 4, torch.device("cpu"))) is TinyDecoder


def test_a_picture_is_the_same_in_any_batch(pipeline, file):
    """Ranges are those of one picture."""
    settings = pipeline.resolve(replace(OPTIONS, tiny_decoder=file))
    latents = torch.randn(2, 4, 4, 6) * torch.tensor([0.3, 3.0]).view(2, 1, 1, 1)
    both = pipeline.decode(latents, settings)
    assert torch.equal(both[:1], pipeline.decode(latents[:1], settings))
    assert torch.equal(both[1:], pipeline.decode(latents[1:], settings))


def test_the_model_s_own_file_is_taken(pipeline, file, monkeypatch):
    monkeypatch.setattr(decoders, "TINY_DECODERS", {EMBEDDED: file})
    assert pipeline.resolve(OPTIONS).tiny_decoder.path == str(file)
    monkeypatch.setattr(decoders, "TINY_DECODERS", {})
    with pytest.raises(FileNotFoundError, match="no tiny decoder: give TAESD's file, or another, with --tiny_decoder"):
        pipeline.resolve(OPTIONS)
    assert EMBEDDED in TINY_DECODERS


def test_a_bundle_has_the_file_of_its_own_autoencoder(pipeline, file, monkeypatch):
    """Not that of Stable Diffusion v1, which a model of shapes would be decoded by to noise."""
    bundle = replace(pipeline.spec, config_path=Path("bundle.safetensors"), bundle=True)
    monkeypatch.setattr(decoders, "TINY_DECODERS", {STABLE_DIFFUSION: Path(__file__), EMBEDDED: file})
    assert decoders.find_tiny(bundle, None).path == str(file)
    monkeypatch.setattr(decoders, "TINY_DECODERS", {STABLE_DIFFUSION: Path(__file__)})
    with pytest.raises(FileNotFoundError, match="no tiny decoder: give"):
        decoders.find_tiny(bundle, None)


def test_what_cannot_be_is_refused(pipeline, file, tmp_path):
    for options, says in (
        ({"vae": "float32", "tiny_decoder": file}, "tiny_decoder has no effect without vae tiny"),
        ({"vae_tiling": True}, "vae_tiling has no effect with vae tiny"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(OPTIONS, **options)
    with pytest.raises(FileNotFoundError, match="no tiny decoder at"):
        pipeline.resolve(replace(OPTIONS, tiny_decoder=tmp_path / "none.pth"))
    wide = tmp_path / "wide.safetensors"
    save_file(
        {f"decoder.{name}": value for name, value in TinyDecoder(channels=16, width=8).state_dict().items()}, wide
    )
    settings = pipeline.resolve(replace(OPTIONS, tiny_decoder=wide))
    with pytest.raises(ValueError, match="decodes latents of 16 channels, the model's have 4"):
        pipeline.prepare(settings)  # before anything is drawn
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        pipeline.prepare(pipeline.resolve(replace(OPTIONS, tiny_decoder=broken)))
