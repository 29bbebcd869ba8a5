"""Arguments of other people's configs that have no effect in this project."""

from collections.abc import Mapping
from typing import Any


def check_neutral(cls: type, given: Mapping[str, Any], neutral: Mapping[str, Any]) -> None:
    """Raise ValueError unless each argument in `given` is in `neutral`, with the value at which it changes nothing."""
    for name, value in given.items():
        if name not in neutral:
            raise ValueError(f"{cls.__name__} has no argument {name!r}: take it out of the config")
        if value != neutral[name] and (value or neutral[name]):
            raise ValueError(f"{cls.__name__}: {name} {value!r} is not supported: only {neutral[name]!r} is")
