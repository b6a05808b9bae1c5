"""FLOPs and bytes of the Triton kernels in the paper's networks, counted, and what they allow on an H200.

    python -m benchmarks.kernel_costs [--structures 8] [--presets 31M 83M 153M] [--output FILE]

Counted on any machine, not measured. Every tensor that a kernel reads or writes counts once (atom features
gathered by several edges come from the cache after the first), and only useful FLOPs count, without the
padding of tensor-core tiles. The plain version stores and reads back every intermediate, one operation after
another, as autograd does. Times are the roofline's, the larger of bytes over bandwidth and FLOPs over the
published peak: the least that a perfect kernel would take. Without `--output` the table is printed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from equiformer2.files import check_target, write_bytes
from equiformer2.kernels.layout import OrderLayout
from equiformer2.model.config import AVG_NUM_NODES, ModelConfig
from equiformer2.model.so3.grid import smallest_resolution
from equiformer2.script import run_script

_INDEX_BYTES = 8
# Wigner-D blocks and sums over edges stay in float32.
_WIDE_BYTES = 4


@dataclass(frozen=True)
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
        sums = (a + b for a, b in zip(astuple(self), astuple(other), strict=True))
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
    layout = OrderLayout(lmax, mmax)
    coefficients, rows, size = (lmax + 1) ** 2, layout.num_rows, layout.packed_size
    width = 2 * channels
    x = atoms * coefficients * channels * element_bytes
    full, cut = edges * coefficients * width * element_bytes, edges * rows * width * element_bytes
    radial = edges * OrderLayout(lmax, mmax).radial_rows(shared_orders) * width * element_bytes
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
    coefficients, rows = (lmax + 1) ** 2, OrderLayout(lmax, values_mmax).num_rows
    # Of a block with more orders than the values have, only these rows are read.
    size = OrderLayout(lmax, values_mmax).packed_size
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


OUTPUT = "docs/results/kernel_costs.md"
#: NVIDIA H200 SXM, data sheet: GB/s, and dense TFLOP/s of the tensor cores and of float32 arithmetic.
GIGABYTES_PER_SECOND = 4800.0
TERAFLOPS = {"bf16": 989.0, "TF32": 494.0, "float32": 67.0}


@dataclass(frozen=True)
class Precision:
    """Arithmetic in which the products of a network are computed.

    Attributes:
        name: as in the table.
        element_bytes: of what is stored.
        products: rate of the products on the grids, which run on tensor cores; the rest is float32.
    """

    name: str
    element_bytes: int
    products: str


PRECISIONS = (Precision("tf32", 4, "TF32"), Precision("bf16", 2, "bf16"))


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel in one pass of a network.

    Attributes:
        name: function of this module and direction.
        calls: how many.
        total: of all of them.
        on_tensor_cores: whether its products run there.
    """

    name: str
    calls: int
    total: Cost
    on_tensor_cores: bool

    def seconds(self, precision: Precision) -> float:
        """Roofline."""
        rate = precision.products if self.on_tensor_cores else "float32"
        return self.total.seconds(GIGABYTES_PER_SECOND, TERAFLOPS[rate])

    def bound(self, precision: Precision) -> str:
        """Name the side of the roofline that bounds it: memory or arithmetic."""
        memory = self.total.bytes / (GIGABYTES_PER_SECOND * 1e9)
        return "memory" if self.seconds(precision) == memory else "arithmetic"


def kernels(config: ModelConfig, atoms: int, edges: int, element_bytes: int) -> list[Kernel]:
    """Both directions of every kernel of the blocks of a network with equal blocks.

    The heads and the embedding, which come once, are left out.
    """
    lmax, mmax, layers = config.lmax, config.mmax, config.num_layers
    rows, coefficients = OrderLayout(lmax, mmax).num_rows, (lmax + 1) ** 2
    values = config.num_heads * config.attn_value_channels
    points = {
        "edges": _points(config.attn_grid, lmax, mmax),
        "atoms": _points(config.ffn_grid, lmax, lmax),
    }
    hidden, inner = config.attn_hidden_channels, config.ffn_hidden_channels
    found = []
    for backward in (False, True):
        options = element_bytes, backward
        sizes = atoms, edges, lmax, mmax
        costs = {
            "gather_rotate": gather_rotate(*sizes, config.sphere_channels, config.use_m_share_rad, *options),
            "segment_softmax": segment_softmax(atoms, edges, config.num_heads, backward),
            "separable_s2_activation": separable_s2_activation(
                edges, rows, rows, hidden, points["edges"], True, *options
            ),
            "rotate_aggregate": rotate_aggregate(*sizes, mmax, values, config.num_heads, *options),
            "grid_mlp": grid_mlp(atoms, coefficients, inner, inner, points["atoms"], *options),
        }
        for name, one in costs.items():
            tensor_cores = name in ("separable_s2_activation", "grid_mlp")
            direction = "backward" if backward else "forward"
            total = sum((one for _ in range(layers - 1)), one)
            found.append(Kernel(f"{name}, {direction}", layers, total, tensor_cores))
    return found


def _points(resolution: int | tuple[int, int] | None, lmax: int, mmax: int) -> int:
    if isinstance(resolution, int):
        return resolution**2
    latitudes, longitudes = resolution or smallest_resolution(lmax, mmax)
    return latitudes * longitudes


def table(found: list[Kernel], precision: Precision) -> list[str]:
    """Markdown, one line per kernel and one for all."""
    lines = [
        "| kernel | calls | GFLOP | GB | GB in plain torch | FLOP per byte | roofline, ms | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kernel in found:
        one = kernel.total
        lines.append(
            f"| {kernel.name} | {kernel.calls} | {one.flops / 1e9:.1f} | {one.bytes / 1e9:.2f} "
            f"| {one.plain_bytes / 1e9:.2f} | {one.intensity:.1f} | {1e3 * kernel.seconds(precision):.3f} "
            f"| {kernel.bound(precision)} |"
        )
    everything = sum((kernel.total for kernel in found[1:]), found[0].total)
    seconds = sum(kernel.seconds(precision) for kernel in found)
    lines.append(
        f"| all | {sum(kernel.calls for kernel in found)} | {everything.flops / 1e9:.1f} "
        f"| {everything.bytes / 1e9:.2f} | {everything.plain_bytes / 1e9:.2f} | {everything.intensity:.1f} "
        f"| {1e3 * seconds:.3f} | |"
    )
    return lines


def _command(presets: list[str], structures: int) -> str:
    return f"python -m benchmarks.kernel_costs --structures {structures} --presets {' '.join(presets)}"


def markdown(presets: list[str], structures: int) -> str:
    """The whole page."""
    atoms = round(structures * AVG_NUM_NODES)
    lines = [
        "# FLOPs and bytes of the Triton kernels",
        "",
        "**Counted, not measured**: no kernel ran for this page. Written by",
        f"`{_command(presets, structures)}`, which",
        "says what is counted.",
        "",
        f"{structures} structures of OC20's average size, {atoms} atoms with the nearest `max_neighbors`;",
        "all blocks, without embedding and heads and the matrix products between the kernels (cuBLAS).",
        "",
        "The roofline is the larger of bytes over bandwidth and FLOPs over the peak rate that NVIDIA",
        f"publishes for the H200: {GIGABYTES_PER_SECOND / 1000} TB/s; dense products "
        f"{TERAFLOPS['bf16']:.0f} TFLOP/s in bf16 and {TERAFLOPS['TF32']:.0f} in TF32;",
        f"{TERAFLOPS['float32']:.0f} TFLOP/s of float32 arithmetic, which rotations and the softmax take.",
        "A time below is the least that a perfect kernel could take. Exponentials, for which no peak is",
        "published, are not counted: the true bound of the S2 activations may be higher. In the precision",
        "float32 without TF32 the products on the grids are three in TF32. Plain torch stores and reads back",
        "every intermediate.",
    ]
    for preset in presets:
        config = ModelConfig.preset(preset)
        edges = atoms * config.max_neighbors
        lines += [
            "",
            f"## {preset}",
            "",
            f"{config.num_layers} blocks, L = {config.lmax}, M = {config.mmax}, ",
        ]
        lines[-1] += f"{edges} edges."
        for precision in PRECISIONS:
            found = kernels(config, atoms, edges, precision.element_bytes)
            lines += ["", f"Precision {precision.name}:", "", *table(found, precision)]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--structures",
        type=_positive,
        default=8,
        help="number of structures in a batch (default: %(default)s)",
    )
    names = ("31M", "83M", "153M")
    parser.add_argument("--presets", nargs="+", choices=names, default=list(names), help="networks")
    parser.add_argument("--output", help=f"file to write, such as {OUTPUT}; default: print")
    arguments = parser.parse_args(words)
    if arguments.output:
        check_target(arguments.output)
    page = markdown(arguments.presets, arguments.structures)
    if arguments.output:
        write_bytes(arguments.output, page.encode(), make_folder=True)
    else:
        print(page, end="")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    run_script(main)
