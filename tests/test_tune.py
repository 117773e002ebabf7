"""ff.tune: measured costs are used, stored, and read again by another process."""

import json
import subprocess
import sys

import futurefill_rs as ff
import numpy as np
import pytest
from futurefill_rs import _core, _tune


@pytest.fixture
def shipped_costs():
    yield
    _core.set_costs(None)


def test_tune_measures_stores_and_is_read_again(tmp_path, monkeypatch, shipped_costs):
    monkeypatch.setattr(_tune, "_stored", lambda: tmp_path / "costs.json")
    costs = ff.tune()
    assert all(value > 0 for value in costs.values())
    assert json.loads((tmp_path / "costs.json").read_text())["costs"] == costs
    filters = np.random.default_rng(0).standard_normal((4, 3000)).astype(np.float32)
    u = np.ones((4, 3000), np.float32)
    tuned = ff.plan(filters, 3000).new_cache().extend(u)
    np.testing.assert_allclose(tuned, ff.causal_conv(u, filters), rtol=0, atol=1e-3)


def test_costs_decide_the_schedule(tmp_path, monkeypatch, shipped_costs):
    monkeypatch.setattr(_tune, "_stored", lambda: tmp_path / "costs.json")
    before = ff.Schedule.auto(1 << 14, 1 << 14, rows=64)
    costs = _core.measure_costs()
    costs["fixed"] = costs["sum_in_cache"] = costs["sum_beyond"] = 1e-9
    costs["direct"] = costs["level"] = 1e9
    (tmp_path / "costs.json").write_text(json.dumps({"format": 1, "costs": costs}))
    _tune.load_stored()
    assert ff.Schedule.auto(1 << 14, 1 << 14, rows=64) == ff.Schedule.naive()
    _core.set_costs(None)
    assert ff.Schedule.auto(1 << 14, 1 << 14, rows=64) == before


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 1, "costs": {"step": -1}}', '{"format": 9, "costs": {}}']
)
def test_damaged_files_are_ignored(tmp_path, monkeypatch, text, shipped_costs):
    monkeypatch.setattr(_tune, "_stored", lambda: tmp_path / "costs.json")
    before = ff.Schedule.auto(1 << 14, 1 << 14, rows=64)
    (tmp_path / "costs.json").write_text(text)
    _tune.load_stored()
    assert ff.Schedule.auto(1 << 14, 1 << 14, rows=64) == before


def test_bad_costs_are_errors(shipped_costs):
    with pytest.raises(ValueError, match="costs: expected positive numbers"):
        _core.set_costs({"step": 1.0})


def test_import_without_a_home():
    code = "import os; os.environ.pop('HOME', None); import futurefill_rs as ff; print(ff.Schedule.naive())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "Schedule(base=None, fans=())"
