"""Fingerprints change with everything that a stored result depends on."""

import pytest
import torch
from search_helpers import slab

from equiformer2.pruning.fingerprints import fingerprint_of_structures


@pytest.mark.parametrize("name", ["pos", "atomic_numbers", "cell", "pbc", "fixed", "tags"])
def test_all_that_a_network_or_a_router_reads_counts(name: str) -> None:
    first, changed = slab("a"), slab("a")
    assert fingerprint_of_structures([first]) == fingerprint_of_structures([changed])
    values = changed[name].clone()
    values.view(-1)[0] = ~values.view(-1)[0] if values.dtype == torch.bool else values.view(-1)[0] + 1
    changed[name] = values
    assert fingerprint_of_structures([first]) != fingerprint_of_structures([changed])
