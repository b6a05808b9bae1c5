"""Multiply-accumulate operations and parameters of a network, counted from its shapes.

Counted are the matrix products of a forward pass, in the arrangement in which they are executed: the SO(2)
maps of an order m > 0 with three real products (Gauss; `complex_products=4` counts them as paper Equation 2
writes them), rotations by the non-zero blocks of the Wigner-D matrices with |m| <= mmax alone, both outer
layers of the grid MLP on coefficients rather than grid points, and of the heads what is read. The S2
activation counts as products with the grid's matrices, which the C++ kernel takes by their factors. Norms,
softmax and other element-wise work are not counted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import Activation, ModelConfig
from equiformer2.model.parameters import count_parameters, num_gates
from equiformer2.model.so3.grid import smallest_resolution

#: Parts of a block; heads have some of them.
PARTS = (
    *("radial", "rotation", "convolution_1", "activation", "convolution_2", "projection"),
    "feed_forward",
)


class Plan(Protocol):
    """Cuts as costs see them: a change of the configuration (`structured.PruningPlan`)."""

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of the smaller network."""


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulate operations of one forward pass.

    Attributes:
        blocks: operations per block and part (`PARTS`).
        edge_degree: operations of the edge-degree embedding.
        energy_head: operations of the energy head.
        force_head: operations of the force head per part; empty without one.
        parameters: parameters of the whole network, those that no output depends on included.
    """

    blocks: tuple[Mapping[str, int], ...]
    edge_degree: int
    energy_head: int
    force_head: Mapping[str, int]
    parameters: int

    @property
    def total(self) -> int:
        """Operations of the whole network."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Operations by part, summed over blocks, then `edge_degree`, `energy_head` and `force_head`."""
        parts = {part: sum(block.get(part, 0) for block in self.blocks) for part in PARTS}
        heads = {"energy_head": self.energy_head, "force_head": sum(self.force_head.values())}
        return parts | {"edge_degree": self.edge_degree} | heads


def count_macs(
    network: ModelConfig | EquiformerV2,
    atoms: int,
    edges: int,
    plan: Plan | None = None,
    complex_products: int = 3,
) -> MacCount:
    """Count the operations of a forward pass of `network`, or of the smaller network of `plan`.

    Args:
        network: the network or its configuration.
        atoms: number of atoms of all structures together.
        edges: number of their directed edges.
        plan: cuts; None for none.
        complex_products: real products per complex one: 3 as executed, 4 as in paper Equation 2.

    Returns:
        Operations by block and part.

    Raises:
        InputError: `plan` does not fit the network, or `complex_products` is neither 3 nor 4.
    """
    config = network.config if isinstance(network, EquiformerV2) else network
    if complex_products not in (3, 4):
        raise InputError(
            f"complex_products is {complex_products}; it must be 3 (executed) or 4 (the paper's)"
        )
    if plan is not None:
        config = plan.applied_to(config)
    counter = _Counter(config, atoms, edges, complex_products)
    blocks = []
    for index in range(config.num_layers):
        block, parts = config.block(index), {}
        if block.attention:
            parts = counter.attention(block)
        if block.feed_forward:
            parts["feed_forward"] = counter.feed_forward(block)
        blocks.append(parts)
    coefficients = (config.lmax + 1) ** 2 * config.sphere_channels
    return MacCount(
        blocks=tuple(blocks),
        edge_degree=edges * coefficients + counter.radial((config.lmax + 1) * config.sphere_channels),
        energy_head=counter.scalars(config.energy_block),
        force_head=counter.vectors(config.force_block) if config.regress_forces else {},
        parameters=count_parameters(config),
    )


@dataclass(frozen=True)
class MacRates:
    """Operations per atom and per edge, for blocks that compute different numbers of them.

    What is computed once per element, however many atoms there are, is left out.

    Attributes:
        blocks: `[2]` float64 per block: operations per atom and per edge.
        embedding: `[2]` of the embedding of atoms and edges before the first block.
        heads: `[2]` of both heads.
    """

    blocks: tuple[Tensor, ...]
    embedding: Tensor
    heads: Tensor

    @classmethod
    def of(cls, config: ModelConfig) -> "MacRates":
        """Count the operations of a network of this configuration per atom and per edge."""
        empty, atom, edge = (count_macs(config, *size) for size in ((0, 0), (1, 0), (0, 1)))

        def rate(macs_of: Callable[[MacCount], int]) -> Tensor:
            return torch.tensor(
                [macs_of(more) - macs_of(empty) for more in (atom, edge)], dtype=torch.float64
            )

        blocks = tuple(rate(lambda m, b=b: sum(m.blocks[b].values())) for b in range(config.num_layers))  # type: ignore[misc]
        heads = rate(lambda macs: macs.energy_head + sum(macs.force_head.values()))
        return cls(blocks, rate(lambda macs: macs.edge_degree), heads)

    @property
    def total(self) -> Tensor:
        """Operations of the whole network per atom and per edge, `[2]`."""
        return torch.stack((*self.blocks, self.embedding, self.heads)).sum(0)


class _Counter:
    """Operations of single parts of a network of `config` on `atoms` atoms and `edges` edges."""

    def __init__(self, config: ModelConfig, atoms: int, edges: int, products: int) -> None:
        self.config, self.atoms, self.edges, self.products = config, atoms, edges, products

    def attention(self, block: ResolvedBlock) -> dict[str, int]:
        """Graph attention of a block, by part."""
        config, hidden = self.config, block.attn_hidden_channels
        values = block.num_heads * block.attn_value_channels
        # Functions taken to the grid and back.
        functions = {"gate": 0, "s2": 2, "separable_s2": 2, "swiglu_s2": 3}[config.attn_activation]
        points = functions * self.grid_points("attn") * self.coefficients(block.lmax, block.mmax) * hidden
        rotation = self.wigner_entries(block.lmax, block.mmax) * (2 * config.sphere_channels + values)
        return {
            "radial": self.radial(self.radial_outputs(block)),
            "rotation": self.edges * rotation,
            "convolution_1": self.edges * self.first_convolution(block, config.attn_activation),
            "activation": self.edges * points,
            "convolution_2": self.edges * self.order_products(block) * hidden * values,
            "projection": self.atoms * (block.lmax + 1) ** 2 * values * config.sphere_channels,
        }

    def vectors(self, block: ResolvedBlock) -> dict[str, int]:
        """Attention of the force head, of which only the output of degree 1, one channel, is read."""
        config, hidden, lmax = self.config, block.attn_hidden_channels, block.lmax
        values, read_mmax = block.num_heads * block.attn_value_channels, min(1, block.mmax)
        read_rows = (lmax + 1) + 2 * lmax * read_mmax
        grid = self.grid_points("attn") * (self.coefficients(lmax, block.mmax) + read_rows) * hidden
        if config.force_activation == "gate":
            grid = 0
        second = (2 * (lmax + 1) + read_mmax * self.products * lmax) * hidden * values
        into, back = self.wigner_entries(lmax, block.mmax), self.wigner_entries(1, read_mmax)
        return {
            "radial": self.radial(self.radial_outputs(block)),
            "rotation": self.edges * (into * 2 * config.sphere_channels + back * values),
            "convolution_1": self.edges * self.first_convolution(block, config.force_activation),
            "activation": self.edges * grid,
            "convolution_2": self.edges * second,
            "projection": self.atoms * 3 * values,
        }

    def first_convolution(self, block: ResolvedBlock, activation: Activation) -> int:
        """First convolution, per edge: 2C channels to the hidden ones and, of m = 0, to alpha and gates."""
        inputs, hidden = 2 * self.config.sphere_channels, block.attn_hidden_channels
        coefficients = self.order_products(block) * inputs * hidden
        if activation == "swiglu_s2":
            coefficients *= 2
        scalars = block.num_heads * self.config.attn_alpha_channels + num_gates(block, activation) * hidden
        return coefficients + (block.lmax + 1) * inputs * scalars

    def radial_outputs(self, block: ResolvedBlock) -> int:
        """Radial weights of the first convolution."""
        degrees = [block.lmax + 1 - m for m in range(block.mmax + 1)]
        return (degrees[0] if self.config.use_m_share_rad else sum(degrees)) * 2 * self.config.sphere_channels

    def radial(self, outputs: int) -> int:
        """Three linear layers; the elements' share of the first is computed once per element."""
        config, depth = self.config, self.config.edge_channels
        per_edge = config.num_distance_basis * depth + depth * depth + depth * outputs
        tables = 2 * config.max_num_elements * depth * depth if config.use_atom_edge_embedding else 0
        return self.edges * per_edge + tables

    def feed_forward(self, block: ResolvedBlock) -> int:
        """Feed-forward network of a block."""
        config, hidden = self.config, block.ffn_hidden_channels
        coefficients = (config.lmax + 1) ** 2
        out = coefficients * hidden * config.sphere_channels
        if not config.use_swiglu_s2_act:
            return self.feed_forward_hidden(block) + self.atoms * out
        on_coefficients = coefficients * (config.sphere_channels * hidden + 3 * hidden * hidden)
        on_points = 3 * self.grid_points("ffn") * coefficients * hidden
        return self.atoms * (on_coefficients + on_points + 3 * config.sphere_channels * hidden + out)

    def scalars(self, block: ResolvedBlock) -> int:
        """Feed-forward network of the energy head, of which only the scalar output, one channel, is read."""
        config, hidden = self.config, block.ffn_hidden_channels
        if config.use_sep_s2_act or (config.use_gate_act and not config.use_grid_mlp):
            return self.atoms * (config.sphere_channels * hidden + hidden)
        return self.feed_forward_hidden(block) + self.atoms * hidden

    def feed_forward_hidden(self, block: ResolvedBlock) -> int:
        """Feed-forward network up to its last linear map."""
        config, points = self.config, self.grid_points("ffn")
        coefficients = (config.lmax + 1) ** 2
        channels, hidden = config.sphere_channels, block.ffn_hidden_channels
        if not config.use_grid_mlp:
            first = coefficients * channels * hidden
            if config.use_gate_act:
                return self.atoms * (first + channels * config.lmax * hidden)
            gates = channels * hidden if config.use_sep_s2_act else 0
            return self.atoms * (first + gates + 2 * points * coefficients * hidden)
        inner, one, two = block.ffn_input_channels, block.ffn_grid_channels_1, block.ffn_grid_channels_2
        on_coefficients = coefficients * (channels * inner + inner * one + two * hidden)
        on_points = points * (coefficients * (one + two) + one * two)
        scalars = channels * hidden if config.use_sep_s2_act else 0
        return self.atoms * (on_coefficients + on_points + scalars)

    def order_products(self, block: ResolvedBlock) -> int:
        """Real products of an SO(2) linear map per pair of channels, over all orders."""
        degrees = [block.lmax + 1 - m for m in range(block.mmax + 1)]
        return sum((self.products if m else 1) * n * n for m, n in enumerate(degrees))

    @staticmethod
    def coefficients(lmax: int, mmax: int) -> int:
        """Coefficients with |m| <= mmax."""
        return sum(2 * min(l, mmax) + 1 for l in range(lmax + 1))

    @staticmethod
    def wigner_entries(lmax: int, mmax: int) -> int:
        """Entries of the blocks of a Wigner-D matrix, rows with |m| <= mmax alone."""
        return sum((2 * min(l, mmax) + 1) * (2 * l + 1) for l in range(lmax + 1))

    def grid_points(self, module: str) -> int:
        """Points of the S2 grid of `module`, `attn` or `ffn`."""
        config = self.config
        mmax = config.mmax if module == "attn" else config.lmax
        grid = config.attn_grid if module == "attn" else config.ffn_grid
        grid = grid or smallest_resolution(config.lmax, mmax)
        return grid**2 if isinstance(grid, int) else math.prod(grid)
