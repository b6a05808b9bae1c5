"""Errors against the number of training frames, and what more of them would bring."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from datasets_oc20.untrusted import AnyPath
from equiformer2.finetuning.judging import AFTER, SCRATCH
from equiformer2.training.figures import save_figure

SHARES = (0.125, 0.25, 0.5, 1.0)
"""Shares of the training frames that a curve is made of."""
UNITS = {"force_mae_eV_A": ("force MAE", "eV/Å"), "energy_mae_eV": ("energy MAE", "eV")}
_WORD = {AFTER: "fine-tuned", SCRATCH: "from scratch"}
_FLAT = 0.03


def nested_parts(systems: Sequence[str], seed: int) -> dict[float, np.ndarray]:
    """Choose parts of the training frames, each within the next larger.

    Where there are at least eight systems, whole systems are left out; otherwise frames, evenly.

    Args:
        systems: name of every training frame's system.
        seed: of the order of the systems.

    Returns:
        Indices into the training frames by share; parts that would have less than two frames are left out.
    """
    count, names = len(systems), sorted(set(systems))
    order = np.random.default_rng(seed)
    if len(names) >= 1 / SHARES[0]:
        place = {name: number for number, name in enumerate(order.permutation(names).tolist())}
        rank = np.argsort(np.argsort([place[name] for name in systems], kind="stable"), kind="stable")
    else:
        # Bit-reversed places: every prefix is spread evenly over the frames.
        bits = max(1, (count - 1).bit_length())
        reverse = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(count)]
        rank = np.argsort(np.argsort(reverse, kind="stable"), kind="stable")
    sizes = {share: round(share * count) for share in SHARES}
    return {share: np.flatnonzero(rank < size) for share, size in sizes.items() if size >= 2}


def power_law(frames: Sequence[float], errors: Sequence[float]) -> tuple[float, float] | None:
    """Fit `error = a * frames**-b` on logarithms; `(a, b)`, or None with less than two points above 0."""
    x, y = np.asarray(frames, dtype=float), np.asarray(errors, dtype=float)
    good = (x > 0) & (y > 0)
    if len(np.unique(x[good])) < 2:
        return None
    slope, offset = np.polyfit(np.log(x[good]), np.log(y[good]), 1)
    return float(np.exp(offset)), float(-slope)


def sentences(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what twice and ten times the frames would bring, and from how many on fine-tuning is better.

    Args:
        points: `{network, frames, energy_mae_eV, force_mae_eV_A}`, one per training.
    """
    told = []
    for key, (label, unit) in UNITS.items():
        curve = means(points, AFTER, key)
        law = power_law(*curve) if curve[0] else None
        if law is None:
            continue
        b, most = law[1], curve[0][-1]
        now = curve[1][-1]
        twice, ten = (now * factor**-b for factor in (2, 10))
        told.append(
            f"more frames of this kind would hardly lower the {label}: it does not fall from "
            f"{curve[0][0]:g} to {most:g} frames (exponent {-b:.2f})"
            if b < _FLAT
            else f"twice the frames would bring the {label} from {now:.3g} to about {twice:.3g} {unit}, ten "
            f"times to about {ten:.3g} {unit} (power law with exponent {-b:.2f} through {len(curve[0])} "
            "points; extrapolated)"
        )
        scratch = dict(zip(*means(points, SCRATCH, key), strict=True))
        better = [
            f"{frames:g} frames ({error:.3g} against {scratch[frames]:.3g} {unit})"
            for frames, error in zip(*curve, strict=True)
            if error < scratch.get(frames, -1.0)
        ]
        if scratch:
            told.append(
                f"by {label}, fine-tuning is better than training from scratch with "
                + (", ".join(better) or "none of these numbers of frames")
            )
    return told


def means(points: Sequence[Mapping[str, Any]], network: str, key: str) -> tuple[list[float], list[float]]:
    """Numbers of frames and mean errors over the seeds of one network, both sorted by frames."""
    found: dict[float, list[float]] = {}
    for point in points:
        if point["network"] == network and point[key] is not None:
            found.setdefault(float(point["frames"]), []).append(point[key])
    return sorted(found), [float(np.mean(found[frames])) for frames in sorted(found)]


def draw(points: Sequence[Mapping[str, Any]], trivial: Mapping[str, Any], target: AnyPath) -> None:
    """Draw both errors against the number of frames, with the fit of the fine-tuned network.

    Args:
        points: as for `sentences`.
        trivial: errors of trivial answers, by the same keys.
        target: PNG file.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, (key, (label, unit)) in zip(figure.subplots(1, 2), UNITS.items(), strict=True):
        for network, style in ((AFTER, "o-"), (SCRATCH, "s-")):
            frames, errors = means(points, network, key)
            if frames:
                axis.plot(frames, errors, style, markersize=4, label=_WORD[network])
            law = power_law(frames, errors) if network == AFTER and frames else None
            if law is not None and law[1] > 0:
                x = np.geomspace(frames[0], 10 * frames[-1], 50)
                axis.plot(x, law[0] * x ** -law[1], ":", color="0.4", label=f"power law {-law[1]:.2f}")
        if trivial.get(key) is not None:
            axis.axhline(trivial[key], color="0.6", linestyle="--", label="trivial")
        axis.set(xlabel="training frames", ylabel=f"{label} ({unit})", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    save_figure(figure, target)
