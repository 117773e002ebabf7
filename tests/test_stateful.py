"""Caches of every engine under random operations; `make stateful` runs many more of them."""

import json

import pytest
import stateful
from stateful_engine import EngineWorld


@pytest.mark.parametrize("first", range(0, 400, 40))
def test_any_operations_on_a_cache(first):
    stateful.check(EngineWorld, range(first, first + 40))


def test_a_failure_shrinks_to_its_cause():
    """An operation that fails once the cache has been reordered: both are left, in the plainest world."""

    class Broken(EngineWorld):
        name = "engine"
        reordered = False

        def reorder(self, rng):
            super().reorder(rng)
            self.reordered = self.batched

        def fork(self, rng):
            assert not self.reordered, "the planted fault"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stateful, "worlds", lambda: {"engine": Broken})
        with pytest.raises(
            AssertionError, match=r"the planted fault[\s\S]*\nreplay: python tests/stateful.py"
        ) as error:
            stateful.check(Broken, range(100))
        line = str(error.value).splitlines()[-1]
        trial = stateful.Trial(**json.loads(line.split("'")[1]))
        assert len(trial.operations) == 2
        assert (trial.setup["method"], trial.setup["filters"]) == ([1, []], [])
        assert "planted" in str(stateful.failure(trial))
