"""Data that the weights of a checkpoint have seen, kept under `training_data` of its provenance.

Every training writes one stage, plain values:

    energy_mean_eV, energy_std_eV   of its targets, less the references
    frames, systems                 structures, and different systems (`sid`) among those looked at
    frames_looked_at                of which the rest was counted: all, or 50,000 evenly spaced ones
    elements                        {symbol: frames with it}
    adsorbates                      {formula of the atoms with tag 2 ("*CHO"): frames with it}
    labels                          statements of the data files about their labels; may be empty
    earlier                         stages of the checkpoint that the training started from, oldest first;
                                    empty for random weights, null where that checkpoint does not say

Files of earlier versions and of other packages have no such lists. What was seen is then not known, and
nothing is concluded from it.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

KEY = "training_data"
_MOST_STAGES = 1000


class TrainingData:
    """Stages of training behind a checkpoint, as its provenance tells them.

    Values of a file are data of others: lists that cannot be read count as not known.

    Args:
        provenance: of the checkpoint.

    Attributes:
        stages: one dictionary per training, oldest first; None where one of them is not known.
    """

    def __init__(self, provenance: Mapping[str, Any]) -> None:
        self.stages: list[Mapping[str, Any]] | None = None
        last = provenance.get(KEY)
        earlier = last.get("earlier") if isinstance(last, Mapping) else None
        if not isinstance(earlier, list) or len(earlier) > _MOST_STAGES:
            return
        stages = [*earlier, last]
        if all(isinstance(stage, Mapping) and self._lists_elements(stage) for stage in stages):
            self.stages = stages

    @staticmethod
    def _lists_elements(stage: Mapping[str, Any]) -> bool:
        elements = stage.get("elements")
        return isinstance(elements, Mapping) and all(
            symbol in atomic_numbers and type(count) is int and count > 0
            for symbol, count in elements.items()
        )

    @property
    def elements(self) -> dict[str, int] | None:
        """Frames by element over all stages, in the order of the periodic table; None if not known."""
        if self.stages is None:
            return None
        frames: Counter[str] = Counter()
        for stage in self.stages:
            frames.update(stage["elements"])
        return {symbol: frames[symbol] for symbol in sorted(frames, key=chemical_symbols.index)}

    def unseen(self, size: int) -> Tensor | None:
        """Mark the elements that no training has seen.

        Args:
            size: of the network's element table.

        Returns:
            `[size]` bool by atomic number, None where it is not known or nothing is unseen.
        """
        elements = self.elements
        if not elements:
            return None
        marks = torch.ones(size, dtype=torch.bool)
        marks[[number for symbol in elements if (number := atomic_numbers[symbol]) < size]] = False
        return marks

    def before(self) -> list[Mapping[str, Any]] | None:
        """Return the `earlier` of a training that starts from this checkpoint: its stages, each by itself."""
        if self.stages is None:
            return None
        return [{name: value for name, value in stage.items() if name != "earlier"} for stage in self.stages]


def inherited(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a provenance that a network made from the weights keeps, such as a pruned one."""
    return {KEY: provenance[KEY]} if KEY in provenance else {}
