"""Derived constants that reference files hold beside their parameters, recomputed and compared.

The reference registers its coefficient mappings, sphere grids and index tables as buffers, and shares the
modules that own them, so that one constant appears under many names: 4,455 keys for 370 parameters in the
public 31M file. Names here are without prefix, as in `EquiformerV2.state_dict()`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.model.config import ModelConfig
from equiformer2.model.so3.grid import grid_matrices, m_major_order

TOLERANCE = 1e-6
"""Largest allowed difference, relative to the constant's largest entry (or 1 where that is smaller)."""
_SHOWN = 12
"""Largest number of names in a message."""

_MAPPING = "l_harmonic|m_harmonic|m_complex|res_size|to_m|m_size"
_ATTENTION = r"(?:blocks\.\d+\.ga|force_block)"
_FEED_FORWARD = r"(?:blocks\.\d+\.ffn|energy_block)"
_NORM = r"(?:blocks\.\d+\.norm_[12]|norm)"
_GRID_OWNER = rf"(?:(?:{_ATTENTION}|{_FEED_FORWARD})\.)?"
_ROTATION_OWNER = rf"(?:(?:edge_degree_embedding|{_ATTENTION})\.)?"
_REDUCED_OWNER = rf"(?:(?:edge_degree_embedding|{_ATTENTION}(?:\.so2_conv_[12])?)\.)?"

_PATTERNS = {
    "gaussian": re.compile(r"distance_expansion\.offset"),
    "grid": re.compile(rf"{_GRID_OWNER}SO3_grid\.(\d+)\.(\d+)\.(to_grid_mat|from_grid_mat)"),
    "grid_mapping": re.compile(rf"{_GRID_OWNER}SO3_grid\.(\d+)\.(\d+)\.mapping\.({_MAPPING})"),
    "rotation_mapping": re.compile(rf"{_ROTATION_OWNER}SO3_rotation\.0\.mapping\.({_MAPPING})"),
    "reduced_mapping": re.compile(rf"{_REDUCED_OWNER}mappingReduced\.({_MAPPING})"),
    "attention_gate": re.compile(rf"{_ATTENTION}\.gate_act\.expand_index"),
    "feed_forward_gate": re.compile(rf"{_FEED_FORWARD}\.gate_act\.expand_index"),
    "degrees": re.compile(
        rf"(?:{_ATTENTION}(?:\.proj)?|{_FEED_FORWARD}\.so3_linear_[12]|{_NORM})\.expand_index"
    ),
    "balance": re.compile(rf"{_NORM}\.balance_degree_weight"),
}


def is_derived_constant(name: str) -> bool:
    """Tell whether `name` (without prefix) is one of the reference's buffers rather than a parameter."""
    return any(pattern.fullmatch(name) for pattern in _PATTERNS.values())


def verify_constants(config: ModelConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that every derived constant of a reference file equals the one this network computes with.

    Args:
        config: configuration of the network.
        tensors: constants by name, all of them with `is_derived_constant(name)`.
        source: name of the file, for errors.

    Raises:
        InputError: listing the names whose shape or value differs.
    """

    def agrees(given: Tensor, expected: Tensor | None) -> bool:
        if expected is None or given.shape != expected.shape or given.is_complex() or given.is_quantized:
            return False
        if given.dtype == expected.dtype == torch.int64:
            return torch.equal(given, expected)
        given, expected = given.double(), expected.double()
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        # `not >` would let NaN through.
        return bool(((given - expected).abs() <= TOLERANCE * scale).all())

    constants = ReferenceConstants(config)
    wrong = [name for name, tensor in tensors.items() if not agrees(tensor, constants[name])]
    if wrong:
        raise InputError(
            f"{source}: {len(wrong)} derived constants differ from what its configuration implies "
            f"(the file is damaged or belongs to another model): {shorten(wrong)}"
        )


def shorten(names: list[str]) -> str:
    """Join at most 12 names, as in `a, b, c and 5 more`."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


class ReferenceConstants:
    """Buffers of the reference for one configuration, by name; None for a name that it would not have.

    Args:
        config: configuration of the network.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __getitem__(self, name: str) -> Tensor | None:
        """Compute the buffer `name` (without prefix)."""
        config = self.config
        for kind, pattern in _PATTERNS.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            if kind == "gaussian":
                return torch.linspace(0.0, config.max_radius, config.num_distance_basis)
            if kind in ("grid", "grid_mapping"):
                degree, order, table = int(match[1]), int(match[2]), match[3]
                if degree > config.lmax or order > config.lmax:
                    return None
                # The grid's own mapping covers every order of its degrees, whatever `order` says.
                return (
                    _grid(degree, order, config.ffn_grid)[table]
                    if kind == "grid"
                    else coefficient_mapping(degree, degree)[table]
                )
            if kind == "rotation_mapping":
                return coefficient_mapping(config.lmax, config.lmax)[match[1]]
            if kind == "reduced_mapping":
                return coefficient_mapping(config.lmax, config.mmax)[match[1]]
            if kind == "attention_gate":
                return self._gate_index(config.mmax)
            if kind == "feed_forward_gate":
                return self._gate_index(config.lmax)
            if kind == "degrees":
                return coefficient_mapping(config.lmax, config.lmax)["l_harmonic"]
            return self._balance
        return None

    def _gate_index(self, mmax: int) -> Tensor:
        """Degree less one of every coefficient with l > 0 and |m| <= `mmax`."""
        degrees = coefficient_mapping(self.config.lmax, mmax)["l_harmonic"]
        return degrees[degrees > 0] - 1

    @cached_property
    def _balance(self) -> Tensor | None:
        """Weights that give each degree the same share of the norm; `layer_norm_sh` leaves out l = 0."""
        first = {"layer_norm_sh": 1, "rms_norm_sh": 0}.get(self.config.norm_type)
        if first is None:
            return None
        widths = [2 * degree + 1 for degree in range(first, self.config.lmax + 1)]
        return torch.tensor([1.0 / width / len(widths) for width in widths for _ in range(width)]).unsqueeze(
            1
        )


@lru_cache(maxsize=64)
def coefficient_mapping(lmax: int, mmax: int) -> dict[str, Tensor]:
    """Build the reference's tables for the coefficients l <= lmax, |m| <= min(mmax, l), by l, then m.

    Args:
        lmax: largest degree.
        mmax: largest order.

    Returns:
        `l_harmonic`, `m_harmonic` (|m|), `m_complex` (m) `[R]`; `res_size` `[1]` = R; `m_size` `[mmax + 1]`:
        degrees per |m|; `to_m` `[R, R]`: the permutation to the order |m|, sign (+ first), l.
    """
    degrees = [degree for degree in range(lmax + 1) for _ in range(2 * min(mmax, degree) + 1)]
    orders = [m for degree in range(lmax + 1) for m in range(-min(mmax, degree), min(mmax, degree) + 1)]
    size = len(degrees)
    position = {
        degree * degree + degree + m: i for i, (degree, m) in enumerate(zip(degrees, orders, strict=True))
    }
    to_m = torch.zeros(size, size)
    to_m[torch.arange(size), torch.tensor([position[i] for i in m_major_order(lmax, mmax)])] = 1.0
    return {
        "l_harmonic": torch.tensor(degrees),
        "m_harmonic": torch.tensor(orders).abs(),
        "m_complex": torch.tensor(orders),
        "res_size": torch.tensor([size]),
        "to_m": to_m,
        "m_size": torch.tensor([orders.count(m) for m in range(mmax + 1)]),
    }


@lru_cache(maxsize=128)
def _grid(lmax: int, mmax: int, resolution: int | tuple[int, int] | None) -> dict[str, Tensor]:
    """Build both grid matrices, `[latitude, longitude, R]`; the reference also has pairs mmax > lmax."""
    to_grid, from_grid = grid_matrices(lmax, mmax, resolution)
    is_kept = coefficient_mapping(lmax, lmax)["m_harmonic"] <= mmax
    return {"to_grid_mat": to_grid[..., is_kept], "from_grid_mat": from_grid[..., is_kept]}
