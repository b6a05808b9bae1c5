"""Multiply-accumulate operations and parameters of a network, counted from its shapes.

Counted are the matrix products of a forward pass, in the arrangement in which they are executed: the SO(2)
maps of an order m > 0 with three real products (Gauss; `complex_products=4` counts them as paper Equation 2
writes them), rotations by the non-zero blocks of the Wigner-D matrices with |m| <= mmax alone, both outer
layers of the grid MLP on coefficients rather than grid points, and of the heads what is read. The S2
activation counts as products with the grid's matrices, which the C++ kernel takes by their factors. Norms,
softmax and other element-wise work are not counted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import Activation, ModelConfig
from equiformer2.model.parameters import count_parameters, num_gates
from equiformer2.model.so3.grid import smallest_resolution
from equiformer2.pruning.structured.plan import PruningPlan

#: Parts of a block; heads have some of them.
PARTS = (
    *("radial", "rotation", "convolution_1", "activation", "convolution_2", "projection"),
    "feed_forward",
)


@dataclass(frozen=True)
class MacCount:
    """Operations of one forward pass.

    Attributes:
        blocks: per block and part (`PARTS`).
        edge_degree: of the edge-degree embedding.
        energy_head: of the energy head.
        force_head: per part.
        parameters: of the whole network, those that no output depends on included.
    """

    blocks: tuple[Mapping[str, int], ...]
    edge_degree: int
    energy_head: int
    force_head: Mapping[str, int]
    parameters: int

    @property
    def total(self) -> int:
        """Of the whole network."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Of all blocks together by part, then `edge_degree`, `energy_head` and `force_head`."""
        parts = {part: sum(block.get(part, 0) for block in self.blocks) for part in PARTS}
        heads = {"energy_head": self.energy_head, "force_head": sum(self.force_head.values())}
        return parts | {"edge_degree": self.edge_degree} | heads


def count_macs(
    network: ModelConfig | EquiformerV2,
    atoms: int,
    edges: int,
    plan: PruningPlan | None = None,
    complex_products: int = 3,
) -> MacCount:
    """Operations of a forward pass of `network`, or of what `plan` makes of it.

    Args:
        network: the network or its configuration.
        atoms, edges: how many the structures have.
        plan: cuts, None for none.
        complex_products: real products per complex one: 3 as executed, 4 as the paper's formula.

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
    blocks = []
    for index in range(config.num_layers):
        block, parts = config.block(index), {}
        if block.attention:
            parts = _attention(config, block, atoms, edges, complex_products)
        if block.feed_forward:
            parts["feed_forward"] = _feed_forward(config, block, atoms)
        blocks.append(parts)
    head = {}
    if config.regress_forces:
        head = _vectors(config, config.force_block, atoms, edges, complex_products)
    coefficients = (config.lmax + 1) ** 2 * config.sphere_channels
    return MacCount(
        blocks=tuple(blocks),
        edge_degree=edges * coefficients + _radial(config, edges, (config.lmax + 1) * config.sphere_channels),
        energy_head=_scalars(config, config.energy_block, atoms),
        force_head=head,
        parameters=count_parameters(config),
    )


def _attention(
    config: ModelConfig, block: ResolvedBlock, atoms: int, edges: int, products: int
) -> dict[str, int]:
    degrees, hidden = (block.lmax, block.mmax), block.attn_hidden_channels
    values = block.num_heads * block.attn_value_channels
    channels = config.sphere_channels
    orders = _orders(degrees)
    second = sum(_real(m, products) * n * n for m, n in enumerate(orders)) * hidden * values
    # Functions taken to the grid and back.
    functions = {"gate": 0, "s2": 2, "separable_s2": 2, "swiglu_s2": 3}[config.attn_activation]
    points = functions * _points(config, "attn") * _rows(degrees) * hidden
    return {
        "radial": _radial(config, edges, _radial_outputs(config, block)),
        "rotation": edges * _entries(degrees) * (2 * channels + values),
        "convolution_1": edges * _first(config, block, products, config.attn_activation),
        "activation": edges * points,
        "convolution_2": edges * second,
        "projection": atoms * (block.lmax + 1) ** 2 * values * channels,
    }


def _vectors(
    config: ModelConfig, block: ResolvedBlock, atoms: int, edges: int, products: int
) -> dict[str, int]:
    """Attention of which only the output of degree 1, one channel, is read."""
    degrees, hidden, lmax = (block.lmax, block.mmax), block.attn_hidden_channels, block.lmax
    values = block.num_heads * block.attn_value_channels
    kept = 1, min(1, block.mmax)
    read_rows = (lmax + 1) + 2 * lmax * kept[1]
    grid = _points(config, "attn") * (_rows(degrees) + read_rows) * hidden
    if config.force_activation == "gate":
        grid = 0
    second = (2 * (lmax + 1) + kept[1] * products * lmax) * hidden * values
    return {
        "radial": _radial(config, edges, _radial_outputs(config, block)),
        "rotation": edges * (_entries(degrees) * 2 * config.sphere_channels + _entries(kept) * values),
        "convolution_1": edges * _first(config, block, products, config.force_activation),
        "activation": edges * grid,
        "convolution_2": edges * second,
        "projection": atoms * 3 * values,
    }


def _first(config: ModelConfig, block: ResolvedBlock, products: int, activation: Activation) -> int:
    """First convolution, per edge: 2C channels to the hidden ones and, of m = 0, to alpha and gates."""
    inputs, hidden = 2 * config.sphere_channels, block.attn_hidden_channels
    orders = _orders((block.lmax, block.mmax))
    coefficients = sum(_real(m, products) * n * n for m, n in enumerate(orders)) * inputs * hidden
    if activation == "swiglu_s2":
        coefficients *= 2
    extra = block.num_heads * config.attn_alpha_channels + num_gates(block, activation) * hidden
    return coefficients + orders[0] * inputs * extra


def _radial_outputs(config: ModelConfig, block: ResolvedBlock) -> int:
    """Radial weights of the first convolution."""
    orders = _orders((block.lmax, block.mmax))
    return (orders[0] if config.use_m_share_rad else sum(orders)) * 2 * config.sphere_channels


def _radial(config: ModelConfig, edges: int, outputs: int) -> int:
    """Three linear layers; the elements' share of the first is computed once per element."""
    depth = config.edge_channels
    per_edge = config.num_distance_basis * depth + depth * depth + depth * outputs
    tables = 2 * config.max_num_elements * depth * depth if config.use_atom_edge_embedding else 0
    return edges * per_edge + tables


def _feed_forward(config: ModelConfig, block: ResolvedBlock, atoms: int) -> int:
    coefficients = (config.lmax + 1) ** 2
    out = coefficients * block.ffn_hidden_channels * config.sphere_channels
    if config.use_swiglu_s2_act:
        return atoms * (_swiglu_hidden(config, block) + out)
    return _hidden(config, block, atoms) + atoms * out


def _swiglu_hidden(config: ModelConfig, block: ResolvedBlock) -> int:
    """A SwiGLU-S2 feed-forward network up to its last linear map, per atom."""
    coefficients, channels = (config.lmax + 1) ** 2, config.sphere_channels
    hidden = block.ffn_hidden_channels
    on_coefficients = coefficients * (channels * hidden + 3 * hidden * hidden)
    return on_coefficients + 3 * _points(config, "ffn") * coefficients * hidden + 3 * channels * hidden


def _scalars(config: ModelConfig, block: ResolvedBlock, atoms: int) -> int:
    """A feed-forward network of which only the scalar output, one channel, is read."""
    hidden = block.ffn_hidden_channels
    if config.use_sep_s2_act or (config.use_gate_act and not config.use_grid_mlp):
        return atoms * (config.sphere_channels * hidden + hidden)
    return _hidden(config, block, atoms) + atoms * hidden


def _hidden(config: ModelConfig, block: ResolvedBlock, atoms: int) -> int:
    """A feed-forward network up to its last linear map."""
    coefficients, points = (config.lmax + 1) ** 2, _points(config, "ffn")
    channels, hidden = config.sphere_channels, block.ffn_hidden_channels
    if not config.use_grid_mlp:
        first = coefficients * channels * hidden
        if config.use_gate_act:
            return atoms * (first + channels * config.lmax * hidden)
        gates = channels * hidden if config.use_sep_s2_act else 0
        return atoms * (first + gates + 2 * points * coefficients * hidden)
    inner, one, two = block.ffn_input_channels, block.ffn_grid_channels_1, block.ffn_grid_channels_2
    on_coefficients = coefficients * (channels * inner + inner * one + two * hidden)
    on_points = points * (coefficients * (one + two) + one * two)
    scalars = channels * hidden if config.use_sep_s2_act else 0
    return atoms * (on_coefficients + on_points + scalars)


def _real(m: int, products: int) -> int:
    return 1 if m == 0 else products


def _orders(degrees: tuple[int, int]) -> list[int]:
    """How many degrees there are of each order."""
    return [degrees[0] + 1 - m for m in range(degrees[1] + 1)]


def _rows(degrees: tuple[int, int]) -> int:
    """Coefficients with |m| <= mmax."""
    return sum(2 * min(l, degrees[1]) + 1 for l in range(degrees[0] + 1))


def _entries(degrees: tuple[int, int]) -> int:
    """Entries of the blocks of a Wigner-D matrix."""
    return sum((2 * min(l, degrees[1]) + 1) * (2 * l + 1) for l in range(degrees[0] + 1))


def _points(config: ModelConfig, module: str) -> int:
    mmax = config.mmax if module == "attn" else config.lmax
    grid = config.attn_grid if module == "attn" else config.ffn_grid
    grid = grid or smallest_resolution(config.lmax, mmax)
    return grid**2 if isinstance(grid, int) else math.prod(grid)
