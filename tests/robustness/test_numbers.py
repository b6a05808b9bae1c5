"""Answers depend on the structure alone, not on where or how it is written down; bounds on structures."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bcc110, bulk, fcc100, fcc111, hcp0001, molecule
from torch_geometric.data import Batch, Data

from datasets_oc20 import LmdbWriter, OC20Lmdb
from equiformer2 import EquiformerV2Calculator
from equiformer2.errors import InputError
from equiformer2.graph import radius_graph
from equiformer2.inference import Predictor
from equiformer2.inference.atoms import atoms_to_data
from equiformer2.inference.symmetric_sites import find_symmetric_sites

CHECKPOINT = Path(__file__).parents[2] / "models" / "oc20_small.pt"


def oxygen_on_copper() -> Atoms:
    slab = fcc111("Cu", (2, 2, 4), vacuum=8.0, periodic=True)
    add_adsorbate(slab, "O", 1.2, "fcc")
    return slab


SYMMETRIC = {
    "Cu(111)": fcc111("Cu", (2, 2, 3), vacuum=8.0, periodic=True),
    "Cu(100)": fcc100("Cu", (2, 2, 3), vacuum=8.0, periodic=True),
    "Fe(110)": bcc110("Fe", (2, 2, 3), vacuum=8.0, periodic=True),
    "Ru(0001)": hcp0001("Ru", (2, 2, 3), vacuum=8.0, periodic=True),
    "O on Cu(111)": oxygen_on_copper(),
    "fcc crystal": bulk("Cu", "fcc", a=3.6, cubic=True),
}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(CHECKPOINT)


@pytest.fixture(scope="module")
def calculator() -> EquiformerV2Calculator:
    return EquiformerV2Calculator(CHECKPOINT)


def in_other_images(atoms: Atoms, random: np.random.Generator) -> Atoms:
    shifted = atoms.copy()
    shifted.positions += random.integers(-5, 6, size=(len(atoms), 3)) @ atoms.cell.array
    return shifted


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SYMMETRIC)
def test_images_change_no_edge_in_200_shifts(name: str, predictor: Predictor) -> None:
    atoms, random = SYMMETRIC[name], np.random.default_rng(0)
    assert predictor.checkpoint.config.enforce_max_neighbors_strictly
    batch = Batch.from_data_list(
        [unwrapped(atoms), *(unwrapped(in_other_images(atoms, random)) for _ in range(200))]
    )
    graph = predictor.model.build_graph(batch).in_precision(torch.float32)
    structure = torch.arange(201).view(201, 1) * len(atoms)
    source, target = (row.view(201, -1) - structure for row in graph.edge_index)
    for values in (source, target, graph.vectors.view(201, -1), graph.distances.view(201, -1)):
        assert torch.equal(values, values[:1].expand_as(values))


def unwrapped(atoms: Atoms) -> Data:
    """The data object with positions as they are, which `atoms_to_data` would wrap."""
    data = atoms_to_data(atoms, notify=False)
    data.pos = torch.tensor(atoms.positions)
    return data


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SYMMETRIC)
def test_images_change_no_bit_of_an_answer(
    name: str, predictor: Predictor, calculator: EquiformerV2Calculator, tmp_path: Path
) -> None:
    atoms, random = SYMMETRIC[name], np.random.default_rng(1)
    shifted = [in_other_images(atoms, random) for _ in range(4)]
    with LmdbWriter(tmp_path / "frames.lmdb", energy_kind=None) as writer:
        for structure in shifted:
            writer.write(unwrapped(structure))
    stored = OC20Lmdb(tmp_path / "frames.lmdb")
    expected = predictor.predict(atoms_to_data(atoms, notify=False))
    for structure, frame in zip(shifted, stored, strict=True):
        calculator.reset()
        structure.calc = calculator
        assert structure.get_potential_energy() == float(expected["energy"][0])
        assert np.array_equal(structure.get_forces(), expected["forces"].double().numpy())
        assert torch.equal(predictor.predict(frame)["forces"], expected["forces"])
    batch = predictor.predict(Batch.from_data_list([unwrapped(structure) for structure in shifted]))
    torch.testing.assert_close(
        batch["forces"].view(4, -1, 3), expected["forces"].expand(4, -1, 3), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("move", [(0.1, 0.2, 0.3), (-17.3, 4.1, 2.2), (812.0, -333.0, 5.0)], ids=str)
@pytest.mark.parametrize("name", ["Cu(111)", "fcc crystal"])
def test_the_origin_changes_nothing(
    name: str, move: tuple[float, float, float], calculator: EquiformerV2Calculator
) -> None:
    forces = []
    for origin in ((0.0, 0.0, 0.0), move):
        atoms = SYMMETRIC[name].copy()
        atoms.positions += origin
        atoms.calc = calculator
        forces.append(atoms.get_forces())
    assert np.allclose(*forces, rtol=0, atol=1e-6)


def in_float32(atoms: Atoms) -> Data:
    data = unwrapped(atoms)
    data.pos, data.cell = data.pos.float(), data.cell.float()
    return data


@pytest.mark.parametrize("name", ["Cu(111)", "Ru(0001)", "O on Cu(111)"])
def test_images_of_float32_frames_change_no_neighbour(name: str, predictor: Predictor) -> None:
    atoms, random = SYMMETRIC[name], np.random.default_rng(2)
    expected = predictor.predict(in_float32(atoms))["forces"]
    for _ in range(10):
        found = predictor.predict(in_float32(in_other_images(atoms, random)))["forces"]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # float32 positions at 50 Å


WATER_ON_SLAB = oxygen_on_copper()
FAR = [
    ("molecule at 1e5", molecule("H2O"), (1e5, 0.0, 0.0)),
    ("molecule at 9e5", molecule("CH3OH"), (-9e5, 3e5, 1e5)),
    ("open slab at 9e5", fcc111("Cu", (2, 2, 3), vacuum=8.0), (0.0, 0.0, 9e5)),
    ("periodic slab at 9e5", WATER_ON_SLAB, (9e5, -9e5, 9e5)),
]


@pytest.mark.parametrize(("name", "atoms", "move"), FAR, ids=[row[0] for row in FAR])
def test_far_from_the_origin(
    name: str, atoms: Atoms, move: tuple[float, float, float], calculator: EquiformerV2Calculator
) -> None:
    answers = []
    for origin in ((0.0, 0.0, 0.0), move):
        here = atoms.copy()
        here.positions += origin
        here.calc = calculator
        answers.append((here.get_potential_energy(), here.get_forces()))
    assert answers[0][0] == pytest.approx(answers[1][0], abs=2e-6)
    assert np.allclose(answers[0][1], answers[1][1], rtol=0, atol=2e-5)


def stray(atoms: Atoms, position: tuple[float, float, float]) -> Atoms:
    return atoms + Atoms("H", [position])


TOO_FAR = [
    ("two atoms", Atoms("H2", [[0, 0, 0], [2e5, 0, 0]]), r"spans 2e\+05 Å along x.*atom [01]"),
    ("two atoms along y", Atoms("O2", [[0, -6e4, 0], [0, 6e4, 0]]), r"spans 1.2e\+05 Å along y"),
    ("stray atom in T T F", stray(fcc111("Cu", (2, 2, 3), vacuum=8.0), (0, 0, 5e5)), "along z.*atom 12"),
    ("stray atom beyond all bounds", stray(molecule("H2O"), (0, 0, 3e6)), "atom 3.*from the origin"),
    (
        "wire with a stray atom",
        Atoms("CuH", [[0, 0, 0], [0, 9e4, 9e4]], cell=[3, 0, 0], pbc=[1, 0, 0]),
        "spans 9e.04 Å",
    ),
    (
        "periodic slab at 1e12",
        Atoms("Cu", [[1e12, 0, 0]], cell=[3, 3, 3], pbc=True),
        "atom 0.*from the origin",
    ),
    ("gas at 1e19", Atoms("Ar2", [[0, 0, 0], [1e19, 0, 0]]), "atom 1.*from the origin"),
    ("periodic cell of 1e6 Å", Atoms("Cu", cell=[1e6, 3, 3], pbc=True), "lattice vector"),
]


@pytest.mark.parametrize(("name", "atoms", "message"), TOO_FAR, ids=[row[0] for row in TOO_FAR])
def test_structures_that_span_too_much(
    name: str, atoms: Atoms, message: str, calculator: EquiformerV2Calculator, predictor: Predictor
) -> None:
    began = time.monotonic()
    atoms = atoms.copy()
    atoms.calc = calculator
    with pytest.raises(InputError, match=message):
        atoms.get_potential_energy()
    # The same from a data object that no Atoms stood behind.
    data = Data(
        pos=torch.tensor(atoms.positions),
        atomic_numbers=torch.tensor(atoms.numbers),
        cell=torch.tensor(atoms.cell.array).view(1, 3, 3),
        pbc=torch.tensor(atoms.pbc).view(1, 3),
        natoms=len(atoms),
    )
    with pytest.raises(InputError):
        predictor.predict(data)
    assert time.monotonic() - began < 5


def test_within_the_bounds_the_search_is_quick(calculator: EquiformerV2Calculator) -> None:
    began = time.monotonic()
    atoms = stray(fcc111("Cu", (2, 2, 3), vacuum=8.0), (0, 0, 9e3))
    atoms.calc = calculator
    assert np.isfinite(atoms.get_forces()).all()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_positions_without_digits_are_refused(dtype: torch.dtype) -> None:
    pos = torch.tensor([[2e4, 0.0, 0.0], [2e4, 0.0, 2e2]], dtype=dtype)
    arguments = torch.zeros(1, 3, 3), torch.zeros(1, 3, dtype=torch.bool), torch.tensor([2])
    with pytest.raises(InputError, match=r"atom 0.*float64"):
        radius_graph(pos, *arguments, max_radius=6.0, max_neighbors=10, strict=True)
    graph = radius_graph(pos.double(), *arguments, max_radius=6.0, max_neighbors=10, strict=True)
    assert graph.edge_index.shape[1] == 0


CRYSTALS = [
    ("fcc", bulk("Cu", "fcc", a=3.6, cubic=True), "cancel"),
    ("rocksalt", bulk("MgO", "rocksalt", a=4.2, cubic=True), "equally far"),
    ("bcc", bulk("Fe", "bcc", a=2.87, cubic=True), "equally far"),
    ("diamond", bulk("Si", "diamond", a=5.43), "equally far"),
    ("slab with an adsorbate", oxygen_on_copper(), None),
    ("molecule", molecule("CH3OH"), None),
    ("lone atom", Atoms("Cu"), None),
]


@pytest.mark.parametrize(("name", "atoms", "reason"), CRYSTALS, ids=[row[0] for row in CRYSTALS])
def test_perfect_crystals_are_noticed(
    name: str, atoms: Atoms, reason: str | None, predictor: Predictor
) -> None:
    config = predictor.checkpoint.config
    notice = find_symmetric_sites(atoms_to_data(atoms, notify=False), config).notice
    assert (notice is None) if reason is None else (notice is not None and reason in notice)
    if len(atoms) == 2:
        return  # the images of an atom on both sides of another tie however the two are displaced
    rattled = atoms.copy()
    rattled.rattle(0.01, seed=0)
    assert find_symmetric_sites(atoms_to_data(rattled, notify=False), config).notice is None


def test_the_calculator_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True)
    atoms.calc = EquiformerV2Calculator(CHECKPOINT)
    for strain in (1.0, 1.01, 1.02):
        atoms.set_cell(atoms.cell * strain, scale_atoms=True)
        atoms.get_potential_energy()
    assert sum("perfect crystal" in record.message for record in caplog.records) == 1
    assert "rattle" in caplog.text


@pytest.mark.parametrize("crystal", ["fcc", "rocksalt"])
def test_the_remedy_for_perfect_crystals(crystal: str, calculator: EquiformerV2Calculator) -> None:
    atoms = (
        bulk("Cu", "fcc", a=3.6, cubic=True)
        if crystal == "fcc"
        else bulk("MgO", "rocksalt", a=4.2, cubic=True)
    )
    atoms.rattle(0.01, seed=0)
    energies = []
    for step in (0.0, 1e-4):
        moved = atoms.copy()
        moved.positions[0] += step
        moved.calc = calculator
        energies.append(moved.get_potential_energy())
    assert abs(energies[1] - energies[0]) < 1e-3


@pytest.mark.parametrize("natoms", [2, np.int64(2), torch.tensor(2), torch.tensor([2], dtype=torch.int32)])
def test_one_structure_may_give_its_number_of_atoms(natoms: object) -> None:
    pos, cell, pbc = torch.tensor([[0.0, 0, 0], [1.8, 1.8, 0]]), 3.6 * torch.eye(3)[None], torch.ones(1, 3)
    settings = {"max_radius": 6.0, "max_neighbors": 20, "strict": True}
    found = radius_graph(pos, cell, pbc, natoms, **settings)  # type: ignore[arg-type]
    expected = radius_graph(pos, cell, pbc, torch.tensor([2]), **settings)  # type: ignore[arg-type]
    assert torch.equal(found.edge_index, expected.edge_index)
    assert torch.equal(found.vectors, expected.vectors)


@pytest.mark.parametrize(
    "natoms", [2.0, True, "2", None, torch.tensor([[2]]), torch.tensor([2.0]), [3, -1], -2, 3]
)
def test_other_numbers_of_atoms_are_refused(natoms: object) -> None:
    pos, cell, pbc = torch.tensor([[0.0, 0, 0], [1.8, 1.8, 0]]), 3.6 * torch.eye(3)[None], torch.ones(1, 3)
    with pytest.raises(InputError, match="natoms"):
        radius_graph(pos, cell, pbc, natoms, max_radius=6.0, max_neighbors=20, strict=True)  # type: ignore[arg-type]
