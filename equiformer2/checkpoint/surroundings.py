"""Surroundings of atoms that a training set holds, as a network sees them, and distances to them.

The surroundings of an atom are the features of degree 0 that the heads of the network read, C numbers that no
rotation changes. Those of all training atoms of one element are described by their mean, and the spread
around these means by one covariance for all elements (the class-conditional Gaussians with tied covariance of
Lee et al., NeurIPS 2018, arXiv 1807.03888). The distance of an atom to the training set is its Mahalanobis
distance to the mean of its element, or to the nearest mean where no training atom is of its element. The
distance of a structure is that of its farthest atom; what is usual is known from held-out structures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiformer2.checkpoint.tensor_files import plain
from equiformer2.errors import InputError
from equiformer2.values import mapping, shown_name

LEVELS = 101
"""Number of quantiles that are kept, from the smallest distance to the largest in steps of one percent."""
_LIMIT = 99
_SHRINKAGE = 0.05
"""Share of the mean variance that is added to each: directions without spread would decide alone."""
_KEYS = {"elements", "means", "whitening", "quantiles", "weights", "description"}


@dataclass(frozen=True)
class Surroundings:
    """Surroundings of the atoms of a training set, for one set of weights.

    Attributes:
        elements: `[E]` int64 atomic numbers, ascending.
        means: `[E, C]` float32 mean features of each element.
        whitening: `[C, C]` float32, so that a distance is the length of `whitening @ (features - mean)`.
        quantiles: `[LEVELS]` float64 distances of held-out structures.
        weights: `raw` or `averaged`, the weights that gave the features.
        description: plain values: numbers of structures and names of the data.
    """

    elements: Tensor
    means: Tensor
    whitening: Tensor
    quantiles: Tensor
    weights: str
    description: dict[str, Any]

    @property
    def limit(self) -> float:
        """Distance that 99 % of the held-out structures do not exceed."""
        return float(self.quantiles[_LIMIT])

    def distances(self, features: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Compute the distance `[N]` float64 of every atom to the training set.

        Args:
            features: `[N, C]`.
            atomic_numbers: `[N]`.
        """
        means = self.means.double() @ self.whitening.double().T
        points = features.double() @ self.whitening.double().T
        distances = torch.cdist(points, means)
        own = atomic_numbers[:, None] == self.elements
        return torch.where(own | ~own.any(dim=1, keepdim=True), distances, torch.inf).amin(dim=1)

    def percentile(self, distance: float) -> float:
        """Percentage of the held-out structures that are nearer to the training set."""
        return 100.0 * float((self.quantiles < distance).double().mean())

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint file."""
        return {name: getattr(self, name) for name in _KEYS}

    @classmethod
    def from_dict(cls, values: Any, channels: int, source: str) -> "Surroundings":
        """Check the part of a checkpoint file.

        Args:
            values: as `to_dict` gives them.
            channels: C of the network.
            source: names the file in errors.

        Raises:
            InputError: a value is missing, unknown or malformed.
        """
        name = f"{source}: surroundings"
        values = mapping(values, name)
        if set(values) != _KEYS:
            odd = sorted(map(shown_name, set(values) ^ _KEYS))
            raise InputError(f"{name}: missing or unknown {', '.join(odd)[:200]}")
        elements = values["elements"]
        count = len(elements) if isinstance(elements, Tensor) and elements.dim() == 1 else -1
        shapes = {
            "elements": ((count,), torch.int64),
            "means": ((count, channels), torch.float32),
            "whitening": ((channels, channels), torch.float32),
            "quantiles": ((LEVELS,), torch.float64),
        }
        for key, (shape, dtype) in shapes.items():
            value = values[key]
            if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
                raise InputError(f"{name}: {key} must be {dtype} of the shape {shape}")
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"{name}: {key} must be finite")
        if count < 1 or bool((elements.diff() <= 0).any()) or bool((values["quantiles"].diff() < 0).any()):
            raise InputError(f"{name}: elements and quantiles must be ascending")
        if values["weights"] not in ("raw", "averaged"):
            raise InputError(f"{name}: weights must be 'raw' or 'averaged'")
        description = dict(mapping(plain(values["description"]), f"{name}: description"))
        return cls(**{**values, "description": description})


class SurroundingsFit:
    """Sums over the atoms of a training set.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._counts: dict[int, int] = {}
        self._sums: dict[int, Tensor] = {}
        self._squares = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, features: Tensor, atomic_numbers: Tensor) -> None:
        """Add atoms: features `[N, C]` and atomic numbers `[N]`."""
        features = features.double()
        self._squares += features.T @ features
        for number in torch.unique(atomic_numbers).tolist():
            mine = features[atomic_numbers == number]
            self._counts[number] = self._counts.get(number, 0) + len(mine)
            self._sums[number] = self._sums.get(number, torch.zeros_like(mine[0])) + mine.sum(dim=0)

    def finish(self, weights: str, description: Mapping[str, Any]) -> Surroundings:
        """Fit means and covariance; the quantiles are zero until `calibrated` sets them.

        Args:
            weights: `raw` or `averaged`.
            description: plain values.
        """
        elements = sorted(self._counts)
        counts = torch.tensor([self._counts[number] for number in elements], dtype=torch.float64)
        means = torch.stack([self._sums[number] for number in elements]) / counts[:, None]
        within = (self._squares - (means * counts[:, None]).T @ means) / counts.sum()
        variances, axes = torch.linalg.eigh(within)
        # Without any spread, as of one perfect crystal, all distances but zero are far.
        floor = float(variances.mean().clamp(min=0.0)) * _SHRINKAGE + 1e-12
        whitening = (axes / (variances.clamp(min=0.0) + floor).sqrt()).T
        return Surroundings(
            torch.tensor(elements),
            means.float(),
            whitening.float(),
            torch.zeros(LEVELS, dtype=torch.float64),
            weights,
            dict(description),
        )


def quantiles_of(distances: list[float]) -> Tensor:
    """Compute the `LEVELS` quantiles of distances."""
    return torch.from_numpy(np.quantile(np.asarray(distances), np.linspace(0.0, 1.0, LEVELS)))
