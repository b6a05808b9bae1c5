"""Search, DFT, fine-tuning and the next search, with EMT in the place of DFT."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.optimize import BFGS
from command_line import run_command
from vasprun import write_vasprun

from datasets_oc20 import open_dataset
from equiformer2.adsorption.dft_ledger import DftLedger
from equiformer2.checkpoint import Normalizer
from tests.training.tiny_checkpoint import write_tiny_checkpoint

SEARCH = ["--slab", "Cu111", "--size", "2x2x3", "--adsorbate", "*O", "--steps", "3", "--seed", "1"]
GAS = ["--gas", "H2=-0.5,H2O=3.9"]  # 4.4 eV per atom of O


def network(path: Path, seed: int) -> Path:
    return write_tiny_checkpoint(path, seed, Normalizer(-0.7, 0.5), Normalizer(0.0, 30.0))


def relaxation(start: Atoms, steps: int = 4) -> list[Atoms]:
    """EMT's relaxation of a structure, as an output of DFT would hold it."""
    atoms, frames = start.copy(), []
    atoms.calc = EMT()
    optimizer = BFGS(atoms, logfile=None)
    for _ in optimizer.irun(fmax=0.05, steps=steps):
        frame = atoms.copy()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
        frame.calc = SinglePointCalculator(frame, **results)
        frames.append(frame)
    return frames


def answer(place: Path, number: int) -> float:
    """Relax the POSCAR of an input folder, and leave an output of one kind or another in it."""
    frames = relaxation(read(place / "POSCAR"))
    if number % 3 == 0:
        write_vasprun(place / "vasprun.xml", frames)
    elif number % 3 == 1:
        plain = [frame.copy() for frame in frames]  # with neither constraints nor periodic directions
        for atoms, frame in zip(plain, frames, strict=True):
            atoms.set_constraint()
            atoms.pbc = False
            atoms.calc = SinglePointCalculator(atoms, **frame.calc.results)
        write(place / "x.extxyz", plain)
        (place / "result.extxyz.gz").write_bytes(gzip.compress((place / "x.extxyz").read_bytes()))
        (place / "x.extxyz").unlink()
    else:
        write(place / "result.traj", frames)
    return float(frames[-1].calc.results["energy"])


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A search whose relaxations the spread of two networks has ended."""
    folder = tmp_path_factory.mktemp("loop")
    networks = [network(folder / f"{seed}.pt", seed) for seed in (1, 2)]
    words = ["--checkpoint", *networks, "--stop-at-spread", "0.001", "--placements", "4"]
    assert run_command("adsorption search", *words, *SEARCH, "--out", folder / "first") == 3
    return folder, networks


def test_from_a_search_to_dft_to_a_tuned_model_to_the_next_search(
    asked: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, networks = asked
    first = folder / "first"
    record = json.loads((first / "search.json").read_text())
    assert {row["status"] for row in record["placements"]} <= {"unconverged", "merged"}
    assert all("differ" in row["reason"] for row in record["placements"] if row["status"] == "unconverged")
    ledger = json.loads((first / "dft" / "ledger.json").read_text())
    spread = [row["max_force_std_eV_A"] for row in ledger["asked"] if row["id"] != "slab"]
    assert len(spread) > 2
    assert spread[1:] == sorted(spread[1:], reverse=True)  # the best one is the first
    capsys.readouterr()
    assert run_command("adsorption ask", first, "--number", "0", "--json") == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)["open"]] == ledger["open"]

    # DFT of some, then of the others.
    energies = {}
    for number, row in enumerate(ledger["asked"]):
        energies[row["id"]] = answer(first / "dft" / row["folder"], number)
        if number == 1:
            assert run_command("adsorption collect", "--search", first, *GAS) == 0
            assert json.loads((first / "collect.json").read_text())["dft_energy"] == "total"  # no slab yet
    assert run_command("adsorption collect", "--search", first) == 0  # the references of the last call
    found = json.loads((first / "collect.json").read_text())
    assert (found["open"], found["left_out"]) == ([], [])
    assert len(found["ranking"]) == len(energies) - 1
    expected = {name: energy - energies["slab"] - 4.4 for name, energy in energies.items() if name != "slab"}
    assert {row["id"]: row["dft_eV"] for row in found["ranking"]} == pytest.approx(expected, abs=1e-5)
    data = open_dataset(first / "dft" / "collected.lmdb")
    assert data.energy_kind == "adsorption"
    assert len(data) == found["training_data"]["frames"] > 2 * len(expected)
    assert all(int((one.tags == 2).sum()) == 1 and int(one.fixed.sum()) > 0 for one in data)

    words = [
        "--data",
        first / "dft" / "collected.lmdb",
        "--checkpoint",
        networks[0],
        "--out",
        folder / "tuned",
    ]
    assert run_command("finetune", *words, "--steps", 2, "--no-scratch") == 0
    words = ["--checkpoint", folder / "tuned" / "model.pt", "--placements", "2", "--starts-from", first]
    assert run_command("adsorption search", *words, *SEARCH, "--out", folder / "second") in (0, 3)
    again = json.loads((folder / "second" / "search.json").read_text())
    assert again["placements"][0]["id"] == f"earlier-{record['best']['id']}"
    capsys.readouterr()


def test_results_that_contradict_are_refused(
    asked: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "search"
    shutil.copytree(asked[0] / "first", first)
    for name in ("ledger.json", "answers.traj"):
        (first / "dft" / name).unlink(missing_ok=True)
    (first / "collect.json").unlink(missing_ok=True)
    names = [row["id"] for row in json.loads((first / "search.json").read_text())["placements"]][:2]
    frames = {}
    for name, functional in zip(names, ("RP", "PE"), strict=True):
        atoms = read(first / "trajectories" / f"{name}.traj")
        frames[name] = relaxation(atoms[np.argsort(atoms.get_chemical_symbols(), kind="stable")], 1)
        write_vasprun(tmp_path / f"{functional}.xml", frames[name], functional)
    collect = ["adsorption collect", "--search", first, "--dft"]
    (tmp_path / "broken.xml").write_text("<modeling>")
    files = [tmp_path / "RP.xml", tmp_path / "broken.xml", tmp_path / "missing"]
    assert run_command(*collect, *files) == 3  # the others are named
    assert capsys.readouterr().out.count("left out: ") == 2
    grown = relaxation(frames[names[0]][-1], 3)  # the same file later
    write_vasprun(tmp_path / "RP.xml", grown)
    for _ in range(2):
        assert run_command(*collect, tmp_path / "RP.xml") == 0
        taken = DftLedger(first).answers[names[0]]
        assert taken.energy == pytest.approx(grown[-1].calc.results["energy"], abs=1e-6)
        assert len(taken.frames) in (len(grown), len(grown) + len(frames[names[0]]))
    capsys.readouterr()
    assert run_command(*collect, tmp_path / "PE.xml") == 2
    assert "functional is RPBE in" in capsys.readouterr().err
    assert run_command(*collect, tmp_path / "PE.xml", "--mixed") == 0
    out = capsys.readouterr().out
    assert "DFT of different settings is compared" in out
    assert "the model's labels are RPBE" in out
    lower = [frame.copy() for frame in frames[names[0]]]
    for frame, known in zip(lower, frames[names[0]], strict=True):
        energy = grown[-1].calc.results["energy"] - 0.5
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=known.calc.results["forces"])
    write_vasprun(tmp_path / "lower.xml", lower)
    before = DftLedger(first).answers[names[0]].energy
    assert run_command(*collect, tmp_path / "lower.xml", "--mixed") == 2
    assert "give --overwrite to take the second" in capsys.readouterr().err
    assert DftLedger(first).answers[names[0]].energy == before
    assert run_command(*collect, tmp_path / "lower.xml", "--mixed", "--overwrite") == 0
    assert DftLedger(first).answers[names[0]].energy == pytest.approx(before - 0.5)
    other = Atoms("Pt4", cell=[5.0, 5.0, 5.0], positions=np.arange(12).reshape(4, 3) / 3)
    other.calc = SinglePointCalculator(other, energy=-1.0, forces=np.zeros((4, 3)))
    write(tmp_path / "other.extxyz", other)
    written = (first / "collect.json").read_text()
    capsys.readouterr()
    for useless, reason in (("other.extxyz", "its atoms are others"), ("broken.xml", "no DFT energy")):
        assert run_command(*collect, tmp_path / useless, "--mixed") == 2
        assert reason in capsys.readouterr().err
    assert (first / "collect.json").read_text() == written
    # Beside one that is known it is left out.
    assert run_command(*collect, tmp_path / "lower.xml", tmp_path / "other.extxyz", "--mixed") == 3
    capsys.readouterr()
    assert run_command(*collect, tmp_path / "RP.xml", "--gas", "H2=x") == 2
    assert "must be a name and an energy" in capsys.readouterr().err
