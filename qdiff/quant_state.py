"""Convert a model's quantizers to named tensors, the content of our files, and back.

NAME.codes       uint8, a weight's codes, packed at their width (qdiff.bitpack)
NAME.delta       float32, [] for an activation, [channels, 1, ...] for a weight
NAME.zero_point  float32 of the same shape, whole numbers
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizers import DynamicQuantizer, FrozenQuantizer, Quantizer, check_range


def weight_tensors(qnn: QuantModel, unit: str = "") -> dict[str, Tensor]:
    """Return the codes and ranges of the weights of a unit, or of the whole model, as they are rounded at present.

    Raises ValueError for a lowered model.
    """
    qnn.check_float()
    tensors = {}
    for layer, part_name, name in _weights(qnn, unit):
        quantizer = getattr(layer, part_name)
        if not isinstance(quantizer, FrozenQuantizer):
            quantizer = FrozenQuantizer(quantizer, layer.weight_parts()[part_name])
        tensors[f"{name}.codes"] = quantizer.packed.cpu().clone()
        tensors |= range_tensors(name, quantizer)
    return tensors


def weight_range_tensors(qnn: QuantModel, unit: str = "") -> dict[str, Tensor]:
    """Return the fitted ranges of the weights of a unit, or of the whole model."""
    tensors = {}
    for layer, part_name, name in _weights(qnn, unit):
        tensors |= range_tensors(name, getattr(layer, part_name))
    return tensors


def load_weight_ranges(qnn: QuantModel, tensors: Mapping[str, Tensor]) -> None:
    """Set the ranges of all weights to what `weight_range_tensors` returned; roundings stay to be chosen.

    Raises ValueError if a tensor is missing or does not fit.
    """
    for layer, part_name, name in _weights(qnn, ""):
        try:
            delta, zero_point = (tensors[f"{name}.{what}"] for what in ("delta", "zero_point"))
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from error
        getattr(layer, part_name).set(delta, zero_point)


def activation_tensors(qnn: QuantModel, unit: str = "") -> dict[str, Tensor]:
    """Return the fitted ranges of the activations of a unit, or of the whole model; dynamic ones have none."""
    tensors = {}
    for name, quantizer in _acts(qnn, unit).items():
        tensors |= range_tensors(name, quantizer)
    return tensors


def range_tensors(name: str, quantizer: Quantizer) -> dict[str, Tensor]:
    """Return copies of delta and zero_point, by name. Copies, since tensors that share memory cannot be saved."""
    return {f"{name}.{what}": getattr(quantizer, what).detach().cpu().clone() for what in ("delta", "zero_point")}


def load_tensors(
    qnn: QuantModel, tensors: Mapping[str, Tensor], unit: str = "", *, weights: bool = True, acts: bool = True
) -> None:
    """Load what `weight_tensors` and `activation_tensors` return; weight quantizers become FrozenQuantizers.

    Raises ValueError, and leaves the model as it is, if a tensor is missing or does not fit.
    """
    try:
        frozen = [_frozen(tensors, *slot) for slot in _weights(qnn, unit)] if weights else []
        ranges = {name: _range(tensors, name) for name in _acts(qnn, unit)} if acts else {}
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from error
    for (layer, part_name, _), quantizer in zip(_weights(qnn, unit) if weights else (), frozen, strict=True):
        setattr(layer, part_name, quantizer)
    for name, quantizer in _acts(qnn, unit).items() if acts else ():
        quantizer.set(*ranges[name])


def check_keys(found: set[str], expected: set[str], source: str) -> None:
    """Raise ValueError, naming some of them, if keys of the file `source` are missing or unknown."""
    for what, keys in (("lacks", expected - found), ("has unknown", found - expected)):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"cali_ckpt {source!r} {what} {shown}{more}: it is of another architecture, other settings, or damaged"
            )


def expected_keys(qnn: QuantModel) -> set[str]:
    """Return the names of all tensors that the model's quantizers hold."""
    weights = {f"{name}.{what}" for _, _, name in _weights(qnn, "") for what in ("codes", "delta", "zero_point")}
    return weights | {f"{name}.{what}" for name in _acts(qnn, "") for what in ("delta", "zero_point")}


def _frozen(tensors: Mapping[str, Tensor], layer: QuantModule, part_name: str, name: str) -> FrozenQuantizer:
    old: Quantizer = getattr(layer, part_name)
    shape = tuple(layer.weight_parts()[part_name].shape)
    codes, delta, zero_point = (tensors[f"{name}.{what}"] for what in ("codes", "delta", "zero_point"))
    quantizer = FrozenQuantizer.from_packed(codes, shape, old.n_bits, delta, zero_point)
    quantizer.enabled = old.enabled
    return quantizer if layer.weight.is_meta else quantizer.to(layer.weight.device)


def _range(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    delta, zero_point = tensors[f"{name}.delta"], tensors[f"{name}.zero_point"]
    if delta.ndim:
        raise ValueError(f"{name}.delta has shape {tuple(delta.shape)}, not ()")
    check_range(delta, zero_point)
    return delta, zero_point


def _weights(qnn: QuantModel, unit: str) -> Iterator[tuple[QuantModule, str, str]]:
    """Yield for each weight quantizer of the unit its layer, its name there, and its name in the model."""
    for layer_name, layer in qnn.layers().items():
        if _within(layer_name, unit):
            for part_name in layer.weight_parts():
                yield layer, part_name, f"{layer_name}.{part_name}"


def _acts(qnn: QuantModel, unit: str) -> dict[str, Quantizer]:
    """Return the quantizers of activations of the unit that have fitted ranges, by name."""
    quantizers = qnn.act_quantizers().items()
    return {name: q for name, q in quantizers if _within(name, unit) and not isinstance(q, DynamicQuantizer)}


def _within(name: str, unit: str) -> bool:
    return not unit or name == unit or name.startswith(f"{unit}.")
