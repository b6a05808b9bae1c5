"""atoms_to_data: the fields of the data object, the tag rules, and every wrong structure."""

import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.constraints import FixAtoms

from equiformer2.errors import InputError
from equiformer2.inference.atoms import atoms_to_data, fixed_mask, oc20_tags


def test_fields(oxygen_on_copper: Atoms) -> None:
    atoms = oxygen_on_copper
    atoms.info["sid"] = "random1"
    data = atoms_to_data(atoms)
    assert data.pos.dtype == data.cell.dtype == torch.float64
    data.cell[0, 0] += 1.0
    assert not np.allclose(data.cell[0, 0], atoms.cell[0])  # a copy
    shift = np.linalg.solve(atoms.cell.array.T, (data.pos.numpy() - atoms.positions).T)
    assert np.allclose(shift, np.round(shift), atol=1e-6)  # the same atoms, wrapped into the cell
    assert data.atomic_numbers.tolist() == [29] * 12 + [8]
    assert data.cell.shape == (1, 3, 3)
    assert data.pbc.tolist() == [[True, True, True]]
    assert data.tags.tolist() == atoms.get_tags().tolist()
    assert data.fixed.tolist() == [True] * 8 + [False] * 5
    assert (data.natoms, data.sid, data.fid) == (13, "random1", 0)


def test_positions_are_wrapped_in_double_precision() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.positions += 0.3  # off the boundary, where rounding decides the side
    far = atoms.copy()
    far.positions += np.array([3000, -2000, 1000]) * atoms.cell.lengths()
    before = far.positions.copy()
    assert torch.allclose(atoms_to_data(far).pos, atoms_to_data(atoms).pos, rtol=0, atol=1e-10)
    assert np.array_equal(far.positions, before)


def test_open_directions_are_not_wrapped() -> None:
    atoms = Atoms("CO", [[0, 0, -5], [0, 0, -6.1]], cell=[10, 10, 10], pbc=(True, True, False))
    assert atoms_to_data(atoms, notify=False).pos[:, 2].tolist() == pytest.approx([-5, -6.1])


def test_atoms_stay_as_they_are(oxygen_on_copper: Atoms) -> None:
    copy = oxygen_on_copper.copy()
    copy.set_tags(0)
    reference = copy.copy()
    atoms_to_data(copy, notify=False)
    assert copy == reference
    assert copy.get_tags().tolist() == reference.get_tags().tolist()
    assert fixed_mask(copy).tolist() == fixed_mask(reference).tolist()


class TestTags:
    def test_oc20_tags_are_kept(self, oxygen_on_copper: Atoms) -> None:
        tags, notice = oc20_tags(oxygen_on_copper)
        assert tags.tolist() == oxygen_on_copper.get_tags().tolist()
        assert notice is None

    def test_missing_tags_follow_the_constraint(self, oxygen_on_copper: Atoms) -> None:
        oxygen_on_copper.set_tags(0)
        tags, notice = oc20_tags(oxygen_on_copper)
        assert tags.tolist() == [0] * 8 + [1] * 5
        assert notice is not None
        assert "none is marked as adsorbate" in notice

    @pytest.mark.parametrize("layers", [2, 3, 5])
    def test_ase_layers_are_translated(self, layers: int) -> None:
        atoms = fcc111("Pt", (2, 2, layers), vacuum=8.0)
        add_adsorbate(atoms, molecule("CO"), 2.0, "ontop")
        atoms.set_constraint(FixAtoms(mask=atoms.get_tags() >= 2))
        tags, notice = oc20_tags(atoms)
        assert tags.tolist() == [0] * 4 * (layers - 1) + [1] * 4 + [2, 2]
        assert notice is not None
        assert "layer numbers" in notice

    def test_clean_ase_slab(self) -> None:
        tags, notice = oc20_tags(fcc111("Pt", (1, 1, 3), vacuum=8.0))
        assert tags.tolist() == [1, 1, 1]
        assert notice is not None

    def test_subsurface_below_is_not_mistaken_for_an_adsorbate(self, oxygen_on_copper: Atoms) -> None:
        # A genuine system that lies across the cell boundary: its adsorbate is lower than its slab.
        oxygen_on_copper.positions[12, 2] -= 15
        tags, notice = oc20_tags(oxygen_on_copper)
        assert tags.tolist() == oxygen_on_copper.get_tags().tolist()
        assert notice is None

    def test_other_numbers(self, oxygen_on_copper: Atoms) -> None:
        oxygen_on_copper.set_tags([7] * 13)
        tags, notice = oc20_tags(oxygen_on_copper)
        assert tags.tolist() == [0] * 8 + [1] * 5
        assert notice is not None
        assert "(7)" in notice

    def test_notice_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            atoms_to_data(molecule("H2O"))
            atoms_to_data(molecule("H2O"), notify=False)
        assert len(caplog.records) == 1

    def test_a_thousand_structures_give_one_notice_of_a_kind(self, caplog: pytest.LogCaptureFixture) -> None:
        structures = [fcc111("Pt", (1, 1, layers), vacuum=8.0, periodic=False) for layers in (1, 2, 3, 4)]
        with caplog.at_level(logging.WARNING):
            for atoms in [*structures, molecule("CO"), molecule("H2O")]:
                atoms.set_tags(0)
                atoms_to_data(atoms)
        kinds = [record.getMessage().split()[:3] for record in caplog.records]
        assert kinds == [["no", "tags", "are"]]


def _nan() -> Atoms:
    atoms = molecule("H2O")
    atoms.positions[1, 0] = np.nan
    return atoms


def _coincident_across_the_boundary() -> Atoms:
    return Atoms("CuAg", [[0.01, 0, 0], [3.99, 4, 0]], cell=[4, 4, 4], pbc=True)


def _infinite_cell() -> Atoms:
    atoms = bulk("Cu")
    atoms.cell.array[0, 0] = np.inf
    return atoms


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (Atoms(), "no atoms"),
        (_nan(), r"atom 1 \(H\) has a non-finite position"),
        (Atoms("OCC", [[0, 0, 0], [1, 0, 0], [1, 0, 0.02]]), r"atoms 1 \(C\) and 2 \(C\) are 0.02 Å apart"),
        (_coincident_across_the_boundary(), r"atoms 0 \(Cu\) and 1 \(Ag\)"),
        # A cell in the wrong unit: every atom has millions of images within a few Å.
        (Atoms("Cu", cell=[0.01] * 3, pbc=True), "atom 0 .* and its periodic image are"),
        (Atoms("Cu", cell=[0.05, 5, 5], pbc=True), "its periodic image"),
        (Atoms("Cu", pbc=True), "periodic along a and b and c but has no lattice vector"),
        (Atoms("Cu", cell=[5, 5, 0], pbc=True), "periodic along c but has no lattice vector"),
        (Atoms("Cu", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 5]], pbc=True), "lie in one plane"),
        (_infinite_cell(), "non-finite"),
        (Atoms("Cu", cell=[5, 5, 1e7], pbc=True), r"a lattice vector is 1e\+07 Å long"),
        (Atoms("CuTh", [[0, 0, 0], [2.5, 0, 0]]), r"atom 1 \(Th, Z = 90\).*1 to 89"),
        (Atoms("X"), r"atom 0 \(X, a dummy atom, Z = 0\) is no element"),
    ],
)
def test_wrong_structures(atoms: Atoms, message: str) -> None:
    with pytest.raises(InputError, match=message):
        atoms_to_data(atoms, max_num_elements=90)


def test_open_cell_may_be_missing_where_not_periodic() -> None:
    atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]], cell=[3, 3, 0], pbc=(True, True, False))
    assert atoms_to_data(atoms, notify=False).natoms == 2
