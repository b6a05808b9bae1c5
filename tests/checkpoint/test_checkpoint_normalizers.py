"""Normalised units and eV."""

import pytest
import torch
from checkpoint_helpers import structure
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.errors import InputError


def two_structures() -> Batch:
    return Batch.from_data_list(
        [
            Data(atomic_numbers=torch.tensor([1, 8, 1]), pos=torch.zeros(3, 3), natoms=3),
            Data(atomic_numbers=torch.tensor([78, 8]), pos=torch.zeros(2, 3), natoms=2),
        ]
    )


def with_references() -> Normalizers:
    references = torch.zeros(100, dtype=torch.float64)
    references[1], references[8], references[78] = -3.477, -7.204, -54321.123456
    return Normalizers(Normalizer(0.5, 2.0), Normalizer(0.0, 4.0), references)


def test_energy_and_forces_have_their_own_scale() -> None:
    normalizers = Normalizers(Normalizer(-1.0, 2.0), Normalizer(0.0, 4.0))
    out = {"energy": torch.tensor([1.0, -2.0]), "forces": torch.tensor([[1.0, 0.0, -0.5]])}
    physical = normalizers.denormalize(out, two_structures())
    assert physical["energy"].tolist() == [1.0, -5.0]
    assert physical["forces"].tolist() == [[4.0, 0.0, -2.0]]


def test_energy_only_output_has_no_forces() -> None:
    normalizers = Normalizers(Normalizer(0.0, 1.0), Normalizer(0.0, 1.0))
    assert set(normalizers.denormalize({"energy": torch.zeros(2)}, two_structures())) == {"energy"}


def test_linear_references_are_added_per_structure() -> None:
    physical = with_references().denormalize({"energy": torch.tensor([1.0, 2.0])}, two_structures())
    expected = torch.tensor([2.5 - 2 * 3.477 - 7.204, 4.5 - 54321.123456 - 7.204], dtype=torch.float64)
    torch.testing.assert_close(physical["energy"], expected)


def test_a_single_structure_needs_no_batch_index() -> None:
    data = structure()[0]
    references = torch.arange(100, dtype=torch.float64)
    normalizers = Normalizers(Normalizer(0.0, 1.0), Normalizer(0.0, 1.0), references)
    total = normalizers.denormalize({"energy": torch.zeros(1)}, data)["energy"]
    assert total.item() == 3 * 29 + 8 + 6 + 1


def test_large_totals_keep_their_digits() -> None:
    """A float32 sum of the references would lose what the network is to learn."""
    normalizers, batch = with_references(), two_structures()
    totals = normalizers.reference_energy(batch, 2) + torch.tensor([0.001, 0.002], dtype=torch.float64)
    normalised = normalizers.normalize_energy(totals, batch)
    torch.testing.assert_close(normalised * 2.0 + 0.5, torch.tensor([0.001, 0.002], dtype=torch.float64))


@pytest.mark.parametrize(
    "normalizers", [with_references(), Normalizers(Normalizer(1.5, 3.0), Normalizer(0.0, 2.0))]
)
def test_normalize_is_the_inverse(normalizers: Normalizers) -> None:
    batch = two_structures()
    energy, forces = torch.randn(2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    out = {
        "energy": normalizers.normalize_energy(energy, batch),
        "forces": normalizers.normalize_forces(forces),
    }
    physical = normalizers.denormalize(out, batch)
    torch.testing.assert_close(physical["energy"], energy)
    torch.testing.assert_close(physical["forces"], forces)


@pytest.mark.parametrize(
    "normalizers", [with_references(), Normalizers(Normalizer(1.5, 3.0), Normalizer(0.0, 2.0))]
)
def test_half_precision_ends_here(normalizers: Normalizers) -> None:
    out = {"energy": torch.zeros(2, dtype=torch.bfloat16), "forces": torch.zeros(5, 3, dtype=torch.bfloat16)}
    physical = normalizers.denormalize(out, two_structures())
    assert {name: value.dtype for name, value in physical.items()} == {
        "energy": torch.float64,
        "forces": torch.float32,
    }


def test_element_without_reference_is_named() -> None:
    normalizers = Normalizers(Normalizer(0.0, 1.0), Normalizer(0.0, 1.0), torch.zeros(50))
    with pytest.raises(InputError, match=r"atomic number 78 .* 49"):
        normalizers.denormalize({"energy": torch.zeros(2)}, two_structures())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_useless_numbers_are_refused(mean: float, std: float) -> None:
    with pytest.raises(InputError, match="finite mean and a finite std above 0"):
        Normalizer(mean, std)


def test_forces_have_no_mean() -> None:
    with pytest.raises(InputError, match=r"mean 0, not 0\.1"):
        Normalizers(Normalizer(0.0, 1.0), Normalizer(0.1, 1.0))


def test_references_must_be_a_finite_vector() -> None:
    for references in (torch.zeros(3, 2), torch.tensor([0.0, float("nan")])):
        with pytest.raises(InputError, match="one finite energy per atomic number"):
            Normalizers(Normalizer(0.0, 1.0), Normalizer(0.0, 1.0), references)


def test_dictionary_round_trip() -> None:
    for normalizers in (with_references(), Normalizers(Normalizer(1.5, 3.0), Normalizer(0.0, 2.0))):
        assert Normalizers.from_dict(normalizers.to_dict()) == normalizers
    assert with_references() != Normalizers(Normalizer(0.5, 2.0), Normalizer(0.0, 4.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stress": {"mean": 0.0, "std": 1.0}}, "stress"),
        ({"energy": {"mean": 0.0}}, "numbers 'mean' and 'std'"),
        ({"energy": {"mean": "x", "std": 1.0}}, "numbers 'mean' and 'std'"),
        ({"forces": {"mean": 0.0, "std": 0.0}}, "std above 0"),
    ],
)
def test_malformed_dictionaries_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Normalizers.from_dict(with_references().to_dict() | change)
