"""Figures of a run and of an evaluation."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from equiformer2.training.figures import draw_error_bars, draw_loss_curves, draw_parity

pytestmark = pytest.mark.pictures


def is_coloured(path: Path) -> bool:
    """True for a picture with more than shades of grey."""
    return bool(np.ptp(imread(path)[..., :3], axis=-1).max() > 0.3)


def test_loss_curves_have_a_panel_per_quantity(tmp_path: Path) -> None:
    metrics, target = tmp_path / "metrics.csv", tmp_path / "figures" / "loss.png"
    draw_loss_curves(metrics, target)
    metrics.write_text("step,train/loss\n")
    draw_loss_curves(metrics, target)
    assert not target.exists()
    widths = []
    for names, rows in (
        ("step,train/loss", ("0,2.5", "1,1.5")),
        ("step,train/loss,lr,val/forces_mae", ("0,2.5,1e-3,", "1,0,2e-3,", "1,,,0.4", "2,nan,1e-3,")),
    ):
        metrics.write_text("\n".join((names, *rows)) + "\n")
        draw_loss_curves(metrics, target)
        widths.append(imread(target).shape[1])
        assert is_coloured(target)
    assert widths[1] == 3 * widths[0]


def test_parity_and_error_bars_are_drawn(tmp_path: Path) -> None:
    for number, values in enumerate((np.linspace(-1, 1, 50), np.zeros(1), np.array([np.nan, 1.0]))):
        draw_parity(values, values + 0.1, "energy", "eV", "a note", tmp_path / f"{number}.png")
    assert is_coloured(tmp_path / "0.png")
    rows = {name: {"structures": 3, "energy_mae": 0.2, "forces_mae": 0.1} for name in ("*O", "*OH", "*CO")}
    heights = []
    for most in (2, 60):
        draw_error_bars(rows | {str(n): rows["*O"] for n in range(9)}, "adsorbates", tmp_path / "b.png", most)
        heights.append(imread(tmp_path / "b.png").shape[0])
    assert heights[0] < heights[1]
    assert is_coloured(tmp_path / "b.png")
