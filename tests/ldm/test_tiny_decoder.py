"""The tiny decoder: against diffusers' AutoencoderTiny, in both layouts of its files, and files that are none."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.models.tiny_decoder import read_tiny_decoder
from ldm.modules.diffusionmodules.tiny import TinyDecoder


def theirs(tensors):
    """The names that TAESD's own files have: a Sequential whose layer 0 squeezes the latents."""
    parts = {name: name.removeprefix("layers.").split(".", 1) for name in tensors}
    return {f"{int(number) + 1}.{rest}": tensors[name] for name, (number, rest) in parts.items()}


def test_it_is_that_of_diffusers(tmp_path):
    library = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = library.AutoencoderTiny().eval()
    model.save_pretrained(tmp_path)
    decoder = read_tiny_decoder(tmp_path / "diffusion_pytorch_model.safetensors")
    z = 2 * torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        expected = model.decode(z).sample
        assert expected.shape == (2, 3, 48, 40) and expected.std() > 0
        assert torch.allclose(decoder(z), expected, atol=1e-5)


def test_the_numbers_written_out():
    """Without a library: the first and the last layers, with blocks that add nothing."""
    torch.manual_seed(0)
    decoder = TinyDecoder(channels=4, width=8)
    for block in decoder.modules():
        if isinstance(block, nn.Conv2d) and block.bias is not None and block.weight.shape[:2] == (8, 8):
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
    sizes = [layer for layer in decoder.layers if isinstance(layer, nn.Conv2d)]
    z = 5 * torch.randn(1, 4, 2, 3)
    with torch.no_grad():
        x = torch.relu(sizes[0](3 * torch.tanh(z / 3)))
        for conv in sizes[1:-1]:
            x = torch.relu(conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
        assert torch.allclose(decoder(z), 2 * sizes[-1](x) - 1, atol=1e-6)


def test_both_layouts_are_read_and_an_encoder_is_left_out(tmp_path):
    torch.manual_seed(0)
    for width in (64, 16):
        decoder = TinyDecoder(width=width)
        tensors = decoder.state_dict()
        with_encoder = {f"decoder.{name}": value for name, value in tensors.items()}
        with_encoder["encoder.layers.0.weight"] = torch.zeros(64, 3, 3, 3)
        save_file(with_encoder, tmp_path / "diffusers.safetensors")
        save_file({name: value.half() for name, value in theirs(tensors).items()}, tmp_path / "half.safetensors")
        torch.save(theirs(tensors), tmp_path / "taesd_decoder.pth")
        z = torch.randn(1, 4, 3, 3)
        with torch.no_grad():
            expected = decoder(z)
            for name in ("diffusers.safetensors", "taesd_decoder.pth"):
                assert torch.equal(read_tiny_decoder(tmp_path / name)(z), expected), name
            assert torch.allclose(read_tiny_decoder(tmp_path / "half.safetensors")(z), expected, atol=0.01)


def test_other_files_are_refused(tmp_path):
    tensors = theirs(TinyDecoder().state_dict())
    cases = {
        "encoder": ({"encoder.layers.0.weight": torch.zeros(64, 3, 3, 3)}, "holds no tiny decoder"),
        "less": (
            {name: value for name, value in tensors.items() if name != "18.conv.0.bias"},
            "no tiny decoder of TAESD",
        ),
        "more": (tensors | {"20.weight": torch.zeros(3)}, "no tiny decoder of TAESD"),
        "nan": (tensors | {"1.bias": torch.full((64,), float("nan"))}, "not of finite"),
        "bytes": (tensors | {"1.bias": torch.zeros(64, dtype=torch.int8)}, "not of finite"),
    }
    for name, (content, says) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=says) as raised:
            read_tiny_decoder(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(raised.value), name
    with pytest.raises(FileNotFoundError):
        read_tiny_decoder(tmp_path / "missing.pth")
