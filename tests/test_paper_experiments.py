"""The paper's experiments in small: they run, keep what they measured, and go on where they were stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
PAPER = Path(__file__).parents[1] / "benches" / "paper"


def run(name: str, results: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, PAPER / f"{name}.py", "--preset", "small", "--results", results]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_online_goes_on_where_it_was(tmp_path):
    printed = run("online", tmp_path)
    assert re.search(r"\| continuous \|.*\| \d\.\d\d ± \d\.\d\d \|", printed)
    assert (tmp_path / "paper_online.png").stat().st_size > 1000
    file = tmp_path / "online-small.json"
    kept = json.loads(file.read_text())
    first, *rest = kept["cells"]
    first["us_per_step"] = 123.0
    file.write_text(json.dumps({**kept, "cells": [first, *rest[: len(rest) // 2]]}))
    assert "| naive | 123 |" in run("online", tmp_path)
    assert len(json.loads(file.read_text())["cells"]) == len(rest) + 1


def test_every_method_keeps_its_bound(tmp_path):
    run("error", tmp_path)
    for cell in json.loads((tmp_path / "error-small.json").read_text())["cells"]:
        eps = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float64": 2.0**-52}[cell["dtype"]]
        assert cell["error"] <= eps * (cell["log_length"] + 1), cell


def test_the_cache_of_a_prompt_grows_with_the_new_positions_only(tmp_path):
    run("prompt", tmp_path)
    rows = json.loads((tmp_path / "prompt-small.json").read_text())["cells"]
    sizes: dict[int, set[int]] = {}
    for row in rows:
        sizes.setdefault(row["log_new"], set()).add(row["cache_bytes"])
    (few,), (many,) = (sizes[log] for log in sorted(sizes))
    assert few < many


@pytest.mark.parametrize("name", ["unknown", "language_models"])
def test_tables(name, tmp_path):
    assert run(name, tmp_path).count("\n| ") > 5
