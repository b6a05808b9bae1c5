"""Files of CatBench: reading, refusals, and the numbers of CatBench itself where it is installed."""

import copy
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read, write
from command_line import run_command

from datasets_oc20.errors import DataError
from equiformer2.adsorption.benchmark import Evaluated, bond_change, evaluate, statistics
from equiformer2.adsorption.catbench import read_catbench
from equiformer2.errors import InputError
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.engines import open_engine


def text(atoms: Atoms) -> str:
    buffer = io.StringIO()
    write(buffer, atoms, format="json")
    return buffer.getvalue()


def surface(metal: str) -> Atoms:
    slab = fcc111(metal, (2, 2, 3), vacuum=7.0, periodic=True)
    slab.set_constraint(FixAtoms([atom.index for atom in slab if atom.tag > 2]))
    return slab


def molecule(bond: float) -> Atoms:
    return Atoms("O2", [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0 + bond]], cell=[10.0] * 3, pbc=True)


def content() -> dict[str, Any]:
    """O on the hollow of Cu and Pt, on top of Cu, whence it slides, and a slab that falls together."""
    found: dict[str, Any] = {"_structures": {"oxygen": text(molecule(1.2))}}
    cases = {
        "cu": ("Cu", "fcc", -2.0),
        "pt": ("Pt", "fcc", -9.0),
        "top": ("Cu", "bridge", -2.0),
        "bad": ("Cu", "fcc", 0.0),
    }
    for name, (metal, site, energy) in cases.items():
        slab = surface(metal)
        system = slab.copy()
        add_adsorbate(system, "O", 1.3 if site == "fcc" else 1.8, site)
        if name == "top":
            system.positions[-1] += [0.9, 0.2, 0.3]
        if name == "bad":
            slab.positions[-1] += [0.0, 0.0, 1.4]
        found[name] = {
            "raw": {
                "star": {"stoi": -1, "energy_ref": 0.0, "atoms_json": text(slab)},
                "Ostar": {"stoi": 1, "energy_ref": 0.0, "atoms_json": text(system)},
                "O2gas": {"stoi": -0.5, "energy_ref": 0.0, "ref": "oxygen"},
            },
            "ref_ads_eng": energy,
            "adsorbate_indices": [12],
        }
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catbench") / "tiny_adsorption.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content()).encode()))
    return path


@pytest.fixture(scope="module")
def rows(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evaluated]:
    settings = RelaxationSettings(fmax=0.02, steps=200)
    found = evaluate(
        read_catbench(file)[0], open_engine(EMT()), "total", tmp_path_factory.mktemp("out"), settings
    )
    return {row.reaction: row for row in found}


def test_reactions_are_read_whole(file: Path) -> None:
    reactions, left_out = read_catbench(file)
    assert not left_out
    reaction = reactions[0]
    assert (reaction.name, reaction.adsorbate, reaction.energy) == ("cu", "O", -2.0)
    assert np.array_equal(np.flatnonzero(reaction.system.get_tags() == 2), [12])
    assert np.array_equal(reaction.system.constraints[0].index, range(4))
    assert {name: factor for name, (_, factor) in reaction.terms.items()} == {
        "star": -1,
        "Ostar": 1,
        "O2gas": -0.5,
    }
    assert reaction.terms["O2gas"][0].get_chemical_formula() == "O2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry["raw"].pop("star"), None),
        (lambda entry: entry.pop("ref_ads_eng"), "ref_ads_eng is missing"),
        (lambda entry: entry["raw"]["O2gas"].update(stoi=-1), "do not balance"),
        (lambda entry: entry["raw"]["O2gas"].update(ref="other"), "'other' is not in _structures"),
        (lambda entry: entry["raw"].pop("Ostar"), "one structure of slab and adsorbate"),
        (lambda entry: entry.update(adsorbate_indices=[99]), "are not in the structure"),
        (lambda entry: entry["raw"]["star"].update(atoms_json="{}"), "ids is missing"),
        (lambda entry: entry["raw"]["star"].update(atoms_json=3), "no text"),
        (lambda entry: entry.update(raw=[]), "not laid out as"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, change: Any, message: str | None) -> None:
    changed = copy.deepcopy(content())
    change(changed["pt"])
    path = tmp_path / "x.json"
    path.write_text(json.dumps(changed))
    if message is None:
        assert read_catbench(path)[0][1].slab is None
        return
    reactions, left_out = read_catbench(path)
    assert [one.name for one in reactions] == ["cu", "top", "bad"]
    assert message in left_out["pt"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, written in (("a.json", "[]"), ("b.json", "{}"), ("c.json", "nothing"), ("d.json", '{"x": 3}')):
        (tmp_path / name).write_text(written)
        with pytest.raises(DataError, match=name):
            read_catbench(tmp_path / name)


def test_energies_are_those_of_the_structures(rows: dict[str, Evaluated]) -> None:
    slab, system, gas = surface("Cu"), None, molecule(1.2)
    system = slab.copy()
    add_adsorbate(system, "O", 1.3, "fcc")
    energies = []
    for atoms in (slab, system, gas):
        atoms.calc = EMT()
        energies.append(atoms.get_potential_energy())
    assert rows["cu"].single_point == pytest.approx(energies[1] - energies[0] - energies[2] / 2, abs=1e-6)
    assert rows["cu"].model is not None
    assert {name: row.kind for name, row in rows.items()} == {
        "cu": "normal",
        "pt": "energy_anomaly",
        "top": "adsorbate_migration",
        "bad": "unphysical_relaxation",
    }


def test_errors_are_counted_with_and_without_a_shift() -> None:
    errors = [3.0, 3.1, 2.9, 3.2, 2.8, 6.0]
    rows = [
        Evaluated(str(number), "O", 0.5 * number, 0.5 * number + error, 0.0, "energy_anomaly")
        for number, error in enumerate(errors)
    ]
    rows.append(Evaluated("x", "N", 1.0, 1.5, 1.0, "normal"))
    rows.append(Evaluated("y", "N", 1.0, None, None, "failed"))
    found = statistics(rows)
    assert found["counts"]["energy_anomaly"] == 6
    assert found["counts"]["failed"] == 1
    assert found["mae_eV"]["all"] == pytest.approx((sum(errors) + 0.5) / 7)
    assert found["shifted"]["shift_eV"] == {"O": pytest.approx(3.05), "N": None}
    assert found["shifted"]["counts"]["energy_anomaly"] == 1  # 6.0 alone stays one
    assert found["by_adsorbate"]["N"]["mae_eV"]["all"] == pytest.approx(0.5)
    assert found["by_adsorbate"]["O"]["spearman"] == pytest.approx(1.0)


def test_changes_of_distances_are_relative_and_periodic() -> None:
    first = Atoms("Cu2O", [[0, 0, 0], [7.5, 0, 0], [0, 0, 2.0]], cell=[8.0, 8.0, 20.0], pbc=True)
    second = first.copy()
    second.positions[2] = [0, 0, 2.5]
    assert bond_change(first, second, [2]) == pytest.approx(0.25)
    assert bond_change(first, second, []) == 0.0


def test_the_command_resumes_and_writes_one_record(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [file, "--calculator", "emt", "--fmax", "0.1", "--out", tmp_path / "out"]
    assert run_command("adsorption benchmark", *words, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out/benchmark.json").read_text())
    assert {row["reaction"] for row in printed["reactions"]} == {"cu", "pt", "top", "bad"}
    assert sum(printed["counts"].values()) == 4
    assert (tmp_path / "out/benchmark.png").is_file()
    lines = (tmp_path / "out/relaxed.jsonl").read_text()
    assert len(lines.splitlines()) == 7  # the slab of copper and the molecule are relaxed once
    stored = (tmp_path / "out/benchmark.json").read_bytes()
    assert run_command("adsorption benchmark", *words, "--json") == 0  # finished
    assert json.loads(capsys.readouterr().out) == json.loads(stored)
    assert (tmp_path / "out/benchmark.json").read_bytes() == stored
    assert run_command("adsorption benchmark", *words, "--steps", "5") == 2
    assert "holds a finished benchmark with other settings (steps)" in capsys.readouterr().err
    assert run_command("adsorption benchmark", *words, "--overwrite") == 0
    assert (tmp_path / "out/benchmark.json").read_bytes() != stored
    assert (tmp_path / "out/relaxed.jsonl").read_text() == lines
    assert "MAE (eV)" in capsys.readouterr().out


def test_energies_of_molecules_may_be_given(file: Path, rows: dict[str, Evaluated], tmp_path: Path) -> None:
    settings = RelaxationSettings(fmax=0.02, steps=200)
    reactions = read_catbench(file)[0][:1]
    (row,) = evaluate(reactions, open_engine(EMT()), "total", tmp_path / "a", settings, {"O2gas": 3.0})
    gas = molecule(1.2)
    gas.calc = EMT()
    difference = (gas.get_potential_energy() - 3.0) / 2
    assert row.single_point == pytest.approx(rows["cu"].single_point + difference, abs=1e-6)
    assert "O2" not in {read(path).get_chemical_formula() for path in (tmp_path / "a").rglob("*.traj")}
    with pytest.raises(InputError, match="no reaction has the molecule H2gas"):
        evaluate(reactions, open_engine(EMT()), "total", tmp_path / "b", settings, {"H2gas": 3.0})


def test_catbench_itself_finds_the_same(
    rows: dict[str, Evaluated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own relaxations with ASE's L-BFGS; skipped where the package is not installed."""
    pytest.importorskip("catbench")
    from catbench.adsorption.calculation.calculation import AdsorptionCalculation

    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw_data").mkdir()
    (tmp_path / "raw_data/tiny_adsorption.json").write_text(json.dumps(content()))
    options = {"mlip_name": "emt", "benchmark": "tiny", "f_crit_relax": 0.02, "n_crit_relax": 200}
    AdsorptionCalculation([EMT()], save_files=False, **options).run()
    found = json.loads(next(tmp_path.rglob("emt_result.json")).read_text())
    for name, row in rows.items():
        theirs = found[name]
        assert row.single_point == pytest.approx(theirs["single_calculation"]["ads_eng"], abs=1e-6)
        assert row.model == pytest.approx(theirs["0"]["ads_eng"], abs=5e-3)
        assert row.substrate_displacement == pytest.approx(theirs["0"]["substrate_displacement"], abs=0.02)
        assert row.slab_displacement == pytest.approx(theirs["0"]["slab_max_disp"], abs=0.02)
        assert 100 * row.bond_change == pytest.approx(theirs["0"]["max_bond_change"], abs=2.0)
