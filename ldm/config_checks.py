"""Checks of a config before a model is built from it: sizes that its weights bear out, and types of values.

A config may lie in a file from elsewhere. One that asks for a million layers would keep a computer busy for hours
before it turned out that the weights are of a small model.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

LARGEST_NUMBER = 65_536  # more than any size that models of this kind have and their weights do not show
MOST_LAYERS = 1000  # as above; so many are built in a second or two
# What repeats layers: numbers, and lists with an entry for each level.
DEPTHS = ("transformer_depth", "num_res_blocks", "num_hidden_layers")
LEVELS = ("channel_mult", "ch_mult")
NOT_BUILT = "scheduler_config"  # of training, which builds the learning rates itself


def check_sizes(config: Any, shapes: Iterable[Sequence[int]] | None, source: str) -> None:
    """Raise ValueError if a config has sizes that its weights cannot have.

    config: plain containers, or a node of OmegaConf. shapes: of all weights, None where they are not known. source:
    names the config's file in the message. No number may be larger than the largest side of a weight, and no layer may
    be repeated more often than there are weights; LARGEST_NUMBER and MOST_LAYERS are allowed in any case.
    """
    known = [] if shapes is None else [tuple(shape) for shape in shapes]
    largest = max((side for shape in known for side in shape), default=0)
    _check_node(config, "", max(largest, LARGEST_NUMBER), max(len(known), MOST_LAYERS), source)


def _check_node(node: Any, path: str, largest: int, most: int, source: str) -> None:
    if isinstance(node, Mapping):
        layers = math.prod(_repeats(name, value) for name, value in node.items())
        if layers > most:
            repeats = ", ".join(str(name) for name in node if name in (*DEPTHS, *LEVELS))
            raise ValueError(
                f"{source}: {path or 'the config'} asks for {layers} layers ({repeats}), {most} at most fit"
            )
        for name, value in node.items():
            if name != NOT_BUILT:
                _check_node(value, f"{path}.{name}" if path else str(name), largest, most, source)
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        if len(node) > LARGEST_NUMBER:
            raise ValueError(f"{source}: {path} has {len(node)} entries")
        for value in node:
            _check_node(value, path, largest, most, source)
    elif isinstance(node, int | float) and not (math.isfinite(node) and abs(node) <= largest):
        raise ValueError(f"{source}: {path} is {node:.6g}: a model of this kind has {largest} at most")


def _repeats(name: Any, value: Any) -> int:
    """Return how often an entry of a config repeats what the others of its node describe."""
    if name in DEPTHS and isinstance(value, int):
        return max(value, 1)
    return max(len(value), 1) if name in LEVELS and isinstance(value, Sequence) else 1


def check_parts(model: Any, source: str) -> None:
    """Raise ValueError if the networks of a latent diffusion model do not fit each other.

    source: names the config in the message. A part that lacks a size, as one of another kind does, is not compared.
    """
    for path, other_path in (
        ("model.diffusion_model.in_channels", "channels"),
        ("model.diffusion_model.out_channels", "channels"),
        ("first_stage_model.embed_dim", "channels"),
        ("model.diffusion_model.context_dim", "cond_stage_model.transformer.text_model.config.hidden_size"),
    ):
        size, other = _attribute(model, path), _attribute(model, other_path)
        if size is not None and other is not None and size != other:
            raise ValueError(f"{source} does not fit itself: {path} is {size}, and {other_path} is {other}")


def _attribute(value: Any, path: str) -> Any:
    """Return the attribute at a dotted path; None where there is none."""
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def check_types(name: str, target: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument is of another type than `target` declares for it.

    name: the target's name in the config. Arguments without a declared type pass.
    """
    function = target.__init__ if isinstance(target, type) else target
    try:
        hints = get_type_hints(function)
    except Exception:  # functions of other libraries, whose hints may name what only type checkers import
        return
    # The hint of **arguments is that of each of them.
    own = {each.name for each in inspect.signature(function).parameters.values() if each.kind != each.VAR_KEYWORD}
    for argument, value in arguments.items():
        if argument not in hints or argument not in own:
            continue
        try:
            check_type(value, hints[argument], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            wanted = inspect.formatannotation(hints[argument])
            raise ValueError(f"params of {name}: {argument} is {value!r:.200}: it must be of type {wanted}") from error
