"""References, normalizers and the check of the kind of energy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oc20_files import structure
from torch_geometric.data import Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from datasets_oc20.targets import (
    TargetSample,
    check_energies_match_kind,
    fit_linear_references,
    fit_normalizers,
    sample_targets,
)

ELEMENTS = {1: -3.5, 8: -7.2, 29: -3.7}


@pytest.fixture
def totals(tmp_path: Path) -> OC20Lmdb:
    """40 structures whose total energy is exactly a sum over their elements."""
    random = np.random.default_rng(0)
    with LmdbWriter(tmp_path / "totals.lmdb", "total") as writer:
        for seed in range(40):
            numbers = random.choice(list(ELEMENTS), size=12)
            energy = sum(ELEMENTS[int(number)] for number in numbers)
            changes = {"atomic_numbers": torch.from_numpy(numbers)}
            writer.write(structure(natoms=12, energy=energy, seed=seed, **changes))
    return OC20Lmdb(tmp_path / "totals.lmdb")


def test_linear_references_are_recovered(totals: OC20Lmdb) -> None:
    references = fit_linear_references(totals)
    assert references.shape == (100,)
    for number, energy in ELEMENTS.items():
        assert references[number].item() == pytest.approx(energy, abs=1e-3)
    per_atom = np.mean([data.energy.item() / 12 for data in totals])
    assert references[79].item() == pytest.approx(per_atom, abs=1e-5)  # an element that is not there
    statistics = fit_normalizers(totals, references)
    assert statistics["energy"][0] == pytest.approx(0.0, abs=1e-2)


def test_statistics_are_those_of_numpy(totals: OC20Lmdb) -> None:
    energy = np.array([data.energy.item() for data in totals])
    free = np.concatenate([data.forces[~data.fixed].numpy() for data in totals])
    statistics = fit_normalizers(totals)
    assert statistics["energy"] == pytest.approx((energy.mean(), energy.std()), rel=1e-6)
    assert statistics["forces"] == pytest.approx((0.0, np.sqrt((free**2).mean())), rel=1e-6)
    references = torch.linspace(-2, 2, 100, dtype=torch.float64)
    shifted = energy - np.array([references[data.atomic_numbers].sum().item() for data in totals])
    statistics = fit_normalizers(totals, references)
    assert statistics["energy"] == pytest.approx((shifted.mean(), shifted.std()), rel=1e-6)


def test_a_sample_is_spread_over_the_dataset(totals: OC20Lmdb) -> None:
    sample = sample_targets(totals, limit=5)
    expected = [totals[index].energy.item() for index in (0, 9, 19, 29, 39)]
    assert sample.energy.tolist() == expected
    assert sample.composition.sum(axis=1).tolist() == [12] * 5


def test_no_spread_becomes_one(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "one.lmdb", "adsorption") as writer:
        data = structure(energy=0.25)
        del data["forces"]
        writer.write(data)
    assert fit_normalizers(OC20Lmdb(tmp_path / "one.lmdb")) == {"energy": (0.25, 1.0), "forces": (0.0, 1.0)}


def sample_of(energy: list[float], natoms: int) -> TargetSample:
    composition = np.zeros((len(energy), 100))
    composition[:, 29] = natoms
    return TargetSample(composition, np.array(energy), None)


def test_energies_of_the_other_kind_are_refused(val_20: Path) -> None:
    with pytest.raises(DataError, match=r"data\.lmdb: .*adsorption .* 300 eV \(5 eV per"):
        check_energies_match_kind(sample_of([-200.0, -400.0], 60), "adsorption", "data.lmdb")
    with pytest.warns(UserWarning, match=r"data\.lmdb: .*total energies"):
        check_energies_match_kind(sample_of([-1.0, 2.0], 60), "total", "data.lmdb")
    check_energies_match_kind(sample_of([-200.0, -400.0], 60), "total", "data.lmdb")
    check_energies_match_kind(sample_of([-1.0, 2.0], 60), "adsorption", "data.lmdb")
    check_energies_match_kind(sample_of([-6.7], 2), "total", "data.lmdb")  # H2 has a small total energy
    with pytest.raises(DataError, match="declared as adsorption"):  # so have small cells of light metals
        check_energies_match_kind(sample_of([-20.0, -30.0], 16), "adsorption", "data.lmdb")
    # Twelve adsorbates on one slab: an adsorption energy of the cell that no single adsorbate could have.
    check_energies_match_kind(sample_of([-20.0, -30.0], 90), "adsorption", "data.lmdb")
    check_energies_match_kind(sample_targets(OC20Lmdb(val_20)), "adsorption", "data.lmdb")


def test_normalizers_of_other_data_are_refused() -> None:
    """Raw energies under OC20's normalizers: the most common failed reproduction."""
    totals = sample_of([-200.0, -400.0, -310.0], 60)
    oc20 = (-0.7554450631141663, 2.887317180633545)
    with pytest.raises(DataError, match=r"data: .*mean -0\.7554 eV, .* without"):
        totals.check_normalized(*oc20, None, "data")
    references = torch.zeros(100, dtype=torch.float64)
    references[29] = -300.0 / 60
    with pytest.raises(DataError, match="after linear references"):
        totals.check_normalized(*oc20, references, "data")
    totals.check_normalized(0.0, 100.0, references, "data")
    # A table as short as the network's elements, as foreign checkpoints have.
    totals.check_normalized(0.0, 100.0, references[:90], "data")
    sample_of([-9.9, 9.9], 60).check_normalized(*oc20, None, "data")


def test_records_without_energy_or_with_unknown_elements(tmp_path: Path) -> None:
    for name, change, message in (
        ("a", {"energy": None}, "no energy"),
        ("b", {"atomic_numbers": torch.tensor([1, 2, 3, 100])}, "above 99"),
    ):
        with LmdbWriter(tmp_path / f"{name}.lmdb", "total") as writer:
            writer.write(Data(**{**structure().to_dict(), **change}))
        with pytest.raises(DataError, match=rf"{name}\.lmdb, key 0: .*{message}"):
            sample_targets(OC20Lmdb(tmp_path / f"{name}.lmdb"))
