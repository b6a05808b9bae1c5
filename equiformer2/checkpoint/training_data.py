"""Data that the weights of a checkpoint have seen, kept under `training_data` of its provenance.

Every training writes one stage, plain values:

    energy_mean_eV, energy_std_eV   of its targets, less the references
    frames, systems                 structures, and different systems (`sid`) among those looked at
    frames_looked_at                of which the rest was counted: all, or 50,000 evenly spaced ones
    elements                        {symbol: frames with it}
    pairs                           {"Cu-O": frames in which such atoms are neighbours}
    adsorbates                      {formula of the atoms with tag 2 ("*CHO"): frames with it}
    substrates                      {elements of the other atoms ("Pt-Cu"): frames with just these}
    labels                          statements of the data files about their labels; may be empty
    earlier                         stages of the checkpoint that the training started from, oldest first;
                                    empty for random weights, null where that checkpoint does not say

Files of earlier versions and of other packages have no such lists. What was seen is then not known, and
nothing is concluded from it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.formula import Formula
from torch import Tensor
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from equiformer2.errors import InputError
from equiformer2.graph import radius_graph

KEY = "training_data"
DENSE_ANSWERS = "answers of the dense network, not of DFT"
"""Labels of a pruned network that was trained on the answers of the network that it is made from."""
#: A structure without an atom of tag 2.
NO_ADSORBATE = "(none)"
#: A structure without any other atom.
NO_SUBSTRATE = "(none)"
#: Å by which neighbours may exceed the sum of their covalent radii (ASE's natural cutoffs with skin).
NEIGHBOUR_SKIN = 0.6
_ADSORBATE = 2
_MOST_STAGES = 1000
_MOST_NEIGHBOURS = 64
_MOST_FOR_PAIRS = 10_000


class Structures(Protocol):
    """A list or dataset of structures."""

    def __len__(self) -> int:
        """Count the structures."""

    def __getitem__(self, index: int, /) -> Any:
        """Return a structure, a data object."""


def adsorbate_formula(atomic_numbers: np.ndarray, tags: np.ndarray) -> str:
    """Write the formula of the atoms with tag 2 in Hill order, as `*CHO`.

    OC20's LMDB files do not name the adsorbate, so isomers (*CHO and *COH) share a formula.

    Args:
        atomic_numbers: `[N]`.
        tags: `[N]`.
    """
    counts = Counter(chemical_symbols[number] for number in atomic_numbers[tags == _ADSORBATE])
    return f"*{Formula.from_dict(counts):hill}" if counts else NO_ADSORBATE


def substrate_elements(atomic_numbers: np.ndarray, tags: np.ndarray) -> str:
    """Join the elements of the atoms that have not tag 2, heaviest first, as `Pt-Cu`.

    Args:
        atomic_numbers: `[N]`.
        tags: `[N]`.

    Returns:
        `NO_SUBSTRATE` where all atoms have tag 2.
    """
    numbers = np.unique(atomic_numbers[tags != _ADSORBATE])[::-1]
    return "-".join(chemical_symbols[number] for number in numbers.tolist()) or NO_SUBSTRATE


def neighbour_pairs(structure: Data | Batch) -> set[str]:
    """Find the pairs of elements that touch, as `Cu-O`, the lighter element last.

    Neighbours are at most `NEIGHBOUR_SKIN` farther apart than the sum of their covalent radii.

    Args:
        structure: one structure, or several whose pairs are put together.
    """
    numbers = structure.atomic_numbers.cpu()
    radii = torch.from_numpy(covalent_radii)[numbers.long()]
    graph = radius_graph(
        structure.pos.detach().cpu().double(),
        structure.cell.cpu(),
        structure.pbc.cpu(),
        torch.as_tensor(structure.natoms).reshape(-1).cpu(),
        max_radius=float(2.0 * radii.max() + NEIGHBOUR_SKIN),
        max_neighbors=_MOST_NEIGHBOURS,
        strict=False,
    )
    source, target = graph.edge_index
    near = graph.distances <= radii[source] + radii[target] + NEIGHBOUR_SKIN
    ends = torch.stack([numbers[source[near]], numbers[target[near]]]).sort(dim=0, descending=True).values
    return {
        f"{chemical_symbols[heavy]}-{chemical_symbols[light]}"
        for heavy, light in torch.unique(ends, dim=1).T.tolist()
    }


def count_contents(structures: Structures, most: int = 50_000) -> dict[str, Any]:
    """Count systems, elements, pairs of neighbours, adsorbates and substrates, as a stage of training lists.

    Pairs take longest: they are looked for in at most 10,000 structures. A structure whose neighbours cannot
    be found adds none; what uses it says why.

    Args:
        structures: with `tags` and `sid`; a list or dataset.
        most: number of structures to look at, evenly spaced.

    Returns:
        `systems`, `frames_looked_at`, `elements`, `pairs`, `adsorbates` and `substrates` of a stage.
    """
    looked_at = np.linspace(0, len(structures) - 1, min(most, len(structures))).astype(np.int64).tolist()
    every = -(-len(looked_at) // _MOST_FOR_PAIRS)
    systems: set[str] = set()
    elements: Counter[int] = Counter()
    pairs: Counter[str] = Counter()
    adsorbates: Counter[str] = Counter()
    substrates: Counter[str] = Counter()
    for place, index in enumerate(tqdm(looked_at, "elements and pairs", disable=None, leave=False, delay=5)):
        structure = structures[index]
        numbers = structure.atomic_numbers.numpy()
        systems.add(str(structure.sid))
        elements.update(np.unique(numbers).tolist())
        if place % every == 0:
            with suppress(InputError):
                pairs.update(neighbour_pairs(structure))
        adsorbates[adsorbate_formula(numbers, structure.tags.numpy())] += 1
        substrates[substrate_elements(numbers, structure.tags.numpy())] += 1
    adsorbates.pop(NO_ADSORBATE, None)
    substrates.pop(NO_SUBSTRATE, None)
    return {
        "systems": len(systems),
        "frames_looked_at": len(looked_at),
        "elements": {chemical_symbols[number]: elements[number] for number in sorted(elements)},
        "pairs": dict(sorted(pairs.items())),
        "adsorbates": dict(sorted(adsorbates.items())),
        "substrates": dict(sorted(substrates.items())),
    }


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

    @property
    def pairs(self) -> dict[str, int] | None:
        """Frames by pair of neighbouring elements over all stages; None if not known."""
        return self._counted("pairs")

    @property
    def adsorbates(self) -> dict[str, int] | None:
        """Frames by formula of the adsorbate over all stages; None if not known."""
        return self._counted("adsorbates")

    @property
    def substrates(self) -> dict[str, int] | None:
        """Frames by elements of the substrate over all stages; None if not known."""
        return self._counted("substrates")

    @property
    def counted_in_part(self) -> bool:
        """True if a stage looked at some of its frames only, so that its lists may lack something."""
        return any(
            isinstance(looked_at := stage.get("frames_looked_at"), int)
            and looked_at != stage.get("frames", looked_at)
            for stage in self.stages or ()
        )

    def _counted(self, name: str) -> dict[str, int] | None:
        frames: Counter[str] = Counter()
        for stage in self.stages or ():
            counts = stage.get(name)
            if not isinstance(counts, Mapping) or not all(type(count) is int for count in counts.values()):
                return None
            frames.update(counts)
        return None if self.stages is None else dict(frames)

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


def with_labels_of_all(provenances: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Provenance of the first of several networks, whose last training states the labels of all.

    Labels that are the answers of a dense network are those of another member and add none.

    Args:
        provenances: of the members of a committee.
    """
    labels: list[str] = []
    for one in provenances:
        last = (TrainingData(one).stages or [{}])[-1]
        labels += [str(label) for label in last.get("labels") or () if label != DENSE_ANSWERS]
    first = provenances[0]
    own = TrainingData(first).stages
    if not labels:
        return first
    last = own[-1] if own else {"elements": {}}
    earlier = first[KEY]["earlier"] if own else []
    stage = {**last, "labels": list(dict.fromkeys(labels)), "earlier": earlier}
    return {**first, KEY: stage}


def validation_errors(provenance: Mapping[str, Any]) -> dict[str, float]:
    """Read the errors on the validation data of the training that made the weights.

    Returns:
        `energy_mae_eV` and `forces_mae_eV_A` (by component); without what the provenance does not tell.
    """
    values = provenance.get("validation")
    found = {}
    for name, key in (("energy_mae", "energy_mae_eV"), ("forces_mae", "forces_mae_eV_A")):
        value = values.get(name) if isinstance(values, Mapping) else None
        if isinstance(value, float) and 0.0 <= value < float("inf"):
            found[key] = value
    return found


def inherited(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a provenance that a network made from the weights keeps, such as a pruned one."""
    return {KEY: provenance[KEY]} if KEY in provenance else {}
