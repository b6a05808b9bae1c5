"""Points of the S2 grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from equiformer2.errors import InputError
from equiformer2.values import Whole, shown

_POINTS = Whole(1, 256)


@dataclasses.dataclass(frozen=True)
class GridResolution:
    """Grids of their own for the two places that sample the sphere.

    Attributes:
        attn: latitudes and longitudes in the attention, where the cut |m| <= mmax leaves few orders.
        ffn: those in the feed-forward networks.
    """

    attn: tuple[int, int]
    ffn: tuple[int, int]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name = f"model.grid_resolution.{field.name}"
            pair = getattr(self, field.name)
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise InputError(
                    f"{name} = {shown(pair)}: must be two whole numbers, latitudes and longitudes"
                )
            object.__setattr__(self, field.name, tuple(_POINTS.read(each, name) for each in pair))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> GridResolution:
        """From `{"attn": (latitudes, longitudes), "ffn": (latitudes, longitudes)}`.

        Raises:
            InputError: another key, one that is missing, or no two whole numbers.
        """
        if set(values) != {"attn", "ffn"}:
            raise InputError(
                f"model.grid_resolution has the keys {shown([str(key) for key in values])}: it must be a "
                "number, null, or have the keys attn and ffn with latitudes and longitudes each"
            )
        return cls(**values)

    def check(self, lmax: int, mmax: int) -> None:
        """Raise `InputError` for a grid that cannot hold degrees up to `lmax` and orders up to `mmax`."""
        for name, (latitudes, longitudes), order in (("attn", self.attn, mmax), ("ffn", self.ffn, lmax)):
            least = 2 * (lmax + 1), 2 * order + 1
            if latitudes < least[0] or latitudes % 2 or longitudes < least[1]:
                raise InputError(
                    f"model.grid_resolution.{name} = {(latitudes, longitudes)}: must have an even "
                    f"number of at least {least[0]} latitudes and at least {least[1]} longitudes"
                )


class Grids:
    """Rule of `ModelConfig.grid_resolution`: one number for both grids, None, or a `GridResolution`."""

    def read(self, value: Any, name: str) -> int | GridResolution | None:
        """See `values.Rule`."""
        if value is None or isinstance(value, GridResolution):
            return value
        return GridResolution.read(value) if isinstance(value, Mapping) else _POINTS.read(value, name)
