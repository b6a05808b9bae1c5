"""Predictions beside labels: what is kept of a frame, and the figure."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from equiformer2.checkpoint import Normalizer, Normalizers
from equiformer2.finetuning.parity import ParityPairs, draw


def test_total_energies_are_per_atom_and_less_the_references() -> None:
    table = torch.zeros(100, dtype=torch.float64)
    table[29], table[8] = -3.0, -7.0
    pairs = ParityPairs(Normalizers(Normalizer(1.0, 2.0), Normalizer(0.0, 1.0), table))
    forces = np.arange(6.0).reshape(2, 3)
    pairs.add(torch.tensor([29, 29, 8, 8]), (-22.0, -20.8), (forces, forces + 1.0))
    assert pairs.energies == [[-0.5, pytest.approx(-0.2)]]
    assert pairs.forces == [[value, value + 1.0] for value in range(6)]


def test_adsorption_energies_stay_and_nan_is_left_out() -> None:
    pairs = ParityPairs(None)
    many = np.zeros((1000, 3))
    pairs.add(torch.tensor([29]), (-2.0, -1.5), (many, many))
    pairs.add(torch.tensor([29]), (-3.0, float("nan")), (many[:0], many[:0]))
    assert pairs.energies == [[-2.0, -1.5]]
    assert 50 < len(pairs.forces) <= 60


@pytest.mark.pictures
def test_the_figure_has_a_panel_per_quantity(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    after = {"energies": rng.normal(size=(20, 2)).tolist(), "forces": rng.normal(size=(90, 2)).tolist()}
    before = {"energies": [], "forces": (1e4 * rng.normal(size=(90, 2))).tolist()}
    errors = {"energy_mae_eV": None, "energy_mae_eV_per_atom": 0.1, "force_mae_eV_A": 0.2}
    widths = []
    for number, networks in enumerate(({"before": before, "after": after}, {"before": before})):
        draw(networks, {"before": errors, "after": errors}, True, tmp_path / f"{number}.png")
        widths.append(matplotlib.image.imread(tmp_path / f"{number}.png").shape[1])
    assert widths[0] == 2 * widths[1]
    draw({"after": {"energies": [], "forces": []}}, {"after": errors}, True, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
