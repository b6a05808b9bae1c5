"""FLOPs and bytes of the Triton kernels in the paper's networks, counted, and what they allow on an H200.

    python -m benchmarks.kernel_costs [--structures 8] [--presets 31M 83M 153M] [--output FILE]

Needs no device: `benchmarks/kernel_costs.py` counts. Times are the roofline's, the larger of bytes over
bandwidth and FLOPs over the published peak: the least that a perfect kernel would take, nothing measured.
Without `--output` the table is printed.
"""

import argparse
from dataclasses import dataclass

from benchmarks import gpu_cost as cost
from benchmarks.gpu_cost import Cost
from equiformer2.files import check_target, write_bytes
from equiformer2.kernels.gpu.tables import num_rows
from equiformer2.model.config import AVG_NUM_NODES, ModelConfig
from equiformer2.model.so3.grid import smallest_resolution
from equiformer2.script import run_script

OUTPUT = "docs/results/kernel_costs.md"
#: NVIDIA H200 SXM, data sheet: GB/s, and dense TFLOP/s of the tensor cores and of float32 arithmetic.
GIGABYTES_PER_SECOND = 4800.0
TERAFLOPS = {"bf16": 989.0, "TF32": 494.0, "float32": 67.0}


@dataclass(frozen=True)
class Precision:
    """What the products of a network are computed in.

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
        name: function in `benchmarks/kernel_costs.py` and direction.
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
        """What the roofline is made of there."""
        memory = self.total.bytes / (GIGABYTES_PER_SECOND * 1e9)
        return "memory" if self.seconds(precision) == memory else "arithmetic"


def kernels(config: ModelConfig, atoms: int, edges: int, element_bytes: int) -> list[Kernel]:
    """Both directions of every kernel of the blocks of a network with equal blocks.

    The heads and the embedding, which come once, are left out.
    """
    lmax, mmax, layers = config.lmax, config.mmax, config.num_layers
    rows, coefficients = num_rows(lmax, mmax), (lmax + 1) ** 2
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
            "gather_rotate": cost.gather_rotate(
                *sizes, config.sphere_channels, config.use_m_share_rad, *options
            ),
            "segment_softmax": cost.segment_softmax(atoms, edges, config.num_heads, backward),
            "separable_s2_activation": cost.separable_s2_activation(
                edges, rows, rows, hidden, points["edges"], True, *options
            ),
            "rotate_aggregate": cost.rotate_aggregate(*sizes, mmax, values, config.num_heads, *options),
            "grid_mlp": cost.grid_mlp(atoms, coefficients, inner, inner, points["atoms"], *options),
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structures", type=_positive, default=8, help="in a batch (default: %(default)s)")
    names = ("31M", "83M", "153M")
    parser.add_argument("--presets", nargs="+", choices=names, default=list(names), help="networks")
    parser.add_argument("--output", help=f"file to write, such as {OUTPUT}; default: print")
    arguments = parser.parse_args()
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
