"""Placing, references, anomalies and restraints of adsorption energies: cases as data."""

import json
import logging
import lzma
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.mixing import SumCalculator
from ase.constraints import ExternalForce, FixAtoms, FixBondLength, FixedPlane, Hookean
from ase.io import read, write
from command_line import run_command

from equiformer2.adsorption import PlacementOptions, adsorption_energy, prepare_system
from equiformer2.adsorption.anomalies import NAMES, check_anomalies
from equiformer2.adsorption.named_structures import build_adsorbate, build_slab, place_adsorbate
from equiformer2.adsorption.references import OC20_GAS_REFERENCES
from equiformer2.errors import InputError
from equiformer2.inference import relax
from equiformer2.inference.named_calculators import resolve_energy_kind
from equiformer2.inference.record import write_structure

ROOT = Path(__file__).parents[2]
EXPECTED = json.loads((ROOT / "tests/fixtures/inference/anomalies_expected.json").read_text())

CARBON_DOWN = Atoms("CO", [[0, 0, 0], [0.2, 0.1, 1.13]])
TRICLINIC = [[8.0, 0, 0], [3.0, 7.5, 0], [2.0, -2.5, 9.0]]


class DeclaredEMT(EMT):
    """Effective medium theory that says which kind of energy it gives."""

    energy_kind = "total"


class Restraint:
    """A constraint of a user's own: a constant energy and a force."""

    def adjust_positions(self, atoms: Atoms, new: np.ndarray) -> None: ...

    def adjust_forces(self, atoms: Atoms, forces: np.ndarray) -> None:
        forces[-1, 2] += 0.3

    def adjust_potential_energy(self, atoms: Atoms) -> float:
        return 7.0

    def get_removed_dof(self, atoms: Atoms) -> int:
        return 0


def in_cell(atoms: Atoms, cell: object, at: tuple[float, float, float], pbc: object = True) -> Atoms:
    """The molecule with its first atom at the fractional place `at`, wrapped where periodic."""
    boxed = Atoms(atoms.numbers, atoms.positions, cell=cell, pbc=pbc)
    boxed.translate(np.asarray(at) @ boxed.cell.array - boxed.positions[0])
    boxed.wrap(eps=0)
    return boxed


def water() -> Atoms:
    gas = molecule("H2O")
    gas.rotate(180, "x")
    return gas[[0, 1, 2]]


# id, molecule, cell, fractional place, pbc
WRAPPED = [
    ("co over z", CARBON_DOWN, [15, 15, 15], (0.5, 0.5, 0.999), True),
    ("co over x", CARBON_DOWN, [15, 15, 15], (0.999, 0.5, 0.5), True),
    ("co over x, y and z", CARBON_DOWN, [15, 15, 15], (0.995, 0.999, 0.95), True),
    ("co over z, triclinic", CARBON_DOWN, TRICLINIC, (0.3, 0.99, 0.95), True),
    ("co over x, pbc along x only", CARBON_DOWN, [15, 15, 15], (0.99, 0.5, 0.5), (True, False, False)),
    ("water over all", water(), [12, 13, 14], (0.0, 0.0, 0.0), True),
    ("ethanol over all", molecule("CH3CH2OH"), TRICLINIC, (0.02, 0.01, 0.98), True),
    ("benzene over x", molecule("C6H6"), [14, 14, 14], (0.0, 0.5, 0.5), True),
]


@pytest.mark.parametrize(
    ("gas", "cell", "at", "pbc"), [case[1:] for case in WRAPPED], ids=[c[0] for c in WRAPPED]
)
@pytest.mark.parametrize("suffix", [".extxyz", ".traj"])
def test_wrapping_of_the_adsorbate_changes_nothing(
    tmp_path: Path, gas: Atoms, cell: object, at: tuple[float, float, float], pbc: object, suffix: str
) -> None:
    write(tmp_path / f"wrapped{suffix}", in_cell(gas, cell, at, pbc))
    write(tmp_path / "whole.traj", gas)
    write(tmp_path / "slab.traj", build_slab("Pt111", (4, 4, 3), vacuum=15.0))
    slab = str(tmp_path / "slab.traj")
    expected = prepare_system(slab, str(tmp_path / "whole.traj"))
    found = prepare_system(slab, str(tmp_path / f"wrapped{suffix}"))
    assert np.abs(found.positions - expected.positions).max() < 1e-5


def test_positions_that_lost_their_pbc_are_made_whole(tmp_path: Path) -> None:
    broken = in_cell(CARBON_DOWN, [15, 15, 15], (0.5, 0.5, 0.99))
    broken.pbc = False
    write(tmp_path / "co.traj", broken)
    system = prepare_system("Pt111", str(tmp_path / "co.traj"))
    assert system.get_distance(-2, -1) == pytest.approx(CARBON_DOWN.get_distance(0, 1))


def _without_cell() -> Atoms:
    broken = in_cell(CARBON_DOWN, [15, 15, 15], (0.5, 0.5, 0.999))
    return Atoms(broken.numbers, broken.positions)


# id, adsorbate file, what the message names
PIECES = [
    ("torn, no cell", _without_cell(), r"ads\.traj is not one molecule: atom 1 \(O\).*13\.8\d Å"),
    (
        "two molecules",
        Atoms("OHOH", [[0, 0, 0], [0, 0, 1], [6, 0, 0], [6, 0, 1]], cell=[20] * 3, pbc=True),
        "one mole",
    ),
    ("a crystal", bulk("Cu", cubic=True), r"ads\.traj is bound to its own periodic image"),
    (
        "a chain",
        Atoms("C4", [[1.3 * i, 0, 0] for i in range(4)], cell=[5.2, 10, 10], pbc=True),
        "own periodic image",
    ),
]


@pytest.mark.parametrize(("gas", "message"), [case[1:] for case in PIECES], ids=[c[0] for c in PIECES])
def test_adsorbates_that_are_no_molecule(tmp_path: Path, gas: Atoms, message: str) -> None:
    write(tmp_path / "ads.traj", gas)
    with pytest.raises(InputError, match=message):
        prepare_system("Pt111", str(tmp_path / "ads.traj"))


def _moved(slab: Atoms, shift: object, wrap: bool = True) -> Atoms:
    slab = slab.copy()
    slab.translate(shift)
    if wrap:
        slab.wrap(eps=0)
    return slab


def _hanging(slab: Atoms) -> Atoms:
    """Turned over, held layers on top."""
    slab = slab.copy()
    slab.positions = slab.positions * [1, -1, -1]
    slab.cell[1] *= -1
    slab.wrap(eps=0)
    return slab


def _turned(slab: Atoms, angle: float, axis: object) -> Atoms:
    slab = slab.copy()
    slab.rotate(angle, axis, rotate_cell=True)
    return slab


SLAB = fcc111("Cu", (2, 2, 4), vacuum=8.0, periodic=True)
SLAB.set_tags([0] * 8 + [1] * 8)
SLAB.set_constraint(FixAtoms(mask=SLAB.get_tags() == 0))
SLAB.info = {}
LEFT_HANDED = SLAB.copy()
LEFT_HANDED.cell[2] *= -1
TILTED = SLAB.copy()
TILTED.cell[2] += [1.3, 0.4, 0]

# id, slab: the same crystal, so the same surroundings of the adsorbate
CROSSING = [
    ("bottom layer below zero", _moved(SLAB, [0, 0, -8.001])),
    ("half over the boundary", _moved(SLAB, [0, 0, -11.0])),
    ("top over the boundary", _moved(SLAB, [0, 0, 8.5])),
    ("shifted in all directions", _moved(SLAB, [1.7, -3.3, 12.5])),
    ("many cells away", _moved(SLAB, 7 * SLAB.cell[2] - 3 * SLAB.cell[0], wrap=False)),
    ("left-handed cell", _moved(LEFT_HANDED, [0, 0, 5.0])),
    ("tilted cell", _moved(TILTED, [0, 0, -9.0])),
    ("hangs upside down", _hanging(SLAB)),
    ("turned about x", _turned(SLAB, 30, "x")),
    ("turned about another axis", _turned(SLAB, 77, (1, 2, 0.5))),
    ("on its side", _turned(SLAB, 90, "y")),
    ("hangs, and turned", _turned(_hanging(SLAB), 50, "x")),
]


def _surroundings(system: Atoms) -> np.ndarray:
    slab, ads = np.flatnonzero(system.get_tags() < 2), np.flatnonzero(system.get_tags() == 2)
    return np.sort([system.get_distances(int(a), slab, mic=True) for a in ads], axis=1)[:, :8]


@pytest.mark.parametrize("slab", [case[1] for case in CROSSING], ids=[case[0] for case in CROSSING])
def test_slabs_across_the_boundary(slab: Atoms) -> None:
    adsorbate, atom = build_adsorbate("CO")
    expected = place_adsorbate(SLAB, adsorbate, atom)
    system = place_adsorbate(slab, adsorbate, atom)
    assert _surroundings(system) == pytest.approx(_surroundings(expected), abs=1e-4)
    held = np.flatnonzero(system.get_tags() == 0)
    assert system.get_distances(16, held, mic=True).min() > 5  # above the free layers
    assert system.get_distance(16, 17) == pytest.approx(expected.get_distance(16, 17))


@pytest.mark.parametrize("site", ["fcc", "hcp", "bridge"])
def test_sites_follow_a_built_slab_that_was_moved(site: str) -> None:
    slab = build_slab("Cu111", (3, 3, 4))
    expected = place_adsorbate(slab, Atoms("O"), site=site)
    found = place_adsorbate(_moved(slab, [0.9, 1.7, -3.0], wrap=False), Atoms("O"), site=site)
    assert _surroundings(found) == pytest.approx(_surroundings(expected), abs=1e-6)


def _two_slabs() -> Atoms:
    two = SLAB.copy()
    two.set_constraint()
    return two.repeat((1, 1, 2))


def _vacuum_along_x() -> Atoms:
    slab = bulk("Cu", cubic=True).repeat((2, 2, 2))
    slab.cell[0, 0] += 15
    return slab


def _cluster() -> Atoms:
    cluster = SLAB.copy()
    cluster.pbc = False
    return cluster


def _parted() -> Atoms:
    parted = _moved(SLAB, [0, 0, -9.0])
    parted.pbc = (True, True, False)
    return parted


# id, slab, options of placing, what the message names
REFUSED: list[tuple[str, Atoms, dict[str, Any], str]] = [
    ("bulk", bulk("Cu", cubic=True).repeat((2, 2, 2)), {}, "no vacuum along its third lattice vector"),
    ("little vacuum", fcc111("Cu", (2, 2, 4), vacuum=1.5, periodic=True), {}, r"widest gap is 3\.0 Å"),
    ("vacuum too small for CO", fcc111("Cu", (2, 2, 4), vacuum=3.2, periodic=True), {}, "more vacuum"),
    ("vacuum along x", _vacuum_along_x(), {}, "vacuum is along the first"),
    ("two slabs", _two_slabs(), {}, "two parts"),
    ("in two parts", _parted(), {}, "two parts.*set pbc"),
    ("cluster", _cluster(), {}, "not periodic along its first two"),
    ("height 1e9", SLAB, {"height": 1e9}, "height is 1000000000.*at most 100"),
    ("height beyond the middle", SLAB, {"height": 13.5}, "periodic image"),
    ("height of one period", SLAB, {"height": 22.5}, "periodic image"),
    ("height -1", SLAB, {"height": -1.0}, "height is -1.0"),
    ("height nan", SLAB, {"height": float("nan")}, "height is nan"),
    ("height inf", SLAB, {"height": float("inf")}, "height is inf"),
    ("height 1", SLAB, {"height": 1.0}, r"1\.00 Å from slab atom \d+ \(Cu\), closer than a bond"),
    ("position nan", SLAB, {"position": (float("nan"), 0.0)}, "position"),
    (
        "larger than the cell",
        fcc111("Cu", (1, 1, 4), vacuum=8, periodic=True),
        {"adsorbate": "C6H6"},
        "own periodic",
    ),
]


@pytest.mark.parametrize(
    ("slab", "options", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_places_that_are_none(slab: Atoms, options: dict[str, Any], message: str) -> None:
    options = dict(options)
    adsorbate, atom = build_adsorbate(options.pop("adsorbate", "CO"), flat="adsorbate" in options)
    with pytest.raises(InputError, match=message):
        place_adsorbate(slab, adsorbate, atom, **options)


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=[case["name"] for case in EXPECTED["cases"]])
def test_verdicts_are_those_of_the_detector(case: dict[str, Any]) -> None:
    before, after = Atoms(**case["initial"]), Atoms(**case["final"])
    clean = case["clean_slab"] and Atoms(**case["clean_slab"])
    found = check_anomalies(before, after, before.get_tags(), clean)
    assert {anomaly.name: anomaly.present for anomaly in found} == case["expected"]
    assert [anomaly.name for anomaly in found] == list(NAMES)
    assert all(anomaly.margin >= 0 for anomaly in found)


@pytest.mark.parametrize("name", [name for name in EXPECTED["trajectories"] if name.startswith("oc20_trajs")])
def test_verdicts_of_the_bundled_relaxations(name: str) -> None:
    lines = lzma.decompress((ROOT / "data" / name).read_bytes()).decode().splitlines(keepends=True)
    size = int(lines[0]) + 2
    first, last = (read(StringIO("".join(part)), format="extxyz") for part in (lines[:size], lines[-size:]))
    found = check_anomalies(first, last, first.get_tags())
    assert {anomaly.name: anomaly.present for anomaly in found} == EXPECTED["trajectories"][name]


# id, C above Cu, expected name and present, margin (threshold 1.5 * (0.76 + 1.32) + 0.6 = 3.72 Å)
MARGINS = [
    ("bound, borderline", 3.70, False, 0.02, True),
    ("desorbed, borderline", 3.75, True, 0.03, True),
    ("desorbed, clear", 4.20, True, 0.48, False),
]


@pytest.mark.parametrize(
    ("height", "present", "margin", "borderline"), [c[1:] for c in MARGINS], ids=[c[0] for c in MARGINS]
)
def test_margin_of_desorption(height: float, present: bool, margin: float, borderline: bool) -> None:
    start = place_adsorbate(SLAB, *build_adsorbate("CO"))
    end = start.copy()
    end.positions[-2:, 2] += height - start.get_distances(17, range(16), mic=True).min()  # C
    desorbed = check_anomalies(start, end, start.get_tags())[1]
    assert (desorbed.name, desorbed.present, desorbed.borderline) == ("desorbed", present, borderline)
    assert desorbed.margin == pytest.approx(margin, abs=1e-6)
    assert ("borderline" in desorbed.sentence) == borderline


def test_clean_slab_is_relaxed_for_the_comparison_only_and_has_no_energy() -> None:
    system = place_adsorbate(SLAB, Atoms("O"), site="ontop")
    calculator = DeclaredEMT()
    calculator.energy_kind = "adsorption"
    plain = adsorption_energy(system, calculator, steps=5)
    compared = adsorption_energy(system, calculator, steps=5, relax_clean_slab=True)
    assert (plain.compared_with, compared.compared_with) == ("initial slab", "relaxed clean slab")
    assert compared.clean_slab.calc is None
    assert compared.energy == plain.energy
    assert compared.summary()["slab"] is None
    given = adsorption_energy(system, calculator, steps=0, clean_slab=compared.clean_slab)
    assert given.compared_with == "relaxed clean slab"
    with pytest.raises(InputError, match="clean slab's atoms"):
        adsorption_energy(system, calculator, steps=0, clean_slab=system)


def _energy_in_vacuum(gas: Atoms) -> float:
    boxed = gas.copy()
    boxed.center(vacuum=10.0)
    return relax(boxed, DeclaredEMT(), fmax=0.05).energy


def _gas_energy(adsorbate: str | Atoms, **options: Any) -> tuple[float, Any]:
    gas, atom = build_adsorbate(adsorbate) if isinstance(adsorbate, str) else (adsorbate, 0)
    system = place_adsorbate(SLAB, gas, atom)
    result = adsorption_energy(system, DeclaredEMT(), slab_energy=0.0, steps=60, **options)
    return result.terms["gas"], result.gas


# id, adsorbate, options, expected energy, source
GAS: list[tuple[str, str, dict[str, Any], Callable[[], float], str]] = [
    ("default: the molecule", "CO", {}, lambda: _energy_in_vacuum(molecule("CO")), "vacuum"),
    ("default: an atom", "O", {}, lambda: _energy_in_vacuum(Atoms("O")), "vacuum"),
    ("by name", "H", {"gas_references": "vacuum"}, lambda: _energy_in_vacuum(Atoms("H")), "vacuum"),
    (
        "from molecules",
        "H",
        {"gas_references": "molecules"},
        lambda: _energy_in_vacuum(molecule("H2")) / 2,
        "molecules",
    ),
    ("OC20's when asked", "CO", {"gas_references": "oc20"}, lambda: -7.282 - 7.204, "oc20"),
    ("given", "CO", {"gas_references": {"C": -1.0, "O": -2.0}}, lambda: -3.0, "given"),
    (
        "given and OC20's",
        "CO",
        {"gas_references": {"C": -1.0}, "gas_source": "oc20"},
        lambda: -8.204,
        "oc20 and given",
    ),
]


@pytest.mark.parametrize(
    ("adsorbate", "options", "expected", "source"), [c[1:] for c in GAS], ids=[c[0] for c in GAS]
)
def test_gas_references(
    adsorbate: str, options: dict[str, Any], expected: Callable[[], float], source: str
) -> None:
    energy, gas = _gas_energy(adsorbate, **options)
    assert energy == pytest.approx(expected(), abs=5e-3)
    assert gas.source == source
    assert gas.label


def test_two_molecules_are_two_in_vacuum_and_wrapped_ones_are_whole() -> None:
    wide = fcc111("Cu", (4, 2, 3), vacuum=8.0, periodic=True)
    wide.set_tags([0] * 8 + [1] * 16)
    wide.set_constraint(FixAtoms(mask=wide.get_tags() == 0))
    system = place_adsorbate(wide, *build_adsorbate("CO"))
    second = system[-2:]
    second.translate(wide.cell[0] / 2)
    system.extend(second)
    system.positions[-1] += wide.cell[0] - wide.cell[1]  # the O of one, another image
    result = adsorption_energy(system, DeclaredEMT(), slab_energy=0.0, steps=30)
    assert result.gas is not None
    assert result.terms["gas"] == pytest.approx(2 * _energy_in_vacuum(molecule("CO")), abs=1e-2)
    assert list(result.gas.relaxations) == ["CO", "CO #2"]


# id, adsorbate, options, what the message names
GAS_REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("one element missing", "CO", {"gas_references": {"C": -1.0}}, "no gas reference for O.*O=-1.23"),
    ("not among OC20's", "S", {"gas_references": "oc20"}, "no gas reference for S"),
    ("unknown source", "O", {"gas_references": "OC22"}, "'OC22' are unknown.*vacuum, molecules, oc20"),
    ("not finite", "O", {"gas_references": {"O": float("nan")}}, "reference of O is not a finite"),
]


@pytest.mark.parametrize(
    ("adsorbate", "options", "message"), [c[1:] for c in GAS_REFUSED], ids=[c[0] for c in GAS_REFUSED]
)
def test_gas_references_that_are_none(adsorbate: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _gas_energy(adsorbate, **options)


def test_ase_calculators_give_total_energies_and_wrappers_must_say() -> None:
    assert resolve_energy_kind(EMT()) == "total"
    with pytest.raises(InputError, match="does not say"):
        resolve_energy_kind(SumCalculator([EMT(), EMT()]))
    system = place_adsorbate(SLAB, Atoms("O"))
    result = adsorption_energy(system, EMT(), steps=0)
    assert result.gas is not None
    assert result.gas.source == "vacuum"
    assert result.terms["gas"] != pytest.approx(OC20_GAS_REFERENCES["O"], abs=0.5)


RESTRAINTS: list[tuple[str, Callable[[], Any]]] = [
    ("Hookean", lambda: Hookean(16, 17, k=5.0, rt=0.9)),
    ("Hookean to a point", lambda: Hookean(16, (0.0, 0.0, 0.0), k=0.05, rt=1.0)),
    ("ExternalForce", lambda: ExternalForce(16, 17, 0.5)),
    ("a class of one's own", Restraint),
]


@pytest.mark.parametrize("make", [case[1] for case in RESTRAINTS], ids=[case[0] for case in RESTRAINTS])
@pytest.mark.parametrize("steps", [0, 4])
def test_restraints_enter_no_energy(make: Callable[[], Any], steps: int, tmp_path: Path) -> None:
    system = place_adsorbate(SLAB, *build_adsorbate("CO"))
    restraint = make()
    system.set_constraint([*system.constraints, restraint])
    result = relax(system, EMT(), steps=steps, fmax=0.01, trajectory=tmp_path / "run.traj")
    bare = result.atoms.copy()
    bare.set_constraint()
    bare.calc = EMT()
    assert result.energy == pytest.approx(bare.get_potential_energy(), abs=1e-9)
    extra = restraint.adjust_potential_energy(result.atoms)
    assert abs(extra) > 1e-3
    assert result.atoms.get_potential_energy() == pytest.approx(result.energy + extra, abs=1e-9)
    assert result.atoms.get_potential_energy(apply_constraint=False) == result.energy
    assert result.summary()["restraint_energy_eV"] == pytest.approx(extra)
    frames = read(tmp_path / "run.traj", ":")
    assert [frame.calc.results["energy"] for frame in frames] == pytest.approx(result.energies)
    if steps:  # the optimiser feels it
        free = place_adsorbate(SLAB, *build_adsorbate("CO"))
        assert (
            np.abs(relax(free, EMT(), steps=steps, fmax=0.01).atoms.positions - result.atoms.positions).max()
            > 1e-3
        )


# id, constraint, whether the trajectory can hold it
LOST: list[tuple[str, Callable[[], Any], bool]] = [
    ("Hookean", lambda: Hookean(16, 17, k=5.0, rt=0.9), True),
    ("FixedPlane", lambda: FixedPlane(16, (0, 0, 1)), True),
    ("FixBondLengths", lambda: FixBondLength(16, 17), True),
    ("Restraint", Restraint, False),
]


@pytest.mark.parametrize(("name", "make", "kept"), LOST, ids=[case[0] for case in LOST])
def test_constraints_that_a_file_cannot_hold_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, make: Callable[[], Any], kept: bool
) -> None:
    system = place_adsorbate(SLAB, *build_adsorbate("CO"))
    system.set_constraint([*system.constraints, make()])
    result = relax(system, EMT(), steps=1, trajectory=tmp_path / "run.traj")
    with caplog.at_level(logging.WARNING):
        write_structure(tmp_path / "relaxed.extxyz", result.atoms)
    assert name in caplog.text
    assert ("relaxation.traj has all constraints" in caplog.text) == kept
    assert read(tmp_path / "relaxed.extxyz").get_potential_energy() == pytest.approx(result.energy, abs=1e-6)
    held = read(tmp_path / "run.traj", -1).constraints
    assert (name in [type(constraint).__name__ for constraint in held]) == kept


# id, arguments, what the message names
IGNORED = [
    ("--site", ["--system", "s.traj", "--site", "fcc"], "--site would be ignored beside --system"),
    ("--height", ["--system", "s.traj", "--height", "2", "--flat"], "--height, --flat would be ignored"),
    ("--size", ["--system", "s.traj", "--size", "2x2x2"], "--size would be ignored"),
    ("--binding-atom 0", ["--system", "s.traj", "--binding-atom", "0"], "--binding-atom would be ignored"),
    (
        "--adsorbate-indices",
        ["--slab", "Pt111", "--adsorbate", "O", "--adsorbate-indices", "1"],
        "--adsorbate-indices",
    ),
    ("--gas twice", ["--system", "s.traj", "--gas", "oc20", "--gas", "molecules"], "molecules and oc20"),
    ("--gas X=", ["--system", "s.traj", "--gas", "Xx=1"], "'Xx=1' is none of vacuum, molecules, oc20"),
    ("--gas O twice", ["--system", "s.traj", "--gas", "O=-1,O=-2"], "gives O twice"),
]


@pytest.mark.parametrize(("arguments", "message"), [c[1:] for c in IGNORED], ids=[c[0] for c in IGNORED])
def test_options_that_would_be_ignored(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("adsorption energy", "--checkpoint", "none.pt", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_wrapped_system_gives_the_same(tmp_path: Path) -> None:
    system = place_adsorbate(SLAB, *build_adsorbate("CO"), position=(0.1, 0.1))
    wrapped = _moved(system, [-0.15, 0.0, 10.9])
    plain, other = (adsorption_energy(atoms, EMT(), steps=8) for atoms in (system, wrapped))
    assert other.energy == pytest.approx(plain.energy, abs=1e-6)
    assert [a.name for a in other.anomalies] == [a.name for a in plain.anomalies]


def test_placement_options_reach_the_check() -> None:
    with pytest.raises(InputError, match="closer than a bond"):
        prepare_system("Pt111", "O", placement=PlacementOptions(height=0.5))


def test_a_vacuum_thinner_than_the_cutoff_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slab = ["--slab", "Cu111", "--size", "2x2x2", "--vacuum", "3.5", "--adsorbate", "O"]
    network = ["--checkpoint", "oc20_small", "--out", tmp_path / "out"]
    assert run_command("adsorption energy", *network, *slab) == 2
    assert "the vacuum of 7.0 Å is thinner than the cutoff of 8 Å" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
