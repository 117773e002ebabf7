"""Caches of layers and models under random operations; `make stateful` runs many more of them."""

import pytest
import stateful
from stateful_layers import LayersWorld


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_any_operations_on_the_cache_of_a_layer(first):
    stateful.check(LayersWorld, range(first, first + 20))
