"""Read from a file of experts those that a structure needs: the nearest set, merged and kept in a cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from equiformer2.checkpoint.expert_files import ExpertFile, TaskInfo
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.weights import build_model
from equiformer2.errors import InputError
from equiformer2.experts import scores
from equiformer2.experts.cache import BoundedCache
from equiformer2.experts.composition import composition_of, shares_by_symbol, unseen_elements
from equiformer2.experts.dropped import DroppedExperts
from equiformer2.experts.gate import ExpertGate
from equiformer2.experts.merge import save_merged
from equiformer2.experts.network import merge_weights
from equiformer2.experts.prune import PruneSettings, task_compositions, task_structures
from equiformer2.experts.sets import ExpertSet, Match, Per, make_sets, nearest, nearest_composition
from equiformer2.experts.settings import ExpertSettings
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.values import shown

DEFAULT_CACHE = 1 << 30
_DEFAULT_KEEP = 0.5


@dataclass(frozen=True)
class Retrieval:
    """Choice of experts for one structure.

    Attributes:
        match: the nearest set, and how near it is.
        composition: `[Z]` shares of the structure.
        coefficients: `[M]` of the experts of the set, scaled to add up to 1.
        kept_share: sum of their coefficients before.
        unseen: symbols that no training structure of the task has.
        excess: bound of the change by the pruning of the file, where it is larger than those of the task's
            structures; else None.
    """

    match: Match
    composition: Tensor
    coefficients: Tensor
    kept_share: float
    unseen: tuple[str, ...]
    excess: float | None

    @property
    def task(self) -> str:
        """Task of the set."""
        return self.match.chosen.task

    @property
    def experts(self) -> tuple[int, ...]:
        """Numbers of the experts."""
        return self.match.chosen.experts

    def warnings(self) -> list[str]:
        """Say what is unlike the training data of the task."""
        told = []
        if self.unseen:
            told.append(f"{', '.join(self.unseen)} not among the training data of {self.task}")
        if self.match.far:
            told.append(f"a composition that is farther from those of {self.task} than these are")
        if self.match.tied:
            told.append(f"{self.match.second} is as near as {self.task}: name the task that is wanted")
        if self.excess is not None:
            told.append(f"worse than the bound with which the file was pruned ({self.excess:.4g})")
        return told


class ExpertStore:
    """File of experts of which gate and tasks are in memory, and experts are read when they are needed.

    The sets follow from the gate and from the structures that the file holds of every task
    (`experts.sets.make_sets`).

    Args:
        path: the file.
        keep: share of the experts in a set; None for a half, or for all those of a pruned file.
        per: one set per task, or one per composition of every task.
        top: k of TCESS; None for a quarter of the experts.
        weights: `raw`, `averaged`, or None for the averaged ones where the file has them.
        cache_bytes: most bytes of the merged networks that are kept.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: no file of experts, or a value out of its range.

    Attributes:
        sets: all of them.
        tasks: by name.
        cache: merged networks by task, composition and experts.
        loaded_bytes: bytes of the weights that the last reading from the file took.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keep: float | None = None,
        per: Per = "task",
        top: int | None = None,
        weights: str | None = None,
        cache_bytes: int = DEFAULT_CACHE,
    ) -> None:
        self.cache: BoundedCache[EquiformerV2] = BoundedCache(cache_bytes)
        self._file = ExpertFile(path)
        head = self._file.read(only=(), weights=weights)
        self.path, self.config, self.provenance = Path(path), head.config, head.provenance
        self.tasks: dict[str, TaskInfo] = dict(head.tasks)
        self.weights = head.choose_weights(weights)
        self.loaded_bytes = 0
        try:
            settings = ExpertSettings(**head.settings)
        except (InputError, TypeError) as error:
            raise InputError(f"{path}: the settings of its experts are not valid: {error}") from error
        self.num_experts = settings.num_experts
        self._dropped = DroppedExperts.from_provenance(head.provenance, str(path), self.weights)
        if keep is None and self._dropped is not None:
            number = self.num_experts
        else:
            number = scores.number_kept(_DEFAULT_KEEP if keep is None else keep, self.num_experts)
        size = len(self.tasks), head.config.max_num_elements
        self.gate = ExpertGate.from_state(settings, *size, head.weights[self.weights].gate, str(path))
        compositions = {
            name: task_compositions(info, task_structures(info)) for name, info in self.tasks.items()
        }
        answers = {name: self._answers(shares) for name, shares in compositions.items()}
        leading = PruneSettings(top=top).leading(self.num_experts)
        self.sets: list[ExpertSet] = make_sets(answers, compositions, number, leading, per)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the file so far."""
        return self._file.bytes_read

    def _answers(self, compositions: Tensor) -> Tensor:
        """Coefficients `[systems, tasks, K]` of compositions `[systems, Z]` for every task."""
        with torch.no_grad():
            found = [
                self.gate.coefficients(compositions, torch.full((len(compositions),), number))
                for number in range(len(self.tasks))
            ]
        return torch.stack(found, dim=1)

    def choose_tasks(self, patterns: Sequence[str] | None) -> list[str]:
        """Select tasks by patterns of their names (`*` stands for anything); None for all.

        Raises:
            InputError: a pattern fits no task; the known ones are named.
        """
        if patterns is not None and (isinstance(patterns, str) or not patterns):
            raise InputError(f"tasks are chosen by a list of names or patterns, not by {shown(patterns)}")
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in self.tasks):
                raise InputError(
                    f"{self.path} has no task {shown(pattern)}: its tasks are {', '.join(self.tasks)}"
                )
        if patterns is None:
            return list(self.tasks)
        return [name for name in self.tasks if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def find(
        self, structure: Data, among: Sequence[str] | None = None, by_composition: bool = False
    ) -> Retrieval:
        """Find the nearest set of experts for a structure; nothing is read.

        Args:
            structure: one structure; labels are not read.
            among: patterns of the tasks to choose from, such as those with the wanted kind of labels; None
                for all.
            by_composition: compare compositions themselves, the baseline.

        Raises:
            InputError: an unknown task, or an element that no task has.
        """
        names = self.choose_tasks(among)
        composition = composition_of(structure, self.config.max_num_elements)
        if len(composition) != 1:
            raise InputError(f"experts are found for one structure at a time, not for {len(composition)}")
        unseen = {name: unseen_elements(self.tasks[name], composition[0]) for name in names}
        nowhere = [each for each in unseen[names[0]] if all(each in others for others in unseen.values())]
        if nowhere:
            raise InputError(
                f"no task of {self.path} was trained on {', '.join(nowhere)}, which the structure holds: use "
                "a network that was"
            )
        sets = [each for each in self.sets if each.task in names]
        answers = self._answers(composition)[0]
        if by_composition:
            match = nearest_composition(sets, composition[0])
        else:
            match = nearest(sets, answers.flatten())
        number = list(self.tasks).index(match.chosen.task)
        own = answers[number][None].double()
        excess = None
        if self._dropped is not None:
            excess = self._dropped.excess(self.gate, number, composition[0])
        return Retrieval(
            match,
            composition[0],
            scores.renormalized(own, match.chosen.experts)[0],
            float(own[0, list(match.chosen.experts)].sum()),
            tuple(unseen[match.chosen.task]),
            excess,
        )

    def network(self, found: Retrieval) -> EquiformerV2:
        """Merge the experts of a set for the structure's composition; read what is missing.

        The network is in evaluation mode and answers in normalised units of its task (`tasks`).

        Args:
            found: of `find`.
        """
        present = found.composition.nonzero().flatten().tolist()
        shares = tuple((number, float(found.composition[number])) for number in present)
        return self.cache.get((found.task, shares, found.experts), lambda: self._merge(found))

    def _merge(self, found: Retrieval) -> tuple[EquiformerV2, int]:
        part = self._file.read(found.experts, self.weights, [found.task])
        weights = part.weights[self.weights]
        self.loaded_bytes = sum(
            tensor.numel() * tensor.element_size()
            for group in weights.groups().values()
            for tensor in group.values()
        )
        network = build_model(part.config, merge_weights(weights, found.coefficients, 0), str(self.path))
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.parameters())
        return network.eval(), size

    def write(self, found: Retrieval, out: str | os.PathLike[str]) -> None:
        """Write an ordinary checkpoint of the merged experts.

        Args:
            found: of `find`.
            out: native checkpoint to write.

        Raises:
            OSError: `out` cannot be written.
        """
        of_experts: dict[str, Any] = {
            "file": self.path.name,
            "sha256": sha256(self.path),
            "task": found.task,
            "composition": shares_by_symbol(found.composition),
            "composition_from": "a structure",
            "coefficients": found.coefficients.tolist(),
            "experts": list(found.experts),
            "unseen_elements": list(found.unseen),
        }
        if self._dropped is not None:
            of_experts["excess_of_bound"] = found.excess
        info, network = self.tasks[found.task], self.network(found)
        save_merged(out, network, info, self.weights, self.provenance, of_experts)

    def describe(self, found: Retrieval) -> dict[str, Any]:
        """Return plain values of a retrieval, for a record."""
        match = found.match
        return {
            "task": found.task,
            "energy_kind": self.tasks[found.task].energy_kind,
            "experts": list(found.experts),
            "num_experts": self.num_experts,
            "coefficients": found.coefficients.tolist(),
            "kept_share": found.kept_share,
            "distance": match.distance,
            "reach": match.chosen.reach,
            "far": match.far,
            "tied": match.tied,
            "unseen_elements": list(found.unseen),
            "worse_than_bound": found.excess is not None,
            "second": None
            if match.second is None
            else {"task": match.second, "distance": match.second_distance},
            "weights": self.weights,
        }
