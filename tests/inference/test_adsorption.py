"""adsorption_energy: what is subtracted for which model, every way of mixing them, and anomalies."""

import logging
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import read
from inference_helpers import KindedEMT

from equiformer2.adsorption import adsorption_energy
from equiformer2.adsorption.anomalies import find_anomalies
from equiformer2.adsorption.named_structures import build_adsorbate, build_slab, place_adsorbate
from equiformer2.adsorption.references import OC20_GAS_REFERENCES, gas_reference
from equiformer2.errors import InputError
from equiformer2.inference import relax
from equiformer2.inference.named_calculators import resolve_energy_kind

FMAX = 0.02


@pytest.fixture
def carbon_monoxide_on_copper() -> Atoms:
    return place_adsorbate(build_slab("Cu111", (2, 2, 3), free_layers=1), *build_adsorbate("CO"))


class TestEnergy:
    def test_adsorption_model_subtracts_nothing(self, oxygen_on_copper: Atoms, tmp_path: Path) -> None:
        result = adsorption_energy(
            oxygen_on_copper, KindedEMT("adsorption"), fmax=FMAX, folder=tmp_path / "out"
        )
        direct = relax(oxygen_on_copper, KindedEMT("adsorption"), fmax=FMAX)
        assert result.energy == direct.energy == result.system.energy
        assert result.slab is None
        assert result.terms == {}
        assert result.converged
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["relaxation.traj"]
        assert result.adsorbate_formula == "O"

    def test_total_model_subtracts_slab_and_gas(
        self, carbon_monoxide_on_copper: Atoms, tmp_path: Path
    ) -> None:
        system = carbon_monoxide_on_copper
        result = adsorption_energy(
            system,
            KindedEMT("total"),
            gas_references={"C": -1.5},
            gas_source="oc20",
            fmax=FMAX,
            folder=tmp_path,
        )
        together = relax(system, KindedEMT("total"), fmax=FMAX)
        clean = relax(system[system.get_tags() < 2], KindedEMT("total"), fmax=FMAX)
        gas = -1.5 + OC20_GAS_REFERENCES["O"]
        assert result.energy == pytest.approx(together.energy - clean.energy - gas, abs=1e-9)
        assert result.terms == pytest.approx(
            {"slab_and_adsorbate": together.energy, "slab": clean.energy, "gas": gas}
        )
        assert result.gas_references == {"C": -1.5, "O": -7.204}
        assert result.slab is not None
        assert len(read(tmp_path / "slab.traj")) == 12
        assert len(read(tmp_path / "relaxation.traj")) == 14

    def test_given_slab_energy_replaces_the_slab_relaxation(self, oxygen_on_copper: Atoms) -> None:
        relaxed = adsorption_energy(oxygen_on_copper, KindedEMT("total"), fmax=FMAX)
        given = adsorption_energy(
            oxygen_on_copper, KindedEMT("total"), fmax=FMAX, slab_energy=relaxed.terms["slab"]
        )
        assert given.slab is None
        assert given.energy == pytest.approx(relaxed.energy, abs=1e-12)

    def test_atoms_are_not_changed_and_the_summary_is_plain(self, oxygen_on_copper: Atoms) -> None:
        before = oxygen_on_copper.copy()
        result = adsorption_energy(oxygen_on_copper, KindedEMT("total"), steps=1)
        assert oxygen_on_copper == before
        summary = result.summary()
        assert summary["converged"] is False
        assert summary["adsorption_energy_eV"] == result.energy
        assert summary["slab"]["steps"] <= 1


class TestKinds:
    @pytest.mark.parametrize("references", [{"slab_energy": -10.0}, {"gas_references": {"O": -7.0}}])
    def test_references_with_an_adsorption_model(self, oxygen_on_copper: Atoms, references: dict) -> None:
        calculator = KindedEMT("adsorption")
        with pytest.raises(InputError, match="already have slab and gas references subtracted"):
            adsorption_energy(oxygen_on_copper, calculator, **references)
        assert calculator.calls == 0

    def test_declared_against_the_checkpoint(self, oxygen_on_copper: Atoms) -> None:
        for own, declared in (("adsorption", "total"), ("total", "adsorption")):
            with pytest.raises(InputError, match=f"predicts {own} energies, not {declared}"):
                adsorption_energy(oxygen_on_copper, KindedEMT(own), energy_kind=declared)

    def test_no_kind_at_all(self, oxygen_on_copper: Atoms) -> None:
        with pytest.raises(InputError, match="does not say"):
            adsorption_energy(oxygen_on_copper, KindedEMT(None))
        result = adsorption_energy(oxygen_on_copper, KindedEMT(None), energy_kind="adsorption", steps=1)
        assert result.energy_kind == "adsorption"

    def test_unknown_kind(self) -> None:
        with pytest.raises(InputError, match="'referenced' is unknown"):
            resolve_energy_kind(KindedEMT(None), "referenced")


class TestInput:
    def test_element_without_gas_reference(self) -> None:
        system = place_adsorbate(build_slab("Cu111", (2, 2, 2), free_layers=1), Atoms("Al"))
        with pytest.raises(InputError, match=r"no gas reference for Al.*Al=-1\.23"):
            adsorption_energy(system, KindedEMT("total"), gas_references="molecules")
        assert (
            adsorption_energy(system, KindedEMT("total"), gas_references={"Al": 1.0}, steps=0).terms["gas"]
            == 1
        )

    @pytest.mark.parametrize(
        "references", [{"slab_energy": float("nan")}, {"gas_references": {"O": float("inf")}}]
    )
    def test_references_that_are_not_numbers(self, oxygen_on_copper: Atoms, references: dict) -> None:
        with pytest.raises(InputError, match="finite"):
            adsorption_energy(oxygen_on_copper, KindedEMT("total"), **references)

    def test_no_adsorbate(self, oxygen_on_copper: Atoms) -> None:
        oxygen_on_copper.set_tags(0)
        with pytest.raises(InputError, match="no atom is marked as adsorbate"):
            adsorption_energy(oxygen_on_copper, KindedEMT("adsorption"))

    def test_no_slab(self) -> None:
        gas = molecule("CO", vacuum=5.0, tags=[2, 2])
        with pytest.raises(InputError, match="every atom is marked as adsorbate"):
            adsorption_energy(gas, KindedEMT("adsorption"))

    def test_fixed_adsorbate(self, oxygen_on_copper: Atoms) -> None:
        oxygen_on_copper.set_tags([2] * 4 + [0] * 4 + [1] * 4 + [2])
        with pytest.raises(InputError, match=r"atom 0 \(Cu\) is both adsorbate \(tag 2\) and fixed"):
            adsorption_energy(oxygen_on_copper, KindedEMT("adsorption"))

    def test_loose_slab_is_noticed(self, oxygen_on_copper: Atoms, caplog: pytest.LogCaptureFixture) -> None:
        oxygen_on_copper.set_constraint()
        with caplog.at_level(logging.WARNING):
            adsorption_energy(oxygen_on_copper, KindedEMT("adsorption"), steps=0)
        assert "no slab atom is fixed" in caplog.text


class TestAnomalies:
    def test_none(self, carbon_monoxide_on_copper: Atoms) -> None:
        system = carbon_monoxide_on_copper
        moved = system.copy()
        moved.positions[-2:, 2] += 0.1
        assert find_anomalies(system, moved, system.get_tags()) == []

    def test_desorbed(self, carbon_monoxide_on_copper: Atoms) -> None:
        system = carbon_monoxide_on_copper
        moved = system.copy()
        moved.positions[-2:, 2] += 5.0
        (anomaly,) = find_anomalies(system, moved, system.get_tags())
        assert anomaly.name == "desorbed"

    def test_dissociated(self, carbon_monoxide_on_copper: Atoms) -> None:
        system = carbon_monoxide_on_copper
        oxygen = int(np.flatnonzero(system.numbers == 8)[0])
        moved = system.copy()
        moved.positions[oxygen, 2] += 1.5
        (anomaly,) = find_anomalies(system, moved, system.get_tags())
        assert anomaly.name == "dissociated"

    def test_reconstructed(self, carbon_monoxide_on_copper: Atoms) -> None:
        system = carbon_monoxide_on_copper
        moved = system.copy()
        top = int(np.flatnonzero(system.get_tags() == 1)[-1])
        neighbour = moved.get_distances(
            top, np.flatnonzero(system.get_tags() == 1)[:-1], mic=True, vector=True
        )[0]
        moved.positions[top] += 0.6 * neighbour  # squeezed far below a bond length
        moved.positions[top, 2] += 6.0  # and lifted off
        anomalies = find_anomalies(moved, system, system.get_tags())
        assert "surface_changed" in [anomaly.name for anomaly in anomalies]

    def test_inside_the_slab(self, oxygen_on_copper: Atoms) -> None:
        moved = oxygen_on_copper.copy()
        moved.positions[-1, 2] -= 3.0
        anomalies = find_anomalies(oxygen_on_copper, moved, oxygen_on_copper.get_tags())
        assert "intercalated" in [anomaly.name for anomaly in anomalies]

    def test_reported_with_the_result(self, oxygen_on_copper: Atoms) -> None:
        oxygen_on_copper.positions[-1, 2] += 6.0
        result = adsorption_energy(oxygen_on_copper, KindedEMT("adsorption"), steps=0)
        assert [anomaly["name"] for anomaly in result.summary()["anomalies"]] == ["desorbed"]


def test_a_calculator_that_cannot_compute_the_adsorbate_alone_is_named() -> None:
    with pytest.raises(InputError, match=r"Xe in vacuum: EMT failed with .*give gas references"):
        gas_reference(Atoms("Xe"), EMT(), None, "vacuum", {})
