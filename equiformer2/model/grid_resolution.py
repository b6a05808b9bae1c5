"""Points of the S2 grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from equiformer2.errors import InputError


@dataclasses.dataclass(frozen=True)
class GridResolution:
    """Grids of their own for the two places that sample the sphere.

    Attributes:
        attn: latitudes and longitudes in the attention, where the cut |m| <= mmax leaves few orders.
        ffn: those in the feed-forward networks.
    """

    attn: tuple[int, int]
    ffn: tuple[int, int]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> GridResolution:
        """From `{"attn": (latitudes, longitudes), "ffn": (latitudes, longitudes)}`.

        Raises:
            InputError: another key, one that is missing, or no two whole numbers.
        """
        if set(values) != {"attn", "ffn"}:
            raise InputError(
                f"model.grid_resolution has the keys {sorted(map(str, values))}: it must be a number, null, "
                "or have the keys attn and ffn with latitudes and longitudes each"
            )
        pairs = {}
        for key, pair in values.items():
            if (
                not isinstance(pair, Sequence)
                or len(pair) != 2
                or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
            ):
                raise InputError(
                    f"model.grid_resolution.{key} = {pair!r}: must be two whole numbers, "
                    "latitudes and longitudes"
                )
            pairs[key] = (int(pair[0]), int(pair[1]))
        return cls(**pairs)

    def check(self, lmax: int, mmax: int) -> None:
        """Raise `InputError` for a grid that cannot hold degrees up to `lmax` and orders up to `mmax`."""
        for name, (latitudes, longitudes), order in (("attn", self.attn, mmax), ("ffn", self.ffn, lmax)):
            least = 2 * (lmax + 1), 2 * order + 1
            if latitudes < least[0] or latitudes % 2 or longitudes < least[1]:
                raise InputError(
                    f"model.grid_resolution.{name} = {(latitudes, longitudes)}: must have an even "
                    f"number of at least {least[0]} latitudes and at least {least[1]} longitudes"
                )
