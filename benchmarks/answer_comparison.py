"""Do both implementations give the same answers? Checked before anything is timed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The reference draws its edge frames at random, so its answers scatter from call to call. Ours, one more
# choice of frames, must lie within this many times that scatter of the mean of its draws, plus float32
# rounding relative to the rms of the values.
SCATTERS = 4.0
ROUNDING = 1e-4


@dataclass(frozen=True)
class Comparison:
    """One quantity: largest difference, the reference's own scatter, what is allowed, size of the values."""

    quantity: str
    difference: float
    scatter: float
    tolerance: float
    rms: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance


def compare_answers(ours: Path, reference: Path) -> list[Comparison]:
    """Edges, energies, forces and (if saved) gradients of two `answers` files.

    Raises ValueError when the graphs or the parameters differ: then nothing else can be compared.
    """
    mine, theirs = (torch.load(path, weights_only=True, mmap=True) for path in (ours, reference))
    rows = [_compare_edges(mine, theirs)]
    rows += _compare_outputs(mine, theirs)
    if "gradients" in mine["draws"][0]:
        gradients = [draw["gradients"] for draw in theirs["draws"]]
        rows.append(_compare_gradients(mine["draws"][0]["gradients"], gradients))
    return rows


def compare_outputs(ours: Path, reference: Path) -> list[Comparison]:
    """Energies and forces alone."""
    return _compare_outputs(*(torch.load(path, weights_only=True) for path in (ours, reference)))


def deviation(other: Path, plain: Path) -> dict[str, float]:
    """Rms difference of energies and forces over the rms of the plain ones, and the largest difference.

    Both files hold answers of equiformer2 for the same structures, the plain ones in float32.
    """
    files = [torch.load(path, weights_only=True)["draws"][0] for path in (other, plain)]
    found = {}
    for quantity in ("energy", "forces"):
        changed, kept = (file[quantity].double() for file in files)
        rms = kept.square().mean().sqrt()
        found[quantity] = ((changed - kept).square().mean().sqrt() / rms).item()
        found[f"{quantity}_largest"] = (changed - kept).abs().max().item()
        found[f"{quantity}_rms"] = rms.item()
    return found


def _compare_outputs(mine: dict[str, Any], theirs: dict[str, Any]) -> list[Comparison]:
    rows = []
    for quantity in ("energy", "forces"):
        draws = torch.stack([draw[quantity].double() for draw in theirs["draws"]])
        rows.append(_compare(quantity, mine["draws"][0][quantity].double(), draws))
    return rows


def _compare(quantity: str, ours: torch.Tensor, draws: torch.Tensor) -> Comparison:
    mean = draws.mean(0)
    difference = (ours - mean).abs().max().item()
    scatter = (draws - mean).abs().max().item()
    rms = mean.square().mean().sqrt().item()
    return Comparison(quantity, difference, scatter, SCATTERS * scatter + ROUNDING * rms, rms)


def _compare_gradients(ours: dict[str, torch.Tensor], draws: list[dict[str, torch.Tensor]]) -> Comparison:
    """All parameters at once, as distances between vectors relative to the length of the reference's."""
    if set(ours) != set(draws[0]):
        raise ValueError(f"parameters differ: {sorted(set(ours) ^ set(draws[0]))}")
    length = difference = 0.0
    scatters = [0.0] * len(draws)
    for name, gradient in ours.items():
        stacked = torch.stack([draw[name] for draw in draws]).double()
        mean = stacked.mean(0)
        length += mean.square().sum().item()
        difference += (gradient - mean).square().sum().item()
        distances = (stacked - mean).flatten(1).square().sum(1).tolist()
        scatters = [old + new for old, new in zip(scatters, distances, strict=True)]
    scatter = (max(scatters) / length) ** 0.5
    tolerance = SCATTERS * scatter + ROUNDING
    return Comparison("gradients (relative)", (difference / length) ** 0.5, scatter, tolerance, 1.0)


def _compare_edges(ours: dict[str, Any], theirs: dict[str, Any]) -> Comparison:
    (index, vectors), (other_index, other_vectors) = _sorted_edges(ours), _sorted_edges(theirs)
    if index.shape != other_index.shape or not torch.equal(index, other_index):
        raise ValueError(
            f"the graphs differ: {index.shape[1]} edges here, {other_index.shape[1]} in the reference"
        )
    difference = (vectors - other_vectors).abs().max().item()
    return Comparison(
        f"edge vectors ({index.shape[1]}, Å)", difference, 0.0, 1e-4, vectors.square().mean().sqrt().item()
    )


def _sorted_edges(answers: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges ordered by target, source, and, among periodic images of one pair, along a general direction."""
    index, vectors = answers["edge_index"], answers["vectors"].double()
    along = vectors @ torch.tensor([1.0, 0.7320508, 0.4142136], dtype=torch.float64)
    order = torch.argsort(along)
    pair = index[1] * (int(index.max()) + 1) + index[0]
    order = order[torch.argsort(pair[order], stable=True)]
    return index[:, order], vectors[order]
