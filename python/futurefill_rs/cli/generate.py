"""`futurefill generate`: a prompt and its continuation, as they come."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from futurefill_rs.cli.alphabet import alphabet_of
from futurefill_rs.cli.terminal import CommandError, Progress, Text, UntilStop, note
from futurefill_rs.data import BUILTIN

SMALL_MATRIX = 2**21


def run(options: argparse.Namespace) -> None:
    prompt = _read_prompt(options.prompt)
    try:
        import torch
    except ImportError:
        raise CommandError(
            "generate: needs torch: install the extra with  pip install 'futurefill_rs[torch]'"
        ) from None
    from futurefill_rs._generate.one import new_ids

    device = torch.device(options.device)
    _check_device(device)
    model = _load(options.model, device)
    alphabet = alphabet_of(model)
    context = alphabet.encode(prompt)
    if not context:
        context = [alphabet.start]
    elif len(context) + options.max_new >= 2**63:
        most = 2**63 - 1 - len(context)
        raise CommandError(
            f"generate: --max-new: expected at most {most} after such a prompt, got {options.max_new}"
        )
    # Nothing is written before whatever may fail has come to its end.
    started = time.perf_counter()
    ids: Iterator[Any] = iter(())
    if options.max_new:
        logits, cache = _read(model, torch.tensor([context], device=device), options)
        sampler = _sampler(options, context, alphabet.mask(model.vocab_size), device)
        ids = new_ids(model, logits, cache, options.max_new, sampler)
        if not alphabet.letters(prompt):
            note(f"empty prompt: continuing after {alphabet.stands_in}, which is not printed")
    text = Text(sys.stdout.buffer)
    text.write(alphabet.shown(prompt))
    stop = UntilStop([alphabet.letters(each) for each in options.stop])
    progress = Progress(f"adding {options.max_new} {alphabet.name}s")
    made, read = 0, 0.0
    with _stepping_threads(model):
        for new in ids:
            if not made:
                read, started = time.perf_counter() - started, time.perf_counter()
            made += 1
            text.write(stop(alphabet.decode(int(new[0]))))
            if stop.found is not None:
                break
            if not sys.stdout.isatty():
                progress(made, options.max_new)
    seconds = time.perf_counter() - started
    progress.clear()
    text.write(stop.rest())
    text.finish()
    if sys.stdout.isatty() and sys.stderr is not None:
        print(file=sys.stderr)
    if not made:
        note(f"0 tokens after a prompt of {len(prompt)} bytes")
        return
    # The first token comes out of reading the prompt.
    rate = (made - 1) / seconds if made > 1 else made / read
    note(
        f"{made} tokens, {rate:.1f} tokens/s with {options.method} on {device.type}"
        f" (prompt of {len(prompt)} bytes read in {read:.2f} s)"
    )


def _read(model: Any, context: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """Logits after the prompt and the cache, with a bar on the way."""
    import torch

    from futurefill_rs._generate.one import read_prompt

    progress = Progress(f"reading a prompt of {context.shape[1]} ids")
    try:
        with _counting(model, context.shape[1], progress), torch.inference_mode():
            return read_prompt(model, context, options.max_new, options.method)
    except (MemoryError, ValueError) as error:
        words = str(error)
        if isinstance(error, MemoryError) or words.startswith(("horizon", "max_new")):
            raise CommandError(
                f"generate: --max-new: expected a number this machine has memory for, got {options.max_new}"
                f" after a prompt of {context.shape[1]}: {words or 'not enough memory'}"
            ) from None
        raise
    finally:
        progress.clear()


@contextlib.contextmanager
def _counting(model: Any, length: int, progress: Callable[[int, int], None]) -> Iterator[None]:
    """Calls `progress` with the positions that blocks of the model have been through, and all of them."""
    from torch import nn

    blocks = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), ())
    read = length if model.reach is None else min(length, model.reach)
    done = 0

    def count(block: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        nonlocal done
        done += arguments[0].shape[1]
        progress(done, read * len(blocks))

    handles = [block.register_forward_hook(count) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sampler(options: argparse.Namespace, context: list[int], known: Any, device: Any) -> Any:
    from futurefill_rs._generate.sampling import Sampler, Sampling, row_randoms

    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty
    )
    return Sampler(sampling, [context], row_randoms(options.seed, 1, device), known)


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
