"""Networks whose forces are the gradient of their energy, as users meet them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from ase.optimize import LBFGS
from inference_helpers import SMALL
from torch_geometric.data import Batch

from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor
from equiformer2.inference.atoms import atoms_to_data
from equiformer2.inference.batched import RelaxationSettings, relax_batched
from equiformer2.inference.cuda_graph import capture_unavailable_reason
from equiformer2.inference.relaxation import relax
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.pruning import PruningPlan

STD = 2.0
SIZES = SMALL | {"max_neighbors": 500}


@pytest.fixture(scope="module")
def gradient_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = EquiformerV2(ModelConfig(**SIZES, forces="gradient", stress=True, avg_num_nodes=5.0))
    path = tmp_path_factory.mktemp("gradient") / "model.pt"
    save_checkpoint(
        path,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(Normalizer(-0.7, STD), Normalizer(0.0, STD), torch.linspace(-9, 0, 100)),
        energy_kind="total",
        provenance={"origin": "random weights"},
    )
    return path


@pytest.fixture
def crystal() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[1] = 46
    atoms.rattle(0.1, seed=3)
    return atoms


def test_predictions_are_derivatives_in_physical_units(gradient_checkpoint: Path, crystal: Atoms) -> None:
    predictor = Predictor(gradient_checkpoint)
    data = atoms_to_data(crystal)
    out = predictor.predict(Batch.from_data_list([data, data]))
    assert predictor.has_forces
    assert predictor.has_stress
    assert not any(value.requires_grad for value in out.values())
    # float64, so that finite differences mean something
    model, normalizers = load_checkpoint(gradient_checkpoint).model.double(), predictor.checkpoint.normalizers

    def energy(pos: torch.Tensor, cell: torch.Tensor) -> float:
        moved = data.clone()
        moved.pos, moved.cell = pos, cell
        with torch.no_grad():
            return normalizers.denormalize(model(moved), Batch.from_data_list([moved]))["energy"].item()

    pos, cell, step = data.pos.double(), data.cell.double(), 1e-4
    shift = torch.zeros_like(pos)
    shift[1, 2] = step
    slope = (energy(pos + shift, cell) - energy(pos - shift, cell)) / (2 * step)
    assert out["forces"][1, 2].item() == pytest.approx(-slope, rel=1e-3)
    stretch = torch.eye(3, dtype=torch.float64)
    stretch[0, 0] += step
    shrink = 2 * torch.eye(3, dtype=torch.float64) - stretch
    slope = (energy(pos @ stretch, cell @ stretch) - energy(pos @ shrink, cell @ shrink)) / (2 * step)
    assert out["stress"][1, 0, 0].item() == pytest.approx(slope / crystal.get_volume(), rel=1e-3)


def test_the_calculator_has_the_stress_of_periodic_structures(
    gradient_checkpoint: Path, checkpoint: Path, crystal: Atoms
) -> None:
    crystal.calc = EquiformerV2Calculator(gradient_checkpoint)
    assert "stress" in crystal.calc.implemented_properties
    stress = crystal.get_stress(voigt=False)
    predicted = crystal.calc.predictor.predict(atoms_to_data(crystal))["stress"][0]
    assert np.allclose(stress, predicted.numpy(), rtol=1e-6)
    assert crystal.get_stress().shape == (6,)
    assert crystal.get_stress()[3] == stress[1, 2]
    slab = crystal.copy()
    slab.pbc = [True, True, False]
    slab.calc = EquiformerV2Calculator(gradient_checkpoint)
    assert np.isfinite(slab.get_forces()).all()
    assert "stress" not in slab.calc.results
    with pytest.raises(InputError, match=r"this one has pbc \[True, True, False\]"):
        slab.get_stress()
    assert "stress" not in EquiformerV2Calculator(checkpoint).implemented_properties
    assert not Predictor(checkpoint).has_stress


def test_forces_come_with_their_energy(gradient_checkpoint: Path, crystal: Atoms) -> None:
    """Leaving out energies or held atoms saves nothing and changes no value."""
    free = EquiformerV2Calculator(gradient_checkpoint)
    crystal.calc = free
    forces = crystal.get_forces()
    crystal.set_constraint(FixAtoms([0]))
    crystal.calc = EquiformerV2Calculator(gradient_checkpoint, forces_on_fixed=False, energy_every=5)
    for _ in range(2):
        crystal.calc.calculate(crystal, ["forces"])
        assert crystal.calc.results["energy"] == free.results["energy"]
        assert np.array_equal(crystal.calc.results["forces"][1:], forces[1:])


@pytest.mark.parametrize("optimizer", ["BFGS", "FIRE"])
def test_relaxations_follow_the_energy(gradient_checkpoint: Path, crystal: Atoms, optimizer: str) -> None:
    result = relax(crystal, EquiformerV2Calculator(gradient_checkpoint), optimizer=optimizer, steps=5)
    crystal.calc = EquiformerV2Calculator(gradient_checkpoint)
    assert result.energy < crystal.get_potential_energy()


def test_batched_relaxations(gradient_checkpoint: Path, crystal: Atoms) -> None:
    predictor, data = Predictor(gradient_checkpoint), atoms_to_data(crystal)
    data.sid, data.fid = "a", 0
    settings = RelaxationSettings(steps=3)
    (relaxed,) = relax_batched(predictor.predict, [(0, data)], settings, batch_size=1)
    assert relaxed.steps == 3
    crystal.calc = EquiformerV2Calculator(gradient_checkpoint)
    assert relaxed.frames[0].energy == pytest.approx(crystal.get_potential_energy(), abs=1e-4)
    optimizer = LBFGS(crystal, logfile=None, maxstep=0.04, memory=50, alpha=70.0)
    optimizer.run(fmax=settings.fmax, steps=3)
    assert relaxed.energy == pytest.approx(crystal.get_potential_energy(), abs=1e-4)
    assert relaxed.energy < relaxed.frames[0].energy


def test_what_gradient_forces_do_not_take(gradient_checkpoint: Path) -> None:
    for backend in ("cpp", "compile", "triton"):
        with pytest.raises(InputError, match=f"the backend '{backend}' .*: use the backend"):
            Predictor(gradient_checkpoint, backend=backend)
    with pytest.raises(InputError, match="leave out the router or the masks"):
        Predictor(gradient_checkpoint, router=lambda model, batch, request: model(batch))
    with pytest.raises(InputError, match="CUDA graphs cannot be used"):
        Predictor(gradient_checkpoint, cuda_graphs=True)
    reason = capture_unavailable_reason(torch.device("cuda"), "auto", False, gradient=True)
    assert reason == "forces as the gradient of the energy take a backward pass, which is not captured"
    assert capture_unavailable_reason(torch.device("cuda"), "auto", False, gradient=False) is None
    with pytest.raises(InputError, match="pruning needs a network with direct forces or none"):
        PruningPlan.keep_all(load_checkpoint(gradient_checkpoint).config)


def test_bf16_gives_nearby_forces(gradient_checkpoint: Path, crystal: Atoms) -> None:
    data = atoms_to_data(crystal)
    exact = Predictor(gradient_checkpoint).predict(data)["forces"]
    rounded = Predictor(gradient_checkpoint, precision="bf16").predict(data)["forces"]
    assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_a_checkpoint_whose_forces_are_not_those_of_its_energy_is_refused(
    gradient_checkpoint: Path, tmp_path: Path
) -> None:
    loaded = load_checkpoint(gradient_checkpoint)
    arguments = {
        "model": loaded.model,
        "raw_state": loaded.model.state_dict(),
        "averaged_state": None,
        "energy_kind": "total",
        "provenance": {},
    }
    other = Normalizers(Normalizer(0.0, 2.0), Normalizer(0.0, 1.0))
    with pytest.raises(InputError, match="their std must be that of the energy, 2, not 1"):
        save_checkpoint(tmp_path / "wrong.pt", normalizers=other, **arguments)
    file = torch.load(gradient_checkpoint, weights_only=True)
    file["normalizers"]["forces"]["std"] = 1.0
    torch.save(file, tmp_path / "wrong.pt")
    with pytest.raises(
        InputError, match=r"wrong\.pt: the forces of this model are the gradient of its energy"
    ):
        load_checkpoint(tmp_path / "wrong.pt")


def test_a_checkpoint_of_an_older_version_is_read(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for forces in ("direct", "none"):
        file = torch.load(make_checkpoint(forces=forces), weights_only=True)
        config = file["model_config"]
        del config["forces"], config["stress"]
        config["regress_forces"] = forces == "direct"
        torch.save(file, tmp_path / "old.pt")
        loaded = load_checkpoint(tmp_path / "old.pt")
        assert loaded.config.forces == forces
        assert (loaded.model.force_block is not None) == (forces == "direct")
