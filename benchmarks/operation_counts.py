"""Floating-point operations and bytes of a forward, counted from the shapes of the network.

Operations are those of matrix products (2 m k n each), in the cheapest arrangement known here: rotations by
blocks of degrees with only the rows |m| <= mmax, complex products with three real ones, the S2 activation of
edges by latitudes and orders, the outer layers of the grid network on coefficients. Bytes are float32 inputs
and outputs of every part, each touched once, weights included: what no arrangement can avoid.
"""

import math
from dataclasses import dataclass

from equiformer2 import ModelConfig

# Parts of the network that are told apart, in the sequence of a report.
GRAPH = "graph"
FRAMES = "edge frames, distance basis"
EDGE_DEGREE = "edge-degree embedding"
NORM = "norm"
RADIAL = "radial functions"
ROTATE = "gather, rotate, radial weights"
CONVOLVE_1 = "SO(2) GEMMs 1"
SOFTMAX = "attention softmax"
ACTIVATION = "S2 activation"
CONVOLVE_2 = "SO(2) GEMMs 2"
AGGREGATE = "weight, rotate back, sum"
PROJECT = "output projection"
FEED_FORWARD = "feed-forward"
HEADS = "heads"
OPTIMIZER = "optimizer"
OTHER = "other"
PARTS = (
    *(GRAPH, FRAMES, EDGE_DEGREE, NORM, RADIAL, ROTATE, CONVOLVE_1, SOFTMAX, ACTIVATION, CONVOLVE_2),
    *(AGGREGATE, PROJECT, FEED_FORWARD, HEADS, OPTIMIZER, OTHER),
)


@dataclass(frozen=True)
class Count:
    """Floating-point operations of matrix products, and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Count":
        return Count(self.flops * factor, self.bytes * factor)


def count(config: ModelConfig, atoms: int, edges: int) -> dict[str, Count]:
    """Per part, for a forward of `atoms` atoms with `edges` edges.

    A backward pass takes twice the operations of a forward: the gradients of the inputs and of the weights.

    Raises:
        ValueError: the configuration leaves the grid to the implementation.
    """
    if config.grid_resolution is None:
        raise ValueError("the grid resolution must be given to count operations")
    grid = math.prod(_resolution(config.ffn_grid))
    coefficients = (config.lmax + 1) ** 2
    channels, hidden = config.sphere_channels, config.ffn_hidden_channels
    scalars = atoms * 2 * channels * hidden if config.use_grid_mlp and config.use_sep_s2_act else 0
    on_coefficients = channels * hidden + 2 * hidden**2 + hidden * channels
    on_grid = 2 * coefficients * hidden + hidden**2
    feed_forward = Count(
        scalars + atoms * (2 * coefficients * on_coefficients + 2 * grid * on_grid),
        4 * (2 * atoms * coefficients * channels + (config.lmax + 1) * 2 * channels * hidden + 3 * hidden**2),
    )
    norm = Count(0, 4 * 2 * atoms * coefficients * channels)
    layer = _attention(config, atoms, edges, config.lmax)
    parts = {name: part.times(config.num_layers) for name, part in layer.items()}
    parts[FEED_FORWARD] = feed_forward.times(config.num_layers)
    parts[NORM] = norm.times(2 * config.num_layers + 1)
    parts[EDGE_DEGREE] = _edge_degree(config, atoms, edges)
    heads = Count(atoms * 2 * (channels * hidden + hidden), 4 * atoms * channels)
    if config.regress_forces:
        heads = sum(_attention(config, atoms, edges, min(1, config.lmax)).values(), heads)
    return parts | {HEADS: heads}


def gemm_shapes(config: ModelConfig, edges: int) -> list[tuple[int, int, int]]:
    """`(m, k, n)` of the matrix products of both SO(2) convolutions of one layer."""
    return [
        (edges, inner, outer)
        for inputs, outputs, extra in _convolutions(config)
        for times, inner, outer in _orders(config, inputs, outputs, extra)
        for _ in range(times)
    ]


def _convolutions(config: ModelConfig) -> list[tuple[int, int, int]]:
    """Input channels, output channels and further scalar outputs of both SO(2) convolutions."""
    hidden = config.attn_hidden_channels
    gates = (config.lmax if config.use_gate_act else int(config.use_sep_s2_act)) * hidden
    extra = config.num_heads * config.attn_alpha_channels + gates
    values = config.num_heads * config.attn_value_channels
    return [(2 * config.sphere_channels, hidden, extra), (hidden, values, 0)]


def _orders(config: ModelConfig, inputs: int, outputs: int, extra: int) -> list[tuple[int, int, int]]:
    """Return the number, inner and outer dimension of the real matrix products of each order m."""
    found = []
    for m in range(config.mmax + 1):
        degrees = config.lmax + 1 - m
        wide = degrees * outputs + (extra if m == 0 else 0)
        found.append((1 if m == 0 else 3, degrees * inputs, wide))
    return found


def _attention(config: ModelConfig, atoms: int, edges: int, out_lmax: int) -> dict[str, Count]:
    """One attention layer with outputs up to degree `out_lmax` (1 in the force head)."""
    lmax, mmax = config.lmax, config.mmax
    whole = out_lmax == lmax
    channels, hidden = config.sphere_channels, config.attn_hidden_channels
    values = config.num_heads * config.attn_value_channels
    rows = sum(_rows(l, mmax) for l in range(lmax + 1))
    rotation = sum(_rows(l, mmax) * (2 * l + 1) for l in range(lmax + 1))
    out_rows = sum(_rows(l, mmax) for l in range(out_lmax + 1))
    out_rotation = sum(_rows(l, mmax) * (2 * l + 1) for l in range(out_lmax + 1))
    # Only the orders |m| <= out_lmax of the hidden features reach outputs up to that degree.
    used_rows = rows if whole else sum((1 if m == 0 else 2) * (lmax + 1 - m) for m in range(min(mmax, 1) + 1))
    width = sum(lmax + 1 - m for m in range(mmax + 1)) * 2 * channels
    if config.use_m_share_rad:
        width = (lmax + 1) * 2 * channels
    depth = config.edge_channels
    (_, _, extra), _ = _convolutions(config)
    first = _orders(config, 2 * channels, hidden, extra)
    second = _orders(config, hidden, values, 0)
    if not whole:
        kept = [(out_lmax + 1 - m) * values for m in range(min(mmax, out_lmax) + 1)]
        second = [(n, inner, outer) for (n, inner, _), outer in zip(second, kept, strict=False)]
    latitudes, longitudes = _resolution(config.attn_grid)
    # Latitude by latitude: from coefficients to the orders there, from these to the longitudes, and back.
    on_latitudes = latitudes * (rows + used_rows) + 2 * latitudes * longitudes * (2 * mmax + 1)
    on_grid = 0 if config.use_gate_act else 2 * edges * on_latitudes * hidden
    heads, alpha = config.num_heads, config.num_heads * config.attn_alpha_channels
    out_channels = channels if whole else 1
    out_coefficients = (out_lmax + 1) ** 2
    radial_weights = config.num_distance_basis * depth + depth**2 + depth * width
    return {
        RADIAL: Count(
            2 * edges * radial_weights, 4 * (edges * (config.num_distance_basis + width) + radial_weights)
        ),
        ROTATE: Count(
            2 * edges * rotation * 2 * channels,
            4 * edges * ((lmax + 1) ** 2 * 2 * channels + rotation + width + rows * 2 * channels),
        ),
        CONVOLVE_1: _products(edges, first, rows * 2 * channels, rows * hidden + extra),
        SOFTMAX: Count(0, 4 * edges * (alpha + heads)),
        ACTIVATION: Count(on_grid, 4 * edges * (rows + used_rows) * hidden),
        CONVOLVE_2: _products(edges, second, used_rows * hidden, out_rows * values),
        AGGREGATE: Count(
            2 * edges * out_rotation * values,
            4 * (edges * (out_rows * values + heads + out_rotation) + atoms * out_coefficients * values),
        ),
        PROJECT: Count(
            2 * atoms * out_coefficients * values * out_channels,
            4 * atoms * out_coefficients * (values + out_channels),
        ),
    }


def _products(edges: int, orders: list[tuple[int, int, int]], inputs: int, outputs: int) -> Count:
    weights = sum(times * inner * outer for times, inner, outer in orders)
    return Count(2 * edges * weights, 4 * (edges * (inputs + outputs) + weights))


def _edge_degree(config: ModelConfig, atoms: int, edges: int) -> Count:
    """Radial functions times the m = 0 column of the rotations, summed over edges."""
    depth, channels = config.edge_channels, config.sphere_channels
    width = (config.lmax + 1) * channels
    coefficients = (config.lmax + 1) ** 2
    weights = config.num_distance_basis * depth + depth**2 + depth * width
    return Count(
        2 * edges * (weights + coefficients * channels),
        4 * (edges * (config.num_distance_basis + coefficients) + weights + atoms * coefficients * channels),
    )


def _resolution(resolution: int | tuple[int, int] | None) -> tuple[int, int]:
    """Latitudes and longitudes of a grid; 0 where the implementation chooses it."""
    if resolution is None or isinstance(resolution, int):
        return (resolution or 0), (resolution or 0)
    return resolution


def _rows(l: int, mmax: int) -> int:
    """Orders |m| <= mmax of degree l."""
    return min(2 * l, 2 * mmax) + 1
