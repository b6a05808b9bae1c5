"""Batched relaxation: the steps of ASE's LBFGS, places that are filled again, failures, memory."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.optimize import LBFGS
from inference_helpers import SYSTEMS, slab
from torch_geometric.data import Batch, Data

from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor, atoms_to_data
from equiformer2.inference.batched import (
    BatchedLBFGS,
    RelaxationSettings,
    Relaxed,
    free_forces,
    relax_batched,
)

LBFGS_EXPECTED = Path(__file__).parents[1] / "fixtures" / "inference" / "lbfgs_expected.json"


def data(atoms: Atoms, sid: str) -> Data:
    made = atoms_to_data(atoms, notify=False)
    made.sid = sid
    return made


def emt(batch: Batch) -> dict[str, torch.Tensor]:
    """Effective medium theory in place of the network."""
    energies, forces = [], []
    for item in batch.to_data_list():
        numbers, positions = item.atomic_numbers.numpy(), item.pos.double().numpy()
        atoms = Atoms(numbers, positions, cell=item.cell[0].numpy(), pbc=item.pbc[0].numpy())
        atoms.calc = EMT()
        energies.append(atoms.get_potential_energy())
        forces.append(torch.as_tensor(atoms.get_forces()))
    return {"energy": torch.tensor(energies, dtype=torch.float64), "forces": torch.cat(forces)}


def test_every_structure_takes_the_steps_of_ase_alone() -> None:
    settings = {"memory": 4, "max_step": 0.05, "alpha": 60.0, "damping": 0.9}
    alone = []
    for metal, seed in SYSTEMS[:3]:
        atoms = slab(metal, seed)
        optimizer = LBFGS(atoms, logfile=None, memory=4, maxstep=0.05, alpha=60.0, damping=0.9)
        positions = [atoms.positions.copy()]
        for _ in range(12):
            optimizer.step()
            positions.append(atoms.positions.copy())
        alone.append(positions)
    # The third comes after three steps, the first leaves after six.
    together = BatchedLBFGS(**settings)  # type: ignore[arg-type]
    running = {0: slab(*SYSTEMS[0]), 1: slab(*SYSTEMS[1])}
    taken = dict.fromkeys(range(3), 0)
    for step in range(12):
        if step == 3:
            running[2] = slab(*SYSTEMS[2])
            together.add(len(running[2]), 1)
        if step == 6:
            gone = len(running.pop(0))
            stays = torch.ones(gone + sum(map(len, running.values())), dtype=torch.bool)
            stays[:gone] = False
            together.keep(stays, torch.tensor([False, True, True]))
        structure = torch.repeat_interleave(
            torch.arange(len(running)), torch.tensor([len(atoms) for atoms in running.values()])
        )
        positions = torch.cat([torch.as_tensor(atoms.positions) for atoms in running.values()])
        forces = torch.cat([torch.as_tensor(atoms.get_forces()) for atoms in running.values()])
        moved = positions + together.step(positions, forces, structure, len(running))
        parts = moved.split([len(atoms) for atoms in running.values()])
        for (name, atoms), part in zip(running.items(), parts, strict=True):
            atoms.positions[:] = part.numpy()
            taken[name] += 1
            np.testing.assert_allclose(atoms.positions, alone[name][taken[name]], atol=1e-10)
    assert taken == {0: 6, 1: 12, 2: 9}


def test_the_path_of_the_reference() -> None:
    """fairchem-core's own batched optimiser, on a Morse potential (tests/fixtures/inference)."""
    content = json.loads(LBFGS_EXPECTED.read_text())
    natoms, fixed = content["natoms"], torch.tensor(content["fixed"])
    structure = torch.repeat_interleave(torch.arange(len(natoms)), torch.tensor(natoms))
    start = positions = torch.tensor(content["start"], dtype=torch.float64)
    optimizer = BatchedLBFGS(**content["settings"])
    for _ in range(content["steps"]):
        pulls = []
        for atoms in positions.split(natoms):
            apart = atoms[:, None] - atoms[None]
            distance = apart.norm(dim=-1, keepdim=True) + torch.eye(len(atoms))[..., None]
            decay = torch.exp(-1.5 * (distance - 2))
            pulls.append((-3.0 * (1 - decay) * decay * apart / distance).sum(dim=1))
        forces = torch.cat(pulls)
        forces[fixed] = 0.0
        positions = positions + optimizer.step(positions, forces, structure, len(natoms))
    expected = torch.tensor(content["relaxed"], dtype=torch.float64)
    assert (expected - start).abs().max() > 0.1
    # The reference scales every step by x / (x + 1e-7).
    torch.testing.assert_close(positions, expected, atol=1e-5, rtol=0.0)


def relax_all(**options: object) -> tuple[list[Relaxed], list[int]]:
    """All `SYSTEMS` by EMT, and the size of every batch."""
    sizes = []

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        sizes.append(batch.num_graphs)
        return emt(batch)

    structures = ((index, data(slab(*system), system[0])) for index, system in enumerate(SYSTEMS))
    options.setdefault("settings", RelaxationSettings(fmax=0.05))
    return list(relax_batched(predict, structures, **options)), sizes  # type: ignore[arg-type]


def test_a_full_batch_until_the_end_and_the_minima_of_ase() -> None:
    relaxed, sizes = relax_all(batch_size=2)
    assert sorted(item.index for item in relaxed) == [0, 1, 2, 3]
    steps = [item.steps for item in sorted(relaxed, key=lambda item: item.index)]
    assert len(set(steps)) > 1  # they do not end together
    # Every evaluation belongs to a structure that still moves or just ends: no place waits for the slowest.
    assert sum(sizes) == sum(steps) + 4
    assert set(sizes[: len(sizes) // 2]) == {2}
    for item in relaxed:
        assert item.converged
        assert item.max_force < 0.05
        assert len(item.frames) == item.steps + 1
        atoms = slab(*SYSTEMS[item.index])
        LBFGS(atoms, logfile=None, maxstep=0.04, memory=50, alpha=70.0).run(fmax=0.05, steps=200)
        assert item.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        held = item.start.fixed.numpy()
        np.testing.assert_array_equal(item.positions[held], item.frames[0].positions[held])
        assert np.abs(item.positions[~held] - item.frames[0].positions[~held]).max() > 0.01


def test_what_stands_beside_a_structure_does_not_change_its_relaxation() -> None:
    alone, _ = relax_all(batch_size=1)
    together, sizes = relax_all(batch_size=4)
    assert max(sizes) == 4
    assert [item.index for item in alone] == [0, 1, 2, 3]
    for item in together:
        other = alone[item.index]
        assert item.steps == other.steps
        np.testing.assert_allclose(item.positions, other.positions, atol=1e-5)


def test_steps_end_and_only_the_ends_are_kept() -> None:
    relaxed, sizes = relax_all(batch_size=4, settings=RelaxationSettings(fmax=1e-6, steps=3, frames="ends"))
    assert sizes == [4, 4, 4, 4]
    assert all(not item.converged and item.steps == 3 and len(item.frames) == 2 for item in relaxed)
    none, sizes = relax_all(batch_size=4, settings=RelaxationSettings(fmax=1e-6, steps=0))
    assert sizes == [4]
    assert all(item.steps == 0 and len(item.frames) == 1 for item in none)


def test_atoms_limit_the_batch_and_the_largest_goes_alone() -> None:
    _, sizes = relax_all(batch_size=4, max_atoms=2 * 9)
    assert max(sizes) == 2
    _, sizes = relax_all(batch_size=4, max_atoms=5)
    assert set(sizes) == {1}


def test_a_structure_that_fails_leaves_with_its_last_good_frame() -> None:
    calls = 0

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        out = emt(batch)
        if calls == 4:
            out["forces"][0] = torch.nan
        if calls == 6:
            raise InputError("atoms coincide", 0)
        return out

    structures = [(index, data(slab(*system), system[0])) for index, system in enumerate(SYSTEMS[:3])]
    relaxed = list(relax_batched(predict, structures, RelaxationSettings(fmax=0.05), batch_size=3))
    by_index = {item.index: item for item in relaxed}
    assert "non-finite" in str(by_index[0].failure)
    assert "coincide" in str(by_index[1].failure)
    assert by_index[2].failure is None
    assert by_index[2].converged
    for index, steps in ((0, 2), (1, 4)):
        assert not by_index[index].converged
        assert by_index[index].steps == steps
        assert len(by_index[index].frames) == steps + 1
        assert np.isfinite(by_index[index].frames[-1].forces).all()


def test_a_start_without_an_energy_leaves_without_a_frame() -> None:
    def picky(batch: Batch) -> dict[str, torch.Tensor]:
        if "Ag" in batch.sid:
            raise InputError("silver is not known", batch.sid.index("Ag"))
        out = emt(batch)
        if "Pt" in batch.sid:
            out["energy"][batch.sid.index("Pt")] = torch.nan
        return out

    structures = [(index, data(slab(*system), system[0])) for index, system in enumerate(SYSTEMS)]
    relaxed = list(relax_batched(picky, structures, RelaxationSettings(fmax=0.05), batch_size=3))
    assert sorted(item.index for item in relaxed) == [0, 1, 2, 3]
    by_name = {item.start.sid: item for item in relaxed}
    reasons = {"Ag": "silver is not known", "Pt": "the model gives a non-finite energy or force at step 0"}
    for name, reason in reasons.items():
        assert (by_name[name].failure, by_name[name].frames, by_name[name].steps) == (reason, [], 0)
    alone, _ = relax_all(batch_size=1)
    for index, name in ((0, "Cu"), (3, "Ni")):
        assert by_name[name].converged
        assert by_name[name].steps == alone[index].steps
        np.testing.assert_allclose(by_name[name].positions, alone[index].positions, atol=1e-5)


def test_an_error_that_is_not_about_a_structure_ends_everything() -> None:
    def broken(batch: Batch) -> dict[str, torch.Tensor]:
        raise InputError("the backend is gone")

    with pytest.raises(InputError, match="the backend is gone"):
        list(relax_batched(broken, [(0, data(slab("Cu", 0), "Cu"))]))


def test_half_of_the_batch_waits_when_memory_ends() -> None:
    sizes = []

    def small_device(batch: Batch) -> dict[str, torch.Tensor]:
        if batch.num_graphs > 2:
            raise torch.OutOfMemoryError
        sizes.append(batch.num_graphs)
        return emt(batch)

    structures = [(index, data(slab(*system), system[0])) for index, system in enumerate(SYSTEMS)]
    relaxed = list(relax_batched(small_device, structures, RelaxationSettings(fmax=0.05), batch_size=4))
    assert sorted(item.index for item in relaxed) == [0, 1, 2, 3]
    assert all(item.converged for item in relaxed)
    assert max(sizes) == 2

    def no_device(batch: Batch) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError

    with pytest.raises(InputError, match="structure Cu with 9 atoms does not fit into the memory"):
        list(relax_batched(no_device, structures, batch_size=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fmax": 0.0}, "fmax is 0.0"),
        ({"steps": -1}, "steps is -1"),
        ({"memory": 0}, "memory is 0"),
        ({"frames": "some"}, "frames is 'some'"),
    ],
)
def test_settings_without_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RelaxationSettings(**options)  # type: ignore[arg-type]


def test_with_a_network(checkpoint: Path, make_checkpoint: Callable[..., Path]) -> None:
    predictor = Predictor(checkpoint)
    settings = RelaxationSettings(steps=3)
    structures = [(index, data(slab(*system), system[0])) for index, system in enumerate(SYSTEMS[:2])]
    relaxed = list(relax_batched(predictor.predict, structures, settings, batch_size=2))
    for item in relaxed:
        out = predictor.predict(Batch.from_data_list([structures[item.index][1]]))
        assert item.frames[0].energy == pytest.approx(float(out["energy"][0]), abs=1e-5)
        atoms = slab(*SYSTEMS[item.index])
        atoms.calc = EquiformerV2Calculator(predictor.checkpoint)
        LBFGS(atoms, logfile=None, maxstep=0.04, memory=50, alpha=70.0).run(fmax=0.02, steps=3)
        np.testing.assert_allclose(
            item.positions - item.frames[0].positions,
            atoms.positions - slab(*SYSTEMS[item.index]).positions,
            atol=2e-4,
        )
        assert np.abs(item.positions - item.frames[0].positions).max() > 0.02
    blind = Predictor(make_checkpoint("adsorption", forces="none"))
    with pytest.raises(InputError, match="predicts no forces"):
        list(relax_batched(blind.predict, structures))
    with pytest.raises(InputError, match="predicts no forces"):
        list(relax_batched(free_forces(blind), structures))


def test_forces_on_held_atoms_are_left_out_and_nothing_else_changes(checkpoint: Path) -> None:
    predictor, settings = Predictor(checkpoint), RelaxationSettings(steps=4)
    structures = [(index, data(slab(*system), system[0])) for index, system in enumerate(SYSTEMS[:3])]
    everything, free = (
        {item.index: item for item in relax_batched(predict, structures, settings, batch_size=2)}
        for predict in (predictor.predict, free_forces(predictor))
    )
    for index, start in structures:
        held = start.fixed.numpy()
        for left, right in zip(everything[index].frames, free[index].frames, strict=True):
            np.testing.assert_allclose(left.positions, right.positions, rtol=0, atol=1e-6)
            np.testing.assert_allclose(left.forces[~held], right.forces[~held], rtol=1e-5, atol=1e-5)
            assert left.energy == pytest.approx(right.energy, abs=1e-5)
            assert left.forces[held].any()
            assert not right.forces[held].any()
        moved = free[index].positions - start.pos.numpy()
        assert np.abs(moved[~held]).max() > 0.02
        assert not moved[held].any()
