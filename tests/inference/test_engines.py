"""Any model in batched relaxations: ASE's minima by any calculator, failures by name, shared networks."""

import copy
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, CalculatorSetupError
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixCartesian, FixedPlane, Hookean
from ase.optimize import LBFGS
from inference_helpers import SYSTEMS, KindedEMT, slab

from equiformer2 import EquiformerV2Calculator, Predictor, load_checkpoint, predict, relax_many
from equiformer2.errors import InputError
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.committee import Committee
from equiformer2.inference.engines import (
    CPU_ATOMS,
    CPU_STRUCTURES,
    CUDA_STRUCTURES,
    NetworkEngine,
    open_engine,
)
from equiformer2.model.branches import set_bf16_branches
from equiformer2.model.grid_resolution import GridResolution
from equiformer2.pruning.routing import ActiveRegion, FrozenPlan, StaticRouter
from equiformer2.pruning.structured.grid_tuning import with_grids

SETTINGS = RelaxationSettings(fmax=0.05, frames="ends")


class Exploding(EMT):
    """Effective medium theory until a structure of silver has been moved some steps."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.silver = how, 0, 0

    def calculate(self, atoms: Atoms | None = None, *args: object) -> None:
        assert atoms is not None
        self.calls += 1
        super().calculate(atoms, *args)
        self.silver += "Ag" in atoms.symbols
        if "Ag" in atoms.symbols and self.silver == 4:
            if self.how == "raises":
                raise FloatingPointError("the density is negative")
            self.results["forces"] = self.results["forces"] * np.nan


def by_ase(atoms: Atoms) -> Atoms:
    alone = atoms.copy()
    alone.calc = EMT()
    LBFGS(alone, logfile=None, maxstep=0.04, memory=50, alpha=70.0).run(fmax=0.05, steps=200)
    return alone


@pytest.mark.parametrize("batch_size", ["auto", 3])
def test_the_minima_of_ase_one_by_one(batch_size: int | str) -> None:
    starts = [slab(*system) for system in SYSTEMS]
    starts[0].positions += 30.0 * starts[0].cell[0]  # beyond the cell, where its owner wants it
    before = [atoms.positions.copy() for atoms in starts]
    results = relax_many(starts, EMT(), settings=SETTINGS, batch_size=batch_size)
    assert [result.id for result in results] == ["0", "1", "2", "3"]
    for start, result, unmoved in zip(starts, results, before, strict=True):
        np.testing.assert_array_equal(start.positions, unmoved)
        alone = by_ase(start)
        assert result.status == "converged"
        assert result.energy_eV == pytest.approx(alone.get_potential_energy(), abs=1e-4)
        assert result.start_energy_eV == pytest.approx(start.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(result.atoms.positions, alone.positions, atol=1e-6)
        assert result.model_evaluations == result.steps + 1
        assert result.atoms.get_potential_energy() == result.energy_eV
        assert np.linalg.norm(result.atoms.get_forces(), axis=1).max() == pytest.approx(result.max_force_eV_A)
        assert result.atoms.get_forces().dtype == np.float64
        np.testing.assert_array_equal(result.atoms.get_tags(), start.get_tags())
        assert len(result.atoms.constraints) == 1


def test_one_calculator_goes_through_a_structure_at_a_time_unless_told_otherwise() -> None:
    seen: list[str] = []

    class Listening(EMT):
        def calculate(self, atoms: Atoms | None = None, *args: object) -> None:
            assert atoms is not None
            seen.append(atoms.symbols[0])
            super().calculate(atoms, *args)

    relax_many([slab(*system) for system in SYSTEMS[:2]], Listening(), settings=SETTINGS)
    changes = sum(one != other for one, other in itertools.pairwise(seen))
    assert changes == 1


@pytest.mark.parametrize(
    ("how", "reason"), [("raises", "the density is negative"), ("nan", "a non-finite energy or force")]
)
def test_an_exploding_structure_is_named_and_alone(
    how: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    calculator = Exploding(how)
    starts = [slab(*system) for system in SYSTEMS[:3]]
    with caplog.at_level(logging.WARNING):
        results = relax_many(starts, calculator, settings=SETTINGS, batch_size=3)
    assert [result.status for result in results] == ["converged", "failed", "converged"]
    assert reason in str(results[1].reason)
    assert "the relaxation of structure 1 failed" in caplog.text
    assert results[1].steps == 2
    assert np.isfinite(results[1].atoms.get_forces()).all()
    for at in (0, 2):
        assert results[at].energy_eV == pytest.approx(by_ase(starts[at]).get_potential_energy(), abs=1e-4)
    # Nothing is calculated twice because of it.
    assert calculator.calls == sum(result.model_evaluations for result in results)


def test_what_cannot_be_relaxed_is_told_and_stops_nothing() -> None:
    good = slab(*SYSTEMS[0])
    twins = Atoms("Cu2", [[0, 0, 0], [0, 0, 0.01]])
    planes, springs = slab(*SYSTEMS[0]), slab(*SYSTEMS[0])
    planes.set_constraint([*planes.constraints, FixedPlane(8, (0, 0, 1))])
    springs.set_constraint(Hookean(8, 7, 5.0, 2.0))
    starts = [twins, planes, good, springs, Atoms("Si2", [[0, 0, 0], [0, 0, 2.2]])]
    results = relax_many(starts, EMT(), settings=SETTINGS)
    assert [result.status for result in results] == ["failed", "failed", "converged", "failed", "failed"]
    for result, reason in zip(
        results,
        [
            "0.01 Å apart",
            "it has the constraint FixedPlane",
            "",
            "the constraint Hookean",
            "No EMT-potential",
        ],
        strict=True,
    ):
        assert reason in (result.reason or "")
        assert (result.energy_eV is None) == (result.status == "failed")
    assert results[0].atoms.calc is None
    assert results[4].model_evaluations == 1


def test_constraints_that_together_hold_atoms_are_kept() -> None:
    start = slab(*SYSTEMS[0])
    held = start.constraints[0].index
    start.set_constraint([FixCartesian(held, (True, True, False)), FixCartesian(held, (False, False, True))])
    (result,) = relax_many([start], EMT(), settings=SETTINGS)
    assert result.status == "converged"
    np.testing.assert_allclose(result.atoms.positions[held], start.positions[held], atol=1e-12)
    same = start.copy()
    same.set_constraint(FixAtoms(held))
    assert result.energy_eV == pytest.approx(by_ase(same).get_potential_energy(), abs=1e-4)


def test_what_a_structure_carries_reaches_the_calculator() -> None:
    seen = []

    class Listening(EMT):
        def calculate(self, atoms: Atoms | None = None, *args: object) -> None:
            assert atoms is not None
            seen.append((atoms.info.get("spin"), atoms.get_initial_magnetic_moments().tolist()))
            super().calculate(atoms, *args)

    start = slab(*SYSTEMS[0])
    start.info["spin"] = 3
    start.set_initial_magnetic_moments(np.arange(len(start)) / 10)
    relax_many([start], Listening(), settings=RelaxationSettings(steps=1))
    assert seen == [(3, start.get_initial_magnetic_moments().tolist())] * 2


def test_structures_that_differ_in_their_notes_alone_are_two() -> None:
    class Charged(EMT):
        def calculate(self, atoms: Atoms | None = None, *args: object) -> None:
            assert atoms is not None
            super().calculate(atoms, *args)
            self.results["energy"] += atoms.info["charge"]

    starts = [slab(*SYSTEMS[0]) for _ in range(2)]
    for charge, atoms in enumerate(starts):
        atoms.info["charge"] = charge
    for size in (1, 2):
        one, other = predict(starts, Charged(), batch_size=size)
        assert other.get_potential_energy() - one.get_potential_energy() == pytest.approx(1.0)


def test_a_calculator_that_cannot_run_or_has_no_forces_ends_everything() -> None:
    class Absent(EMT):
        def calculate(self, *args: object) -> None:
            raise CalculatorSetupError("the command is not installed")

    class Blind(Calculator):
        implemented_properties = ["energy"]  # noqa: RUF012

    with pytest.raises(InputError, match=r"Absent cannot be run .*the command is not installed"):
        relax_many([slab(*SYSTEMS[0])], Absent())
    with pytest.raises(InputError, match="this model gives no forces"):
        relax_many([slab(*SYSTEMS[0])], Blind())
    with pytest.raises(InputError, match="batch_size is 0"):
        relax_many([slab(*SYSTEMS[0])], EMT(), batch_size=0)
    with pytest.raises(InputError, match="structure 1 of the list is str"):
        relax_many([slab(*SYSTEMS[0]), "slab.traj"], EMT())  # type: ignore[list-item]
    with pytest.raises(InputError, match="one structure was given: give a list"):
        relax_many(slab(*SYSTEMS[0]), EMT())
    with pytest.raises(InputError, match="int is no model"):
        open_engine(3)  # type: ignore[arg-type]


def test_one_network_for_all(checkpoint: Path) -> None:
    predictor = Predictor(checkpoint)
    calculators = [EquiformerV2Calculator(predictor) for _ in range(3)]
    weights = [next(one.predictor.model.parameters()).data_ptr() for one in calculators]  # type: ignore[union-attr]
    assert len(set(weights)) == 1
    engine = open_engine(calculators[0])
    assert isinstance(engine, NetworkEngine)
    assert engine.predictor is predictor
    assert open_engine(engine) is engine
    assert engine.energy_kind == "adsorption"
    starts = [slab(*system) for system in SYSTEMS[:2]]
    settings = RelaxationSettings(steps=2, frames="ends")
    one, other = (relax_many(starts, model, settings=settings) for model in (predictor, calculators[1]))
    for left, right in zip(one, other, strict=True):
        assert left.status == "unconverged"
        np.testing.assert_array_equal(left.atoms.positions, right.atoms.positions)
        assert not left.atoms.get_forces(apply_constraint=False)[left.atoms.constraints[0].index].any()
    # A calculator is used as it is where its answers are not the network's alone.
    alone = starts[0].copy()
    alone.calc = calculators[2]
    LBFGS(alone, logfile=None, maxstep=0.04, memory=50, alpha=70.0).run(fmax=0.02, steps=2)
    np.testing.assert_allclose(one[0].atoms.positions, alone.positions, atol=2e-4)


def test_a_batch_is_as_large_as_the_device_takes(checkpoint: Path) -> None:
    network, calculator = open_engine(checkpoint), open_engine(EMT())
    start = slab(*SYSTEMS[0])
    assert network.limits(network.start(start, "a")) == (CPU_STRUCTURES, CPU_ATOMS)
    assert calculator.limits(calculator.start(start, "a")) == (1, None)
    assert network.chosen_limits(network.start(start, "a"), "auto", 50) == (CPU_STRUCTURES, 50)
    assert network.chosen_limits(network.start(start, "a"), 3) == (3, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_filled_by_the_memory_of_one_structure(checkpoint: Path) -> None:
    engine = open_engine(Predictor(checkpoint, "cuda"))
    limits = engine.limits(engine.start(slab(*SYSTEMS[0]), "a"))
    assert limits.structures == CUDA_STRUCTURES
    assert limits.atoms is not None
    assert limits.atoms > 1000
    results = relax_many([slab(*system) for system in SYSTEMS], engine, settings=RelaxationSettings(steps=2))
    assert [result.steps for result in results] == [2] * 4


def test_identities_tell_models_apart(checkpoint: Path, make_checkpoint: Callable[..., Path]) -> None:
    network = open_engine(checkpoint).identity()
    assert network == open_engine(Predictor(checkpoint)).identity()
    assert network != open_engine(make_checkpoint("adsorption", lmax=1)).identity()
    emt = open_engine(EMT()).identity()
    assert emt["calculator"] == "ase.calculators.emt.EMT"
    assert emt != open_engine(EMT(asap_cutoff=True)).identity()
    assert open_engine(KindedEMT("total")).energy_kind == "total"


def test_identities_tell_networks_of_the_same_weights_apart(
    checkpoint: Path, make_checkpoint: Callable[..., Path]
) -> None:
    loaded = load_checkpoint(checkpoint)
    coarse = with_grids(loaded.model, GridResolution((8, 5), (8, 8)))
    provenance = {**loaded.provenance, "grids_tuned": {}}
    tuned = replace(loaded, model=coarse, config=coarse.config, provenance=provenance)
    quick = replace(loaded, model=copy.deepcopy(loaded.model))
    set_bf16_branches(quick.model, ["blocks.0.ga"])

    def routed(path: Path, level: float, every: int = 10) -> EquiformerV2Calculator:
        return EquiformerV2Calculator(path, router=FrozenPlan(StaticRouter(level), every))

    without_context = Predictor(checkpoint, router=ActiveRegion("remove_tag0"))
    models = [loaded, tuned, quick, routed(checkpoint, 0.5), routed(checkpoint, 0.4), without_context]
    models += [routed(checkpoint, 0.5, 5), routed(make_checkpoint("adsorption", lmax=1), 0.5)]
    found = [json.dumps(open_engine(model).identity()) for model in models]
    assert len(set(found)) == len(models)
    assert open_engine(routed(checkpoint, 0.5)).identity() == json.loads(found[3])


def test_energies_beside_a_router_are_those_of_the_whole_network(checkpoint: Path) -> None:
    start = slab(*SYSTEMS[0])
    (found,) = predict([start], Predictor(checkpoint, router=StaticRouter(0.5, protect_ends=False)))
    (whole,) = predict([start], checkpoint)
    assert found.get_potential_energy() == pytest.approx(whole.get_potential_energy(), abs=1e-5)
    assert np.abs(found.get_forces() - whole.get_forces()).max() > 1e-4
    with pytest.raises(InputError, match="router belongs to one network"):
        Committee([Predictor(checkpoint, router=StaticRouter(0.5)), Predictor(checkpoint)])


def test_invariants_of_every_atom(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    calculator = EquiformerV2Calculator(checkpoint)
    features = calculator.embed(oxygen_on_copper)
    assert features.shape == (len(oxygen_on_copper), 16)
    turned = oxygen_on_copper.copy()
    turned.rotate(37, "x", rotate_cell=True)
    turned.positions += 5.0
    # The grid of so small a network keeps rotations to some percent.
    np.testing.assert_allclose(calculator.embed(turned), features, atol=0.03)
    assert np.abs(features[0] - features[-1]).max() > 0.3
    assert oxygen_on_copper.calc is None
    with pytest.raises(InputError, match="no atoms"):
        calculator.embed(Atoms())


def test_a_list_is_predicted_in_its_order(checkpoint: Path, make_checkpoint: Callable[..., Path]) -> None:
    starts = [slab(*system) for system in SYSTEMS] + [slab("Cu", 4)[4:]]
    for atoms, start in zip(predict(starts, EMT(), batch_size=2), starts, strict=True):
        alone = start.copy()
        alone.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(alone.get_potential_energy(), abs=1e-12)
        np.testing.assert_allclose(atoms.get_forces(), alone.get_forces(), atol=1e-12)
    predictor = Predictor(checkpoint)
    predicted = predict(starts, predictor)
    expected = predictor.predict([atoms.copy() for atoms in starts])
    energies = [atoms.get_potential_energy() for atoms in predicted]
    np.testing.assert_allclose(energies, expected["energy"].numpy(), atol=1e-5)
    forces = np.concatenate([atoms.get_forces(apply_constraint=False) for atoms in predicted])
    np.testing.assert_allclose(forces, expected["forces"].numpy(), atol=1e-5)
    assert forces.any(axis=1).all()  # those on held atoms, too
    committee = predict(starts[:2], [checkpoint, make_checkpoint("adsorption", lmax=1)])
    assert all(atoms.info["energy_std_eV"] > 0 for atoms in committee)
    blind = predict(starts[:1], make_checkpoint("adsorption", forces="none"))
    assert "forces" not in blind[0].calc.results
    assert predict([], EMT()) == []


def test_a_structure_without_an_energy_is_named(checkpoint: Path) -> None:
    good, empty = slab(*SYSTEMS[0]), Atoms()
    with pytest.raises(InputError, match="structure 1 of the list: the structure has no atoms"):
        predict([good, empty], checkpoint)
    with pytest.raises(InputError, match=r"structure 2 of the list: EMT failed .*No EMT-potential for Si"):
        predict([good, good, Atoms("Si2", [[0, 0, 0], [0, 0, 2.2]])], EMT(), batch_size=2)


def test_answers_that_are_none_are_told() -> None:
    class Wrong(EMT):
        def calculate(self, atoms: Atoms | None = None, *args: object) -> None:
            super().calculate(atoms, *args)
            assert atoms is not None
            if "Ag" in atoms.symbols:
                self.results["forces"] = self.results["forces"][1:]
            if "Pt" in atoms.symbols:
                self.results["energy"] = np.nan

    starts = [slab(*system) for system in SYSTEMS[:3]]
    with pytest.raises(
        InputError, match=r"structure 1 of the list: Wrong gives forces of the shape \[8, 3\]"
    ):
        predict(starts, Wrong())
    with pytest.raises(InputError, match="structure 0 of the list: Wrong gives a non-finite energy or force"):
        predict(starts[2:], Wrong())
    results = relax_many(starts, Wrong(), settings=SETTINGS)
    assert [result.status for result in results] == ["converged", "failed", "failed"]


def test_memory_that_ends_halves_the_batch(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    engine = open_engine(checkpoint)
    whole = engine.predict

    def small(batch: object, **options: bool) -> dict[str, torch.Tensor]:
        if batch.num_graphs > 1:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError
        return whole(batch, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "predict", small)
    starts = [slab(*system) for system in SYSTEMS]
    energies = [atoms.get_potential_energy() for atoms in predict(starts, engine)]
    again = [atoms.get_potential_energy() for atoms in predict(starts, checkpoint)]
    np.testing.assert_allclose(energies, again, atol=1e-5)
