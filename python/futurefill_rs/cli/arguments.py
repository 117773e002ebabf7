"""The arguments of the command `futurefill`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from futurefill_rs import __version__
from futurefill_rs.cli.terminal import CommandError

METHODS = ("auto", "naive", "epoched", "continuous")

Command = Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{self.prog.removeprefix('futurefill').strip()}: {message}".removeprefix(": "))

    def _print_message(self, message: str, file: object = None) -> None:
        # argparse's own passes over what cannot be written.
        if sys.stdout is None:
            raise CommandError("standard output is closed")
        sys.stdout.write(message)


def _whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            bound = f"a whole number, {least} or more" if value < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"expected {bound}, got {text!r}")
        return value

    return parse


def _temperature(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a finite number, 0 or more, got {text!r}")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def _stop(text: str) -> bytes:
    if not text:
        raise argparse.ArgumentTypeError("expected one or more characters, got none")
    return os.fsencode(text)


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, 1 at most, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _workers(text: str) -> int:
    from futurefill_rs import _threads

    try:
        return _threads.resolve(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a positive whole number, or -1 for all cores, got {text!r}"
        ) from None


def parser(
    generate_command: Command, score_command: Command, bench_command: Command, info_command: Command
) -> _Parser:
    whole = _Parser(
        prog="futurefill",
        description="Exact generation from convolutional sequence models in quasilinear time.",
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"futurefill {__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue PROMPT, byte by byte: prompt and continuation go to standard output as they "
        "come, the speed to standard error.",
        allow_abbrev=False,
    )
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads standard input")
    generate.add_argument(
        "--model",
        default="builtin",
        metavar="builtin|PATH",
        help="a folder with config.json (default builtin)",
    )
    generate.add_argument(
        "--max-new", type=_whole(0), default=256, metavar="N", help="bytes to add (default 256)"
    )
    generate.add_argument(
        "--method",
        choices=METHODS,
        default="auto",
        help="how convolutions are computed: never what comes out",
    )
    generate.add_argument(
        "--temperature",
        type=_temperature,
        default=0.8,
        metavar="X",
        help="0 takes the likeliest (default 0.8)",
    )
    generate.add_argument("--top-k", type=_whole(1), metavar="N", help="draw from the N likeliest only")
    generate.add_argument(
        "--top-p", type=_share, metavar="X", help="draw from the likeliest whose probabilities sum to X only"
    )
    generate.add_argument(
        "--min-p",
        type=_fraction,
        metavar="X",
        help="draw from those only that are at least X times as likely as the likeliest",
    )
    generate.add_argument(
        "--repetition-penalty",
        type=_positive,
        default=1.0,
        metavar="X",
        help="above 1, what the text holds already becomes less likely (default 1)",
    )
    generate.add_argument(
        "--stop",
        type=_stop,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    generate.add_argument("--seed", type=_whole(0), metavar="N", help="makes the draws repeatable")
    generate.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    generate.set_defaults(run=generate_command)

    score = commands.add_parser(
        "score",
        help="how likely a model finds sequences of DNA",
        description="Score the sequences in FILE: FASTA or one sequence a line, plain or compressed with "
        "gzip. A table of tab-separated values goes to standard output, one row a sequence: its length in "
        "bases, the sum and the mean of the natural logarithms of the probabilities that the model gives to "
        "each base after those before it, the perplexity, and the mean entropy of what it expects, in nats. "
        "Small letters are read as capitals.",
        allow_abbrev=False,
    )
    score.add_argument("file", metavar="FILE", help="the sequences; - reads standard input")
    score.add_argument(
        "--model", required=True, metavar="PATH", help="a folder with a configuration and a checkpoint"
    )
    score.add_argument(
        "--begin", action="store_true", help="put the beginning token in front: the first base counts too"
    )
    score.add_argument(
        "--reverse-complement", action="store_true", help="average with the scores of the other strand"
    )
    score.add_argument(
        "--batch-size", type=_whole(1), default=8, metavar="N", help="sequences read together (default 8)"
    )
    score.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    score.set_defaults(run=score_command)

    bench = commands.add_parser(
        "bench",
        help="measure the methods on this machine",
        description="Closed-loop generation by each method, beside the fused direct sum and the offline FFT "
        "of torch, which knows the whole input in advance. Minimum of several interleaved runs.",
        allow_abbrev=False,
    )
    bench.add_argument("--channels", type=_whole(1), default=256, metavar="D", help="default 256")
    bench.add_argument(
        "--length", type=_whole(1), default=16384, metavar="T", help="positions (default 16384)"
    )
    bench.add_argument(
        "--methods",
        type=_methods,
        default=list(METHODS),
        metavar="A,B,..",
        help="of auto, naive, epoched, continuous, or a schedule like 128:8:8 (default: the four)",
    )
    bench.add_argument(
        "--workers", type=_workers, default=1, metavar="N", help="threads, -1 for all cores (default 1)"
    )
    bench.add_argument(
        "--limit",
        type=_whole(1),
        default=60,
        metavar="SECONDS",
        help="longest run of one method (default 60)",
    )
    bench.add_argument("--json", action="store_true", help="print a list of records")
    bench.set_defaults(run=bench_command)

    info = commands.add_parser(
        "info",
        help="show what is installed and the built-in model's card",
        description="Version, instruction set, workers, torch and CUDA, and the built-in model's card.",
        allow_abbrev=False,
    )
    info.set_defaults(run=info_command)
    return whole


def _methods(text: str) -> list[str]:
    from futurefill_rs import bench

    names = [name.strip() for name in text.split(",")]
    for name in names:
        try:
            bench.parse_method(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys(names))
