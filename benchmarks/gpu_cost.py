"""FLOPs and bytes of each kernel, beside the bytes of the same work in plain torch operations.

Counted, not measured: every tensor that a kernel reads or writes counts once (atom features gathered by
several edges come from the cache after the first), and only useful FLOPs count, without the padding of
tensor-core tiles.
The plain version stores and reads back every intermediate, one operation after another, as autograd does.
"""

import dataclasses

from equiformer2.kernels.gpu.tables import num_rows, packed_size, radial_rows

_INDEX_BYTES = 8
# Wigner-D blocks and sums over edges stay in float32.
_WIDE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """One pass of one operation.

    Attributes:
        flops: multiplications and additions of the products and sums.
        exponentials: evaluations of exp, which have a unit of their own on a GPU.
        bytes: moved to and from memory.
        plain_bytes: moved by the plain version.
    """

    flops: int
    exponentials: int
    bytes: int
    plain_bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def seconds(self, gigabytes_per_second: float, teraflops: float, teraexps: float = float("inf")) -> float:
        """Roofline: the slowest of memory, arithmetic and exponentials, each at full rate."""
        return max(
            self.bytes / (gigabytes_per_second * 1e9),
            self.flops / (teraflops * 1e12),
            self.exponentials / (teraexps * 1e12),
        )

    def __add__(self, other: "Cost") -> "Cost":
        sums = (a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        return Cost(*sums)


def gather_rotate(
    atoms: int,
    edges: int,
    lmax: int,
    mmax: int,
    channels: int,
    shared_orders: bool,
    element_bytes: int = 4,
    backward: bool = False,
) -> Cost:
    """Plain: gather twice, concatenate, rotate, multiply by the radial weights."""
    coefficients, rows, size = (lmax + 1) ** 2, num_rows(lmax, mmax), packed_size(lmax, mmax)
    width = 2 * channels
    x = atoms * coefficients * channels * element_bytes
    full, cut = edges * coefficients * width * element_bytes, edges * rows * width * element_bytes
    radial = edges * radial_rows(lmax, mmax, shared_orders) * width * element_bytes
    blocks, indices = edges * size * _WIDE_BYTES, 2 * edges * _INDEX_BYTES
    rotation = 2 * edges * size * width
    if not backward:
        return Cost(
            flops=rotation + edges * rows * width,
            exponentials=0,
            bytes=x + blocks + radial + cut + indices,
            # gather: full read and written; concatenate: the same; rotate; multiply
            plain_bytes=indices + 4 * full + (full + blocks + cut) + (2 * cut + radial),
        )
    pointers = edges * _INDEX_BYTES + 2 * (atoms + 1) * _INDEX_BYTES
    # The gradients of x and of the radial weights are two kernels; each reads the gradient and the blocks,
    # the first of them the blocks twice: for the source and for the target.
    for_x = 2 * blocks + radial + cut + x + pointers
    for_radial = x + blocks + cut + radial + indices
    return Cost(
        flops=2 * rotation + 3 * edges * rows * width,
        exponentials=0,
        bytes=for_x + for_radial,
        # multiply: gradient of either factor; rotate back; split; add to the atoms
        plain_bytes=(2 * cut + radial)
        + (3 * cut + radial)
        + (cut + blocks + full)
        + 2 * full
        + (full + 2 * x),
    )


def rotate_aggregate(
    atoms: int,
    edges: int,
    lmax: int,
    mmax: int,
    values_mmax: int,
    channels: int,
    heads: int | None,
    element_bytes: int = 4,
    backward: bool = False,
) -> Cost:
    """Plain: weigh the values, rotate back, scatter to the atoms."""
    coefficients, rows = (lmax + 1) ** 2, num_rows(lmax, values_mmax)
    # Of a block with more orders than the values have, only these rows are read.
    size = packed_size(lmax, values_mmax)
    values, out = edges * rows * channels * element_bytes, atoms * coefficients * channels * _WIDE_BYTES
    full = edges * coefficients * channels * element_bytes
    blocks, weights = edges * size * _WIDE_BYTES, edges * (heads or 0) * _WIDE_BYTES
    rotation = 2 * edges * size * channels
    weighing = edges * rows * channels if heads else 0
    if not backward:
        return Cost(
            flops=rotation + weighing + atoms * coefficients * channels,
            exponentials=0,
            bytes=values + weights + blocks + 2 * (atoms + 1) * _INDEX_BYTES + out,
            plain_bytes=(2 * values + weights if heads else 0)
            + (values + blocks + full)
            + (full + edges * _INDEX_BYTES + 2 * out),
        )
    return Cost(
        flops=rotation + edges * rows * channels + 3 * weighing,
        exponentials=0,
        bytes=out + blocks + edges * _INDEX_BYTES + values + (values + 2 * weights if heads else 0),
        # gather the gradient; rotate; gradient of the values and of the weights
        plain_bytes=(out + edges * _INDEX_BYTES + full)
        + (full + blocks + values)
        + ((2 * values + weights) + (2 * values + weights) if heads else 0),
    )


def segment_softmax(atoms: int, edges: int, heads: int, backward: bool = False) -> Cost:
    """Plain: maximum, shift, exp, sum and quotient, each with its gather or scatter."""
    logits, atom = edges * heads * _WIDE_BYTES, atoms * heads * _WIDE_BYTES
    index, pointers = edges * heads * _INDEX_BYTES, (atoms + 1) * _INDEX_BYTES
    if not backward:
        return Cost(
            flops=3 * edges * heads,
            exponentials=2 * edges * heads,
            bytes=2 * logits + pointers,
            plain_bytes=(logits + index + atom)
            + 2 * (atom + index + logits)
            + 2 * (3 * logits)
            + (logits + index + atom)
            + 2 * logits,
        )
    return Cost(
        flops=4 * edges * heads,
        exponentials=0,
        bytes=3 * logits + pointers,
        plain_bytes=3 * logits + (logits + index + atom) + (atom + index + logits) + 3 * logits + 3 * logits,
    )


def separable_s2_activation(
    batch: int,
    rows: int,
    out_rows: int,
    channels: int,
    points: int,
    gated: bool,
    element_bytes: int = 4,
    backward: bool = False,
) -> Cost:
    """Plain: to the grid, SiLU, back, and the gates' row in front."""
    x, out = (batch * r * channels * element_bytes for r in (rows, out_rows))
    gates = batch * channels * element_bytes if gated else 0
    matrices = points * (rows + out_rows) * element_bytes
    grid = batch * points * channels * element_bytes
    product = 2 * batch * points * channels
    exponentials = batch * channels * (points + gated)
    if not backward:
        return Cost(
            flops=product * (rows + out_rows),
            exponentials=exponentials,
            bytes=x + gates + matrices + out,
            plain_bytes=(x + matrices + out) + 4 * grid + (2 * gates + 2 * out if gated else 0),
        )
    return Cost(
        flops=product * (2 * rows + out_rows),
        exponentials=exponentials,
        bytes=2 * x + 2 * gates + matrices + out,
        # back: write the grid's gradient; SiLU: read both, write; to the grid: read
        plain_bytes=(out + matrices + x) + (grid + 3 * grid + grid) + (3 * gates + 2 * out if gated else 0),
    )


def grid_mlp(
    batch: int,
    coefficients: int,
    channels: int,
    hidden: int,
    points: int,
    element_bytes: int = 4,
    backward: bool = False,
) -> Cost:
    """Plain: to the grid, SiLU, linear, SiLU, back, for all atoms at once.

    The grids of a chunk are counted as cache traffic, not as bytes: chunks are made to fit in the L2 cache.
    """
    x, out = (batch * coefficients * c * element_bytes for c in (channels, hidden))
    matrices, weight = 2 * points * coefficients * element_bytes, hidden * channels * element_bytes
    grid, grid_hidden = (batch * points * c * element_bytes for c in (channels, hidden))
    sample, project = (2 * batch * points * coefficients * c for c in (channels, hidden))
    linear = 2 * batch * points * channels * hidden
    exponentials = batch * points * (channels + hidden)
    if not backward:
        return Cost(
            flops=sample + project + linear,
            exponentials=exponentials,
            bytes=x + matrices + weight + out,
            plain_bytes=(x + matrices + weight + out) + 4 * grid + 4 * grid_hidden,
        )
    return Cost(
        # the forward up to the hidden layer again, then the gradients
        flops=(sample + linear) + project + 2 * linear + 2 * sample,
        exponentials=exponentials + batch * points * channels,
        bytes=2 * x + out + matrices + 2 * weight,
        # back: write; SiLU: 3; the linear layer's two products: 2 of either; SiLU: 3; to the grid: read
        plain_bytes=(x + out + matrices + 2 * weight) + 6 * grid_hidden + 6 * grid,
    )
