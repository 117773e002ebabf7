"""What the experiments share: cells measured one by one and kept, presets, exponents, pictures.

An experiment is a list of cells (small dictionaries, the same in every run), a function that measures one,
and a page of Markdown made of all. What was measured is kept in `results/NAME-PRESET.json` after every cell,
so that an experiment that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import futurefill_rs as ff
import numpy as np
from futurefill_rs._core import instruction_set

Cell = dict[str, Any]
HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "paper.md"


@dataclass
class Experiment:
    """One of the paper's experiments.

    Attributes:
        name: file name of the results and marker in docs/paper.md.
        cells: what to measure for a preset.
        measure: the figures of one cell.
        report: Markdown of all cells with their figures; may save pictures beside docs/paper.md.
        presets: what `cells` knows.
    """

    name: str
    cells: Callable[[str], Sequence[Cell]]
    measure: Callable[[Cell], dict[str, Any]]
    report: Callable[[list[Cell], Path], str]
    presets: Sequence[str] = ("small", "full")


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--preset", choices=experiment.presets, default="full")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/paper.md")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{experiment.name}-{options.preset}.json"
    known = [] if options.again or not file.exists() else json.loads(file.read_text())["cells"]
    cells = list(experiment.cells(options.preset))
    done: list[Cell] = []
    start = time.perf_counter()
    for number, cell in enumerate(cells):
        spent = time.perf_counter() - start
        show(f"{experiment.name}: {number} of {len(cells)} cells, {spent:.0f} s: {text(cell)}")
        found = next((row for row in known if row.items() >= cell.items()), None)
        done.append(found or {**cell, **experiment.measure(cell)})
        keep(file, done)
    show("")
    folder = PAGE.parent if options.docs else options.results
    page = f"{machine()}\n\n{experiment.report(done, folder)}"
    print(page)
    if options.docs:
        fill(experiment.name, page)
    return 0


def show(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:110]}", end="", file=sys.stderr, flush=True)


def text(cell: Cell) -> str:
    return ", ".join(f"{key} {value}" for key, value in cell.items())


def keep(file: Path, cells: list[Cell]) -> None:
    """Whole files only: a run may be stopped at any moment."""
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps({"machine": machine(), "cells": cells}, indent=1) + "\n")
    fresh.replace(file)


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and (found := re.search(r"model name\s*: (.*)", cpu.read_text())):
        name = found[1]
    versions = f"futurefill_rs {ff.__version__}, numpy {np.__version__}"
    return f"{name}, {instruction_set()}, one thread; {versions}; {time.strftime('%Y-%m-%d')}."


def fill(name: str, page: str) -> None:
    """Put a page between its markers in docs/paper.md."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = PAGE.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise SystemExit(f"{PAGE}: expected the markers {begin} and {end}")
    head, rest = content.split(begin)
    PAGE.write_text(f"{head}{begin}\n\n{page}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def exponent(lengths: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope of log(values) against log(lengths), and half the width of its 95 % confidence interval."""
    from scipy import stats

    fit = stats.linregress(np.log(lengths), np.log(values))
    return float(fit.slope), float(fit.stderr * stats.t.ppf(0.975, len(lengths) - 2))


def picture(file: Path, lines: dict[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> str:
    """Curves with logarithmic axes; the Markdown that shows them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, (at, values) in lines.items():
        axes.loglog(at, values, marker="o", label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return f"![{y} against {x}]({file.name})"


def best(call: Callable[[], float], rounds: int = 3) -> float:
    """The least of several timings."""
    return min(call() for _ in range(rounds))
