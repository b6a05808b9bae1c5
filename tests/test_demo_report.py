"""The demo's report says what its figures say, weak ones too."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import add_adsorbate, fcc111

from equiformer2.adsorption.energy import AdsorptionResult
from equiformer2.demo.demo_report import DemoReport, table_lines
from equiformer2.demo.plan import DemoPlan
from equiformer2.demo.steps import Network, Relaxed
from equiformer2.inference.relaxation import RelaxationResult
from equiformer2.training.evaluation import Evaluation


def network(title: str, energy: float, forces: float, milliseconds: float = np.nan) -> Network:
    """A network with these errors, where the mean has 2 eV and zero forces have 0.5 eV/Å."""
    metrics = {
        "energy_mae": energy,
        "forces_mae": forces,
        "forces_cosine_similarity": 0.25,
        "energy_forces_within_threshold": 0.0,
    }
    baselines = {"mean_energy": {"energy_mae": 2.0}, "zero_force": {"forces_mae": 0.5}}
    result = Evaluation(metrics, baselines, 60, 4, 900, np.zeros((0, 2)), np.zeros((0, 2)))
    return Network(title, Path("x.pt"), 100, 1000, result, macs=4e6, milliseconds=milliseconds)


def relaxation(system: str, name: str, energy: float, converged: bool, **known: float | None) -> Relaxed:
    atoms = fcc111("Cu", (1, 1, 2), vacuum=5.0)
    add_adsorbate(atoms, "O", 1.5)
    atoms.set_tags([0, 1, 2])
    run = RelaxationResult(atoms, converged, 7, [energy], [0.04], 0.05, "LBFGS", 1.0)
    result = AdsorptionResult(energy, "adsorption", {}, None, atoms, run, None, atoms, "initial slab")
    return Relaxed(system, name, result, known.get("dft"), known.get("teacher"), "dft", 0.0)


@pytest.fixture
def report() -> DemoReport:
    dense, small = network("fine-tuned", 1.5, 0.25, 40.0), network("pruned", 1.8, 0.3, 20.0)
    networks = [network("as shipped", 1.9, 0.4), network("from nothing", 1.9, 0.45), dense]
    networks += [network("pruned, not distilled", 2.5, 0.6), replace(small, macs=2e6)]
    shown = relaxation("a", "fine-tuned", -0.5, True, dft=-0.45, teacher=0.05)
    relaxed = [shown, relaxation("b", "fine-tuned", -3.0, False, dft=-1.0)]
    return DemoReport(DemoPlan(), networks, relaxed, shown, {"absent": Path("absent.png")}, {"all": 480.0})


def test_sentences_follow_from_the_figures(report: DemoReport) -> None:
    page = report.to_html()
    for words in (
        "Fine-tuned, the force error is 0.50 times that of zero forces, the energy error 0.75 times",
        "fine-tuning is better than training from nothing at energies and forces",
        "1 of 2 relaxations converged",
        "1 of 2 energies are within 0.1 eV of DFT&#x27;s, with a mean error of 1.02 eV",
        "differ by 0.50 eV on average",
        "50% of the operations and 50% of the time",
        "1.20 times that of the dense network; without distillation 2.40 times",
        "off by 1.50 eV on average",
        "1 of 2 relaxations did not converge in 150 steps (b)",
        "together 8.0 minutes",
    ):
        assert words in page, words
    assert "worse than saying zero" not in page
    assert "absent" not in page


def test_a_bad_result_is_said(report: DemoReport) -> None:
    bad = replace(report.networks[2], result=network("fine-tuned", 3.0, 0.7).result)
    page = replace(report, networks=[*report.networks[:2], bad, *report.networks[3:]]).to_html()
    assert "Forces on unseen systems are worse than saying zero" in page
    assert "fine-tuning is no better than training from nothing" in page


def test_elements_that_training_from_nothing_has_not_seen_are_named(report: DemoReport) -> None:
    scratch = replace(report.networks[1], unseen_elements=("Na", "Cl"))
    page = replace(report, networks=[report.networks[0], scratch, *report.networks[2:]]).to_html()
    assert "The unseen systems hold Na, Cl, of which the DFT frames for training have none" in page


def test_the_printed_table_has_a_line_per_network(report: DemoReport) -> None:
    lines = table_lines(report.networks)
    assert len(lines) == 2 + len(report.networks)
    assert "0.2500" in next(line for line in lines if line.startswith("fine-tuned"))
