"""Several networks as one: mean, spread, and relaxations that log it and stop at it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read, write
from command_line import run_command

from datasets_oc20 import LmdbWriter
from equiformer2.checkpoint import load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor, atoms_to_data, relax
from equiformer2.inference.batched import RelaxationSettings, free_forces, relax_batched
from equiformer2.inference.committee import Committee, largest_spread
from equiformer2.inference.record import model_record, recorded_model

MakeCheckpoint = Callable[..., Path]


def other_seed(path: Path, out: Path, seed: int) -> Path:
    """A copy of a checkpoint with slightly different weights."""
    loaded = load_checkpoint(path)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: value + 0.05 * value.std(correction=0) * torch.randn(value.shape, generator=generator)
        for name, value in loaded.model.state_dict().items()
    }
    save_checkpoint(
        out,
        model=loaded.model,
        raw_state=state,
        averaged_state=None,
        normalizers=loaded.normalizers,
        energy_kind=loaded.energy_kind,
        provenance=loaded.provenance,
    )
    return out


@pytest.fixture
def three(checkpoint: Path, tmp_path: Path) -> list[Path]:
    return [checkpoint, *(other_seed(checkpoint, tmp_path / f"seed{n}.pt", n) for n in (1, 2))]


def test_mean_and_spread_are_those_of_the_members(three: list[Path], oxygen_on_copper: Atoms) -> None:
    calculator = EquiformerV2Calculator(three)
    atoms = oxygen_on_copper.copy()
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
    outs = [Predictor(path).predict(oxygen_on_copper) for path in three]
    energies = np.array([float(out["energy"][0]) for out in outs])
    members = np.stack([out["forces"].numpy() for out in outs])
    assert energy == pytest.approx(energies.mean(), rel=1e-6)
    assert calculator.results["energy_std"] == pytest.approx(energies.std(), rel=1e-5)
    np.testing.assert_allclose(forces, members.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(calculator.results["forces_std"], members.std(axis=0), atol=1e-5)
    assert calculator.results["energy_std"] > 0
    assert calculator.energy_kind == "adsorption"
    assert calculator.predictor.provenance == Predictor(three[0]).provenance


def test_a_list_of_one_and_loaded_predictors(three: list[Path], oxygen_on_copper: Atoms) -> None:
    alone = EquiformerV2Calculator(three[:1])
    alone.calculate(oxygen_on_copper, ["energy"])
    assert "energy_std" not in alone.results
    assert EquiformerV2Calculator(alone.predictor).predictor is alone.predictor
    both = EquiformerV2Calculator([alone.predictor, three[1]])
    both.calculate(oxygen_on_copper, ["energy"])
    assert both.results["energy_std"] > 0


def test_what_does_not_fit_together_is_refused(
    three: list[Path], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.pt"
    copy.write_bytes(three[0].read_bytes())
    for other, words in (
        (make_checkpoint("total"), "different kinds of energy: adsorption, total"),
        (make_checkpoint(max_radius=5.0), r"different cutoff radii \(Å\): 6.0, 5.0"),
        (make_checkpoint(forces="none"), "different kinds of forces"),
        (copy, "checkpoints 1 and 2 of the committee hold the same weights"),
    ):
        with pytest.raises(InputError, match=words):
            EquiformerV2Calculator([three[0], other])
    with pytest.raises(InputError, match="is empty"):
        EquiformerV2Calculator([])
    with pytest.raises(InputError, match="router belongs to one network"):
        EquiformerV2Calculator(three, router=lambda model, batch, request: {})
    with pytest.raises(InputError, match="at least two"):
        Committee([])


def test_a_relaxation_logs_the_spread(three: list[Path], oxygen_on_copper: Atoms, tmp_path: Path) -> None:
    trajectory = tmp_path / "relaxation.traj"
    result = relax(oxygen_on_copper, three, fmax=1e-4, steps=2, trajectory=trajectory)
    frames = read(trajectory, ":")
    assert len(result.force_spreads) == len(frames) == 3
    assert [frame.info["max_force_std_eV_A"] for frame in frames] == pytest.approx(result.force_spreads)
    assert frames[-1].info["energy_std_eV"] == pytest.approx(result.energy_std)
    assert result.stopped is None
    assert "max_force_std_eV_A" not in oxygen_on_copper.info
    json.dumps(result.summary())


def test_a_large_spread_ends_a_relaxation(three: list[Path], oxygen_on_copper: Atoms) -> None:
    result = relax(oxygen_on_copper, three, steps=5, stop_at_spread=1e-6)
    assert (result.steps, result.converged) == (0, False)
    assert result.stopped is not None
    assert "more than the 1e-06" in result.stopped
    assert result.outcome().startswith("STOPPED, the committee's forces")
    assert relax(oxygen_on_copper, three, fmax=1e-4, steps=2, stop_at_spread=1e6).steps == 2
    for calculator in (EMT(), three[0]):
        with pytest.raises(InputError, match="needs a committee"):
            relax(oxygen_on_copper, calculator, stop_at_spread=0.1)
    with pytest.raises(InputError, match="give a positive force"):
        relax(oxygen_on_copper, three, stop_at_spread=0.0)


def test_held_atoms_do_not_count() -> None:
    spread = np.array([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]])
    assert largest_spread(spread, np.array([True, True])) == 5.0
    assert largest_spread(spread, np.array([False, True])) == pytest.approx(0.1)
    assert largest_spread(spread, np.array([False, False])) == 0.0


def test_the_command(
    three: list[Path], oxygen_on_copper: Atoms, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "slab.traj", oxygen_on_copper)
    out = tmp_path / "result"
    # The structure behind the checkpoints is no member.
    arguments = ["--stop-at-spread", "1e-6", "--checkpoint", *three, tmp_path / "slab.traj", "--out", out]
    assert run_command("relax", *arguments) == 3
    printed = capsys.readouterr().out
    assert "spread of 3 networks" in printed
    assert printed.splitlines()[-1].startswith("Cu12O: STOPPED, the committee's forces on an atom differ by")
    record = json.loads((out / "relaxation.json").read_text())
    assert len(record["checkpoint_sha256"]) == 3
    assert record["model"]["checkpoint"] == [str(path) for path in three]
    assert record["max_force_std_eV_A"] > 1e-6
    assert record["energy_std_eV"] > 0
    assert "more than the 1e-06" in record["stopped"]
    assert record["model"]["familiarity"]["compared"] == []

    arguments = [tmp_path / "slab.traj", "--checkpoint", three[0], "--stop-at-spread", "1", "--overwrite"]
    assert run_command("relax", *arguments, "--out", out) == 2
    assert "needs a committee" in capsys.readouterr().err


def test_batched_relaxations_keep_the_spread_and_stop_at_it(
    three: list[Path], oxygen_on_copper: Atoms
) -> None:
    """The steps of one relaxation with ASE, and its spread; the structure whose members differ ends alone."""
    moved = oxygen_on_copper.copy()
    moved.rattle(0.1, seed=1)
    structures = []
    for number, atoms in enumerate((oxygen_on_copper, moved)):
        start = atoms_to_data(atoms, notify=False)
        start.sid = str(number)
        structures.append((number, start))
    committee = Committee([Predictor(path) for path in three])
    settings = RelaxationSettings(fmax=1e-4, steps=2)
    relaxed = sorted(relax_batched(free_forces(committee), structures, settings), key=lambda item: item.index)
    alone = relax(oxygen_on_copper, three, fmax=1e-4, steps=0)
    assert relaxed[0].frames[0].energy_std == pytest.approx(alone.energy_std, rel=1e-4)
    assert relaxed[0].frames[0].max_force_std == pytest.approx(alone.force_spreads[0], rel=1e-4)
    assert [item.stopped for item in relaxed] == [None, None]
    spreads = sorted(max(frame.max_force_std or 0.0 for frame in item.frames) for item in relaxed)
    limited = RelaxationSettings(fmax=1e-4, steps=2, stop_at_spread=sum(spreads) / 2)
    ends = {item.stopped is None for item in relax_batched(committee.predict, structures, limited)}
    assert ends == {True, False}
    with pytest.raises(InputError, match="needs a committee"):
        list(relax_batched(free_forces(committee.members[0]), structures, limited))


def test_the_commands_of_datasets_and_adsorption_energies(
    three: list[Path], oxygen_on_copper: Atoms, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = atoms_to_data(oxygen_on_copper, notify=False)
    start.sid = "system"
    with LmdbWriter(tmp_path / "starts.lmdb", "adsorption") as writer:
        writer.write(start)
    given = ["--checkpoint", *three, "--data", tmp_path / "starts.lmdb", "--out", tmp_path / "many"]
    assert run_command("relax-is2re", *given, "--steps", 2, "--stop-at-spread", "1e-6") == 0
    assert "ended by the committee's spread" in capsys.readouterr().out
    report = json.loads((tmp_path / "many" / "is2re.json").read_text())
    assert len(report["checkpoint_sha256"]) == 3
    assert "differ by" in report["datasets"]["starts"]["stopped"]["system"]
    with np.load(tmp_path / "many" / "starts" / "relaxed.npz") as arrays:
        assert arrays["max_force_std"][0] > 1e-6
    (frame,) = read(tmp_path / "many" / "starts" / "trajectories" / "system.traj", ":")
    assert frame.info["energy_std_eV"] > 0
    for wrong, message in (
        (["--stop-at-spread", "1"], "needs a committee"),
        (["--checkpoint", *three, "--router", "router.json"], "--router belongs to one network"),
    ):
        arguments = ["--checkpoint", three[0], "--data", tmp_path / "starts.lmdb", "--out", tmp_path / "x"]
        assert run_command("relax-is2re", *arguments, *wrong) == 2
        assert message in capsys.readouterr().err

    write(tmp_path / "system.traj", oxygen_on_copper)
    out = tmp_path / "energy"
    arguments = ["--checkpoint", *three, "--system", tmp_path / "system.traj", "--out", out]
    assert run_command("adsorption energy", *arguments, "--steps", 1, "--fmax", 1e-4) == 3
    record = json.loads((out / "adsorption_energy.json").read_text())
    assert record["adsorption_energy_std_eV"] == pytest.approx(record["system"]["energy_std_eV"])
    assert f"± {record['adsorption_energy_std_eV']:.4f}" in capsys.readouterr().out


def test_a_network_and_its_twin_in_bfloat16(
    checkpoint: Path, oxygen_on_copper: Atoms, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [Predictor(checkpoint), Predictor(checkpoint, precision="bf16")]
    committee = Committee(members)
    assert committee.precision == ["float32", "bf16"]
    out = committee.predict(oxygen_on_copper)
    energies = [float(member.predict(oxygen_on_copper)["energy"][0]) for member in members]
    assert float(out["energy"][0]) == pytest.approx(np.mean(energies), rel=1e-6)
    assert float(out["energy_std"][0]) == pytest.approx(np.std(energies), rel=1e-4)
    record = model_record(committee, [checkpoint, checkpoint])
    again = recorded_model(json.loads(json.dumps(record)))
    assert float(again.predict(oxygen_on_copper)["energy"][0]) == pytest.approx(float(out["energy"][0]))
    with pytest.raises(InputError, match="or another precision"):
        Committee([Predictor(checkpoint), Predictor(checkpoint)])
    file = tmp_path / "start.extxyz"
    write(file, oxygen_on_copper)
    options = [file, "--checkpoint", checkpoint, "--steps", "1", "--out", tmp_path / "out", "--twin-bf16"]
    assert run_command("relax", *options) in (0, 3)
    written = json.loads((tmp_path / "out" / "relaxation.json").read_text())
    assert written["model"]["precision"] == ["float32", "bf16"]
    assert len(written["checkpoint_sha256"]) == 2
    assert "spread of 2 networks" in capsys.readouterr().out
    assert run_command("relax", *options, "--precision", "bf16", "--overwrite") == 2
    assert "--twin-bf16 has no meaning with --precision bf16" in capsys.readouterr().err
