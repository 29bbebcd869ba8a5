"""The console, flags and processes of commands; imported by `scripts` only. Nothing here imports torch.

Importing it makes Ctrl-C end a command in one line from here on: others of its modules are still being imported then,
before `console.command` guards anything. Only Python's own start, and the standard library's modules, come before.
"""

import sys
from types import TracebackType

_before = sys.excepthook


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an error that nothing caught: Ctrl-C as a line, after which Python ends by SIGINT, others as before."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        _before(kind, error, traceback)


sys.excepthook = _tell
