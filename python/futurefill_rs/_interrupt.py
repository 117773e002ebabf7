"""Ctrl-C ends the command `futurefill` with one line and status 2, from the package's first import on.

While numpy or torch is imported, or the interpreter ends, a `KeyboardInterrupt` becomes a traceback, another
error or an abort: the process of the command ends at once instead. Programs that import the package keep
Python's own behaviour.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

clear = b""
"""Written before the line: what removes a progress bar, while there is one."""


def is_command() -> bool:
    """Whether this process is the console script or `python -m futurefill_rs.cli`."""
    if not sys.argv:
        return False
    if sys.argv[0] == "-m":
        # While `python -m` looks for its module, whose name comes before the arguments.
        return sys.orig_argv[-len(sys.argv)].endswith("futurefill_rs.cli")
    return os.path.basename(sys.argv[0]) in ("futurefill", "futurefill.exe")


def end_at_once() -> None:
    """From now on Ctrl-C ends the process, unless it is ignored or someone else waits for it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def ignore() -> None:
    """The process is about to end: Ctrl-C has nothing left to interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    ignore()
    with contextlib.suppress(OSError):
        os.write(2, clear + b"futurefill: interrupted\n")
    os._exit(2)


if is_command():
    end_at_once()
