"""Odd structures, options and results at the doors of inference: inputs and what must come of them.

Structures are built by functions of this file, so that a case can be read as a line of a table.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import (
    FixAtoms,
    FixBondLength,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixScaled,
    Hookean,
)
from ase.io import read, write
from command_line import run_script_file
from torch_geometric.data import Batch

from datasets_oc20 import LmdbWriter, OC20Lmdb, constraints, structure_record
from datasets_oc20.ase_lmdb import AseRow
from datasets_oc20.errors import DataError
from datasets_oc20.structure_files import read_structure
from equiformer2 import EquiformerV2, EquiformerV2Calculator, ModelConfig
from equiformer2.adsorption.named_structures import build_slab
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor, atoms_to_data, relax
from equiformer2.inference.atoms import check_atoms, fixed_mask, oc20_tags
from equiformer2.inference.extras import extras, plain, simple_info
from equiformer2.inference.meaning import count_adsorbates, no_adsorption_energy
from equiformer2.inference.record import write_relaxation_record
from equiformer2.symmetry import check_symmetries
from equiformer2.training.prediction import write_predictions
from equiformer2.training.submission import SPLITS, make_submission

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = {
    "num_layers": 1, "sphere_channels": 8, "attn_hidden_channels": 8, "num_heads": 2,
    "attn_alpha_channels": 4, "attn_value_channels": 4, "ffn_hidden_channels": 8, "lmax": 2,
    "mmax": 1, "grid_resolution": 8,
    "edge_channels": 8, "num_distance_basis": 16, "max_radius": 5.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(energy_kind: str = "adsorption", overflows: bool = False, **options: Any) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = EquiformerV2(ModelConfig(**{**SMALL, **options}))
        path = tmp_path_factory.mktemp("model") / "model.pt"
        save_checkpoint(
            path,
            model=model,
            raw_state={
                name: value * 1e30 if overflows and name.startswith("energy") else value
                for name, value in model.state_dict().items()
            },
            averaged_state=None,
            normalizers=Normalizers(Normalizer(-0.7, 2.0), Normalizer(0.0, 2.5)),
            energy_kind=energy_kind,
            provenance={},
        )
        return path

    return make


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model()


def slab(layers: int = 3, *, adsorbate: bool = True, oc20: bool = True, held: bool = True) -> Atoms:
    atoms = fcc111("Cu", (1, 1, layers), vacuum=8.0, periodic=True)
    if adsorbate:
        add_adsorbate(atoms, "O", 1.3, "fcc")
    numbers = atoms.get_tags()
    if held:
        atoms.set_constraint(FixAtoms(mask=numbers >= 2))
    if oc20:
        atoms.set_tags(np.where(numbers == 0, 2, np.where(numbers >= 2, 0, 1)))
    return atoms


LOWER = [0, 1]
HELD: list[tuple[str, Any, list[bool]]] = [
    ("FixAtoms", FixAtoms(LOWER), [True, True, False, False]),
    ("FixAtoms from the end", FixAtoms([-1]), [False, False, False, True]),
    ("FixCartesian", FixCartesian(LOWER), [True, True, False, False]),
    ("FixCartesian of one atom", FixCartesian(2), [False, False, True, False]),
    ("FixScaled", FixScaled(LOWER), [True, True, False, False]),
    ("FixCartesian in part", FixCartesian(LOWER, (True, True, False)), [False] * 4),
    ("FixScaled in part", FixScaled(LOWER, (False, False, True)), [False] * 4),
    ("FixedLine", FixedLine(LOWER, (0, 0, 1)), [False] * 4),
    ("line, plane", [FixedLine(LOWER, (0, 0, 1)), FixedPlane(LOWER, (0, 0, 1))], [True, True, False, False]),
    ("line in a plane", [FixedLine(LOWER, (1, 0, 0)), FixedPlane(LOWER, (0, 0, 1))], [False] * 4),
    ("two lines", [FixedLine(0, (0, 0, 1)), FixedLine(0, (0, 1, 1))], [True, False, False, False]),
    ("x, then y z", [FixCartesian(0, (1, 0, 0)), FixCartesian(0, (0, 1, 1))], [True, False, False, False]),
    ("a b, then z", [FixScaled(0, (1, 1, 0)), FixCartesian(0, (0, 0, 1))], [True, False, False, False]),
    ("three planes", [FixedPlane(3, d) for d in np.eye(3)], [False, False, False, True]),
    ("no atom is held", [FixCom(), Hookean(0, 3, k=5.0, rt=1.0), FixBondLength(0, 1)], [False] * 4),
]  # fmt: skip


@pytest.mark.parametrize(("constraint", "held"), [case[1:] for case in HELD], ids=[case[0] for case in HELD])
def test_held_atoms(constraint: Any, held: list[bool]) -> None:
    atoms = slab()
    atoms.set_constraint(constraint)
    assert fixed_mask(atoms).tolist() == held
    atoms.set_tags(0)
    assert atoms_to_data(atoms, notify=False).tags.tolist() == [0 if one else 1 for one in held]


@pytest.mark.parametrize(
    ("constraint", "held"),
    [case[1:] for case in HELD if "no atom" not in case[0]],
    ids=[case[0] for case in HELD if "no atom" not in case[0]],
)
def test_held_atoms_of_a_database_row(constraint: Any, held: list[bool]) -> None:
    atoms = slab()
    kept = [one.todict() for one in (constraint if isinstance(constraint, list) else [constraint])]
    row = {"numbers": atoms.numbers.tolist(), "positions": atoms.positions.tolist()}
    row |= {"cell": atoms.cell.tolist(), "pbc": [True] * 3, "tags": [0] * 4}
    found = AseRow({**row, "constraints": json.loads(json.dumps(kept))}, "row 1").fields("1", keep_tags=False)
    assert found["fixed"].tolist() == held


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "FixAtoms", "kwargs": {"indices": [99]}}, "FixAtoms is of atom 99, but there are 4"),
        ({"name": "FixCartesian", "kwargs": {"a": [-7]}}, "FixCartesian is of atom -7"),
        ({"name": "FixAtoms", "kwargs": {"indices": [0.5]}}, "FixAtoms cannot be read"),
        ({"name": "FixAtoms"}, "FixAtoms cannot be read"),
        ({"name": "FixedLine", "kwargs": {"indices": [0]}}, "FixedLine cannot be read"),
        ({"name": "Invented", "kwargs": {}}, "Invented does not say which atoms"),
        (["FixAtoms"], "None does not say which atoms"),
    ],
)
def test_wrong_constraints_of_a_row_are_one_sentence(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        constraints.held_atoms(slab(), constraints.constraints_from_records([row], "x.aselmdb, row 1"))
    assert "not a row of an ASE database" not in str(error.value)


def _tagged(
    tags: list[int], *, upside_down: bool = False, wrapped: bool = False, held: bool = False
) -> Atoms:
    atoms = slab(held=held)
    atoms.set_tags(tags)
    if upside_down:
        atoms.positions[:, 2] = atoms.cell[2, 2] - atoms.positions[:, 2]
    if wrapped:
        atoms.positions[3, 2] -= atoms.cell[2, 2]
    return atoms


TAGS: list[tuple[str, Atoms, list[int], str | None]] = [
    ("upright", _tagged([0, 0, 1, 2]), [0, 0, 1, 2], None),
    ("without subsurface", _tagged([1, 1, 1, 2]), [1, 1, 1, 2], None),
    ("without subsurface, upside down", _tagged([1, 1, 1, 2], upside_down=True), [1, 1, 1, 2], "OC20's"),
    ("adsorbate wrapped over c", _tagged([1, 1, 1, 2], wrapped=True), [1, 1, 1, 2], "OC20's"),
    ("wrapped and held", _tagged([0, 0, 1, 2], wrapped=True, held=True), [0, 0, 1, 2], None),
    ("only an adsorbate tag", _tagged([0, 0, 0, 2]), [0, 0, 0, 2], None),
    ("all 0 are no tags", _tagged([0] * 4, held=True), [0, 0, 1, 1], "no tags are set"),
    ("layers of three", _tagged([3, 2, 1, 0], held=True), [0, 0, 1, 2], "layer numbers"),
    ("layers of three, free", _tagged([3, 2, 1, 0]), [1, 1, 1, 2], "layer numbers"),
    ("other numbers", _tagged([5, 5, 5, 7], held=True), [0, 0, 1, 1], "other than 0, 1, 2"),
    ("negative", _tagged([-1, 0, 1, 2], held=True), [0, 0, 1, 1], "other than 0, 1, 2"),
]


@pytest.mark.parametrize(
    ("atoms", "tags", "notice"), [case[1:] for case in TAGS], ids=[case[0] for case in TAGS]
)
def test_tags(atoms: Atoms, tags: list[int], notice: str | None) -> None:
    found, told = oc20_tags(atoms)
    assert found.tolist() == tags
    assert (told is None) if notice is None else (told is not None and notice in told)


CIF = """data_x
_cell_length_a 3.9
_cell_length_b 3.9
_cell_length_c 3.9
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M '{group}'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{sites}
"""
PDB = "ATOM      1  C   MOL A   1       0.000   0.000   0.000  {:4.2f}  0.00           C\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ab.cif", CIF.format(group="F m -3 m", sites="Pt Pt 0 0 0 0.7\nNi Ni 0 0 0 0.3"), "Pt 0.7, Ni 0.3"),
        ("holes.cif", CIF.format(group="F m -3 m", sites="Pd Pd 0 0 0 0.5"), "partly occupied .Pd 0.5"),
        ("one.cif", CIF.format(group="P m -3 m", sites="Cs Cs 0 0 0 1\nO O .5 .5 .5 0.25"), "O 0.25"),
        ("whole.cif", CIF.format(group="F m -3 m", sites="Pt Pt 0 0 0 1.0(1)"), None),
        ("half.pdb", PDB.format(0.5), "atom 0 has the occupancy 0.5"),
        ("whole.pdb", PDB.format(1.0), None),
        ("unknown.pdb", PDB.format(0.0), None),
    ],
)
def test_partial_occupancies(tmp_path: Path, name: str, text: str, message: str | None) -> None:
    (tmp_path / name).write_text(text)
    atoms = read_structure(tmp_path / name)
    if message is None:
        check_atoms(atoms)
        return
    with pytest.raises(InputError, match=message):
        check_atoms(atoms)
    with pytest.raises(InputError, match=message):
        relax(atoms, EMT())


def _numbered(number: int) -> Atoms:
    atoms = slab()
    atoms.numbers[3] = number
    return atoms


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "atom 3 .X, a dummy atom, Z = 0. is no element"),
        (119, "atom 3 .Z = 119. is no element"),
        (-1, "atom 3 .Z = -1. is no element"),
        (10**6, "is no element"),
        (92, "atom 3 .U, Z = 92.*use a checkpoint trained with this element"),
    ],
)
def test_atomic_numbers(model: Path, number: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        EquiformerV2Calculator(model).get_potential_energy(_numbered(number))
    data = atoms_to_data(slab())
    data.atomic_numbers[3] = number
    with pytest.raises(InputError, match=message):
        Predictor(model).predict(data)
    assert ("checkpoint" in str(error.value)) == (number == 92)


OLD_ARGUMENTS = [
    ({"checkpoint_path": "x.pt"}, "checkpoint= here"),
    ({"checkpoint_path": "x.pt", "cpu": False}, '"cuda" for cpu=False'),
    ({"model_name": "EquiformerV2-31M-S2EF-OC20-All+MD", "local_cache": "."}, "path of the downloaded file"),
    ({"config_yml": "x.yml"}, "holds its own settings"),
    ({"trainer": "ocp", "seed": 0}, "seed= is not needed"),
    ({"predict_unit": 1, "task_name": "oc20"}, "energy_kind= here"),
    ({"default_dtype": "float64"}, "precision= here"),
    ({"use_device": "cuda"}, "device= here"),
]


@pytest.mark.parametrize(("arguments", "message"), OLD_ARGUMENTS)
@pytest.mark.parametrize("kind", [EquiformerV2Calculator, Predictor])
def test_old_argument_names(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        kind(**arguments)
    assert message in str(error.value)
    assert all(f"{name}=" in str(error.value) for name in arguments)


def test_predictor_takes_what_users_have(model: Path) -> None:
    predictor, atoms = Predictor(model), slab()
    expected = predictor.predict(Batch.from_data_list([atoms_to_data(atoms)] * 2))
    for given in ([atoms, atoms], (atoms, atoms), [atoms_to_data(atoms), atoms]):
        found = predictor.predict(given)
        assert torch.allclose(found["energy"], expected["energy"])
        assert found["forces"].shape == (8, 3)
    assert predictor.predict(atoms)["energy"].shape == (1,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no structure"),
        ("slab.traj", "given str: give a Batch"),
        (None, "given NoneType"),
        ([slab(), "slab.traj"], "structure 1 of the list is str"),
        ([slab(), Atoms()], "structure 1 of the list: the structure has no atoms"),
        ([slab(), slab(), _numbered(92)], "structure 2 of the list: atom 3"),
        (_numbered(92), "^atom 3"),
    ],
)
def test_predictor_names_what_it_cannot_take(model: Path, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Predictor(model).predict(given)


def _two_adsorbates() -> Atoms:
    return slab().repeat((2, 2, 1))


def _water_across_the_cell() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0, periodic=True)
    water = molecule("H2O")
    water.set_tags(2)
    water.positions += [0.1, 0.1, atoms.positions[:, 2].max() + 2.5]
    atoms.set_tags(1)
    atoms += water
    atoms.wrap()
    return atoms


def _boxed(name: str) -> Atoms:
    atoms = molecule(name, vacuum=6.0)
    atoms.pbc = True
    return atoms


def _tagged_cluster() -> Atoms:
    return Atoms("Pt2O", [[0, 0, 0], [2.7, 0, 0], [1.3, 0, 1.8]], tags=[1, 1, 2])


MEANINGLESS = [
    ("slab with adsorbate", slab(), None),
    ("ASE layers with adsorbate", slab(oc20=False), None),
    ("clean slab", slab(adsorbate=False), "slab without an adsorbate"),
    ("clean slab of layers", slab(adsorbate=False, oc20=False), "slab without an adsorbate"),
    ("molecule", molecule("CO"), "molecule"),
    ("molecule in a box", _boxed("CH3OH"), "molecule"),
    ("molecule tagged as adsorbate", _tagged([2, 2, 2, 2]), "molecule"),
    ("bulk", bulk("Cu"), "bulk crystal"),
    ("bulk of two elements", bulk("NaCl", "rocksalt", a=5.64), "bulk crystal"),
    ("atom", Atoms("O"), "lone atom"),
    ("cluster tagged as a slab", _tagged_cluster(), "cluster without a slab"),
    ("atom in a box", Atoms("O", cell=[9, 9, 9], pbc=True), "lone atom"),
]


@pytest.mark.parametrize(
    ("atoms", "what"), [case[1:] for case in MEANINGLESS], ids=[case[0] for case in MEANINGLESS]
)
def test_structures_without_an_adsorption_energy(
    model: Path, caplog: pytest.LogCaptureFixture, atoms: Atoms, what: str | None
) -> None:
    found = no_adsorption_energy(atoms)
    assert (found is None) if what is None else (found is not None and what in found)
    calculator = EquiformerV2Calculator(model)
    for _ in range(2):
        calculator.get_potential_energy(atoms)
        atoms = atoms.copy()
        atoms.positions[0] += 0.01
    told = [entry for entry in caplog.records if "means nothing" in entry.getMessage()]
    assert len(told) == (what is not None)


@pytest.mark.parametrize(
    ("atoms", "count"),
    [(slab(), 1), (_two_adsorbates(), 4), (_water_across_the_cell(), 1), (slab(adsorbate=False), 0)],
)
def test_adsorbates_are_counted(atoms: Atoms, count: int) -> None:
    assert count_adsorbates(atoms) == count


def test_several_adsorbates_warn_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    predictor = Predictor(model)
    predictor.predict(_two_adsorbates())
    predictor.predict([_two_adsorbates(), slab()])
    told = [entry.getMessage() for entry in caplog.records if "adsorbates" in entry.getMessage()]
    assert len(told) == 1
    assert "one per structure" in told[0]


@pytest.mark.parametrize("kind", ["adsorption", "total"])
def test_supercells_are_compared_without_the_mean(make_model: Callable[..., Path], kind: str) -> None:
    predictor = Predictor(make_model(kind))
    atoms = slab()
    atoms.rattle(0.1, seed=3)
    data = [atoms_to_data(atoms, notify=False)]

    def error(predict: Callable[[Batch], Any], **options: Any) -> float:
        report = check_symmetries(predict, data, symmetries=["supercell"], trials=1, **options)
        return report.errors["supercell"].largest

    assert error(predictor.predict) < 1e-4
    assert error(lambda batch: predictor.predict(batch)) > 0.01
    assert error(lambda batch: predictor.predict(batch), energy_per_structure=-0.7) < 1e-4


class Strange:
    """An object that no file holds."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


ODD_INFO: list[tuple[str, dict[Any, Any], dict[str, Any]]] = [
    ("reserved energy", {"energy": 7.0}, {}),
    ("reserved forces", {"forces": [[0.0] * 3] * 4, "stress": "x"}, {}),
    ("object", {"thing": Strange(), "Lattice": "1 2"}, {}),
    ("nested", {"a": {"b": [1, {"c": (2, 3)}]}}, {}),
    ("number as a name", {3: "three"}, {}),
    ("not finite", {"x": float("nan"), "y": np.inf}, {}),
    ("text that reads as a key", {"note": 'pbe energy=-3 "quoted"\nforces=1'}, {}),
    ("array of results", {}, {"forces": np.ones((4, 3)), "energies": np.ones(4)}),
    ("array of objects", {}, {"labels": np.array([None, {}, "a", 1], dtype=object)}),
    ("array of three axes", {}, {"tensor": np.zeros((4, 3, 3))}),
    ("complex", {"z": 1 + 2j}, {"phase": np.ones(4, dtype=complex)}),
    ("bytes", {"raw": b"\xff\x00"}, {"move_mask": np.array([True, False, True, False])}),
    ("deep", {"deep": [[[[[[[[[[1]]]]]]]]]]}, {}),
]


@pytest.mark.parametrize(
    ("info", "arrays"), [case[1:] for case in ODD_INFO], ids=[case[0] for case in ODD_INFO]
)
def test_records_of_odd_structures(
    tmp_path: Path, info: dict[Any, Any], arrays: dict[str, np.ndarray]
) -> None:
    atoms = slab()
    atoms.info.update({"sid": "random7", **info})
    for name, values in arrays.items():
        atoms.arrays[name] = values
    calculator = EMT()
    result = relax(atoms, calculator, steps=1, fmax=1e-6, trajectory=tmp_path / "relaxation.traj")
    write_relaxation_record(tmp_path, atoms, result, {"energy_kind": "total"})
    stored = json.loads((tmp_path / "relaxation.json").read_text())
    back = read(tmp_path / "relaxed.extxyz")
    assert stored["energy_eV"] == pytest.approx(back.get_potential_energy(), abs=1e-6)
    forces = result.atoms.calc.results["forces"]
    assert np.allclose(back.get_forces(apply_constraint=False), forces, atol=1e-7)
    assert back.info["sid"] == "random7"
    assert back.get_tags().tolist() == atoms.get_tags().tolist()
    assert fixed_mask(back).tolist() == fixed_mask(atoms).tolist()
    assert set(stored["extras"]["info"]) == {str(name) for name in atoms.info}
    assert set(stored["extras"].get("arrays", {})) == set(arrays)
    assert len(read(tmp_path / "relaxation.traj", ":")) == 2


@pytest.mark.parametrize(
    "constraint",
    [FixCartesian(LOWER), FixScaled(LOWER), [FixedLine(LOWER, (0, 0, 1)), FixedPlane(LOWER, (0, 0, 1))]],
)
def test_relaxed_files_keep_what_is_held(tmp_path: Path, constraint: Any) -> None:
    atoms = slab()
    atoms.set_constraint(constraint)
    result = relax(atoms, EMT(), steps=1)
    write_relaxation_record(tmp_path, atoms, result, {"energy_kind": "total"})
    assert fixed_mask(read(tmp_path / "relaxed.extxyz")).tolist() == [True, True, False, False]


@pytest.mark.pictures
def test_a_picture_that_cannot_be_drawn_costs_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    atoms = slab()
    with matplotlib.rc_context({"savefig.dpi": 1e6}):  # an image that is too large
        written = write_relaxation_record(tmp_path, atoms, relax(atoms, EMT()), {"energy_kind": "total"})
    assert [path.name for path in written] == ["relaxed.extxyz", "relaxation.json"]
    assert "structure.png could not be drawn" in caplog.text


def test_plain_values_and_names() -> None:
    assert plain({"a": np.float64("inf"), 2: np.arange(2)}) == {"a": "inf", "2": [0, 1]}
    assert plain(2**70) == str(2**70)
    atoms = Atoms("H", info={"note": "as it is", "Energy": 1.0, "two words": 1, "n": np.int64(3)})
    assert simple_info(atoms) == {"note": "as it is", "n": 3}
    assert extras(Atoms("H")) == {}


def test_no_convergence_is_told_and_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    atoms = slab()
    atoms.rattle(0.1, seed=1)
    assert not relax(atoms, EMT(), steps=1, fmax=1e-6).converged
    assert "NOT converged after 1" in caplog.text
    caplog.clear()
    assert relax(slab(), EMT(), fmax=5.0).converged
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "fmax", "status", "last"),
    [
        ("start", 1e-6, 3, "NOT converged after 1 LBFGS steps"),
        ("start", 50.0, 0, "converged after 0 LBFGS steps"),
        ("clean", 1e-6, 3, "NOT converged"),
    ],
)
def test_relax_script(
    model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str, fmax: float, status: int, last: str,
) -> None:  # fmt: skip
    atoms = slab(adsorbate=name != "clean")
    atoms.info.clear()
    write(tmp_path / "start.extxyz", atoms)
    out = tmp_path / "out"
    arguments = ["--checkpoint", model, "--structure", tmp_path / "start.extxyz", "--out", out]
    assert run_script_file("relax", *arguments, "--steps", 1, "--fmax", fmax) == status
    lines = capsys.readouterr().out.splitlines()
    assert last in lines[-1]
    stored = json.loads((out / "relaxation.json").read_text())
    assert stored["converged"] == (status == 0)
    assert stored["max_force_eV_A"] >= 0
    assert any(line.startswith("adsorption energy:") for line in lines) == (name != "clean")
    assert any("slab without an adsorbate" in warning for warning in stored["warnings"]) == (name == "clean")


def _named_pipe(path: Path) -> None:
    os.mkfifo(path)


ODD_STRUCTURES: list[tuple[str, str, Callable[[Path], object], int, str]] = [
    ("pipe", "s.xyz", _named_pipe, -1, r"s\.xyz.*named pipe"),
    ("device", "s.traj", lambda path: path.symlink_to("/dev/zero"), -1, r"s\.traj.*device"),
    ("circle of links", "s.cif", lambda path: path.symlink_to(path), 0, r"s\.cif.*circle"),
    ("folder", "s.vasp", Path.mkdir, 0, r"s\.vasp.*folder"),
    ("NUL in its name", "s\0.xyz", lambda path: None, 0, "file name"),
    (
        "frame beyond the first",
        "s.traj",
        lambda path: write(path, [slab(), slab()]),
        -3,
        "index -3.*no such frame",
    ),
    (
        "frame beyond the last",
        "s.xyz",
        lambda path: write(path, [slab(), slab()]),
        2,
        "index 2.*no such frame",
    ),
    ("only frame of a crystal", "s.vasp", lambda path: write(path, slab()), -2, "index -2"),
]


@pytest.mark.parametrize(
    ("name", "make", "index", "message"),
    [case[1:] for case in ODD_STRUCTURES],
    ids=[case[0] for case in ODD_STRUCTURES],
)
def test_what_is_no_structure(
    tmp_path: Path, name: str, make: Callable[[Path], object], index: int, message: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_structure(tmp_path / name, index)


def test_frames_are_counted_from_the_end(tmp_path: Path) -> None:
    write(tmp_path / "s.xyz", [slab(layers) for layers in (2, 3, 4)])
    sizes = [len(read_structure(tmp_path / "s.xyz", index)) for index in (-3, -2, -1, 0)]
    assert sizes == [len(slab(layers)) for layers in (2, 3, 4, 2)]


# id, files in the folder, structure that is read, options, what the message names (None: it runs)
FOLDERS: list[tuple[str, list[str], str, list[str], str | None]] = [
    ("result of the other script", ["adsorption_energy.json", "relaxed.extxyz"], "start.traj", [], "result"),
    ("file of a user", ["relaxed.extxyz"], "start.traj", [], "relaxed.extxyz exists already"),
    ("trajectory of a user", ["relaxation.traj"], "start.traj", [], "relaxation.traj exists already"),
    ("picture of a user", ["structure.png"], "start.traj", [], "structure.png exists already"),
    ("input", ["relaxed.extxyz"], "out/relaxed.extxyz", ["--overwrite"], "read as input"),
    ("input, linked", ["start.png"], "out/relaxed.extxyz", ["--overwrite"], "read as input"),
    ("own unfinished run", ["unfinished"], "start.traj", [], None),
    ("input of an unfinished run", ["unfinished"], "out/relaxation.traj", ["--overwrite"], "read as input"),
    ("user's files, --overwrite", ["relaxation.json", "relaxed.extxyz"], "start.traj", ["--overwrite"], None),
    ("files of other names", ["notes.txt"], "start.traj", [], None),
]


@pytest.mark.parametrize(
    ("there", "structure", "options", "message"), [case[1:] for case in FOLDERS], ids=[c[0] for c in FOLDERS]
)
def test_folders_of_relaxations(
    model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    there: list[str], structure: str, options: list[str], message: str | None,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    write(tmp_path / "start.traj", slab())
    for name in there:
        if name == "unfinished":
            relax(slab(), EquiformerV2Calculator(model), steps=1, trajectory=out / "relaxation.traj")
        elif name == "start.png":
            (out / "relaxed.extxyz").symlink_to(tmp_path / "start.traj")
        else:
            write(out / name, slab(), format="traj")
    before = {path: path.read_bytes() for path in out.iterdir()}
    arguments = ["--checkpoint", model, "--structure", tmp_path / structure, "--out", out, *options]
    status = run_script_file("relax", *arguments, "--steps", 0)
    if message is None:
        assert status == 3
        assert json.loads((out / "relaxation.json").read_text())["steps"] == 0
    else:
        assert status == 2
        assert message in capsys.readouterr().err
        assert {path: path.read_bytes() for path in out.iterdir()} == before


def _dataset(path: Path, *, energies: bool = False) -> Path:
    with LmdbWriter(path, "adsorption") as writer:
        for number in range(2):
            data = atoms_to_data(slab(3 + number))
            data.sid = f"s{number}"
            if energies:
                data.energy = torch.tensor([0.5])
                data.forces = torch.zeros(len(data.pos), 3)
            writer.write(data)
    return path


IGNORED: list[tuple[str, list[str], str]] = [
    ("relax", ["--structure", "x.traj", "--index", ":"], "relax-is2re"),
    ("relax", ["--structure", "x.traj", "--index", "0:5"], "'0:5' is not the number of one frame"),
    ("relax", ["--structure", "x.traj", "--replan-every", "5"], "--router"),
    ("relax_is2re", ["--data", "d.lmdb", "--out", "o", "--max-atoms", "1"], "of d.lmdb has 4 atoms"),
    ("relax_is2re", ["--data", "d.lmdb", "--out", "o", "--splits", "a"], "--splits has no meaning without"),
    ("evaluate", ["--data", "d.lmdb", "--wandb-offline"], "--wandb-offline has no meaning without"),
    ("evaluate", ["--data", "d.lmdb", "--wandb-entity", "me"], "--wandb-entity has no meaning without"),
    ("preprocess_oc20", ["--no-filter", "--max-energy", "10"], "--max-energy has no meaning with --no"),
    ("preprocess_oc20", ["--no-filter", "--max-force", "9"], "--max-force has no meaning with --no-filter"),
    ("preprocess_oc20", ["--energy", "total", "--max-energy", "4"], "has no meaning with --energy total"),
    ("preprocess_oc20", ["--later-fraction", "0.2"], "--later-fraction has no meaning without --later-"),
    ("preprocess_oc20", ["--later-frames", "3"], "--later-frames has no meaning without --later-out"),
    ("make_submission", ["--validate", "x.npz", "--atoms", "all"], "--atoms has no meaning with --validate"),
    ("make_submission", ["--task", "is2re", "--out", "x.npz", "--atoms", "free"], "--atoms has no meaning"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), IGNORED)
def test_options_that_would_be_ignored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    script: str, arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    _dataset(Path("d.lmdb"))
    if script == "preprocess_oc20":
        arguments = ["--data", "raw", "--out", "o.lmdb", *arguments]
    elif script != "make_submission":
        arguments = ["--checkpoint", str(model), *arguments]
        write("x.traj", slab())
    before = sorted(tmp_path.iterdir())
    assert run_script_file(script, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("option", "status"), [([], 0), (["--require-convergence"], 3)])
def test_relax_is2re_of_unlabelled_structures(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    option: list[str], status: int,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with LmdbWriter("d.lmdb", None) as writer:
        for number in range(2):
            data = atoms_to_data(slab(3 + number))
            data.sid = f"s{number}"
            writer.write(data)
    assert OC20Lmdb("d.lmdb").energy_kind is None
    arguments = ["--checkpoint", model, "--data", "d.lmdb", "--out", "o", "--steps", 1, "--fmax", 1e-7]
    assert run_script_file("relax_is2re", *arguments, *option) == status
    assert "NOT converged: 2 of 2" in capsys.readouterr().out
    assert json.loads(Path("o/is2re.json").read_text())["converged"] == 0


@pytest.mark.parametrize("ending", ["npz", "json"])
def test_predictions_that_are_not_finite_are_refused(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], ending: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    _dataset(Path("d.lmdb"))
    broken = make_model(overflows=True)
    out = Path(f"p.{ending}")
    assert run_script_file("predict", "--checkpoint", broken, "--data", "d.lmdb", "--out", out) == 2
    error = capsys.readouterr().err
    assert "s0/0" in error
    assert "non-finite" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "row", "named"), [("energy", 1, "energy of structure b/7"), ("forces", 2, "structure a/5")]
)
def test_written_predictions_are_finite(tmp_path: Path, key: str, row: int, named: str) -> None:
    arrays = {
        "sid": np.array(["a", "b"]), "fid": np.array([5, 7]), "natoms": np.array([3, 1]),
        "energy": np.zeros(2), "forces": np.zeros((4, 3)), "fixed": np.zeros(4, dtype=bool),
    }  # fmt: skip
    arrays[key][row] = np.nan
    with pytest.raises(InputError, match=named):
        write_predictions(tmp_path / "p.npz", arrays)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float32", "holds nan in row 1"),
        (-np.inf, "float16", "-inf"),
        (1e6, "float16", "--dtype float32"),
    ],
)
def test_submissions_are_finite(tmp_path: Path, value: float, dtype: str, message: str) -> None:
    path = tmp_path / "p.npz"
    np.savez(path, sid=np.array(["a", "b"]), energy=np.array([0.0, value]))
    with pytest.raises(InputError, match=message):
        make_submission("is2re", dict.fromkeys(SPLITS, path), dtype=dtype)


@pytest.mark.parametrize(("forces", "told"), [("direct", "forces in eV/Å"), ("none", "no forces")])
def test_predict_says_what_it_wrote(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], forces: str, told: str,
) -> None:  # fmt: skip
    data = _dataset(tmp_path / "d.lmdb")
    out = tmp_path / "p.npz"
    arguments = ["--checkpoint", make_model(forces=forces), "--data", data, "--out", out]
    assert run_script_file("predict", *arguments) == 0
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Cu3Au111", "NiTi110", "Pt3Ni(111)", "TiO2110", "Cu3Au"])
def test_slabs_of_compounds_say_what_to_do(name: str) -> None:
    with pytest.raises(InputError, match=r"several elements .*`equiformer2 adsorption slab --bulk`"):
        build_slab(name)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [(FixAtoms([99]), "FixAtoms is of atom 99"), (FixCartesian(-9), "FixCartesian is of atom -9")],
)
def test_constraints_of_atoms_that_are_not_there(model: Path, constraint: Any, message: str) -> None:
    atoms = slab()
    atoms.set_constraint(constraint)
    for calculator in (EMT(), EquiformerV2Calculator(model)):
        with pytest.raises(InputError, match=message):
            relax(atoms, calculator)


def test_tags_of_a_record_say_what_to_do() -> None:
    data = atoms_to_data(slab())
    data.tags = torch.tensor([3, 2, 1, 0])
    names = ("pos", "atomic_numbers", "cell", "pbc", "tags", "fixed")
    fields = {name: data[name].numpy() for name in names} | {"sid": "a", "fid": 0, "natoms": 4}
    with pytest.raises(DataError, match=r"atom 0 has tag 3; .*layer"):
        structure_record.pack(fields, "x.lmdb, key 0")
