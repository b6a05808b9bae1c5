"""What a checkpoint file holds, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from equiformer2.checkpoint.normalizers import Normalizers
from equiformer2.errors import InputError
from equiformer2.model.config import ModelConfig
from equiformer2.values import shown

EnergyKind = Literal["adsorption", "total"]
WeightsKind = Literal["raw", "averaged"]


@dataclass(frozen=True)
class Contents:
    """A checkpoint file, read and translated but not yet made into a network.

    Attributes:
        source: names the file in errors and in the log.
        source_format: `equiformer2`, `ocp-v0`, `fairchem-v1-flat` or `fairchem-v1-hydra`.
        config: of the network.
        weights: `raw` (what the optimizer last wrote), `averaged` (their exponential moving average) or both;
            this network's parameter names.
        normalizers: to eV and eV/Å.
        energy_kind: None when a foreign file does not state it.
        provenance: plain values: where the weights come from.
    """

    source: str
    source_format: str
    config: ModelConfig
    weights: Mapping[WeightsKind, Mapping[str, Tensor]]
    normalizers: Normalizers
    energy_kind: EnergyKind | None
    provenance: dict[str, Any]

    @property
    def available_weights(self) -> tuple[WeightsKind, ...]:
        """The kinds of weights in the file, `raw` first."""
        return tuple(kind for kind in get_args(WeightsKind) if kind in self.weights)

    def choose_weights(self, asked: str | None) -> WeightsKind:
        """`asked`, or the averaged weights when the file has them.

        Raises:
            InputError: if `asked` is no kind of weights, or not in the file.
        """
        if asked is not None and (not isinstance(asked, str) or asked not in get_args(WeightsKind)):
            raise InputError(f"weights must be 'raw' or 'averaged', not {shown(asked)}")
        for kind in (asked,) if asked else ("averaged", "raw"):
            if kind in self.weights:
                return kind  # type: ignore[return-value]
        raise InputError(
            f"{self.source} does not hold {asked} weights, only {' and '.join(self.available_weights)} ones"
        )


def check_energy_kind(value: object, source: str) -> EnergyKind:
    """`value` if it is a kind of energy.

    Raises:
        InputError: naming `source`.
    """
    if not isinstance(value, str) or value not in get_args(EnergyKind):
        raise InputError(f"{source}: energy_kind must be 'adsorption' or 'total', not {shown(value)}")
    return value  # type: ignore[return-value]
