"""Checks of options, each with its line for the user. `optional` lets None pass, which stands for a default."""

from collections.abc import Sequence


def is_whole(value: object) -> bool:
    """Return True for a whole number, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(name: str, value: object, low: int, high: int | None = None, *, optional: bool = False) -> None:
    """Raise ValueError unless a value is a whole number in low..high; high None is no end."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limits = f"of {low} or more" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} is {value!r}: it must be a whole number {limits}")


def check_choice(name: str, value: object, choices: Sequence[str], *, optional: bool = False) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices and not (value is None and optional):
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(choices)}")
