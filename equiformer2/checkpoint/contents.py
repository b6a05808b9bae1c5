"""Content of a checkpoint file of any format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from equiformer2.checkpoint.normalizers import Normalizers
from equiformer2.checkpoint.surroundings import Surroundings
from equiformer2.errors import InputError
from equiformer2.model.config import ModelConfig
from equiformer2.values import shown

EnergyKind = Literal["adsorption", "total"]
WeightsKind = Literal["raw", "averaged"]


@dataclass(frozen=True)
class Contents:
    """A checkpoint file, read and translated but not yet made into a network.

    Attributes:
        source: name of the file, for errors and the log.
        source_format: `equiformer2`, `ocp-v0`, `fairchem-v1-flat` or `fairchem-v1-hydra`.
        config: of the network.
        weights: `raw` (what the optimizer last wrote), `averaged` (their exponential moving average) or both;
            this network's parameter names. A `CompactState` holds some of them in fewer bytes.
        normalizers: to eV and eV/Å.
        energy_kind: None when a foreign file does not state it.
        provenance: plain values: where the weights come from.
        surroundings: of the atoms that the weights were trained on; None where the file does not hold them.
    """

    source: str
    source_format: str
    config: ModelConfig
    weights: Mapping[WeightsKind, Mapping[str, Tensor]]
    normalizers: Normalizers
    energy_kind: EnergyKind | None
    provenance: dict[str, Any]
    surroundings: Surroundings | None = None

    @property
    def available_weights(self) -> tuple[WeightsKind, ...]:
        """The kinds of weights in the file, `raw` first."""
        return tuple(kind for kind in get_args(WeightsKind) if kind in self.weights)

    def choose_weights(self, kind: str | None) -> WeightsKind:
        """Return the kind of weights to use.

        Args:
            kind: `raw`, `averaged`, or None for the averaged weights where the file has them.

        Raises:
            InputError: if `kind` is no kind of weights, or not in the file.
        """
        if kind is not None and (not isinstance(kind, str) or kind not in get_args(WeightsKind)):
            raise InputError(f"weights must be 'raw' or 'averaged', not {shown(kind)}")
        for candidate in (kind,) if kind else ("averaged", "raw"):
            if candidate in self.weights:
                return candidate  # type: ignore[return-value]
        raise InputError(
            f"{self.source} does not hold {kind} weights, only {' and '.join(self.available_weights)} ones"
        )

    def surroundings_of(self, kind: str) -> Surroundings | None:
        """Return the surroundings if the weights `kind` gave them: others see the same atoms differently."""
        return (
            self.surroundings if self.surroundings is not None and self.surroundings.weights == kind else None
        )

    def with_energy_kind(self, kind: str | None) -> Contents:
        """Return the contents with a given kind of energy.

        Args:
            kind: `adsorption` or `total`; None leaves the contents unchanged.

        Raises:
            InputError: if `kind` is no kind of energy, or the file states another one.
        """
        if kind is None:
            return self
        checked = check_energy_kind(kind, self.source)
        if self.energy_kind is None:
            provenance = self.provenance | {"energy_kind_from": "given on import"}
            return dataclasses.replace(self, energy_kind=checked, provenance=provenance)
        if checked != self.energy_kind:
            origin = self.provenance.get("energy_kind_from")
            known = f" (known from {origin})" if origin and self.source_format != "equiformer2" else ""
            raise InputError(
                f"{self.source} predicts {self.energy_kind} energies{known}; {checked} energies were asked "
                "for"
            )
        return self


def check_energy_kind(value: object, source: str) -> EnergyKind:
    """Return `value` if it is a kind of energy.

    Args:
        value: `adsorption` or `total`.
        source: names the file in the error.

    Raises:
        InputError: if it is anything else.
    """
    if not isinstance(value, str) or value not in get_args(EnergyKind):
        raise InputError(f"{source}: energy_kind must be 'adsorption' or 'total', not {shown(value)}")
    return value  # type: ignore[return-value]
