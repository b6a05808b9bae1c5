"""D3 dispersion added to a model: ASE's sums, batches of networks, and what cannot be computed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.mixing import SumCalculator
from inference_helpers import slab

from equiformer2 import EquiformerV2Calculator, predict, relax_many
from equiformer2.errors import InputError
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.dispersion import Dispersion, DispersionCalculator, base_calculator, dispersion_of
from equiformer2.inference.engines import NetworkEngine, open_engine


@pytest.mark.skipif(importlib.util.find_spec("dftd3") is not None, reason="the package is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(InputError, match="pip install dftd3"):
        Dispersion.read("rpbe")


class Shifted(EMT):
    """Effective medium theory with an energy that is exchanged, as an adapter of a network is."""

    shift, answered = 0.0, 0.0

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        return [*super().check_state(atoms, tol), *(["shift"] if self.shift != self.answered else [])]

    def calculate(self, *arguments: object) -> None:
        super().calculate(*arguments)
        self.results["energy"] += self.shift
        self.answered = self.shift


class NoDispersion(Dispersion):
    """Zero everywhere, without a package."""

    def __post_init__(self) -> None:
        pass

    def energy_and_forces(self, atoms: Atoms) -> tuple[float, np.ndarray]:
        return 0.0, np.zeros((len(atoms), 3))


def test_results_follow_a_base_that_changes() -> None:
    atoms, base = slab("Cu", 1), Shifted()
    atoms.calc = DispersionCalculator(base, NoDispersion("none"))
    before = atoms.get_potential_energy()
    base.shift = 2.0
    assert atoms.get_potential_energy() == pytest.approx(before + 2.0)


class TestDispersion:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("dftd3.ase")

    def test_the_energy_is_that_of_the_package(self) -> None:
        # The example of its documentation.
        assert Dispersion.read("TPSS").energy(molecule("H2O")) == pytest.approx(-0.0114416, abs=1e-6)
        assert Dispersion.read("pbe/d3zero") == Dispersion("pbe", "d3zero")

    @pytest.mark.parametrize(
        ("text", "message"),
        [("nosuch", "functional 'nosuch'"), ("pbe/bj", "damping 'bj'"), ("", "functional ''")],
    )
    def test_wrong_names_are_refused(self, text: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Dispersion.read(text)

    def test_energies_and_forces_are_the_sum_of_both(self) -> None:
        from dftd3.ase import DFTD3

        atoms = slab("Cu", 1)
        atoms.rattle(0.1, seed=1)
        expected = atoms.copy()
        expected.calc = SumCalculator([EMT(), DFTD3(method="pbe", damping="d3bj")])
        found = atoms.copy()
        found.calc = DispersionCalculator(EMT(), Dispersion("pbe"))
        (batched,) = predict([atoms], found.calc)
        for one in (found, batched):
            assert one.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-5)
            assert one.get_forces(apply_constraint=False) == pytest.approx(
                expected.get_forces(apply_constraint=False), abs=1e-5
            )
        assert base_calculator(found.calc) is found.calc.base
        assert dispersion_of(EMT()) is None

    def test_a_network_keeps_its_batches(self, checkpoint: Path) -> None:
        network = EquiformerV2Calculator(checkpoint)
        calculator = DispersionCalculator(network, Dispersion("rpbe"))
        engine = open_engine(calculator)
        assert isinstance(engine.base, NetworkEngine)
        assert engine.energy_kind == network.energy_kind == calculator.energy_kind
        assert engine.identity() == {
            **engine.base.identity(),
            "d3": {"functional": "rpbe", "damping": "d3bj"},
        }
        starts = [slab("Cu", 1), slab("Pt", 2), slab("Cu", 3, "N")]
        plain, added = predict(starts, network), predict(starts, calculator)
        for start, one, other in zip(starts, plain, added, strict=True):
            energy, forces = Dispersion("rpbe").energy_and_forces(start)
            assert other.get_potential_energy() - one.get_potential_energy() == pytest.approx(
                energy, abs=1e-4
            )
            difference = other.get_forces(apply_constraint=False) - one.get_forces(apply_constraint=False)
            assert difference == pytest.approx(forces, abs=1e-5)
        results = relax_many(starts, calculator, settings=RelaxationSettings(fmax=0.05, steps=2))
        assert all(result.steps == 2 for result in results)

    @pytest.mark.parametrize("symbol", ["X", "Og"])
    def test_an_element_without_parameters_is_named(self, symbol: str) -> None:
        with pytest.raises(InputError, match=f"no parameters of {symbol}"):
            Dispersion("pbe").energy(Atoms([symbol, "H"], [[0, 0, 0], [0, 0, 2.5]]))

    def test_the_calculator_does_not_change_the_atoms(self) -> None:
        atoms = slab("Cu", 1)
        before = atoms.positions.copy()
        Dispersion("pbe").energy(atoms)
        assert np.array_equal(atoms.positions, before)
