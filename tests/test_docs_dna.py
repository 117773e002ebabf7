"""docs/dna.md as its reader follows it: every block, in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_runs_from_top_to_bottom(tmp_path):
    text = (ROOT / "docs" / "dna.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    for name, arguments in (("python", ""), ("futurefill", " -m futurefill_rs.cli")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        script.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    program, programs = "import futurefill_rs", 0
    for kind, block in blocks:
        if kind == "python":
            # One process for neighbours: starting takes longer than what they do.
            program, programs = f"{program}\n{block}", programs + 1
            continue
        if "pip install" in block:
            continue
        run([sys.executable, "-W", "error", "-c", program], tmp_path, environment)
        program = ""
        run(["sh", "-e", "-c", block], tmp_path, environment)
    run([sys.executable, "-W", "error", "-c", program], tmp_path, environment)
    assert programs == 7
    header, *rows = (tmp_path / "scores.tsv").read_text().splitlines()
    assert header.startswith("id\tlength\tlog_likelihood")
    assert [row.split("\t")[:2] for row in rows] == [["first", "9"], ["second", "14"]]


def run(command, folder, environment):
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr


def test_checkpoints_in_parts_and_with_eight_bits(tmp_path):
    import futurefill_rs as ff
    import pytest

    script = ROOT / "examples" / "evo2_checkpoint.py"
    for folder, options in (("one", []), ("parts", ["--parts", "3", "--fp8"])):
        run([sys.executable, script, folder, *options], tmp_path, os.environ)
    with pytest.raises(ValueError, match="use_fp8_input_projections"):
        ff.models.load(tmp_path / "parts")
    insisted = ff.models.load(tmp_path / "parts", settings={"use_fp8_input_projections": False})
    score = ff.models.load(tmp_path / "one").score("GATTACA", reduce="sum")
    assert insisted.score("GATTACA", reduce="sum") == score
