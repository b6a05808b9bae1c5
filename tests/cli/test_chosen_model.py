"""Commands with `--calculator` in place of `--checkpoint`, and with a draft."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read
from ase.optimize import LBFGS
from command_line import run_command

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint
from tests.training.tiny_checkpoint import TINY, write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.pt")


@pytest.fixture
def slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Atoms:
    """O on a Cu slab, in `slab.traj` of the working directory."""
    monkeypatch.chdir(tmp_path)
    atoms = fcc111("Cu", (2, 2, 2), vacuum=7.0, periodic=True)
    add_adsorbate(atoms, "O", 1.4, "fcc")
    atoms.set_tags([{0: 2, 1: 1, 2: 0}[tag] for tag in atoms.get_tags()])
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 0))
    atoms.write("slab.traj")
    return atoms


def by_ase(atoms: Atoms) -> float:
    atoms = atoms.copy()
    atoms.calc = EMT()
    LBFGS(atoms, logfile=None).run(fmax=0.05, steps=100)
    return float(atoms.get_potential_energy())


def test_relax_with_a_calculator(slab: Atoms, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("relax", "slab.traj", "--calculator", "emt", "--out", "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    record = json.loads(Path("out/relaxation.json").read_text())
    assert printed["energy_eV"] == record["energy_eV"]
    assert record["energy_eV"] == pytest.approx(by_ase(slab), abs=1e-4)
    assert record["energy_kind"] == "total"
    assert record["converged"]
    assert record["checkpoint_sha256"] is None
    assert record["model_evaluations"] == record["steps"] + 1
    assert record["model"] == {
        "checkpoint": None,
        "calculator": "emt",
        "class": "ase.calculators.emt.EMT",
        "parameters": {"asap_cutoff": False},
        "energy_kind": "total",
    }
    assert read("out/relaxed.extxyz").get_potential_energy() == pytest.approx(record["energy_eV"], abs=1e-6)
    # A run that was killed leaves no record, and its folder can be used again.
    Path("out/relaxation.json").unlink()
    assert run_command("relax", "slab.traj", "--calculator", "emt", "--out", "out") == 0
    Path("out/relaxation.json").unlink()
    slab.calc = EMT()
    slab.get_forces()
    slab.write("out/relaxation.traj")  # somebody else's
    assert run_command("relax", "slab.traj", "--calculator", "emt", "--out", "out") == 2


def test_an_adsorption_energy_of_total_energies(slab: Atoms, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--system", "slab.traj", "--calculator", "emt", "--out", "out"]
    assert run_command("adsorption energy", *arguments) == 0
    record = json.loads(Path("out/adsorption_energy.json").read_text())
    clean, atom = by_ase(slab[:-1]), Atoms("O", cell=[20, 20, 20], pbc=True)
    atom.calc = EMT()
    expected = by_ase(slab) - clean - atom.get_potential_energy()
    assert record["adsorption_energy_eV"] == pytest.approx(expected, abs=1e-3)
    assert record["model_energy_kind"] == "total"
    assert record["gas"]["source"] == "vacuum"
    assert record["gas"]["label"] == "this calculator's energy of O in vacuum"
    assert record["checkpoint_sha256"] is None
    assert record["model"]["calculator"] == "emt"
    assert "this calculator's energy of O in vacuum" in capsys.readouterr().out
    arguments += ["--gas", "O=1.5", "--overwrite"]
    assert run_command("adsorption energy", *arguments) == 0
    record = json.loads(Path("out/adsorption_energy.json").read_text())
    assert record["gas_references_eV_per_atom"] == {"O": 1.5}


ADSORPTION_MODEL = """
from ase.calculators.emt import EMT

class Model(EMT):
    energy_kind = "adsorption"
"""


def test_a_factory_of_an_adsorption_energy_model(
    slab: Atoms, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "adsorption_model", raising=False)
    Path("adsorption_model.py").write_text(ADSORPTION_MODEL)
    arguments = ["--system", "slab.traj", "--calculator", "adsorption_model:Model", "--out", "out"]
    assert run_command("adsorption energy", *arguments) == 0
    record = json.loads(Path("out/adsorption_energy.json").read_text())
    assert record["model_energy_kind"] == record["model"]["energy_kind"] == "adsorption"
    assert record["adsorption_energy_eV"] == pytest.approx(by_ase(slab), abs=1e-4)
    assert record["gas"] is None
    assert run_command("adsorption energy", *arguments, "--overwrite", "--gas", "O=1.5") == 2
    assert "already have slab and gas references subtracted" in capsys.readouterr().err
    arguments[3] = "emt"
    assert run_command("adsorption energy", *arguments, "--overwrite", "--energy-kind", "adsorption") == 2
    assert "predicts total energies, not adsorption energies as declared" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["relax slab.traj", "adsorption energy --system slab.traj"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "one of the arguments --calculator --checkpoint is required"),
        ("--calculator emt --checkpoint oc20_small", "not allowed with argument"),
        ("--calculator emt --weights raw", "--weights has no meaning with --calculator"),
        ("--calculator emt --device cpu", "--device has no meaning with --calculator"),
        ("--calculator emt --stop-at-spread 1", "--stop-at-spread has no meaning with --calculator"),
        ("--calculator dft", "there is no calculator 'dft': give one of ASE's (abinit,"),
        ("--calculator no_such:make", "the module of the calculator no_such:make cannot be imported"),
    ],
)
def test_one_model_and_what_belongs_to_it(
    slab: Atoms, command: str, arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command, *arguments.split(), "--out", "out") == 2
    assert sentence in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_answer_after_a_draft_is_the_full_models(
    slab: Atoms, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["slab.traj", "--calculator", "emt", "--draft", checkpoint, "--steps", 40, "--out", "out"]
    status = run_command("relax", *arguments)
    record = json.loads(Path("out/relaxation.json").read_text())
    assert status == (0 if record["converged"] else 3)
    frames, drafted = read("out/relaxation.traj", ":"), read("out/draft.traj", ":")
    np.testing.assert_allclose(drafted[0].positions, slab.positions)
    np.testing.assert_allclose(drafted[-1].positions, frames[0].positions)
    relaxed = frames[-1].copy()
    relaxed.calc = EMT()
    assert record["energy_eV"] == pytest.approx(relaxed.get_potential_energy(), abs=1e-6)
    assert record["initial_energy_eV"] is None
    assert record["draft"]["used"]
    assert record["draft"]["model_evaluations"] == len(drafted)
    assert len(record["draft"]["checkpoint_sha256"]) == 64
    assert record["model_evaluations"] == len(frames)
    assert "draft.traj" in record["files"]
    assert (
        f"calls: {len(frames)} of the full model, after {len(drafted)} of the draft"
        in capsys.readouterr().out
    )


def test_a_draft_that_cannot_is_left_out(
    slab: Atoms, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.pt"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = EquiformerV2(ModelConfig(**{**TINY, "max_num_elements": 20}))  # no copper
    save_checkpoint(
        broken,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(energy=Normalizer(0.0, 1.0), forces=Normalizer(0.0, 1.0)),
        energy_kind="adsorption",
        provenance={"origin": "random weights"},
    )
    arguments = ["slab.traj", "--calculator", "emt", "--draft", broken, "--out", "out"]
    assert run_command("relax", *arguments) == 0
    record = json.loads(Path("out/relaxation.json").read_text())
    assert record["energy_eV"] == pytest.approx(by_ase(slab), abs=1e-4)
    assert record["draft"]["used"] is False
    assert record["initial_energy_eV"] is not None
    assert "the draft failed (atom 0 (Cu, Z = 29) is outside the network's element table" in caplog.text
