"""The example programs on tiny inputs: they run, and what they print and write is what they say."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from futurefill_rs import models

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str | Path) -> str:
    """What an example prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dna(tmp_path):
    genome = tmp_path / "made.fa"
    letters = "".join(random.Random(0).choices("ACGT", [4, 1, 1, 4], k=400))
    lines = [">made", letters[:70], letters[70:200].lower(), "NNN", ">more", letters[200:]]
    genome.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    sizes = [
        "--steps",
        "3",
        "--bases",
        "150",
        "--width",
        "16",
        "--layers",
        "1",
        "--length",
        "24",
        "--batch",
        "2",
    ]
    printed = run("dna.py", genome, *sizes, "--out", out)
    assert printed.startswith("400 bases; order-0 entropy 1.")
    assert re.search(r"trained \d+ s: \d\.\d{4} bits per base", printed)
    assert "generated 150 bases" in printed
    rows = re.findall(r"^  (model|single bases) +(\d\.\d{4})  (-?\d\.\d{4})$", printed, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["model", "single bases"]
    assert all(0 <= float(distance) <= 1 and -1 <= float(fit) <= 1 for _, distance, fit in rows)
    head, *made = (out / "generated.fa").read_text().splitlines()
    assert head == ">generated" and [len(line) for line in made] == [70, 70, 10]
    assert set("".join(made)) <= set("ACGT")
    assert models.load(out)(torch.tensor([[7, 8, 9, 10]])).shape == (1, 4, 16)


def test_full_size():
    printed = run("full_size.py", "hyenadna-tiny-1k", "--prompt", "40", "--new", "6")
    assert "hyenadna-tiny-1k: 0.4 M parameters" in printed
    assert "prompt of 40 read" in printed and re.search(r"cache \d+\.\d MB, peak memory \d+ MB", printed)
    assert re.search(r"6 bases: median \d+\.\d\d ms, worst", printed)


def test_training_takes_the_same_way_as_with_plain_transforms():
    sizes = ["--steps", "20", "--context", "64", "--width", "16", "--tolerance", "1e-4"]
    printed = run("train_compare.py", *sizes)
    first, *_, last = (float(line.split()[1]) for line in printed.splitlines()[1:-1])
    assert last < first - 0.5
