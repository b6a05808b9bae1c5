"""Measure how evenly batches share the work between ranks, against batches drawn at random.

    python -m benchmarks.measure_batches [--data LMDB] [--ranks 8] [--json FILE]

Without `--data`, sizes are drawn from those of the bundled OC20 relaxations (one structure per system, each
changed at random by up to 15 %). Edges are counted as the limit of the graph, 20 per atom, which structures
of OC20 reach at the cutoff of 12 Å: the first line says what the graphs of the bundled ones have. The table
in docs/data.md comes from this script.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datasets_oc20 import OC20Lmdb
from datasets_oc20.extxyz import read_frames
from datasets_oc20.sampler import BalancedBatchSampler, Imbalance
from equiformer2.files import check_target, write_json
from equiformer2.graph import radius_graph
from equiformer2.script import origin, run_script

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "oc20_trajs"
EDGES_PER_ATOM = 20
CUTOFF = 12.0


def edges_per_atom() -> np.ndarray:
    """In the model's graph of the first frame of every bundled relaxation."""
    found = []
    for path in sorted(BUNDLED.glob("*.extxyz.xz")):
        frame = next(read_frames(path))
        graph = radius_graph(
            torch.from_numpy(frame.pos).float(),
            torch.from_numpy(frame.cell).float()[None],
            torch.from_numpy(frame.pbc)[None],
            torch.tensor([len(frame.pos)]),
            max_radius=CUTOFF,
            max_neighbors=EDGES_PER_ATOM,
            strict=True,
        )
        found.append(len(graph.distances) / len(frame.pos))
    return np.array(found)


def bundled_sizes(count: int) -> np.ndarray:
    """`[count]` numbers of atoms like those of OC20."""
    seen = np.array([len(next(read_frames(path)).pos) for path in sorted(BUNDLED.glob("*.extxyz.xz"))])
    rng = np.random.default_rng(0)
    return np.rint(rng.choice(seen, count) * rng.uniform(0.85, 1.15, count)).astype(np.int32)


def at_random(edges: np.ndarray, ranks: int, batch_size: int) -> Imbalance:
    """A shuffled order dealt to ranks in turn, as torch's `DistributedSampler` does."""
    order = np.random.default_rng(0).permutation(len(edges))
    whole = len(order) // (ranks * batch_size) * ranks * batch_size
    loads = edges[order[:whole]].reshape(-1, batch_size, ranks).sum(axis=1).astype(np.float64)
    return Imbalance.from_loads(loads)


def balanced(sizes: np.ndarray, ranks: int, batch_size: int, max_edges: int | None) -> Imbalance:
    """The project's batches; steps left over at the end of an epoch are counted too."""
    return BalancedBatchSampler(
        len(sizes),
        batch_size,
        natoms=sizes,
        max_edges=max_edges,
        max_neighbors=EDGES_PER_ATOM,
        shuffle=True,
        world_size=ranks,
    ).imbalance()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="sizes of this dataset instead of the bundled ones")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--count", type=int, default=100_000, help="structures drawn without --data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    if options.json is not None:
        check_target(options.json, inputs=[] if options.data is None else [options.data])
    counted = edges_per_atom()
    print(f"{len(counted)} graphs have {counted.min():.2f} to {counted.max():.2f} edges per atom")
    sizes = bundled_sizes(options.count) if options.data is None else OC20Lmdb(options.data).natoms
    edges = EDGES_PER_ATOM * sizes.astype(np.int64)
    print(f"{len(sizes):,} structures of {sizes.min()} to {sizes.max()} atoms, mean {sizes.mean():.1f}")
    print(f"{options.ranks} ranks: edges of the most loaded rank above the mean, per step (worst step)")
    print("| batches of | drawn at random | balanced |\n|---|---|---|")
    rows = []
    largest = int(edges.max())
    cases = [(size, None) for size in (1, 2, 4, 8, 16)] + [(64, 4 * largest), (64, 8 * largest)]
    for batch_size, cap in cases:
        limit = f"{batch_size} structures" if cap is None else f"at most {cap:,} edges"
        chance = at_random(edges, options.ranks, batch_size if cap is None else int(cap / edges.mean()))
        ours = balanced(sizes, options.ranks, batch_size, cap)
        print(f"| {limit} | {_percent(chance)} | {_percent(ours)} |")
        rows.append({"limit": limit, "random": vars(chance), "balanced": vars(ours)})
    if options.json is not None:
        setting = {"structures": len(sizes), "mean_atoms": float(sizes.mean()), "ranks": options.ranks}
        write_json(options.json, {**origin(), **setting, "rows": rows}, make_folder=True)


def _percent(found: Imbalance) -> str:
    return f"{100 * found.mean:.2f} % ({100 * found.worst:.1f} %)"


if __name__ == "__main__":
    run_script(main)
