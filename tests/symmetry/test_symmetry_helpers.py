"""The helpers find exactly the symmetries that a model lacks, and nothing in one that has them all."""

from collections.abc import Callable

import pytest
import torch
from ase.build import fcc111, molecule
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.graph import radius_graph
from equiformer2.symmetry import SYMMETRIES, assert_symmetries, check_symmetries
from equiformer2.symmetry.transformations import repeat_cell, rotate


def as_data(atoms, dtype: torch.dtype = torch.float64) -> Data:  # type: ignore[no-untyped-def]
    return Data(
        pos=torch.tensor(atoms.get_positions(), dtype=dtype),
        atomic_numbers=torch.tensor(atoms.numbers),
        cell=torch.tensor(atoms.cell[:], dtype=dtype).view(1, 3, 3),
        pbc=torch.tensor(atoms.pbc).view(1, 3),
        natoms=len(atoms),
        tags=torch.ones(len(atoms), dtype=torch.int64),
    )


def crystal() -> Data:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=4.0, periodic=True)
    atoms.numbers[3] = 78
    atoms.rattle(0.1, seed=0)
    return as_data(atoms)


Extra = Callable[[Batch], Tensor]


def pair_potential(extra: Extra | None = None) -> Callable[[Batch], dict[str, Tensor]]:
    """A smooth pair potential with its forces, plus an energy per atom that may break a symmetry."""

    def predict(batch: Batch) -> dict[str, Tensor]:
        batch = batch.clone()
        pos = batch.pos.clone().requires_grad_()
        graph = radius_graph(
            pos,
            batch.cell,
            batch.pbc,
            batch.natoms,
            max_radius=4.0,
            max_neighbors=500,
            strict=False,
        )
        source, target = batch.atomic_numbers[graph.edge_index].double()
        per_edge = (source * target).sqrt() * torch.clamp(1 - graph.distances / 4.0, min=0) ** 3
        per_atom = torch.zeros_like(pos[:, 0]).index_add(0, graph.edge_index[1], per_edge)
        batch.pos = pos
        if extra is not None:
            per_atom = per_atom + extra(batch).expand_as(per_atom)
        energy = torch.zeros_like(batch.natoms, dtype=pos.dtype).index_add(0, batch.batch, per_atom)
        (grad,) = torch.autograd.grad(energy.sum(), pos)
        return {"energy": energy, "forces": -grad}

    return predict


def reduced(batch: Batch) -> Tensor:
    """Fractional coordinates along the first lattice vector."""
    return torch.linalg.solve(batch.cell[batch.batch].transpose(1, 2), batch.pos.unsqueeze(2))[:, 0, 0]


def position_in_structure(batch: Batch) -> Tensor:
    return (torch.arange(len(batch.pos)) - batch.ptr[batch.batch]).to(batch.pos)


def lattice_lengths(batch: Batch) -> Tensor:
    """An energy density that depends on which vectors span the lattice, but not on their orientation."""
    return batch.cell.norm(dim=2).sum(1)[batch.batch]


CULPRITS: dict[str, tuple[Extra, set[str]]] = {
    "random": (lambda batch: torch.rand(len(batch.pos)).double(), {*SYMMETRIES}),
    "direction": (
        lambda batch: 10 * batch.cell[batch.batch, 0, 0],
        {"rotation", "lattice vectors", "supercell"},
    ),
    "origin": (
        lambda batch: batch.pos.norm(dim=1),
        {"translation", "periodic images", "supercell"},
    ),
    "numbering": (
        lambda batch: position_in_structure(batch) * batch.atomic_numbers,
        {"permutation", "supercell"},
    ),
    "images": (
        lambda batch: torch.where(batch.pbc[batch.batch, 0], torch.floor(reduced(batch)), 0.0),
        {"translation", "periodic images", "lattice vectors", "supercell"},
    ),
    "lattice": (lattice_lengths, {"lattice vectors", "supercell"}),
    "size": (lambda batch: batch.natoms[batch.batch].double(), {"supercell"}),
    "batch": (lambda batch: torch.tensor(float(len(batch.natoms))).double(), {"batch composition"}),
}


def test_a_symmetric_model_has_only_rounding_errors() -> None:
    report = assert_symmetries(pair_potential(), [crystal(), as_data(molecule("CH3OH"))], 1e-12)
    assert set(report.errors) == set(SYMMETRIES)
    for error in report.errors.values():
        assert error.forces_rms is not None
        assert error.forces_max is not None
        assert error.energy_rms <= error.energy_max <= 1e-12
        assert error.forces_rms <= error.forces_max <= 1e-12
    assert report.errors["repeated call"].largest == 0.0


@pytest.mark.parametrize("culprit", CULPRITS)
def test_a_broken_symmetry_is_found_and_named(culprit: str) -> None:
    extra, broken = CULPRITS[culprit]
    report = check_symmetries(pair_potential(extra), crystal())
    found = {name for name, error in report.errors.items() if error.largest > 1e-9}
    assert found == broken
    with pytest.raises(AssertionError, match="broken beyond the tolerance") as failure:
        assert_symmetries(pair_potential(extra), crystal(), 1e-9)
    assert all(name in str(failure.value) for name in broken)


def test_broken_forces_alone_are_found() -> None:
    def predict(batch: Batch) -> dict[str, Tensor]:
        out = pair_potential()(batch)
        return {"energy": out["energy"], "forces": out["forces"] * torch.tensor([1.0, 1.0, 1.01])}

    report = check_symmetries(predict, crystal())
    found = {name for name, error in report.errors.items() if error.largest > 1e-9}
    assert found == {"rotation"}
    rotation = report.errors["rotation"]
    assert rotation.energy_rms < 1e-12
    assert rotation.forces_rms == pytest.approx(0.006, abs=0.005)


def test_not_a_number_is_broken() -> None:
    def predict(batch: Batch) -> dict[str, Tensor]:
        return {"energy": torch.full((len(batch.natoms),), torch.nan)}

    with pytest.raises(AssertionError, match="rotation"):
        assert_symmetries(predict, crystal(), {"rotation": 1e-3})


def test_structures_without_periodicity_have_fewer_symmetries() -> None:
    report = check_symmetries(pair_potential(), as_data(molecule("CH3OH")))
    assert set(SYMMETRIES) - set(report.errors) == {"periodic images", "lattice vectors", "supercell"}


def test_energies_alone() -> None:
    report = check_symmetries(lambda batch: {"energy": pair_potential()(batch)["energy"]}, crystal())
    assert {error.forces_rms for error in report.errors.values()} == {None}
    assert "–" in str(report)


def test_a_batch_and_its_list_are_the_same() -> None:
    structures = [crystal(), as_data(molecule("CH3OH"))]
    one = check_symmetries(pair_potential(), structures, symmetries=["rotation"], trials=1)
    two = check_symmetries(
        pair_potential(), Batch.from_data_list(structures), symmetries=["rotation"], trials=1
    )
    assert one == two


def test_the_table_has_a_line_for_each_symmetry() -> None:
    lines = str(check_symmetries(pair_potential(), crystal(), trials=1)).splitlines()
    assert [line[:20].strip() for line in lines[1:]] == list(SYMMETRIES)
    assert len({len(line) for line in lines}) == 1


def test_unknown_symmetry() -> None:
    with pytest.raises(InputError, match="unknown symmetry 'parity'; known are repeated call, rotation"):
        check_symmetries(pair_potential(), crystal(), symmetries=["parity"])


def test_transformed_structures() -> None:
    data, generator = crystal(), torch.Generator().manual_seed(0)
    turned = rotate(data, generator).data
    # Lengths and handedness stay.
    assert torch.allclose(torch.pdist(turned.pos), torch.pdist(data.pos))
    assert torch.allclose(torch.linalg.det(turned.cell), torch.linalg.det(data.cell))
    assert not torch.allclose(turned.pos, data.pos, atol=0.1)
    doubled = repeat_cell(data, generator)
    assert doubled is not None
    assert doubled.copies == 2
    assert doubled.data.natoms == 16
    assert torch.allclose(torch.linalg.det(doubled.data.cell), 2 * torch.linalg.det(data.cell))
    assert doubled.data.tags.tolist() == [1] * 16
