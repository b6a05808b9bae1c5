"""Bad input: one sentence that names the atom or structure, never a graph."""

import math

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from graph_helpers import Structures, graph_of, structures

from equiformer2.errors import InputError


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_positions_that_are_not_numbers(value: float) -> None:
    one, batch = structures(molecule("H2O")), structures(molecule("CO"), molecule("H2O"))
    one.pos[1, 2] = value
    with pytest.raises(InputError, match=r"atom 1 of the structure has the position .*; repair"):
        graph_of(one)
    batch.pos[4, 0] = value
    with pytest.raises(InputError, match="atom 2 of structure 1 of the batch") as error:
        graph_of(batch)
    assert error.value.structure == 1


def test_coincident_atoms() -> None:
    with pytest.raises(InputError, match=r"atoms 0 and 2 of the structure are 0 Å apart .*; move or remove"):
        graph_of(structures(Atoms("CHO", [[0, 0, 0], [1, 0, 0], [0, 0, 0]])))
    twins = Atoms("H2", [[0, 0, 0], [5.001, 0, 0]], cell=[5, 5, 5], pbc=True)
    with pytest.raises(
        InputError, match=r"atoms 0 and 1 of structure 1 of the batch are 0.001 Å apart"
    ) as error:
        graph_of(structures(bulk("Cu"), twins))
    assert error.value.structure == 1
    apart = Atoms("H2", [[0, 0, 0], [0.011, 0, 0]])
    assert graph_of(structures(apart)).edge_index.shape[1] == 2


def test_coincident_atoms_are_found_however_few_neighbours_are_kept() -> None:
    s = structures(bulk("Cu").repeat(3))
    s.pos[20] = s.pos[4]
    with pytest.raises(InputError, match="atoms 4 and 20"):
        graph_of(s, max_neighbors=1)


def test_periodic_without_a_cell() -> None:
    atoms = molecule("H2O")
    atoms.pbc = True
    with pytest.raises(
        InputError, match=r"structure 1 of the batch is periodic along axis 0 but .*give it a cell"
    ) as error:
        graph_of(structures(bulk("Cu"), atoms))
    assert error.value.structure == 1
    atoms.pbc = [False, False, True]
    with pytest.raises(InputError, match="the structure is periodic along axis 2"):
        graph_of(structures(atoms))


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False)])
def test_dependent_lattice_vectors(pbc: tuple[bool, bool, bool]) -> None:
    atoms = Atoms("Cu", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 3]], pbc=pbc)
    with pytest.raises(InputError, match="lattice vectors of the structure are linearly dependent"):
        graph_of(structures(atoms))


def test_dependent_vectors_of_non_periodic_axes_are_fine() -> None:
    atoms = Atoms("Cu", cell=[[3, 0, 0], [6, 0, 0], [0, 0, 3]], pbc=(True, False, True))
    assert graph_of(structures(atoms), max_radius=3.1).edge_index.shape[1] == 4


def test_cell_that_is_not_a_number() -> None:
    s = structures(bulk("Cu"))
    s.cell[0, 1, 1] = math.nan
    with pytest.raises(InputError, match="the cell of the structure holds NaN"):
        graph_of(s)


def test_fractional_coordinates_are_noticed() -> None:
    atoms = bulk("Cu").repeat(3)
    s = structures(atoms)
    with pytest.raises(InputError, match="27 atoms in 1 Å"):
        graph_of(Structures(torch.tensor(atoms.get_scaled_positions()), torch.eye(3)[None], *s[2:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos": torch.zeros(3, 2)}, r"pos has the shape \(3, 2\)"),
        ({"natoms": torch.tensor([4])}, "natoms adds up to 4 atoms but pos holds 3"),
        ({"cell": torch.zeros(2, 3, 3)}, "cell has the shape"),
        ({"pbc": torch.zeros(3, dtype=torch.bool)}, "pbc has the shape"),
    ],
)
def test_wrong_shapes(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        graph_of(structures(molecule("H2O"))._replace(**change))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_radius": 0.0}, "max_radius"),
        ({"max_radius": math.nan}, "max_radius"),
        ({"max_radius": 1e4}, "max_radius"),
        ({"max_neighbors": 0}, "max_neighbors"),
    ],
)
def test_wrong_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        graph_of(structures(molecule("H2O")), **settings)


def test_lengths_that_are_not_in_angstrom() -> None:
    stretched = bulk("Cu", cubic=True).repeat((2, 2, 1))
    stretched.cell[2, 2] = 1e7
    with pytest.raises(InputError, match=r"lattice vector 2 of the structure is 1e\+07 Å long"):
        graph_of(structures(stretched))
    wide = structures(Atoms("H2", [[0, 0, 0], [0, 0, 1]], cell=[9e3, 9e3, 9e3], pbc=True))
    assert graph_of(wide).edge_index.shape[1] == 2
    with pytest.raises(InputError, match=r"atom 1 of the structure has the position .*from the origin"):
        graph_of(structures(Atoms("H2", [[0, 0, 0], [0, 0, 1e20]])))
