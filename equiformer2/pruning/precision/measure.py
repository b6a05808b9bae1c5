"""Figures of a compact network beside the one it was made of: errors, memory, time, equivariance."""

from collections.abc import Sequence
from typing import Any

import torch
from torch_geometric.data import Batch, Data

from equiformer2.inference import Predictor
from equiformer2.kernels.linear import multiplies_bfloat16
from equiformer2.model.folding import resident_bytes
from equiformer2.pruning.calibration import unlabelled
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.symmetry import check_symmetries

_ROTATED = 4
_TRIALS = 2


def compare(
    compact: Predictor,
    dense: Predictor,
    structures: Sequence[Data],
    batch_size: int = 2,
    repeats: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a compact network beside the dense one.

    Args:
        compact: the network to judge.
        dense: the network that it was made of.
        structures: at least one; with `forces` they give the errors against labels.
        batch_size: structures per forward pass.
        repeats: timed pairs of force calls, on the first structure.
        seed: of the rotations.

    Returns:
        `force_change_eV_A` (mean absolute change of the force components of free atoms),
        `energy_change_eV` (mean absolute change of the energy of a structure), `force_mae_eV_A`,
        `force_mae_dense_eV_A` and `force_mae_ratio` (against the labels), `ms`, `ms_dense` and `ms_ratio` (of
        one force call), `resident_bytes`, `resident_bytes_dense` (after a call), `equivariance_error`,
        `equivariance_error_dense` and `equivariance_ratio` (relative change of energies and forces under
        rotations). `ms_bf16` and `equivariance_error_bf16` are of the dense network with all products in
        bfloat16. None for what the network, the data or the device do not have.
    """
    bf16 = None
    if multiplies_bfloat16(dense.device):
        bf16 = Predictor(dense.checkpoint, dense.device, precision="bf16")
    figures = errors(compact, dense, structures, batch_size)
    one = Batch.from_data_list([unlabelled(structures[0])])
    latency = compare_latency(lambda: compact.predict(one), lambda: dense.predict(one), repeats)
    figures |= {
        "ms": 1e3 * latency.seconds,
        "ms_dense": 1e3 * latency.dense_seconds,
        "ms_ratio": latency.ratio,
        "ms_bf16": None if bf16 is None else _milliseconds(bf16, dense, one, repeats),
        # After calls, which leave what the network keeps for the next one.
        "resident_bytes": resident_bytes(compact.model),
        "resident_bytes_dense": resident_bytes(dense.model),
    }
    turned: list[float | None] = []
    for predictor in (compact, dense, bf16):
        if predictor is None:
            turned.append(None)
            continue
        report = check_symmetries(
            predictor.predict,
            [unlabelled(structure) for structure in structures[:_ROTATED]],
            symmetries=("rotation",),
            trials=_TRIALS,
            seed=seed,
        )
        turned.append(report.errors["rotation"].largest if "rotation" in report.errors else None)
    for name, error in zip(("", "_dense", "_bf16"), turned, strict=True):
        figures[f"equivariance_error{name}"] = error
    figures["equivariance_ratio"] = turned[0] / turned[1] if turned[0] is not None and turned[1] else None
    return figures


def _milliseconds(predictor: Predictor, dense: Predictor, batch: Batch, repeats: int) -> float:
    """Median time of a force call, taken in turns with the dense network's."""
    latency = compare_latency(lambda: predictor.predict(batch), lambda: dense.predict(batch), repeats)
    return 1e3 * latency.seconds


def errors(
    compact: Predictor, dense: Predictor, structures: Sequence[Data], batch_size: int
) -> dict[str, Any]:
    """Measure changes of the answers, and errors against the forces of the structures that have them.

    Returns:
        The figures of `compare` about forces and energies.
    """
    energies: list[torch.Tensor] = []
    changes: list[torch.Tensor] = []
    misses: dict[str, list[torch.Tensor]] = {"compact": [], "dense": []}
    for start in range(0, len(structures), batch_size):
        some = structures[start : start + batch_size]
        batch = Batch.from_data_list([unlabelled(structure) for structure in some])
        new, old = compact.predict(batch), dense.predict(batch)
        energies.append((new["energy"] - old["energy"]).abs())
        if "forces" not in new:
            continue
        free = ~batch.fixed.bool()
        changes.append((new["forces"] - old["forces"])[free].abs().double().flatten())
        # Structures without labels leave those beside them their own.
        labels = torch.cat([structure.get("forces", structure.pos * torch.nan) for structure in some])
        known = free & ~labels.isnan().any(1)
        for name, out in (("compact", new), ("dense", old)):
            misses[name].append((out["forces"][known].double() - labels[known].double()).abs().flatten())

    def mean(values: list[torch.Tensor]) -> float | None:
        numbers = torch.cat(values) if values else torch.empty(0)
        return float(numbers.mean()) if len(numbers) else None

    mae, dense_mae = mean(misses["compact"]), mean(misses["dense"])
    return {
        "force_mae_ratio": mae / dense_mae if mae is not None and dense_mae else None,
        "force_mae_eV_A": mae,
        "force_mae_dense_eV_A": dense_mae,
        "force_change_eV_A": mean(changes),
        "energy_change_eV": mean(energies),
    }
