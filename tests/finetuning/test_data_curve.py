"""The learning curve: nested parts, and what more frames would bring."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from equiformer2.finetuning.data_curve import draw, nested_parts, power_law, sentences


@pytest.mark.parametrize("systems", [["one"] * 40, [f"s{i // 2}" for i in range(40)]])
def test_parts_are_nested_and_of_the_right_size(systems: list[str]) -> None:
    parts = nested_parts(systems, 0)
    assert {share: len(rows) for share, rows in parts.items()} == {0.125: 5, 0.25: 10, 0.5: 20, 1.0: 40}
    ordered = [set(parts[share].tolist()) for share in sorted(parts)]
    assert all(small < large for small, large in pairwise(ordered))


def test_parts_of_few_systems_are_spread_over_the_frames() -> None:
    eighth = nested_parts(["one"] * 64, 0)[0.125]
    assert np.diff(eighth).min() >= 4


def test_parts_of_one_frame_are_left_out() -> None:
    assert sorted(nested_parts(["one"] * 8, 0)) == [0.25, 0.5, 1.0]


def test_a_power_law_is_found_again() -> None:
    frames = [10, 20, 40, 80]
    factor, exponent = power_law(frames, [3 * n**-0.4 for n in frames])
    assert (factor, exponent) == pytest.approx((3.0, 0.4))
    assert power_law([10], [1.0]) is None


def points(network: str, exponent: float) -> list[dict[str, object]]:
    return [
        {"network": network, "frames": n, "energy_mae_eV": n**-exponent, "force_mae_eV_A": 2 * n**-exponent}
        for n in (8, 16, 32, 64)
    ]


@pytest.mark.pictures
def test_what_more_frames_bring_is_said(tmp_path: Path) -> None:
    every = points("after", 0.5) + points("scratch", 0.3)
    told = " ".join(sentences(every))
    assert "twice the frames would bring the force MAE from 0.25 to about 0.177" in told
    assert "better than training from scratch with 8 frames (0.354 against 0.536 eV), 16 frames" in told
    draw(every, {"force_mae_eV_A": 3.0, "energy_mae_eV": None}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_flat_curve_promises_nothing_and_is_compared_all_the_same() -> None:
    told = " ".join(sentences(points("after", 0.0) + points("scratch", -0.1)))
    assert "would hardly lower" in told
    assert "by force MAE, fine-tuning is better than training from scratch with 8 frames" in told
