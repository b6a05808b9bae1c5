"""Measure what remembering the edges between held atoms could save at most in a relaxation.

    python -m benchmarks.held_edges [--sizes 31M 83M] [--systems 8] [--device cpu] [--json FILE]

Two held atoms do not move, so the length, the direction and the radial functions of an edge between them
stay as they are from step to step. Remembered, they would spare these parts of a pass: radial functions, edge
frames (rotation matrices) with the distance basis, and the edge-degree embedding; not the rotation of
features, which change. The bound is the share of these parts in the time of a pass, times the share of edges
between two held atoms; looking up what is remembered would cost some of it. Structures are first frames of
bundled OC20 relaxations, networks have random weights.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch, Data

from benchmarks import equiformer2_network as ours
from benchmarks import operation_counts as counting
from benchmarks.machine import describe_machine
from benchmarks.network_sizes import SIZES
from benchmarks.part_profile import profile_parts
from datasets_oc20.extxyz import read_frames
from equiformer2 import EquiformerV2
from equiformer2.devices import usable_device
from equiformer2.errors import InputError
from equiformer2.files import check_target, write_json
from equiformer2.script import origin, run_script

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "oc20_trajs"
SPARED = (counting.RADIAL, counting.FRAMES, counting.EDGE_DEGREE)
"""Parts whose results for an edge depend on nothing but its two atoms' places and elements."""
WORTH = 0.05
"""Share of a pass from which remembering would be kept."""


def structures(folder: Path, count: int) -> list[Data]:
    """First frames of relaxations in a raw folder, evenly spaced over it."""
    paths = sorted(folder.glob("*.extxyz.xz"))
    if not paths or count < 1:
        raise InputError(f"{folder}: {count} relaxations are asked for and {len(paths)} are there")
    chosen = [paths[at * len(paths) // min(count, len(paths))] for at in range(min(count, len(paths)))]
    found = []
    for path in chosen:
        frame = next(read_frames(path))
        found.append(
            Data(
                pos=torch.tensor(frame.pos, dtype=torch.float32),
                cell=torch.tensor(frame.cell, dtype=torch.float32).view(1, 3, 3),
                pbc=torch.as_tensor(frame.pbc).bool().view(1, 3),
                atomic_numbers=torch.as_tensor(frame.atomic_numbers, dtype=torch.long),
                tags=torch.as_tensor(frame.tags, dtype=torch.long),
                fixed=torch.as_tensor(frame.fixed).bool(),
                natoms=len(frame.pos),
            )
        )
    return found


def held_edges(model: EquiformerV2, structure: Data) -> tuple[int, int]:
    """Number of edges between two held atoms in the network's graph, and of all edges."""
    edge_index, _ = ours.edges(model, Batch.from_data_list([structure]))
    both = structure.fixed[edge_index[0]] & structure.fixed[edge_index[1]]
    return int(both.sum()), int(both.numel())


def measure(model: EquiformerV2, made: Sequence[Data], device: str) -> dict[str, Any]:
    """Shares of edges and of time, and the bound, over some structures."""
    counts = [held_edges(model, structure) for structure in made]
    held, edges = (sum(column) for column in zip(*counts, strict=True))
    parts: dict[str, float] = {}
    total = 0.0
    for structure in made:
        batch = Batch.from_data_list([structure]).to(device)

        def call(batch: Batch = batch) -> None:
            with torch.no_grad():
                model(batch)

        profiled = profile_parts(model, call, device)
        total += profiled["total"]
        for name, (forward, _) in profiled["parts"].items():
            parts[name] = parts.get(name, 0.0) + forward
    # The force head has a radial function, too, which the profile counts among the heads.
    heads = 1 + 1 / model.config.num_layers
    spared = sum(parts.get(name, 0.0) * (heads if name == counting.RADIAL else 1.0) for name in SPARED)
    return {
        "structures": len(made),
        "atoms": sum(int(structure.natoms) for structure in made),
        "edges": edges,
        "held_edges_share": held / edges,
        "seconds": total,
        "parts_share": {name: seconds / total for name, seconds in parts.items()},
        "spared_share": spared / total,
        "bound": held / edges * spared / total,
    }


def report(rows: dict[str, dict[str, Any]]) -> str:
    """Table of the bounds."""
    lines = [
        "| network | structures | edges between held atoms | these parts' share of a pass | saved at most |",
        "|---|---|---|---|---|",
    ]
    for size, row in rows.items():
        lines.append(
            f"| {size} | {row['structures']} | {row['held_edges_share']:.1%} | {row['spared_share']:.1%} | "
            f"{row['bound']:.1%} |"
        )
    worth = [size for size, row in rows.items() if row["bound"] >= WORTH]
    verdict = f"worth trying at {', '.join(worth)}" if worth else "not worth keeping at any size"
    return "\n".join([*lines, "", f"With a limit of {WORTH:.0%} of a pass: {verdict}."])


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["31M", "83M"], choices=list(SIZES))
    parser.add_argument("--systems", type=int, default=8, help="structures (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=BUNDLED, help="raw folder (default: the bundled one)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", choices=("auto", "torch", "cpp", "triton"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    if options.json is not None:
        check_target(options.json)
    device = str(usable_device(options.device).type)
    made = structures(options.data, options.systems)
    rows = {}
    for size in options.sizes:
        torch.manual_seed(0)
        model = ours.build(SIZES[size], None).to(device).eval().requires_grad_(False)
        ours.select_backend(model, options.backend)
        ours.set_inference_mode(model, True, "float32")
        rows[size] = measure(model, made, device)
        print(f"{size}: {rows[size]['seconds']:.2f} s of passes", flush=True)
    print(report(rows))
    if options.json is not None:
        settings = {"device": device, "backend": options.backend, "threads": torch.get_num_threads()}
        write_json(
            options.json,
            {**origin(), "machine": describe_machine(), **settings, "sizes": rows},
            make_folder=True,
        )


if __name__ == "__main__":
    run_script(main)
