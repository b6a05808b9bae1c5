"""Measure the equivariance error of the network for each degree and resolution of its two sphere grids.

    python -m benchmarks.measure_equivariance [--seeds 3] [--trials 3] [--lmax 2 4 6] [--grids 18x18 …]
        [--output docs/results]

A small network with random weights on a displaced CO/Pt(111) slab. The model configuration has one resolution
for both grids; here the grid of the attention (on edges) is varied beside a very fine one of the feed-forward
network (on atoms), and that of the feed-forward network beside the 18 x 18 of the paper's models.
"""

import argparse
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ase.build import add_adsorbate, fcc111, molecule
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch_geometric.data import Batch, Data

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.files import write_bytes, write_json
from equiformer2.graph import RadiusGraph
from equiformer2.model.activation import S2Activation
from equiformer2.model.feed_forward import FeedForwardNetwork
from equiformer2.model.so3 import EdgeFrames, S2Grid
from equiformer2.model.so3.grid import m_major_order
from equiformer2.script import origin, run_script
from equiformer2.symmetry import check_symmetries

FINE = (40, 41)
PAPER = (18, 18)
LMAX = (2, 4, 6)
MMAX = 2  # or lmax where that is smaller
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Grid = tuple[int, int]


def smallest(lmax: int, mmax: int) -> Grid:
    """The grid of `grid_resolution: null`."""
    return 2 * (lmax + 1), 2 * mmax + (3 if mmax == lmax else 1)


def attention_grids(lmax: int, mmax: int) -> list[Grid]:
    first = smallest(lmax, mmax)
    grids = {first, *((first[0], n) for n in (7, 9, 11, 13)), (14, 14), (18, 18)}
    return sorted((grid for grid in grids if grid[0] >= first[0] and grid[1] >= first[1]), key=math.prod)


def feed_forward_grids(lmax: int) -> list[Grid]:
    first = smallest(lmax, lmax)
    grids = {first, (14, 14), (18, 18), (18, 19), (24, 25), (32, 33), FINE}
    return sorted((grid for grid in grids if grid[0] >= first[0]), key=math.prod)


def grid_of(text: str) -> Grid:
    """Latitudes and longitudes of `LATxLON`; `ValueError` for other texts."""
    latitudes, longitudes = text.split("x")
    return int(latitudes), int(longitudes)


def structure() -> Data:
    """29 atoms, displaced by 0.1 Å, float64."""
    atoms = fcc111("Pt", (3, 3, 3), vacuum=8.0, periodic=True)
    add_adsorbate(atoms, molecule("CO"), 2.0, "fcc")
    atoms.rattle(0.1, seed=0)
    return Data(
        pos=torch.from_numpy(atoms.get_positions()),
        atomic_numbers=torch.from_numpy(atoms.numbers),
        cell=torch.from_numpy(atoms.cell[:]).view(1, 3, 3),
        pbc=torch.from_numpy(atoms.pbc).view(1, 3),
        natoms=len(atoms),
    )


def random_network(lmax: int, mmax: int, weights: str, seed: int) -> EquiformerV2:
    """Two layers of 16 channels in float64, with initial weights or with ones in which nothing is small."""
    torch.manual_seed(seed)
    config = ModelConfig(
        num_layers=2,
        sphere_channels=16,
        attn_hidden_channels=16,
        num_heads=4,
        attn_alpha_channels=16,
        attn_value_channels=16,
        ffn_hidden_channels=16,
        edge_channels=16,
        lmax=lmax,
        mmax=mmax,
        # All neighbours of a shell: a strict cut through one is a different matter (docs/graph.md).
        enforce_max_neighbors_strictly=False,
    )
    model = EquiformerV2(config).double().eval()
    if weights == "random":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() == 1 or "norm" in name:
                    parameter.add_(0.3 * noise)
                else:
                    scale = 1.0 if "embedding.weight" in name else parameter.shape[-1] ** -0.5
                    parameter.copy_(scale * noise)
    return model


def set_grids(model: EquiformerV2, attention: Grid, feed_forward: Grid) -> None:
    lmax, mmax = model.config.lmax, model.config.mmax
    edge_grid = S2Grid(lmax, mmax, attention, m_major_order(lmax, mmax))
    node_grid = S2Grid(lmax, lmax, feed_forward, list(range((lmax + 1) ** 2)))
    for module in model.modules():
        if isinstance(module, S2Activation):
            module.grid = edge_grid
        elif isinstance(module, FeedForwardNetwork):
            module.grid = node_grid
    model.to(model.sphere_embedding.weight.dtype)


def turned_frames(model: EquiformerV2, graph: RadiusGraph, generator: torch.Generator) -> EdgeFrames:
    """Edge frames turned about their edges by random angles, as the reference draws them."""
    degree_1 = EdgeFrames.from_vectors(graph.vectors, graph.distances, 1, 1).blocks[1]
    rotations = degree_1[:, [2, 0, 1]]  # rows y, z, x to x, y, z
    angle = 2 * math.pi * torch.rand(len(rotations), generator=generator, dtype=torch.float64)
    cos, sin = angle.cos().to(rotations), angle.sin().to(rotations)
    x, y, z = rotations.unbind(1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.stack((cos * x + sin * z, y, cos * z - sin * x), dim=1)
    return EdgeFrames.from_rotations(turned, model.config.lmax, model.config.mmax)


def frame_error(model: EquiformerV2, batch: Batch, trials: int) -> float:
    """Rms change of the forces over their rms when the edge frames are turned about their edges."""
    graph = model.build_graph(batch)
    before = model(batch, graph=graph)["forces"]
    generator = torch.Generator().manual_seed(0)
    changes = [
        model(batch, graph=graph, frames=turned_frames(model, graph, generator))["forces"] - before
        for _ in range(trials)
    ]
    return (torch.stack(changes).square().mean() / before.square().mean()).sqrt().item()


def measure(
    model: EquiformerV2, data: Data, dtype: torch.dtype, trials: int, turn_frames: bool
) -> dict[str, float]:
    """Errors by kind, for the network as it is set up."""
    here = data.clone()
    here.pos, here.cell = data.pos.to(dtype), data.cell.to(dtype)
    model.to(dtype)
    rotation = check_symmetries(model, here, symmetries=["rotation"], trials=trials).errors["rotation"]
    assert rotation.forces_rms is not None
    errors = {"rotation_forces": rotation.forces_rms, "rotation_energy": rotation.energy_rms}
    if turn_frames:
        errors["frame_angle_forces"] = frame_error(model, Batch.from_data_list([here]), trials)
    model.double()
    return errors


def sweep(
    seeds: int, trials: int, degrees: Sequence[int] = LMAX, grids: Sequence[Grid] | None = None
) -> list[dict[str, Any]]:
    """One row per degree, varied grid and kind of weights; every error a list with one value per seed.

    Args:
        seeds: networks of each kind.
        trials: rotations of each network.
        degrees: lmax of the networks.
        grids: resolutions of the varied grid; None for a choice that begins with the smallest possible one.
    """
    data, rows = structure(), []
    for lmax in degrees:
        mmax = min(lmax, MMAX)
        choices = [("attention", grid, (grid, FINE)) for grid in grids or attention_grids(lmax, mmax)]
        choices += [("feed-forward", grid, (PAPER, grid)) for grid in grids or feed_forward_grids(lmax)]
        for weights in ("random", "initial"):
            models = [random_network(lmax, mmax, weights, seed) for seed in range(seeds)]
            for varied, grid, both in choices:
                errors: dict[str, dict[str, list[float]]] = {}
                for model in models:
                    set_grids(model, *both)
                    for name in DTYPES if weights == "random" else ("float64",):
                        found = measure(model, data, DTYPES[name], trials, varied == "attention")
                        for kind, value in found.items():
                            errors.setdefault(kind, {}).setdefault(name, []).append(value)
                rows.append(
                    {"lmax": lmax, "mmax": mmax, "weights": weights, "varied": varied, "grid": grid}
                    | {"attention_grid": both[0], "feed_forward_grid": both[1]}
                    | errors
                )
                middle = statistics.median(errors["rotation_forces"]["float64"])
                print(f"L={lmax} {weights} weights, {varied} {grid[0]}x{grid[1]}: rotation {middle:.1e}")
    return rows


def cell(values: list[float]) -> str:
    """Median and, where it says more, the range."""
    return f"{statistics.median(values):.0e} [{min(values):.0e}, {max(values):.0e}]".replace("e-0", "e-")


def table(rows: list[dict[str, Any]], lmax: int, varied: str) -> list[str]:
    kinds = [("rotation_forces", "forces, rotated")]
    if varied == "attention":
        kinds.insert(0, ("frame_angle_forces", "forces, frames turned"))
    heads = [f"{title}, {dtype}" for _, title in kinds for dtype in DTYPES]
    heads += ["energy, rotated, float64", "forces, rotated, float64, initial weights"]
    lines = [f"| {varied} grid | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    chosen = [row for row in rows if row["lmax"] == lmax and row["varied"] == varied]
    initial = {row["grid"]: row for row in chosen if row["weights"] == "initial"}
    for row in chosen:
        if row["weights"] == "random":
            cells = [cell(row[kind][dtype]) for kind, _ in kinds for dtype in DTYPES]
            cells.append(cell(row["rotation_energy"]["float64"]))
            cells.append(cell(initial[row["grid"]]["rotation_forces"]["float64"]))
            lines.append(f"| {row['grid'][0]} x {row['grid'][1]} | " + " | ".join(cells) + " |")
    return lines


def _command(seeds: int, trials: int) -> str:
    return f"python -m benchmarks.measure_equivariance --seeds {seeds} --trials {trials}"


def markdown(rows: list[dict[str, Any]], seeds: int, trials: int) -> str:
    lines = [
        "# Equivariance error",
        "",
        f"Written by `{_command(seeds, trials)}`; the numbers are in [equivariance.json](equivariance.json),",
        "what they mean in [model.md](../model.md#equivariance).",
        "",
        "Two layers, 16 channels, 29 atoms, all neighbours of a shell kept. Errors are root mean squares of",
        f"the change over that of the values: median and range over {seeds} networks with random weights,",
        f"{trials} random rotations (or sets of frame angles) each. Grids are latitudes x longitudes.",
        "",
        "![error against grid points](equivariance.png)",
    ]
    for lmax, mmax in {row["lmax"]: row["mmax"] for row in rows}.items():
        lines += ["", f"## L = {lmax}, M = {mmax}", "", f"Feed-forward grid {FINE[0]} x {FINE[1]}:", ""]
        lines += table(rows, lmax, "attention")
        lines += ["", f"Attention grid {PAPER[0]} x {PAPER[1]}:", "", *table(rows, lmax, "feed-forward")]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]]) -> bytes:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("attention", "frame_angle_forces", "frames turned about their edges"),
        ("feed-forward", "rotation_forces", "structure rotated"),
    )
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (varied, kind, title) in zip(axes, panels, strict=True):
        for color, lmax in enumerate(dict.fromkeys(row["lmax"] for row in rows)):
            for dtype, style in (("float64", "o-"), ("float32", "x:")):
                chosen = [
                    (math.prod(row["grid"]), row[kind][dtype])
                    for row in rows
                    if (row["lmax"], row["varied"], row["weights"]) == (lmax, varied, "random")
                ]
                points, errors = zip(*chosen, strict=True)
                middle = [statistics.median(values) for values in errors]
                axis.plot(
                    points, middle, style, color=f"C{color}", label=f"L = {lmax}, {dtype}", markersize=4
                )
                if dtype == "float64":
                    low, high = [min(v) for v in errors], [max(v) for v in errors]
                    axis.fill_between(points, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel=f"points of the {varied} grid", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rms change of forces / rms force")
    axes[1].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument("--trials", type=int, default=3, help="rotations of each network")
    parser.add_argument("--lmax", type=int, nargs="+", default=LMAX, help="degrees of the networks")
    parser.add_argument(
        "--grids",
        type=grid_of,
        nargs="+",
        metavar="LATxLON",
        help="resolutions of the varied grid (default: a choice for each degree)",
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the report")
    args = parser.parse_args(words)
    with torch.no_grad():
        rows = sweep(args.seeds, args.trials, args.lmax, args.grids)
    write_json(args.output / "equivariance.json", {**origin(), "rows": rows}, make_folder=True)
    write_bytes(args.output / "equivariance.png", draw(rows))
    write_bytes(args.output / "equivariance.md", markdown(rows, args.seeds, args.trials).encode())


if __name__ == "__main__":
    run_script(main)
