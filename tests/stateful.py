"""Random operations on a cache and on a model of it; a failure shrinks to one line that replays it.

A world is drawn from a seed: its setup is plain data, its operations are numbers. Each operation draws what
it needs from a generator of its own, so leaving others out changes nothing in it. Shrinking runs again with
fewer operations and with simpler setups.

    python tests/stateful.py --minutes 60                 every world, from seed 0
    python tests/stateful.py --minutes 5 --world layers --seed 1000
    python tests/stateful.py --replay '{"world": ...}'    the line that a failure prints
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

Setup = dict[str, Any]


class World:
    """One cache, a model of what it must return, and operations on both: methods named in `operations`."""

    name: ClassVar[str]
    operations: ClassVar[dict[str, int]]
    """Names of methods that take a generator, and how often each is drawn."""

    def __init__(self, setup: Setup, rng: np.random.Generator) -> None:
        raise NotImplementedError

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Setup:
        raise NotImplementedError

    @classmethod
    def simpler(cls, setup: Setup) -> Iterator[Setup]:
        """Setups to try instead, the simplest first."""
        raise NotImplementedError

    def finish(self) -> None:
        """What must hold after the last operation."""


@dataclass(frozen=True)
class Trial:
    """Operations by their numbers, in a world of this setup."""

    world: str
    seed: int
    setup: Setup
    operations: list[int]

    @property
    def line(self) -> str:
        return f"python tests/stateful.py --replay '{json.dumps(asdict(self))}'"


def worlds() -> dict[str, type[World]]:
    from stateful_engine import EngineWorld
    from stateful_layers import LayersWorld

    return {world.name: world for world in (EngineWorld, LayersWorld)}


def draw(world: type[World], seed: int) -> Trial:
    rng = np.random.default_rng([seed, 0])
    return Trial(world.name, seed, world.draw(rng), list(range(int(rng.integers(3, 25)))))


def run(trial: Trial, without: Collection[str] = (), trace: bool = False) -> None:
    """Carry out a sequence; raises what the first wrong operation raises."""
    world = worlds()[trial.world]
    names = [name for name, weight in world.operations.items() for _ in range(weight)]
    state = world(trial.setup, np.random.default_rng([trial.seed, 1]))
    for number in trial.operations:
        rng = np.random.default_rng([trial.seed, 2, number])
        name = names[rng.integers(len(names))]
        if name in without:
            continue
        if trace:
            print(f"{number:3} {name:12} {state}", file=sys.stderr)
        getattr(state, name)(rng)
    state.finish()


def failure(trial: Trial, without: Collection[str] = ()) -> BaseException | None:
    try:
        run(trial, without)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic is no Exception
        return error
    return None


def place(error: BaseException | None) -> tuple[Any, ...] | None:
    """What went wrong and where: the same for two failures of one cause, mostly."""
    if error is None:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    return type(error), frames[-1].filename, frames[-1].lineno


def shrink(trial: Trial, error: BaseException, without: Collection[str] = (), seconds: float = 60.0) -> Trial:
    """A smaller trial that fails alike: fewer operations, then a simpler setup, as long as either helps."""
    end, found = time.monotonic() + seconds, place(error)

    def fails(candidate: Trial) -> bool:
        return time.monotonic() < end and place(failure(candidate, without)) == found

    def fewer(trial: Trial) -> Iterator[Trial]:
        kept, size = trial.operations, max(1, len(trial.operations) // 2)
        while size:
            for at in range(0, len(kept), size):
                yield replace(trial, operations=kept[:at] + kept[at + size :])
            size //= 2

    def simpler(trial: Trial) -> Iterator[Trial]:
        for setup in worlds()[trial.world].simpler(trial.setup):
            yield replace(trial, setup=setup)

    while True:
        for candidate in (*fewer(trial), *simpler(trial)):
            if fails(candidate):
                trial = candidate
                break
        else:
            return trial


def check(world: type[World], seeds: Iterable[int]) -> None:
    """Run the sequences of these seeds; a failure is raised with the line that replays its smallest form."""
    for seed in seeds:
        trial = draw(world, seed)
        error = failure(trial)
        if error is not None:
            least = shrink(trial, error)
            raise AssertionError(f"{type(error).__name__}: {error}\nreplay: {least.line}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--world", choices=sorted(worlds()), action="append")
    parser.add_argument("--without", action="append", default=[], help="an operation to leave out")
    parser.add_argument("--replay", type=json.loads, metavar="JSON")
    options = parser.parse_args()
    if options.replay is not None:
        run(Trial(**options.replay), options.without, trace=True)
        print("no failure")
        return 0
    chosen = [worlds()[name] for name in options.world or worlds()]
    start = last = time.monotonic()
    seed, sequences, operations, failures = options.seed, 0, 0, 0

    def report(word: str) -> None:
        minutes = (time.monotonic() - start) / 60
        text = f"{minutes:.1f} min: {sequences} sequences, {operations} operations, {failures} failures"
        print(f"{text}; {word} seed {seed}", flush=True)

    while time.monotonic() - start < 60 * options.minutes:
        for world in chosen:
            trial = draw(world, seed)
            error = failure(trial, options.without)
            sequences, operations = sequences + 1, operations + len(trial.operations)
            if error is not None:
                failures += 1
                traceback.print_exception(error)
                print(f"replay: {shrink(trial, error, options.without).line}", flush=True)
        seed += 1
        if time.monotonic() - last > 30:
            # What ends the process itself is found again from here.
            report("next")
            last = time.monotonic()
    report("ended before")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
