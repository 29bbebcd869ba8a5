"""Words for error messages, which are one line each."""

from collections.abc import Sequence


def some(names: Sequence[str], limit: int = 4) -> str:
    """Join the first names with commas and count the rest."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type for an error without one."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def brief(value: object, most: int = 300) -> str:
    """Return a value's text, cut after `most` characters."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."
