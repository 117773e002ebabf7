"""The command `futurefill`: generate text, score DNA, measure the methods, show what is installed.

Any error, usage included, is one line on standard error and exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from futurefill_rs import _interrupt
from futurefill_rs.cli.arguments import parser
from futurefill_rs.cli.terminal import Progress, printable
from futurefill_rs.data import BUILTIN


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after one line on standard error.

    Without arguments those of the process count, which Ctrl-C then ends at once (see `_interrupt`).
    """
    if arguments is None:
        _interrupt.end_at_once()
    message = _run(arguments)
    if arguments is None:
        _interrupt.ignore()
    return 0 if message is None else _fail(message)


def _run(arguments: Sequence[str] | None) -> str | None:
    """None, or what went wrong."""
    try:
        with contextlib.suppress(SystemExit):  # of --help and --version
            options = parser(_generate, _score, _bench, _info).parse_args(arguments)
            if sys.stdout is None:
                return "standard output is closed"
            options.run(options)
        sys.stdout.flush()
        return None
    except KeyboardInterrupt:
        return "interrupted"
    except BrokenPipeError:
        return "the reader of standard output went away"
    except MemoryError as error:
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    except Exception as error:
        return str(error) or type(error).__name__


def _fail(message: str) -> int:
    # Nothing may be left for the interpreter to flush at its end, and to complain of.
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _discard(sys.stdout)
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"futurefill: {printable(message)}\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)
    return 2


def _discard(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _generate(options: argparse.Namespace) -> None:
    from futurefill_rs.cli import generate

    generate.run(options)


def _score(options: argparse.Namespace) -> None:
    from futurefill_rs.cli import score

    score.run(options)


def _info(options: argparse.Namespace) -> None:
    from futurefill_rs import show_config

    show_config()
    cards = sorted(BUILTIN.glob("*.md"))
    card = cards[0].read_text(encoding="utf-8").rstrip() if cards else "none in this installation"
    print(f"\nbuilt-in model ({BUILTIN}):\n\n{card}")


def _bench(options: argparse.Namespace) -> None:
    from futurefill_rs import bench

    progress = Progress("measuring")
    try:
        records = bench.run(
            options.channels,
            options.length,
            options.methods,
            workers=options.workers,
            limit=options.limit,
            progress=progress,
        )
    finally:
        progress.clear()
    print(bench.as_json(records) if options.json else bench.as_table(records))
