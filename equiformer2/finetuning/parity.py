"""Predictions beside labels, frame by frame, and their figure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch_geometric.data import Data

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Normalizers
from equiformer2.training.figures import draw_diagonal, save_figure

#: Force components kept per frame, evenly spaced; frames kept in all.
_COMPONENTS, _FRAMES = 60, 2000


@dataclass
class ParityPairs:
    """Labels and predictions of one network.

    Attributes:
        references: of total energies, which are kept less these and per atom, because energies of different
            compositions would hide every error behind their size; None for adsorption energies.
        energies: `[label, prediction]` per frame, eV.
        forces: likewise for force components of free atoms, eV/Å; a sample.
    """

    references: Normalizers | None
    energies: list[list[float]] = field(default_factory=list)
    forces: list[list[float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, list[list[float]]]:
        """Return the pairs as plain values."""
        return {"energies": self.energies, "forces": self.forces}

    def add(
        self,
        atomic_numbers: Tensor,
        energy: tuple[float, float],
        forces: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Add a frame; those beyond the first thousands are not kept.

        Args:
            atomic_numbers: `[N]`.
            energy: label and prediction, eV; a prediction that is NaN is left out.
            forces: labels and predictions `[n, 3]` of free atoms, eV/Å.
        """
        if max(len(self.energies), len(self.forces) // _COMPONENTS) >= _FRAMES:
            return
        zero, share = 0.0, 1
        if self.references is not None:
            zero = float(self.references.reference_energy(Data(atomic_numbers=atomic_numbers), 1)[0])
            share = len(atomic_numbers)
        if np.isfinite(energy[1]):
            self.energies.append([(value - zero) / share for value in energy])
        pairs = np.stack([part.reshape(-1) for part in forces], axis=1)
        self.forces += pairs[:: max(1, -(-len(pairs) // _COMPONENTS))].tolist()


def draw(
    networks: Mapping[str, Mapping[str, list[list[float]]]],
    errors: Mapping[str, Mapping[str, Any]],
    is_total: bool,
    target: AnyPath,
) -> None:
    """Draw energies and force components against their labels, one colour per network.

    Args:
        networks: `energies` and `forces` of `ParityPairs`, by name of the network; the last lies on top, and
            the axes are made for it: points of others may lie outside.
        errors: `energy_mae_eV`, `energy_mae_eV_per_atom` and `force_mae_eV_A`, by the same names.
        is_total: whether energies are total energies.
        target: PNG file to write.
    """
    panels = [
        (
            "energies",
            "energy less references (eV/atom)" if is_total else "adsorption energy (eV)",
            "energy_mae_eV_per_atom" if is_total else "energy_mae_eV",
        ),
        ("forces", "force component (eV/Å)", "force_mae_eV_A"),
    ]
    panels = [panel for panel in panels if any(pairs[panel[0]] for pairs in networks.values())]
    if not panels:
        return
    figure = Figure(figsize=(4.6 * len(panels), 4.3), layout="constrained")
    for axis, (key, label, error) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        shown = {name: np.array(pairs[key]) for name, pairs in networks.items() if pairs[key]}
        draw_diagonal(axis, list(shown.values())[-1].reshape(-1))
        for number, (name, pairs) in enumerate(shown.items()):
            mae = errors[name][error]
            note = "" if mae is None else f", MAE {mae:.4f}"
            colour = "0.65" if name == "before" else f"C{number}"
            style = {"markersize": 3, "alpha": 0.5, "color": colour, "rasterized": True}
            axis.plot(*pairs.T, ".", label=f"{name}{note}", **style)
        axis.set(xlabel=f"label: {label}", ylabel="prediction")
        axis.legend(fontsize="small", markerscale=2)
        axis.grid(alpha=0.3)
    save_figure(figure, target)
