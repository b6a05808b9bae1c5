"""DFT results of a search's structures: matched whatever their order, ranked, and refused if of others."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixCartesian, FixedLine, FixedPlane, FixScaled
from ase.io import read, write
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.collect import (
    collect,
    compare,
    match_results,
    read_dft_result,
    with_clean_slab,
)
from equiformer2.adsorption.dft_inputs import Candidate, k_points, write_dft_input
from equiformer2.adsorption.dft_ledger import DftLedger
from equiformer2.errors import InputError


def base() -> Atoms:
    return slab(size=(2, 2, 3))


def candidates() -> list[Candidate]:
    return [
        Candidate("a", with_adsorbate(base(), "O", "fcc"), -1.0),
        Candidate("b", with_adsorbate(base(), "O", "ontop"), -0.5),
        Candidate("c", with_adsorbate(base(), "O", "bridge"), -0.8),
    ]


def test_dft_input_has_oc20_s_settings(tmp_path: Path) -> None:
    folders = DftLedger(tmp_path).ask(candidates()[:2], base())
    assert [folder.name for folder in folders] == ["01", "02", "slab"]
    assert "GGA = RP" in (tmp_path / "dft/01/INCAR").read_text()
    assert k_points(base()) == (8, 9, 1)  # 40 Å over 5.1 Å, and over 4.4 Å, the larger of (2.6, 4.4)
    assert "8 9 1" in (tmp_path / "dft/01/KPOINTS").read_text()
    # Over 10.4 and 9.0 Å: both are rounded to the nearest number.
    assert k_points(fcc111("Cu", (4, 4, 1), a=3.676, vacuum=8.0)) == (4, 4, 1)
    poscar = read(tmp_path / "dft/01/POSCAR")
    order = json.loads((tmp_path / "dft/01/candidate.json").read_text())["order"]
    original = candidates()[0].atoms
    assert np.allclose(poscar.positions, original.positions[order])
    assert len(poscar.constraints[0].index) == 4
    assert (tmp_path / "dft/01/POTCAR.txt").read_text().strip().endswith(": Cu O")
    espresso = read(tmp_path / "dft/01/pw.in", format="espresso-in")
    assert np.allclose(espresso.positions, original.positions)
    assert len(espresso.constraints[0].index) == 4


def dft_file(path: Path, atoms: Atoms, energy: float) -> Path:
    """A relaxation of two steps, as a trajectory."""
    frames = []
    for step in range(2):
        frame = atoms.copy()
        frame.positions[-1, 2] += 0.05 * step
        frame.calc = SinglePointCalculator(
            frame, energy=energy + 0.1 * (1 - step), forces=np.zeros((len(frame), 3))
        )
        frames.append(frame)
    write(path, frames)
    return path


def test_held_atoms_stay_held_in_dft_whatever_holds_them(tmp_path: Path) -> None:
    atoms = fcc111("Cu", (1, 1, 3), vacuum=8.0)
    # Quantum ESPRESSO's input and extended XYZ are read as the first of these.
    for held in (FixCartesian([0]), FixScaled([0]), [FixedLine(0, (0, 0, 1)), FixedPlane(0, (0, 0, 1))]):
        atoms.set_constraint(held)
        write_dft_input(tmp_path, Candidate("a", atoms, 0.0))
        flags = [line.split()[-3:] for line in (tmp_path / "POSCAR").read_text().splitlines()[-3:]]
        assert flags == [["F"] * 3, ["T"] * 3, ["T"] * 3]
        lines = (tmp_path / "pw.in").read_text().split("ATOMIC_POSITIONS angstrom\n")[1].splitlines()
        assert [line.split()[4:] for line in lines[:3]] == [["0"] * 3, [], []]
        shutil.rmtree(tmp_path)


def test_dft_results_are_read_back(tmp_path: Path) -> None:
    a, b, c = candidates()
    files = [
        dft_file(tmp_path / "x.traj", b.atoms[::-1], -99.0),  # in another order of atoms
        dft_file(tmp_path / "y.traj", a.atoms, -100.0),
        dft_file(tmp_path / "slab.traj", base(), -95.0),
    ]
    results = [read_dft_result(file) for file in files]
    found = collect([a, b, c], base(), results)
    assert [row["id"] for row in found["ranking"]] == ["a", "b"]
    assert [row["dft_eV"] for row in found["ranking"]] == [-100.0, -99.0]
    assert (found["dft_energy"], found["top1_held"], found["spearman"]) == ("total", True, pytest.approx(1.0))
    assert found["correction_eV"] == pytest.approx(-98.75)
    assert collect([a, b, c], base(), results[:1])["top1_held"] is None
    assert collect([a, b, c], base(), results[1:])["top1_held"] is None  # of one alone there is no order
    found = collect([a, b, c], base(), results, {"O": -4.0}, ["O"])
    assert found["dft_energy"] == "adsorption"
    assert [row["dft_eV"] for row in found["ranking"]] == pytest.approx([-1.0, 0.0])
    assert found["correction_eV"] == pytest.approx(0.25)


def test_dft_results_of_something_else_are_refused(tmp_path: Path) -> None:
    a, b, _ = candidates()
    other = with_adsorbate(base(), "CO", "fcc")
    moved = a.atoms.copy()
    moved.positions[-1, 2] += 2.0
    for atoms, message in (
        (other, "its atoms are others"),
        (moved, "Å from the nearest structure"),
    ):
        result = read_dft_result(dft_file(tmp_path / "z.traj", atoms, -1.0))
        with pytest.raises(InputError, match=message):
            collect([a, b], base(), [result])
    twice = [read_dft_result(dft_file(tmp_path / f"{n}.traj", a.atoms, -float(n))) for n in (1, 2)]
    with pytest.raises(InputError, match=r"both of the candidate a, with energies that differ by 1.000 eV"):
        collect([a, b], base(), twice)
    slabs = [read_dft_result(dft_file(tmp_path / f"slab{n}.traj", base(), -float(n))) for n in (1, 2)]
    with pytest.raises(InputError, match="both of the clean slab"):
        collect([a, b], base(), [twice[0], *slabs])
    slab_only = [read_dft_result(dft_file(tmp_path / "s.traj", base(), -1.0))]
    with pytest.raises(InputError, match="no DFT result is of a candidate"):
        collect([a, b], base(), slab_only)
    (tmp_path / "OUTCAR").write_text("nothing")
    with pytest.raises(InputError, match="gives no DFT energy"):
        read_dft_result(tmp_path / "OUTCAR")


def answers_of(*files: Path) -> tuple[dict[str, object], list[tuple[str, str]]]:
    return match_results(with_clean_slab(candidates(), base()), [read_dft_result(file) for file in files])


def with_results(atoms: Atoms, energy: float, force: float = 0.0) -> Atoms:
    """A copy with an energy, and forces that are largest on the last atom and a hundredth on the first."""
    found = atoms.copy()
    forces = np.zeros((len(found), 3))
    forces[-1, 2], forces[0, 0] = force, force / 100
    found.calc = SinglePointCalculator(found, energy=energy, forces=forces)
    return found


def test_atoms_are_matched_in_any_order_and_any_image(tmp_path: Path) -> None:
    """As VASP has them: grouped by species, wrapped into the cell, in a compressed file."""
    a = candidates()[0].atoms
    order = np.random.default_rng(0).permutation(len(a))
    moved = with_results(a, -50.0, 0.3)
    forces = moved.get_forces(apply_constraint=False)[order]
    shuffled = moved[order]
    shuffled.positions += np.random.default_rng(1).integers(-1, 2, (len(a), 1)) @ a.cell.array[:1]
    shuffled.set_constraint()
    shuffled.set_tags(None)
    shuffled.calc = SinglePointCalculator(shuffled, energy=-50.0, forces=forces)
    write(tmp_path / "x.extxyz", shuffled)
    (tmp_path / "x.extxyz.gz").write_bytes(gzip.compress((tmp_path / "x.extxyz").read_bytes()))
    found, refused = answers_of(tmp_path / "x.extxyz.gz")
    assert (list(found), refused) == (["a"], [])
    frame = found["a"].frames[0]
    assert frame.get_chemical_symbols() == a.get_chemical_symbols()
    assert np.array_equal(frame.get_tags(), a.get_tags())
    assert np.array_equal(frame.constraints[0].index, a.constraints[0].index)
    assert np.allclose(frame.calc.results["forces"], moved.calc.results["forces"])
    assert found["a"].max_force == pytest.approx(0.3)  # of the adsorbate; the held atoms do not count


def test_a_file_may_hold_several_results(tmp_path: Path) -> None:
    a, b, _ = (one.atoms for one in candidates())
    relaxed = a.copy()
    relaxed.positions[-1, 2] += 0.2
    write(
        tmp_path / "all.extxyz", [with_results(a, -10.0), with_results(relaxed, -10.5), with_results(b, -9.0)]
    )
    found, refused = answers_of(tmp_path / "all.extxyz")
    assert not refused
    assert {name: (len(one.frames), one.energy) for name, one in found.items()} == {
        "a": (2, -10.5),
        "b": (1, -9.0),
    }


def test_a_calculation_that_was_started_again_goes_on(tmp_path: Path) -> None:
    a = candidates()[0].atoms
    way = [a.copy() for _ in range(4)]
    for number, atoms in enumerate(way):
        atoms.positions[-1, 2] += 0.25 * number
    write(tmp_path / "first.traj", [with_results(way[0], -10.0), with_results(way[1], -10.2, 0.5)])
    write(tmp_path / "second.traj", [with_results(atoms, -10.2 - n) for n, atoms in enumerate(way[1:])])
    write(tmp_path / "third.traj", [with_results(way[3], -13.0)])
    found, refused = answers_of(*(tmp_path / f"{name}.traj" for name in ("third", "second", "first")))
    assert not refused
    assert len(found["a"].files) == 3
    assert found["a"].energy == -13.0
    record = compare(candidates(), found)
    assert record["ranking"][0]["moved_A"] == pytest.approx(0.75)
    assert "DFT has moved a by 0.75 Å" in record["warnings"][0]
    alone, refused = answers_of(tmp_path / "third.traj")
    assert not alone
    assert "0.75 Å from the nearest structure" in refused[0][1]
    assert match_results(
        with_clean_slab(candidates(), base()), [read_dft_result(tmp_path / "third.traj")], found.values()
    )[0]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    a, b, c = (one.atoms for one in candidates())
    lower = [c.copy() for _ in range(8)]
    for number, atoms in enumerate(lower):
        atoms.positions[-1] += number / 7 * (a.positions[-1] - c.positions[-1])
    write(tmp_path / "a.traj", with_results(a, -10.0, 0.4))
    write(tmp_path / "b.traj", [with_results(b, -9.0), with_results(b, -9.1, 0.4)])
    write(tmp_path / "c.traj", [with_results(atoms, -10.0, 0.01) for atoms in lower])
    record = compare(candidates(), answers_of(*(tmp_path / f"{name}.traj" for name in "abc"))[0])
    single, unfinished = record["warnings"][1:]
    assert record["warnings"][0].endswith("into the minimum of a")
    assert "single points (a) stand beside relaxations" in single
    assert "not ended: b (0.40 eV/Å)" in unfinished
    assert [row["ended_at"] for row in record["ranking"] if row["id"] == "c"] == ["a"]


@pytest.mark.parametrize(("force", "is_single"), [(0.3, True), (0.02, False), (None, True)])
def test_a_relaxation_that_ends_at_its_first_step_is_no_single_point(
    tmp_path: Path, force: float | None, is_single: bool
) -> None:
    a, b = (one.atoms for one in candidates()[:2])
    first = with_results(a, -10.0, force or 0.0)
    if force is None:
        first.calc = SinglePointCalculator(first, energy=-10.0)
    write(tmp_path / "a.traj", first)
    write(tmp_path / "b.traj", [with_results(b, -9.0, 0.4), with_results(b, -9.1, 0.02)])
    record = compare(candidates(), answers_of(tmp_path / "a.traj", tmp_path / "b.traj")[0])
    assert any("single points (a)" in sentence for sentence in record["warnings"]) == is_single


def test_every_candidate_is_ranked_again(tmp_path: Path) -> None:
    a, b, _ = (one.atoms for one in candidates())
    write(tmp_path / "a.traj", with_results(a, -10.0))
    write(tmp_path / "b.traj", with_results(b, -11.5))
    record = compare(candidates(), answers_of(tmp_path / "a.traj", tmp_path / "b.traj")[0])
    rows = [(row["id"], round(row["energy_eV"], 6), row["from"]) for row in record["reranked"]]
    assert rows == [("b", -11.5, "dft"), ("c", -10.8, "model and correction"), ("a", -10.0, "dft")]


def test_another_cell_is_told_from_other_atoms(tmp_path: Path) -> None:
    wide = candidates()[0].atoms.copy()
    wide.set_cell(wide.cell.array * 1.02, scale_atoms=True)
    write(tmp_path / "wide.traj", with_results(wide, -1.0))
    assert "its cell is another (5.21 x" in answers_of(tmp_path / "wide.traj")[1][0][1]


OUTPUTS = Path(__file__).parents[1] / "data" / "own_data"


@pytest.mark.parametrize("name", ["li_relaxation_OUTCAR.gz", "hfo2_OUTCAR_5.gz", "Si.pwscf.out.gz"])
def test_outputs_of_codes_belong_to_the_structure_that_they_begin_with(name: str) -> None:
    result = read_dft_result(OUTPUTS / name)
    order = np.random.default_rng(2).permutation(len(result.start))
    own = Atoms(result.start.numbers, result.start.positions, cell=result.start.cell, pbc=[1, 1, 0])[order]
    own.positions += 0.01
    other = own.copy()
    other.positions[0] += 1.5
    structures = [Candidate("other", other, -1.0), Candidate("own", own, -2.0)]
    found, refused = match_results(structures, [result])
    assert (list(found), refused) == (["own"], [])
    assert found["own"].energy == result.energy
    assert len(found["own"].frames) == sum(result.usable)
    expected = result.final.calc.results.get("forces")
    if expected is not None:  # that calculation has none
        assert np.allclose(found["own"].frames[-1].calc.results["forces"], expected[order])
    assert found["own"].settings["code"] in ("VASP", "Quantum ESPRESSO")


def test_steps_that_have_not_converged_give_no_energy() -> None:
    with pytest.raises(InputError, match=r"gives no DFT energy .*electronic steps did not converge"):
        read_dft_result(OUTPUTS / "vasprun.unconverged.xml.gz")


def test_of_a_calculation_that_was_cut_off_the_last_good_step_counts() -> None:
    result = read_dft_result(OUTPUTS / "vasprun.bad.xml.gz")
    candidate = Candidate("a", result.start, -1.0)
    record = compare([candidate], match_results([candidate], [result])[0])
    assert record["ranking"][0]["dft_eV"] == result.energy
    assert "the file ends before the calculation did; its last good step counts" in record["warnings"][0]
