"""The command `futurefill`: generate text, measure the methods, show what is installed.

Any error, usage included, is one line on standard error and exit status 2.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from futurefill_rs import __version__
from futurefill_rs.data import BUILTIN

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("auto", "naive", "epoched", "continuous")
SMALL_MATRIX = 2**21


class CommandError(Exception):
    """A message for the user: one line, exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{self.prog.removeprefix('futurefill').strip()}: {message}".removeprefix(": "))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after one line on standard error."""
    try:
        options = _parser().parse_args(arguments)
        if sys.stdout is None:
            raise CommandError("standard output is closed")
        options.run(options)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # --help and --version
        if stop.code:
            raise
        return _flushed()
    except KeyboardInterrupt:
        message = "interrupted"
    except BrokenPipeError:
        message = "the reader of standard output went away"
    except CommandError as error:
        message = str(error)
    except MemoryError as error:
        message = f"not enough memory: {error}" if str(error) else "not enough memory"
    except Exception as error:
        message = str(error) or type(error).__name__
    if arguments is None:
        # The process is about to end: a second Ctrl-C has nothing left to interrupt.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _fail(message)


def _flushed() -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    # Nothing may be left for the interpreter to flush at its end, and to complain of.
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _discard(sys.stdout)
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"futurefill: {' '.join(message.split())}\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)
    return 2


def _discard(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="futurefill",
        description="Exact generation from convolutional sequence models in quasilinear time.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"futurefill {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

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
    generate.add_argument("--seed", type=_whole(0), metavar="N", help="makes the draws repeatable")
    generate.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    generate.set_defaults(run=_generate)

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
    bench.set_defaults(run=_bench)

    info = commands.add_parser(
        "info",
        help="show what is installed and the built-in model's card",
        description="Version, instruction set, workers, torch and CUDA, and the built-in model's card.",
        allow_abbrev=False,
    )
    info.set_defaults(run=_info)
    return parser


def _methods(text: str) -> list[str]:
    from futurefill_rs import bench

    names = [name.strip() for name in text.split(",")]
    for name in names:
        try:
            bench.parse_method(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys(names))


def _info(options: argparse.Namespace) -> None:
    from futurefill_rs import show_config

    show_config()
    cards = sorted(BUILTIN.glob("*.md"))
    card = cards[0].read_text(encoding="utf-8").rstrip() if cards else "none in this installation"
    print(f"\nbuilt-in model ({BUILTIN}):\n\n{card}")


def _bench(options: argparse.Namespace) -> None:
    from futurefill_rs import bench

    def progress(text: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    records = bench.run(
        options.channels,
        options.length,
        options.methods,
        workers=options.workers,
        limit=options.limit,
        progress=progress,
    )
    progress("")
    print(bench.as_json(records) if options.json else bench.as_table(records))


def _generate(options: argparse.Namespace) -> None:
    prompt = _read_prompt(options.prompt)
    try:
        import torch
    except ImportError:
        raise CommandError(
            "generate: needs torch: install the extra with  pip install 'futurefill_rs[torch]'"
        ) from None
    from futurefill_rs._generate import sampler

    device = torch.device(options.device)
    _check_device(device)
    model = _load(options.model, device)
    text = _Text(sys.stdout.buffer)
    alphabet = _alphabet(model)
    text.write(prompt)
    started = time.perf_counter()
    made = 0
    if options.max_new:
        context = alphabet.encode(prompt)
        if not context:
            context = alphabet.start
            _note("empty prompt: continuing after a single line break, which is not printed")
        draw = sampler(options.temperature, options.top_k, options.top_p, options.seed, device)
        with torch.inference_mode():
            for byte in _continuation(model, torch.tensor([context], device=device), options, draw, alphabet):
                if not made:
                    read, started = time.perf_counter() - started, time.perf_counter()
                text.write(byte)
                made += 1
                if made % 64 == 0:
                    _progress(f"{made} of {options.max_new} tokens")
    seconds = time.perf_counter() - started
    text.finish()
    _progress("")
    if sys.stdout.isatty():
        _note("", prefix="")
    if not made:
        _note(f"0 tokens after a prompt of {len(prompt)} bytes")
        return
    # The first token comes out of reading the prompt.
    rate = (made - 1) / seconds if made > 1 else made / read
    _note(
        f"{made} tokens, {rate:.1f} tokens/s with {options.method} on {device.type}"
        f" (prompt of {len(prompt)} bytes read in {read:.2f} s)"
    )


def _continuation(
    model: Any,
    context: Tensor,
    options: argparse.Namespace,
    draw: Callable[[Tensor], Tensor],
    alphabet: _Alphabet,
) -> Iterator[bytes]:
    from futurefill_rs._generate import read_prompt

    _progress(f"reading a prompt of {context.shape[1]} bytes")
    logits, cache = read_prompt(model, context, options.max_new, options.method)
    _progress("")
    with _stepping_threads(model):
        for position in range(options.max_new):
            token = draw(alphabet.restrict(logits))
            yield alphabet.decode(int(token[0]))
            if position + 1 < options.max_new:
                logits = model.step(token, cache)


@contextlib.contextmanager
def _stepping_threads(model: Any) -> Iterator[None]:
    """One torch thread where the matrices of a step are too small to be worth waking a second one."""
    import torch

    before = torch.get_num_threads()
    if max(parameter.numel() for parameter in model.parameters()) < SMALL_MATRIX:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_prompt(prompt: str) -> bytes:
    if prompt != "-":
        return os.fsencode(prompt)
    if sys.stdin is None:
        raise CommandError("generate: standard input is closed")
    return sys.stdin.buffer.read()


def _check_device(device: Any) -> None:
    import torch

    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            present = torch.cuda.is_available()
        if not present:
            raise CommandError("generate: --device cuda: torch finds no CUDA device")


def _load(name: str, device: Any) -> Any:
    from futurefill_rs import models

    folder = BUILTIN if name == "builtin" else Path(name)
    if name == "builtin" and not (folder / "config.json").is_file():
        raise CommandError(
            "generate: --model builtin: this installation was built without the built-in model"
        )
    try:
        model = models.load(folder)
    except (OSError, ValueError) as error:
        raise CommandError(f"generate: --model {name}: {error}") from None
    if not isinstance(model, models.LanguageModel):
        raise CommandError(f"generate: --model {name}: expected a language model, got {type(model).__name__}")
    return model.to(device)


class _Alphabet:
    """What a model's ids mean: the bytes themselves, unless a table says otherwise."""

    def __init__(self, ids: dict[int, int], start: int) -> None:
        self.bytes_of = ids
        self.id_of = {byte: id for id, byte in ids.items()}
        self.start = [start]

    def encode(self, text: bytes) -> list[int]:
        try:
            return [self.id_of[byte] for byte in text]
        except KeyError as error:
            known = bytes(sorted(self.id_of)).decode()
            raise CommandError(
                f"generate: PROMPT: expected only the letters {known}, got {bytes([error.args[0]])!r}"
            ) from None

    def decode(self, id: int) -> bytes:
        return bytes([self.bytes_of[id]])

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits with those of ids that stand for no byte out of reach."""
        import torch

        if len(self.bytes_of) == logits.shape[-1]:
            return logits
        known = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        known[torch.tensor(list(self.bytes_of), device=logits.device)] = True
        return logits.masked_fill(~known, -math.inf)


def _alphabet(model: Any) -> _Alphabet:
    from futurefill_rs import models

    if isinstance(model, models.HyenaDNA):
        # Upstream's character tokenizer: 0 to 6 are special, 1 separates sequences.
        return _Alphabet({7 + i: letter for i, letter in enumerate(b"ACGTN")}, start=1)
    if not 256 <= model.vocab_size <= 512:
        raise CommandError(
            "generate: --model: expected a model over bytes (256 to 512 ids) or nucleotides, "
            f"got one of {model.vocab_size} ids, whose tokenizer is not known here"
        )
    return _Alphabet({i: i for i in range(256)}, start=ord("\n"))


class _Text:
    """Bytes on their way out, at once but in whole UTF-8 sequences; what is not UTF-8 passes unchanged."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def write(self, data: bytes, final: bool = False) -> None:
        text = self._decoder.decode(data, final)
        if text:
            self._stream.write(text.encode("utf-8", "surrogateescape"))
            self._stream.flush()

    def finish(self) -> None:
        self.write(b"", final=True)


def _note(text: str, prefix: str = "futurefill: ") -> None:
    if sys.stderr is not None:
        print(f"{prefix}{text}", file=sys.stderr, flush=True)


def _progress(text: str) -> None:
    """A line that the next one replaces; only where it cannot run into the text."""
    if sys.stderr is not None and sys.stderr.isatty() and not sys.stdout.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
