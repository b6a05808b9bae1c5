"""Vibrations and free energies beside ASE's own, balanced reactions, and the hydrogen electrode."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.optimize import BFGS
from ase.vibrations import Vibrations as AseVibrations
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.free_energy import (
    Reaction,
    Vibrations,
    free_energy,
    referred_energy,
    vibrations,
)
from equiformer2.adsorption.gases import co2_reduction, gas_correction, water_formation
from equiformer2.adsorption.hindered import HinderedMotion
from equiformer2.errors import InputError


def relaxed() -> Atoms:
    atoms = with_adsorbate(slab(size=(2, 2, 3)), "CO", "fcc")
    atoms.calc = EMT()
    BFGS(atoms, logfile=None).run(fmax=0.01)
    atoms.calc = None
    return atoms


def test_frequencies_are_those_of_ase(tmp_path: Path) -> None:
    atoms = relaxed()
    found = vibrations(atoms, EMT())
    atoms.calc = EMT()
    reference = AseVibrations(atoms, indices=[12, 13], name=str(tmp_path / "vib"), delta=0.01)
    reference.run()
    values = reference.get_frequencies()
    assert found.frequencies == pytest.approx(np.sort(values.real - np.abs(values.imag)), abs=0.01)
    assert len(found.imaginary) == (values.imag != 0).sum()
    assert found.asymmetry < 0.01 * found.largest_element


def test_asymmetric_forces_are_told() -> None:
    class Turned(EMT):
        """Forces with a part that is no gradient."""

        def calculate(self, *arguments: object, **more: object) -> None:
            super().calculate(*arguments, **more)
            place = self.atoms.positions[-1]
            self.results["forces"][-1] += [0.5 * place[1], -0.5 * place[0], 0.0]

    found = vibrations(relaxed(), Turned())
    assert found.asymmetry == pytest.approx(1.0, abs=0.02)


def test_thermochemistry_is_that_of_the_formulas() -> None:
    modes = Vibrations(np.array([-80.0, 20.0, 500.0]), 0.0, 1.0)
    thermo = modes.thermo(300.0, lowest=50.0)
    energies = np.array([50.0, 50.0, 500.0]) * units.invcm
    assert thermo["zpe_eV"] == pytest.approx(energies.sum() / 2)
    x = energies / (units.kB * 300.0)
    assert thermo["heat_eV"] == pytest.approx((energies / np.expm1(x)).sum(), rel=1e-6)
    entropy = units.kB * 300.0 * (x / np.expm1(x) - np.log1p(-np.exp(-x))).sum()
    assert thermo["entropy_eV"] == pytest.approx(entropy, rel=1e-6)
    # Nørskov et al. 2004: zero-point energy less entropy of H2 0.27 - 0.41 eV, of water 0.56 - 0.67 eV.
    assert gas_correction("H2", 298.15) == pytest.approx(-0.05, abs=0.03)
    assert gas_correction("H2O", 298.15) == pytest.approx(-0.01, abs=0.03)


@pytest.mark.parametrize(
    ("formula", "gases", "electrons", "text"),
    [
        ("H", {}, 1.0, "(H+ + e-)"),
        ("OH", {"H2O": 1.0}, -1.0, "H2O - (H+ + e-)"),
        ("O", {"H2O": 1.0}, -2.0, "H2O - 2 (H+ + e-)"),
        ("CO", {"CO": 1.0}, 0.0, "CO"),
        ("CHO", {"CO": 1.0}, 1.0, "CO + (H+ + e-)"),
        ("C", {"CO": 1.0, "H2O": -1.0}, 2.0, "CO - H2O + 2 (H+ + e-)"),
        ("NH3", {"N2": 0.5}, 3.0, "0.5 N2 + 3 (H+ + e-)"),
        ("CO2", {"CO": 1.0, "H2O": 1.0}, -2.0, "CO + H2O - 2 (H+ + e-)"),
    ],
)
def test_reactions_are_balanced(formula: str, gases: dict[str, float], electrons: float, text: str) -> None:
    reaction = Reaction.of(Atoms(formula))
    assert (reaction.gases, reaction.electrons) == (gases, electrons)
    assert reaction.text() == text


def test_the_default_pressure_of_water_is_that_of_room_temperature() -> None:
    oxygen = Reaction.of(Atoms("O"))
    assert oxygen.water_warning(298.15, {}) is oxygen.water_warning(500.0, {"H2O": 1.0}) is None
    assert Reaction.of(Atoms("CO")).water_warning(500.0, {}) is None
    assert "0.03534 bar" in str(oxygen.water_warning(500.0, {"H2": 1.0}))


def test_potential_and_acidity_shift_what_takes_electrons() -> None:
    modes = Vibrations(np.full(6, 600.0), 0.0, 1.0)
    hydroxide = [
        free_energy(0.5, Atoms("OH"), modes, 298.15, potential, ph)
        for potential, ph in ((0.0, 0.0), (1.0, 0.0), (0.0, 14.0))
    ]
    values = [one["free_energy_eV"] for one in hydroxide]
    assert values[1] == pytest.approx(values[0] - 1.0)
    assert values[2] == pytest.approx(values[0] - 14 * 0.05916, abs=1e-3)
    # 1/2 O2 is 2.46 eV above water less H2.
    assert hydroxide[2]["free_energy_against_O2_eV"] == pytest.approx(values[0] - 2.458, abs=1e-3)
    assert hydroxide[0]["imaginary"] == 0
    with pytest.raises(InputError, match="no gas reference for S"):
        free_energy(0.0, Atoms("SH"), modes)
    for temperature in (0.0, 1e-3, 1e9, float("nan")):
        with pytest.raises(InputError, match=r"the temperature is .* give one from 1 to 5000"):
            free_energy(0.0, Atoms("OH"), modes, temperature)
    with pytest.raises(InputError, match="lowest frequency is 0"):
        free_energy(0.0, Atoms("OH"), modes, lowest_frequency=0.0)


def test_atoms_that_cannot_vibrate_are_refused() -> None:
    atoms = relaxed()
    with pytest.raises(InputError, match="is held cannot vibrate"):
        vibrations(atoms, EMT(), [0])
    with pytest.raises(InputError, match="no atom is marked"):
        vibrations(slab(), EMT())


def test_carbon_from_co2_and_pressures() -> None:
    modes = Vibrations(np.full(6, 600.0), 0.0, 1.0)
    carbon = free_energy(0.5, Atoms("CO"), modes, 500.0)
    assert carbon["free_energy_against_CO2_eV"] == pytest.approx(
        carbon["free_energy_eV"] + co2_reduction(500.0)
    )
    assert carbon["free_energy_against_O2_eV"] == carbon["free_energy_eV"]
    # Ten times the pressure of CO, and of H2, which half a molecule of is used.
    hydrogen = [
        free_energy(0.5, Atoms("CHO"), modes, 500.0, pressures=pressures)["free_energy_eV"]
        for pressures in (None, {"CO": 10.0}, {"H2": 10.0})
    ]
    step = units.kB * 500.0 * np.log(10.0)
    assert np.diff(hydrogen) == pytest.approx([-step, step / 2])
    oxygen = free_energy(0.5, Atoms("O"), modes, 500.0, pressures={"H2O": 1.0})
    against = oxygen["free_energy_eV"] + water_formation(500.0, {"H2O": 1.0})
    assert oxygen["free_energy_against_O2_eV"] == pytest.approx(against)
    with pytest.raises(InputError, match="against H2 of 1 bar"):
        free_energy(0.5, Atoms("CHO"), modes, 500.0, 0.3, pressures={"H2": 10.0})
    with pytest.raises(InputError, match="give finite numbers"):
        free_energy(0.5, Atoms("CHO"), modes, 500.0, float("nan"))


def test_hindered_motions_replace_the_three_softest_modes() -> None:
    modes = Vibrations(np.array([-100.0, 40.0, 80.0, 300.0, 400.0, 1900.0]), 0.0, 1.0)
    motion = HinderedMotion(0.1, 0.05, 1.5e15, 3, 9.0, 28.0)
    harmonic, hindered = (free_energy(0.5, Atoms("CO"), modes, motion=one) for one in (None, motion))
    assert hindered["harmonic"] == {key: harmonic[key] for key in ("zpe_eV", "heat_eV", "entropy_eV")}
    assert (harmonic["entropy_model"], hindered["entropy_model"]) == ("harmonic", "hindered")
    difference = sum(
        sign * (hindered[key] - harmonic[key])
        for key, sign in (("zpe_eV", 1), ("heat_eV", 1), ("entropy_eV", -1))
    )
    assert hindered["free_energy_eV"] - harmonic["free_energy_eV"] == pytest.approx(difference)
    assert hindered["hindered"]["translation_barrier_eV"] == 0.1


def test_the_energy_must_be_referred_to_molecules() -> None:
    record = {"energy_kind": "total", "adsorption_energy_eV": -1.0, "gas": {"source": "vacuum"}}
    with pytest.raises(InputError, match="--gas molecules"):
        referred_energy(record)
    assert referred_energy(record | {"gas": {"source": "given and molecules"}}) == (-1.0, None)
    assert referred_energy({"energy_kind": "adsorption", "adsorption_energy_eV": -1.0}) == (-1.0, None)
    known = {"oc20": {"energy_eV": -0.9}}
    assert referred_energy(record | {"conventions": known}) == (-0.9, None)
    unknown = {"oc20": {"energy_eV": None, "reason": "the references are others"}}
    energy, warning = referred_energy(record | {"gas": {"source": "given"}, "conventions": unknown})
    assert energy == -1.0
    assert "right only if" in str(warning)


def test_a_structure_far_from_a_minimum_has_no_vibrations() -> None:
    atoms = relaxed()
    assert vibrations(atoms, EMT(), largest_force=0.5).max_force < 0.02
    atoms.positions[-1, 2] += 0.1
    with pytest.raises(InputError, match="it is no minimum of this model"):
        vibrations(atoms, EMT(), largest_force=0.5)
