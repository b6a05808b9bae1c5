"""New last layer of the energy head by ridge regression, for energies with another zero.

The energy is linear in the last layer, whose inputs the checkpoint has learned. A least-squares fit to some
frames gives a start that no optimizer reaches in few steps.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch_geometric.data import Batch, Data

from equiformer2.model import EquiformerV2

_STRENGTHS = tuple(10.0**power for power in range(-4, 4))
"""Ridge, relative to the number of frames, for features of size 1; none at all is compared, too."""
_FOLDS = 5
_WORTHWHILE = 0.9
"""Share of the error without a fit that a fit must stay below; less is chance with few frames."""


def fit_last_layer(
    model: EquiformerV2, frames: Sequence[Data], targets: np.ndarray, systems: Sequence[str]
) -> tuple[float, float]:
    """Replace the last layer so that the network answers energies.

    The ridge is the one that is best on systems that are left out of the fit; where none is clearly
    better than 0 everywhere, the layer becomes 0.

    Args:
        model: changed in place.
        frames: structures.
        targets: `[n]` energies in the network's normalised units.
        systems: name of every frame's system.

    Returns:
        Mean absolute error on systems left out of the fit, of 0 and of the fit, in normalised units.
    """
    features = np.array([_features(model, frame) for frame in frames])
    scale = np.sqrt((features**2).mean(axis=0))
    scale[scale < 1e-9] = np.inf  # a feature that no frame has stays without weight
    scaled = features / scale
    folds = _folds(systems)
    zero = float(np.abs(targets).mean())
    errors = {strength: _left_out(scaled, targets, folds, strength) for strength in _STRENGTHS}
    best = min(errors, key=lambda strength: errors[strength])
    weights = np.zeros(features.shape[1])
    is_better = errors[best] < _WORTHWHILE * zero
    if is_better:
        weights = _ridge(scaled, targets, best) / scale
    layer = model.energy_block.so3_linear_2
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0] = torch.from_numpy(weights[:-1]).to(layer.weight)
        layer.bias.fill_(float(weights[-1]))
    return zero, errors[best] if is_better else zero


def _features(model: EquiformerV2, frame: Data) -> np.ndarray:
    """Derivatives of a frame's energy by the last layer's weights and bias, of which it is a linear sum."""
    layer = model.energy_block.so3_linear_2
    where = layer.weight.device
    with torch.enable_grad():
        energy = model(Batch.from_data_list([frame]).to(where))["energy"].sum()
        by_weight, by_bias = torch.autograd.grad(energy, [layer.weight, layer.bias])
    return torch.cat([by_weight[0, 0], by_bias]).double().cpu().numpy()


def _folds(systems: Sequence[str]) -> np.ndarray:
    """Number of the fold of every frame: of its system, or of a stretch of a single system's frames."""
    names, numbers = np.unique(np.asarray(systems), return_inverse=True)
    if len(names) > 1:
        return numbers % max(2, min(len(names), 2 * _FOLDS))
    return np.arange(len(systems)) * _FOLDS // len(systems)


def _left_out(features: np.ndarray, targets: np.ndarray, folds: np.ndarray, strength: float) -> float:
    """Mean absolute error on each fold of a fit to the others."""
    errors = []
    for fold in np.unique(folds):
        out = folds == fold
        if out.all():
            return float("inf")
        weights = _ridge(features[~out], targets[~out], strength)
        errors.append(np.abs(targets[out] - features[out] @ weights))
    return float(np.concatenate(errors).mean())


def _ridge(features: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    count, size = features.shape
    gram = features.T @ features + strength * count * np.eye(size)
    return np.linalg.solve(gram, features.T @ targets)
