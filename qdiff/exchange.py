"""Exchange a module of a model for another object, and put the original back.

An `Exchanged` stands in the slot of another module, with that module's children, parameters and fields. It holds the
original, so that `eject` restores the model exactly: no class is rewritten and no method is replaced.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch.nn as nn


class Exchanged(nn.Module):
    """A module that stands in the slot of `original`.

    It has the original's children and parameters, under the same names and in the same order: the same objects, not
    copies. Attributes named in FIELDS are copied. A subclass that also inherits from the original's class therefore
    computes what the original computes, until it overrides something. Hooks stay with the original: they do not run
    while it is out of its slot.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, original: nn.Module):
        nn.Module.__init__(self)  # not super(): what the original's class would build is taken from the original
        self.training = original.training
        for name in self.FIELDS:
            setattr(self, name, getattr(original, name))
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in children_of(original):
            self.add_module(name, child)
        self._original: tuple[nn.Module, ...] = (original,)  # in a tuple: not a submodule

    @property
    def original(self) -> nn.Module:
        """The module in whose slot this one stands. Raises ValueError once it was released."""
        if not self._original:
            raise ValueError(f"the original of this {type(self).__name__} is gone: load the model anew")
        return self._original[0]

    def release(self) -> None:
        """Drop the original, which frees the weights that only it holds. It cannot be put back any more."""
        self._original = ()


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the direct children with their names. A child that has several names is yielded once for each."""
    for name, child in module.named_modules(remove_duplicate=False):
        if name and "." not in name:
            yield name, child


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` into the slot `name` of `root`, such as "input_blocks.1.0"."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def exchange(root: nn.Module, factories: Mapping[type[nn.Module], Callable[[nn.Module], nn.Module]]) -> None:
    """Put `factories[type(module)](module)` into the slot of each module below `root` whose exact type is a key.

    A module that stands in several slots is exchanged once: the same new object stands in all of them.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(root.named_modules(remove_duplicate=False)):
        factory = factories.get(type(module))
        if name and factory is not None:
            if module not in made:
                made[module] = factory(module)
            put_module(root, name, made[module])


def eject(root: nn.Module, kind: type[Exchanged] = Exchanged) -> None:
    """Put the originals of all modules of `kind` below `root` back into their slots.

    Raises ValueError, and leaves the model as it is, if one of them was released.
    """
    found = [
        (name, module.original)
        for name, module in root.named_modules(remove_duplicate=False)
        if name and isinstance(module, kind)
    ]
    for name, original in reversed(found):  # inner ones first: an original holds the originals of its children
        put_module(root, name, original)


def release(root: nn.Module) -> None:
    """Release all exchanged modules below `root`, which frees the weights that only their originals hold."""
    for module in root.modules():
        if isinstance(module, Exchanged):
            module.release()


def check_unmerged(root: nn.Module) -> None:
    """Raise ValueError if tokens are merged anywhere in the model, as `tomesd.apply_patch` does."""
    if any(hasattr(module, "token_merging") for module in root.modules()):
        raise ValueError(
            "this model merges tokens, and its blocks cannot be exchanged under the patch: quantize first, merge "
            "tokens last (tomesd.remove_patch takes the patch off)"
        )
