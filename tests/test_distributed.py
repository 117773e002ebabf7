"""Two processes with half of the channels each give the same tokens as one process with all of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import futurefill_rs as ff
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "tensor_parallel.py"


def test_tensor_parallel_generation():
    spec = importlib.util.spec_from_file_location("tensor_parallel", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.small_model().eval()
    prompt = (torch.arange(20) * 7 % model.vocab_size).reshape(2, 10)
    with torch.inference_mode():
        expected = ff.generate(model, prompt, 48)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, EXAMPLE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert [[int(word) for word in row.split()] for row in rows] == expected.tolist()
    mine, whole = (int(word) for word in first.split() if word.isdigit())
    assert mine < whole
