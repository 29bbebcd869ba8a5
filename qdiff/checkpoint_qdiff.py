"""Q-Diffusion's published format: a torch file with the state_dict of its quantized UNet, all in float32.

All keys begin with `model.`. The float weights are stored unchanged. Beside each layer's `weight` there are

    weight_quantizer.alpha, .delta, .zero_point   AdaRound: w' = (clamp(floor(w / delta) + (alpha >= 0) + z) - z) delta
    act_quantizer.delta, .zero_point              only if activations are quantized; so are act_quantizer_{q,k,v,w}
    weight_quantizer_0.*, act_quantizer_0.*       the second part of a split layer

Bit widths are not in the file. They are inferred from the zero points, which lie in 0..2^b - 1: over thousands of
channels the largest one is in the upper half of that range.
"""

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.adaptive_rounding import AdaRoundQuantizer
from qdiff.config import BITS, QuantConfig
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel, freeze_layer
from qdiff.quant_state import check_keys, range_tensors
from qdiff.quantizers import Quantizer

logger = logging.getLogger(__name__)

# A frozen rounding is written as alpha = DECIDED, where h(alpha) reaches 1, or alpha = -DECIDED, where it reaches 0.
DECIDED = 2.3978953


def read_tensors(path: Path) -> Any:
    """Return the content of a torch file, mapped into memory if it is a zip archive. No code in it is run.

    Raises ValueError if it is no torch file, is damaged, or holds more than tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's own text advises to load it all the same
        raise ValueError(f"{str(path)!r} is no checkpoint, or holds more than tensors: not loaded") from error
    except Exception as error:  # a damaged file may lead to any of them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{str(path)!r} is no readable checkpoint: {reason}") from error


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a Q-Diffusion cali_ckpt by name. Raises ValueError if the file is none, or damaged."""
    content, source = read_tensors(path), str(path)
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{source!r} is no Q-Diffusion cali_ckpt: a dictionary of tensors is expected")
    if not any(key.endswith(".weight_quantizer.alpha") for key in content):
        raise ValueError(f"{source!r} is no Q-Diffusion cali_ckpt: it has no weight_quantizer.alpha")
    for key, value in content.items():
        if value.layout != torch.strided or not value.is_floating_point() or value.numel() == 0:
            raise ValueError(f"{key} of {source!r} is no tensor of floating-point numbers")
        if key.endswith((".delta", ".zero_point")):
            _check_numbers(key, value, source)
    return dict(content)


def _check_numbers(key: str, value: Tensor, source: str) -> None:
    """Raise ValueError unless a step size is positive, a zero point whole, and both finite."""
    fits = torch.isfinite(value) & (value > 0 if key.endswith(".delta") else value == value.round())
    if not bool(fits.all()):
        rule = "positive and finite" if key.endswith(".delta") else "whole numbers"
        raise ValueError(f"{key} of {source!r} must be {rule}")


def split_layers_in(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the channels of the first part of each split layer, by its name."""
    end = ".weight_quantizer_0.alpha"
    layers = [key.removesuffix(end) for key in tensors if key.endswith(end)]
    first = {layer: tensors.get(f"{layer}.weight_quantizer.alpha") for layer in layers}
    # Without an alpha, or with one of another shape, loading raises the error.
    return {layer: alpha.shape[1] for layer, alpha in first.items() if alpha is not None and alpha.ndim > 1}


# --- settings, inferred from the numbers -------------------------------------------------------------------


def infer_config(
    tensors: Mapping[str, Tensor], source: str, given: Mapping[str, int | None]
) -> tuple[QuantConfig, list[str]]:
    """Return the settings that the tensors were made with, and the names of those that were inferred.

    given: bit widths that are known from elsewhere, None for one that is not. Raises ValueError if one contradicts the
    tensors.
    """
    zero_points = {key: value for key, value in tensors.items() if key.endswith(".zero_point")}
    quant_act = any("act_quantizer" in key for key in zero_points)
    if all("act_quantizer" in key for key in zero_points):
        raise ValueError(f"cali_ckpt {source!r} has no zero points of weights: it is damaged")
    found = {"weight_bit": _bits_of([v for k, v in zero_points.items() if "act_quantizer" not in k])}
    if quant_act:
        found["act_bit"] = _bits_of([v for k, v in zero_points.items() if "act_quantizer" in k])
    settings, inferred = {}, []
    for name, bits in found.items():
        value = given.get(name)
        if value is None:
            inferred.append(name)
        elif value != bits:
            raise ValueError(f"{name} {value} contradicts {source!r}, whose zero points are those of {name} {bits}")
        settings[name] = bits
    softmax = [v for k, v in tensors.items() if k.endswith("act_quantizer_w.delta")]
    if softmax:
        value = given.get("sm_abit")
        settings["sm_abit"] = _softmax_bits(max(float(v) for v in softmax), value, source)
        if value is None:
            inferred.append("sm_abit")
    config = QuantConfig(quant_act=quant_act, split=bool(split_layers_in(tensors)), **settings)
    return config, inferred


def _bits_of(zero_points: list[Tensor]) -> int:
    highest = max(float(value.max()) for value in zero_points)
    bits = int(highest).bit_length() if highest >= 0 else 0
    return min(max(bits, BITS[0]), BITS[-1])


def _softmax_bits(delta: float, given: int | None, source: str) -> int:
    """Return the bits b of the softmax quantizers, for which (2^b - 1) delta is near 1. delta: their largest step."""

    def spans(bits: int) -> float:
        return (2**bits - 1) * delta

    likely = min(BITS, key=lambda bits: abs(spans(bits) - 0.75))
    if given not in (None, likely) and not 0.2 < spans(given) < 1.5:
        raise ValueError(f"sm_abit {given} contradicts {source!r}, whose step sizes are those of sm_abit {likely}")
    return likely if given is None else given


# --- to and from a model -----------------------------------------------------------------------------------


def load(qnn: QuantModel, tensors: dict[str, Tensor], source: str, freeze: bool) -> None:
    """Load float weights, ranges and roundings. Raises ValueError, and changes nothing, if they do not fit."""
    expected = expected_shapes(qnn)
    _check(expected, tensors, source, qnn.config.quant_act)
    parameters = dict(qnn.named_parameters()) | dict(qnn.named_buffers())
    _tell_of_other_weights({key: parameters[key] for key in expected if "quantizer" not in key}, tensors, source)
    with torch.no_grad():
        for key in expected:
            if "quantizer" not in key:
                parameters[key].copy_(tensors[key])
        for name, quantizer in qnn.act_quantizers().items():
            quantizer.set(tensors[f"{name}.delta"], tensors[f"{name}.zero_point"])
        for name, layer in qnn.layers().items():
            _load_layer(name, layer, tensors)
            if freeze:
                freeze_layer(layer)


def _tell_of_other_weights(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Warn if the float weights of a file are not those of the model, which they are about to replace.

    Models that were rounded to float16 on their way count as the same.
    """
    half = torch.finfo(torch.float16)
    tiny = half.eps * half.smallest_normal
    others = [
        key
        for key, weight in own.items()
        if weight.device.type != "meta"
        and not torch.allclose(tensors[key].float(), weight.float().cpu(), rtol=half.eps, atol=tiny)
    ]
    if others:
        logger.warning(
            "%s brings its own float UNet, which is not the model's (%d of %d tensors differ, such as %s): "
            "the file's is drawn with",
            source,
            len(others),
            len(own),
            others[0],
        )


def _load_layer(name: str, layer: QuantModule, tensors: Mapping[str, Tensor]) -> None:
    for part_name in layer.weight_parts():
        key = f"{name}.{part_name}"
        old: Quantizer = getattr(layer, part_name)
        delta, zero_point, alpha = (tensors[f"{key}.{what}"] for what in ("delta", "zero_point", "alpha"))
        quantizer = AdaRoundQuantizer(old.n_bits, False, delta, zero_point, alpha.clone())
        quantizer.enabled = old.enabled
        setattr(layer, part_name, quantizer.to(layer.weight.device))


def expected_shapes(qnn: QuantModel) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of each tensor in the model's file of this format."""
    shapes = {}
    for key, value in _float_tensors(qnn).items():
        shapes[key] = tuple(value.shape)
    for name, layer in qnn.layers().items():
        for part_name, part in layer.weight_parts().items():
            channels = (part.shape[0], *[1] * (part.ndim - 1))
            shapes[f"{name}.{part_name}.alpha"] = tuple(part.shape)
            shapes[f"{name}.{part_name}.delta"] = shapes[f"{name}.{part_name}.zero_point"] = channels
    for name in qnn.act_quantizers():
        shapes[f"{name}.delta"] = shapes[f"{name}.zero_point"] = ()
    return shapes


def _float_tensors(qnn: QuantModel) -> dict[str, Tensor]:
    return {key: value for key, value in qnn.state_dict().items() if "quantizer" not in key}


def _check(expected: Mapping[str, tuple[int, ...]], tensors: dict[str, Tensor], source: str, quant_act: bool) -> None:
    # A file with ranges of activations also serves a model that quantizes weights only, but not the reverse.
    found = {key for key in tensors if quant_act or "act_quantizer" not in key}
    check_keys(found, set(expected), source)
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{key} of {source!r} has shape {tuple(tensors[key].shape)}, the model's has {shape}")
        if not bool(torch.isfinite(tensors[key]).all()):
            raise ValueError(f"{key} of {source!r} has values that are not finite")


def to_state_dict(qnn: QuantModel) -> dict[str, Tensor]:
    """Return the model in this format. Raises ValueError for signed activations, which it cannot hold."""
    tensors = {key: value.detach().float().cpu().clone() for key, value in _float_tensors(qnn).items()}
    for name, layer in qnn.layers().items():
        for part_name, part in layer.weight_parts().items():
            quantizer = getattr(layer, part_name)
            tensors[f"{name}.{part_name}.alpha"] = _alpha_of(quantizer, part).detach().float().cpu().clone()
            tensors |= range_tensors(f"{name}.{part_name}", quantizer)
    for name, quantizer in qnn.act_quantizers().items():
        if quantizer.symmetric:
            raise ValueError("Q-Diffusion's format has no signed activations: write our own format")
        tensors |= range_tensors(name, quantizer)
    return tensors


@torch.no_grad()
def _alpha_of(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Return an alpha that rounds `weight` to the quantizer's codes."""
    if isinstance(quantizer, AdaRoundQuantizer):
        return quantizer.alpha
    codes = quantizer.codes(weight)
    floor = (weight.float() / quantizer.delta).floor() + quantizer.zero_point
    down = floor.clamp(quantizer.low, quantizer.high) == codes
    up = (floor + 1).clamp(quantizer.low, quantizer.high) == codes
    if not bool((up | down).all()):
        raise ValueError("a weight's code is neither its rounding up nor down: Q-Diffusion's format cannot hold it")
    return torch.where(down, -DECIDED, DECIDED)
