"""Several networks as one: their mean energy and forces, and how far apart they are."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Data

from equiformer2.batch_threads import map_all
from equiformer2.checkpoint import Checkpoint
from equiformer2.checkpoint.training_data import with_labels_of_all
from equiformer2.errors import InputError
from equiformer2.inference.familiarity import Judgement, combined
from equiformer2.inference.predictor import Predictor, Structures

logger = logging.getLogger(__name__)

Model = Checkpoint | Predictor | str | Path
"""One network: a path, the name of a shipped model, or a loaded one."""


class Committee:
    """Networks trained alike, from other seeds or on other halves of the data, that predict together.

    It has the methods of a `Predictor` that a calculator needs. `checkpoint` is that of the first member. A
    small spread is no proof of a small error: members that were trained on the same data err together. Twins
    of one network (pruned, or in bfloat16) err together most of all: they tell how far rounding and pruning
    move an answer, not how far it is from DFT.

    Args:
        members: at least two, with one kind of energy, one cutoff radius, and forces in all or in none.

    Attributes:
        members: see there.
        precision: of all members, or a list with that of each.

    Raises:
        InputError: the members do not fit together, or two of them are the same network.
    """

    def __init__(self, members: Sequence[Predictor]) -> None:
        if len(members) < 2:
            raise InputError("a committee has at least two checkpoints: give more, or one without a list")
        self.members = list(members)
        self.device = self.members[0].device
        precisions = [member.precision for member in self.members]
        self.precision: str | list[str] = precisions if len(set(precisions)) > 1 else precisions[0]
        self.router = None
        if any(member.router is not None for member in members):
            raise InputError("a router belongs to one network: give the members of a committee without one")
        self._check_alike()
        for number, member in enumerate(self.members):
            for other, earlier in enumerate(self.members[:number]):
                if member.precision == earlier.precision and _same_weights(member, earlier):
                    raise InputError(
                        f"checkpoints {other + 1} and {number + 1} of the committee hold the same weights, "
                        "whose spread would say nothing: give networks of other seeds, or another precision"
                    )

    def _check_alike(self) -> None:
        """Raise `InputError` for members whose mean means nothing, which other adapters may make of them."""
        members = self.members
        for name, values in (
            ("kinds of energy", [member.energy_kind for member in members]),
            ("cutoff radii (Å)", [member.checkpoint.config.max_radius for member in members]),
            ("kinds of forces", [member.checkpoint.config.forces for member in members]),
        ):
            if len(set(values)) > 1:
                raise InputError(
                    f"the checkpoints of a committee have different {name}: {', '.join(map(str, values))}; "
                    "give checkpoints that were trained alike"
                )

    @property
    def checkpoint(self) -> Checkpoint:
        """Checkpoint of the first member, with the adapter that this one uses now."""
        return self.members[0].checkpoint

    @property
    def energy_kind(self) -> str:
        """`"adsorption"` or `"total"`."""
        return self.members[0].energy_kind

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Provenance of the first member's checkpoint, which states the labels of all members."""
        return with_labels_of_all([member.provenance for member in self.members])

    @property
    def has_forces(self) -> bool:
        """True if the members predict forces."""
        return self.members[0].has_forces

    @property
    def energies_apart(self) -> bool:
        """False: a committee has no router."""
        return False

    @property
    def has_stress(self) -> bool:
        """True if all members give stress."""
        return all(member.has_stress for member in self.members)

    @property
    def unseen_elements(self) -> list[str]:
        """Symbols met so far that a member lists as not among its training data."""
        return list(dict.fromkeys(name for member in self.members for name in member.unseen_elements))

    def predict(
        self, batch: Structures, *, energy: bool = True, force_atoms: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Predict with all members, on a CPU side by side; arguments and errors as `Predictor.predict`.

        Returns:
            Means under the names of `Predictor.predict`, and population standard deviations over the members:
            `energy_std` `[B]` eV and `forces_std` `[N, 3]` eV/Å, component by component.
        """

        def predict(member: Predictor) -> dict[str, Tensor]:
            return member.predict(batch, energy=energy, force_atoms=force_atoms)

        self._check_alike()
        outs = map_all(predict, self.members, self.device)
        found = {}
        for name in set.intersection(*(set(out) for out in outs)):
            values = torch.stack([out[name] for out in outs])
            found[name] = values.mean(dim=0)
            if name in ("energy", "forces"):
                found[f"{name}_std"] = values.std(dim=0, correction=0)
        return found

    def judge(self, batch: Structures) -> list[Judgement]:
        """Compare structures with the training data of all members; see `Predictor.judge`."""
        judged = [member.judge(batch) for member in self.members]
        return [combined(one) for one in zip(*judged, strict=True)]

    def warn_of(self, atoms: Atoms) -> None:
        """Log what `Predictor.warn_of` says; the members share their kind of energy."""
        self.members[0].warn_of(atoms)

    def warn_of_unfamiliar(self, structure: Data) -> None:
        """Log what `Predictor.warn_of_unfamiliar` says; members that say the same are heard once."""
        warnings = [member.unfamiliar_warning(structure) for member in self.members]
        for warning in dict.fromkeys(warning for warning in warnings if warning is not None):
            logger.warning(warning)


def open_model(model: Model | Sequence[Model], *settings: Any, **named: Any) -> Predictor | Committee:
    """Make a predictor, or a committee of a list of several models.

    Args:
        model: one model, or a list of them.
        settings, named: further arguments of `Predictor`, for every member that is not loaded yet; an
            `adapter` is one of `named`.

    Raises:
        InputError: as `Predictor` and `Committee`; an empty list; an adapter of several or loaded models.
    """
    models: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
    if not models:
        raise InputError("the list of checkpoints is empty: give at least one")
    if named.get("adapter") is not None and (len(models) != 1 or isinstance(models[0], Predictor)):
        raise InputError(
            "an adapter belongs to one network that is loaded here: give one checkpoint, or call use_adapter "
            "of the predictors"
        )
    members = [one if isinstance(one, Predictor) else Predictor(one, *settings, **named) for one in models]
    return members[0] if len(members) == 1 else Committee(members)


def largest_spread(forces_std: Any, free: Any) -> float:
    """Compute the largest length of the standard deviations of a free atom's force, eV/Å.

    Args:
        forces_std: `[N, 3]` eV/Å.
        free: `[N]` bool; 0.0 without a free atom.
    """
    lengths = ((forces_std**2).sum(axis=1) ** 0.5)[free]
    return float(lengths.max()) if len(lengths) else 0.0


def spread_sentence(spread: float, limit: float) -> str:
    """Say that a relaxation was ended because `spread` (`largest_spread`) exceeds its limit, both eV/Å."""
    return (
        f"the committee's forces on an atom differ by {spread:.3f} eV/Å, more than the {limit:g} of "
        "stop_at_spread"
    )


def _same_weights(one: Predictor, other: Predictor) -> bool:
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].shape == theirs[name].shape and bool((mine[name].cpu() == theirs[name].cpu()).all())
        for name in mine
    )
