"""Samples of a data set: the same structures after a round trip, and what is refused."""

from typing import Any

import pytest
import torch
from search_helpers import slab

from equiformer2.checkpoint.samples import Samples
from equiformer2.errors import InputError

STRUCTURES = [slab("a"), slab("b", "Pt", fixed=False)]


def test_structures_come_back() -> None:
    tensors = Samples.from_structures(STRUCTURES).tensors()
    found = Samples.from_tensors(tensors, "file").structures()
    for before, after in zip(STRUCTURES, found, strict=True):
        assert torch.allclose(after.pos, before.pos, atol=1e-5)
        assert torch.allclose(after.cell, before.cell, atol=1e-5)
        for name in ("atomic_numbers", "fixed", "tags", "pbc"):
            assert torch.equal(after[name], before[name])
        assert after.natoms == before.natoms
    assert [each.sid for each in found] == ["sample 0", "sample 1"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"natoms": torch.tensor([4, 5], dtype=torch.int32)}, "shape"),
        ({"natoms": torch.tensor([9, -1], dtype=torch.int32)}, "1 or more"),
        ({"natoms": torch.tensor([2**30, 2**30], dtype=torch.int32)}, "at most"),
        ({"natoms": torch.tensor([[4, 4]], dtype=torch.int32)}, "whole numbers of 1 to"),
        ({"natoms": torch.zeros(0, dtype=torch.int32)}, "whole numbers of 1 to"),
        ({"natoms": torch.ones(2)}, "whole numbers of 1 to"),
        ({"numbers": torch.full((8,), -1, dtype=torch.int16)}, "numbers must be"),
        ({"numbers": torch.ones(8)}, "numbers must be"),
        ({"tags": torch.full((8,), 9, dtype=torch.uint8)}, "tags must be"),
        ({"pos": torch.full((8, 3), float("nan"))}, "pos must be finite"),
        ({"pos": torch.zeros(8, 3, dtype=torch.int64)}, "pos must be finite"),
        ({"cell": torch.zeros(2, 3, 2)}, "shape"),
        ({"fixed": torch.zeros(8)}, "true or false"),
        ({"more": torch.zeros(1)}, "nothing else"),
    ],
)
def test_tensors_that_are_no_samples(values: dict[str, Any], message: str) -> None:
    tensors = Samples.from_structures(STRUCTURES).tensors() | values
    with pytest.raises(InputError, match=message) as found:
        Samples.from_tensors(tensors, "file.safetensors: task a")
    assert str(found.value).startswith("file.safetensors: task a")


def test_no_structures() -> None:
    with pytest.raises(InputError, match="at least one structure"):
        Samples.from_structures([])
