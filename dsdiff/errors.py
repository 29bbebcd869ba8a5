"""Errors that the commands and the server tell alike. Nothing here imports torch."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if Python or torch ran out of memory.

    Torch's error on a GPU goes by its name, since commands that fail early import no torch; that on a CPU by its text.
    """
    by_name = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_name or "can't allocate memory" in str(error)
