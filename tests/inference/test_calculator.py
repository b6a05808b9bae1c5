"""Predictor and ASE calculator on a small network with random weights."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from torch_geometric.data import Batch

from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor, atoms_to_data
from equiformer2.model.folding import resident_bytes

FOREIGN = Path(__file__).parents[1] / "fixtures" / "checkpoint"


@pytest.fixture
def calculator(checkpoint: Path) -> EquiformerV2Calculator:
    return EquiformerV2Calculator(checkpoint)


def _count_calls(calculator: EquiformerV2Calculator) -> list[int]:
    calls: list[int] = []
    calculator.predictor.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_energy_and_forces_are_the_model_output_in_physical_units(
    checkpoint: Path, oxygen_on_copper: Atoms
) -> None:
    loaded = load_checkpoint(checkpoint)
    batch = Batch.from_data_list([atoms_to_data(oxygen_on_copper)])
    with torch.no_grad():
        out = loaded.model(batch)
    oxygen_on_copper.calc = EquiformerV2Calculator(checkpoint)
    assert oxygen_on_copper.get_potential_energy() == pytest.approx(
        float(out["energy"]) * 2.0 - 0.7, abs=1e-6
    )
    forces = oxygen_on_copper.get_forces(apply_constraint=False)
    assert forces.shape == (13, 3)
    assert np.allclose(forces, out["forces"].numpy() * 2.5, atol=1e-6)
    assert np.abs(forces).max() > 0
    assert np.array_equal(oxygen_on_copper.get_forces()[:8], np.zeros((8, 3)))  # FixAtoms
    assert (
        oxygen_on_copper.get_potential_energy(force_consistent=True)
        == oxygen_on_copper.get_potential_energy()
    )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_bit_equal_in_another_process(checkpoint: Path, oxygen_on_copper: Atoms, precision: str) -> None:
    calculator = EquiformerV2Calculator(checkpoint, precision=precision)
    expected = calculator.get_forces(oxygen_on_copper)
    size = resident_bytes(calculator.predictor.model)
    for again in (pickle.loads(pickle.dumps(calculator)), copy.deepcopy(calculator)):
        again.reset()
        assert np.array_equal(again.get_forces(oxygen_on_copper), expected)
        assert resident_bytes(again.predictor.model) == size  # with the matrices kept for inference


def test_settings_of_a_loaded_predictor_are_told_and_not_replaced(checkpoint: Path) -> None:
    predictor = Predictor(checkpoint, precision="bf16", backend="torch")
    calculator = EquiformerV2Calculator(predictor)
    assert calculator.parameters["precision"] == "bf16"
    EquiformerV2Calculator(predictor, precision="bf16", backend="torch", weights="raw")
    for name, value in (
        ("router", lambda model, batch, request: {}),
        ("backend", "cpp"),
        ("weights", "averaged"),
        ("cuda_graphs", True),
    ):
        with pytest.raises(InputError, match=f"{name} is given with a loaded Predictor"):
            EquiformerV2Calculator(predictor, **{name: value})
    with pytest.raises(InputError, match="precision is given with a loaded Predictor"):
        EquiformerV2Calculator(Predictor(checkpoint), precision="bf16")


def test_bit_equal_on_every_call(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    results = []
    for _ in range(2):
        calculator = EquiformerV2Calculator(checkpoint)
        results.append(
            (calculator.get_potential_energy(oxygen_on_copper), calculator.get_forces(oxygen_on_copper))
        )
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])


class TestCache:
    def test_one_call_serves_all_properties(
        self, calculator: EquiformerV2Calculator, oxygen_on_copper: Atoms
    ) -> None:
        calls = _count_calls(calculator)
        oxygen_on_copper.calc = calculator
        oxygen_on_copper.get_forces()
        oxygen_on_copper.get_potential_energy()
        oxygen_on_copper.get_potential_energy(force_consistent=True)
        oxygen_on_copper.get_forces()
        assert len(calls) == 1

    @pytest.mark.parametrize("what", ["positions", "numbers", "cell", "pbc"])
    def test_a_change_is_seen(
        self, calculator: EquiformerV2Calculator, oxygen_on_copper: Atoms, what: str
    ) -> None:
        atoms = oxygen_on_copper
        calls = _count_calls(calculator)
        atoms.calc = calculator
        before = atoms.get_potential_energy()
        if what == "positions":
            atoms.positions[12, 2] += 0.1
        elif what == "numbers":
            atoms.numbers[12] = 7
        elif what == "cell":
            atoms.set_cell(atoms.cell.array * [[1.05], [1], [1]])
        else:
            atoms.pbc = (False, True, True)
        assert atoms.get_potential_energy() != before
        assert len(calls) == 2

    def test_tags_and_constraints_do_not_enter(
        self, calculator: EquiformerV2Calculator, oxygen_on_copper: Atoms
    ) -> None:
        calls = _count_calls(calculator)
        oxygen_on_copper.calc = calculator
        before = oxygen_on_copper.get_forces(apply_constraint=False)
        assert np.array_equal(oxygen_on_copper.get_forces()[0], np.zeros(3))
        oxygen_on_copper.set_constraint()
        oxygen_on_copper.set_tags(1)
        assert np.array_equal(oxygen_on_copper.get_forces(), before)  # the fixed atoms' forces are back
        assert len(calls) == 1

    def test_caller_cannot_spoil_the_results(
        self, calculator: EquiformerV2Calculator, oxygen_on_copper: Atoms
    ) -> None:
        oxygen_on_copper.calc = calculator
        forces = oxygen_on_copper.get_forces()
        kept = forces.copy()
        forces[:] = 0
        assert np.array_equal(oxygen_on_copper.get_forces(), kept)

    def test_no_stale_result_after_an_error(
        self, calculator: EquiformerV2Calculator, oxygen_on_copper: Atoms
    ) -> None:
        oxygen_on_copper.calc = calculator
        oxygen_on_copper.get_potential_energy()
        oxygen_on_copper.positions[0, 0] = np.nan
        for _ in range(2):
            with pytest.raises(InputError, match="non-finite"):
                oxygen_on_copper.get_potential_energy()


def test_atoms_are_not_changed(calculator: EquiformerV2Calculator, oxygen_on_copper: Atoms) -> None:
    oxygen_on_copper.set_tags(0)
    oxygen_on_copper.positions[:, 0] += 30  # outside the cell
    before = oxygen_on_copper.copy()
    calculator.get_potential_energy(oxygen_on_copper)
    assert oxygen_on_copper == before
    assert not oxygen_on_copper.get_tags().any()
    assert oxygen_on_copper.constraints


def test_missing_tags_are_noticed_once(
    calculator: EquiformerV2Calculator, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for name in ("H2O", "CO"):
            calculator.get_potential_energy(molecule(name))
    notices = [record.message for record in caplog.records]
    assert len(notices) == 2
    assert "no tags" in notices[0]
    assert "a molecule or cluster without a slab" in notices[1]


def test_energy_kind_is_stated(make_checkpoint: Callable[..., Path]) -> None:
    for kind in ("adsorption", "total"):
        calculator = EquiformerV2Calculator(make_checkpoint(kind))
        assert calculator.energy_kind == kind
        assert calculator.parameters["energy_kind"] == kind


def test_contradicting_energy_kind(checkpoint: Path) -> None:
    for given in (checkpoint, load_checkpoint(checkpoint)):
        with pytest.raises(InputError, match="adsorption energies"):
            EquiformerV2Calculator(given, energy_kind="total")


def test_model_without_forces(make_checkpoint: Callable[..., Path], oxygen_on_copper: Atoms) -> None:
    calculator = EquiformerV2Calculator(make_checkpoint(forces="none"))
    assert "forces" not in calculator.implemented_properties
    assert np.isfinite(calculator.get_potential_energy(oxygen_on_copper))
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_forces(oxygen_on_copper)


def test_weights_are_chosen(make_checkpoint: Callable[..., Path], oxygen_on_copper: Atoms) -> None:
    path = make_checkpoint(averaged=True)
    energies = {
        weights: EquiformerV2Calculator(path, weights=weights).get_potential_energy(oxygen_on_copper)
        for weights in ("raw", "averaged", None)
    }
    assert energies["raw"] != energies["averaged"]
    assert energies[None] == energies["averaged"]
    with pytest.raises(InputError, match="not the raw ones"):
        Predictor(load_checkpoint(path, weights="averaged"), weights="raw")


def test_a_loaded_checkpoint_is_left_alone(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    loaded = load_checkpoint(checkpoint)
    loaded.model.train().requires_grad_(True)
    Predictor(loaded).predict(atoms_to_data(oxygen_on_copper))
    assert loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_predictor_batches_and_keeps_no_graph(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    predictor = Predictor(checkpoint)
    assert not predictor.model.training
    assert not any(parameter.requires_grad for parameter in predictor.model.parameters())
    other = oxygen_on_copper.copy()
    other.positions[12, 2] += 0.3
    data = [atoms_to_data(atoms) for atoms in (oxygen_on_copper, other)]
    out = predictor.predict(Batch.from_data_list(data))
    single = [predictor.predict(one) for one in data]
    assert out["energy"].shape == (2,)
    assert out["forces"].shape == (26, 3)
    assert not out["energy"].requires_grad
    assert torch.allclose(out["energy"], torch.cat([one["energy"] for one in single]), atol=1e-5)
    assert torch.allclose(out["forces"], torch.cat([one["forces"] for one in single]), atol=1e-4)


def test_wrong_input_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    network = load_checkpoint(checkpoint).model
    for use in (EquiformerV2Calculator, Predictor):
        with pytest.raises(InputError, match=r"EquiformerV2 is no model: .*save a network"):
            use(network)  # type: ignore[arg-type]
    calculator = EquiformerV2Calculator(checkpoint)
    with pytest.raises(InputError, match="no atoms"):
        calculator.get_potential_energy(Atoms())
    with pytest.raises(InputError, match="Z = 92"):
        calculator.get_potential_energy(Atoms("U"))
    with pytest.raises(InputError, match="device 'nowhere'"):
        EquiformerV2Calculator(checkpoint, device="nowhere")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"broken\.pt"):
        EquiformerV2Calculator(broken)
    with pytest.raises(FileNotFoundError):
        EquiformerV2Calculator(tmp_path / "missing.pt")


def test_missing_lattice_vector_along_an_open_direction(checkpoint: Path) -> None:
    atoms = Atoms("CuO", [[0, 0, 0], [0, 0.5, 1.8]], cell=[2.6, 2.6, 0], pbc=(True, True, False))
    boxed = atoms.copy()
    boxed.cell[2, 2] = 30
    energies = [EquiformerV2Calculator(checkpoint).get_potential_energy(one) for one in (atoms, boxed)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-6)


def test_foreign_files_give_the_reference_calculator_s_results() -> None:
    """Energies (eV) and forces (eV/Å) of fairchem's own calculator; it draws its edge frames at random, so
    its answers scatter by a few 1e-7 eV and 1e-5 eV/Å."""
    expected = torch.load(FOREIGN / "ckpt_expected.pt", weights_only=True)["results"][
        "ckpt_v0_ocp_checkpoint"
    ]
    calculator = EquiformerV2Calculator(FOREIGN / "ckpt_v0_ocp_checkpoint.pt", weights="raw")
    for name in ("cu111_co", "ethanol_box", "nacl_prim"):
        system = expected["systems"][name]
        atoms = Atoms(
            system["numbers"].numpy(),
            system["positions"].numpy(),
            cell=system["cell"].numpy(),
            pbc=system["pbc"].numpy(),
            tags=system["tags"].numpy(),
        )
        assert calculator.get_potential_energy(atoms) == pytest.approx(float(system["energy"]), abs=2e-6)
        assert np.allclose(calculator.get_forces(atoms), system["forces"].numpy(), atol=2e-4)


def test_predictor_names_the_element_it_does_not_know(checkpoint: Path) -> None:
    data = atoms_to_data(Atoms("U"), notify=False)
    with pytest.raises(InputError, match=r"atom 0 \(U, Z = 92\)"):
        Predictor(checkpoint).predict(data)


@pytest.mark.parametrize("mistake", ["element", "distance", "cell"])
def test_predictor_names_the_wrong_structure_of_a_batch(
    checkpoint: Path, oxygen_on_copper: Atoms, mistake: str
) -> None:
    structures = [atoms_to_data(oxygen_on_copper, notify=False) for _ in range(3)]
    for fid, data in enumerate(structures):
        data.sid, data.fid = "random7", 40 + fid
    if mistake == "element":
        structures[1].atomic_numbers[3] = 100
        message = r"atom 3 of structure 1 of the batch \(Fm, Z = 100\)"
    elif mistake == "distance":
        structures[1].pos[3] = structures[1].pos[2]
        message = "atoms 2 and 3 of structure 1 of the batch are 0 Å apart"
    else:
        structures[1].cell[0, 2] = 0.0
        message = "structure 1 of the batch is periodic along axis 2"
    batch = Batch.from_data_list(structures)
    with pytest.raises(InputError, match=rf"structure random7/41 \(sid/fid\): {message}") as error:
        Predictor(checkpoint).predict(batch)
    assert error.value.structure == 1
    del batch.sid
    with pytest.raises(InputError, match=f"^{message}"):
        Predictor(checkpoint).predict(batch)
