"""`futurefill generate`: a prompt and its continuation, as they come."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from futurefill_rs.cli.alphabet import prompts_of
from futurefill_rs.cli.model import counting, load
from futurefill_rs.cli.terminal import CommandError, Progress, Text, UntilStop, note

SMALL_MATRIX = 2**21


def run(options: argparse.Namespace) -> None:
    prompt = _read_prompt(options.prompt)
    model = load("generate", options.model, options.device)
    import torch

    from futurefill_rs._generate.one import new_ids

    device = torch.device(options.device)
    prompts = prompts_of(model)
    context = prompts.encode(prompt)
    if not context:
        context = [prompts.start]
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
        sampler = _sampler(options, context, prompts.mask(model.vocab_size), device)
        ids = new_ids(model, logits, cache, options.max_new, sampler)
        if not prompts.letters(prompt):
            note(f"empty prompt: continuing after {prompts.stands_in}, which is not printed")
    text = Text(sys.stdout.buffer)
    text.write(prompts.shown(prompt))
    stop = UntilStop([prompts.letters(each) for each in options.stop])
    progress = Progress(f"adding {options.max_new} {prompts.unit}s")
    made, read = 0, 0.0
    with _stepping_threads(model):
        for new in ids:
            if not made:
                read, started = time.perf_counter() - started, time.perf_counter()
            made += 1
            if int(new[0]) == prompts.end:
                break
            text.write(stop(prompts.decode(int(new[0]))))
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
    length = context.shape[1] if model.reach is None else min(context.shape[1], model.reach)
    try:
        with counting(model, lambda done: progress(int(done), length)), torch.inference_mode():
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
