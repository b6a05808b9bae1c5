"""Compare neighbour-list libraries on this machine: right answers first, then CPU time.

    python -m benchmarks.compare_neighbor_lists [--repeats 30] [--json results.json]

Needs `vesin`; `matscipy` and `nvalchemi-toolkit-ops` are compared where they are installed. The tables in
docs/graph.md come from this script.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111
from ase.io import read
from numpy.typing import NDArray

from equiformer2.files import write_json
from equiformer2.graph import radius_graph, search, truncation
from equiformer2.script import origin, run_script

Array = NDArray[np.float64]
Search = Callable[[Array, Array, NDArray[np.bool_], float], tuple[Array, Array]]
"""(positions, cell, pbc, cutoff) -> pairs [P, 2] and shifts [P, 3]."""
Pairs = Counter[tuple[int, ...]]
"""Number of occurrences of each (i, j, shift)."""

DATA = Path(__file__).resolve().parent.parent / "data" / "oc20_trajs"


def vesin_search(positions: Array, cell: Array, pbc: NDArray[np.bool_], cutoff: float) -> tuple[Array, Array]:
    from vesin import NeighborList

    return NeighborList(cutoff=cutoff, full_list=True, n_threads=1).compute(positions, cell, pbc, "PS")


def matscipy_search(
    positions: Array, cell: Array, pbc: NDArray[np.bool_], cutoff: float
) -> tuple[Array, Array]:
    from matscipy.neighbours import neighbour_list

    i, j, shifts = neighbour_list("ijS", positions=positions, cell=cell, pbc=pbc, cutoff=cutoff)
    return np.stack((i, j), axis=1), shifts


def nvalchemi_search(
    positions: Array, cell: Array, pbc: NDArray[np.bool_], cutoff: float
) -> tuple[Array, Array]:
    from nvalchemiops.torch.neighbors import neighbor_list

    pairs, _, shifts = neighbor_list(
        torch.from_numpy(positions),
        cutoff,
        torch.from_numpy(cell)[None],
        torch.from_numpy(pbc),
        return_neighbor_list=True,
        max_neighbors=1500,  # the library asks for the width of its neighbour matrix in advance
    )
    return pairs.numpy().T, shifts.numpy()


LIBRARIES: dict[str, tuple[str, Search]] = {
    "vesin": ("vesin", vesin_search),
    "matscipy": ("matscipy", matscipy_search),
    "nvalchemi-toolkit-ops": ("nvalchemiops", nvalchemi_search),
}


def all_pairs(positions: Array, cell: Array, pbc: NDArray[np.bool_], cutoff: float) -> Pairs:
    """Every pair by trying every image that can be in reach; for small structures."""
    inverse = np.linalg.inv(cell)
    heights = 1.0 / np.linalg.norm(inverse, axis=0)
    reach = np.ceil(cutoff / heights) + np.ceil(np.ptp(positions @ inverse, axis=0))
    ranges = [range(-int(n), int(n) + 1) if on else range(1) for n, on in zip(reach, pbc, strict=True)]
    shifts = np.array(list(itertools.product(*ranges)))
    vectors = positions[None, None] - positions[None, :, None] + (shifts @ cell)[:, None, None]
    found: Pairs = Counter()
    for s, i, j in zip(*np.nonzero(np.linalg.norm(vectors, axis=-1) < cutoff), strict=True):
        if i != j or shifts[s].any():
            found[(int(i), int(j), *shifts[s].tolist())] += 1
    return found


def wrong_answers(find: Search, trials: int) -> dict[str, str]:
    """Count wrong answers against `all_pairs`, by kind of input that some library got wrong."""
    rng = np.random.default_rng(0)
    kinds = {
        "periodic, wrapped": lambda: (np.ones(3, bool), False, True),
        "periodic, not wrapped": lambda: (np.ones(3, bool), True, True),
        "mixed pbc, not wrapped": lambda: (rng.integers(0, 2, 3).astype(bool), True, True),
        "no pbc, outside the cell": lambda: (np.zeros(3, bool), True, True),
        "left-handed cell": lambda: (np.ones(3, bool), False, False),
    }
    report = {}
    for kind, draw in kinds.items():
        wrong = failed = done = 0
        while done < trials:
            pbc, outside, right_handed = draw()
            cell = np.diag(rng.uniform(2.0, 8.0, 3)) + rng.uniform(-1.5, 1.5, (3, 3))
            if abs(np.linalg.det(cell)) < 8.0:
                continue
            if (np.linalg.det(cell) > 0) != right_handed:
                cell[[0, 1]] = cell[[1, 0]]
            low, high = (-2.0, 2.0) if outside else (0.0, 1.0)
            positions = rng.uniform(low, high, (int(rng.integers(1, 8)), 3)) @ cell
            cutoff = float(rng.uniform(2.0, 6.0))
            done += 1
            try:
                pairs, shifts = find(positions, cell, pbc, cutoff)
            except (RuntimeError, ValueError, TypeError):
                failed += 1
                continue
            rows = np.concatenate((pairs.astype(np.int64), shifts.astype(np.int64)), axis=1)
            wrong += Counter(map(tuple, rows.tolist())) != all_pairs(positions, cell, pbc, cutoff)
        report[kind] = f"{wrong} wrong, {failed} refused of {trials}"
    return report


def structures() -> dict[str, tuple[Array, Array, NDArray[np.bool_]]]:
    """Slabs with an adsorbate, slightly displaced, and a cell with hundreds of images."""
    named = {}
    for size in ((6, 4, 3), (10, 10, 3), (20, 20, 5)):
        slab = fcc111("Cu", size, vacuum=10.0, periodic=True)
        add_adsorbate(slab, "O", 1.2, "fcc")
        slab.rattle(0.05, seed=0)
        named[f"O on Cu(111), {len(slab)} atoms"] = slab
    named["Cu primitive cell, 1 atom"] = bulk("Cu")
    return {name: (a.get_positions(), a.cell[:].copy(), a.pbc.copy()) for name, a in named.items()}


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """CPU time of the process, so that what else runs on the machine matters little."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return round(1e3 * statistics.median(times), 3)


def graph_times(repeats: int, cutoff: float) -> dict[str, dict[str, float]]:
    """`radius_graph` with its shorter first search and without it, 20 neighbours."""
    usual = search.FIRST_CUTOFF
    report: dict[str, dict[str, float]] = {}
    for name, (positions, cell, pbc) in structures().items():
        args = (
            torch.from_numpy(positions).float(),
            torch.from_numpy(cell).float()[None],
            torch.from_numpy(pbc)[None],
            torch.tensor([len(positions)]),
        )
        report[name] = {}
        for label, first in (("short search first", usual), (f"{cutoff:g} Å at once", float("inf"))):
            search.FIRST_CUTOFF = first
            report[name][label] = median_ms(
                partial(radius_graph, *args, max_radius=cutoff, max_neighbors=20, strict=True),
                repeats,
            )
        search.FIRST_CUTOFF = usual
    return report


def count_ties(cutoff: float, max_neighbors: int) -> dict[str, int]:
    """Count the bundled DFT structures with a tie between the last neighbour kept and the next."""
    counts = {"structures": 0, "structures with a tie": 0, "atoms": 0, "atoms with a tie": 0}
    for path in sorted(DATA.glob("*.extxyz.xz")):
        atoms = read(path, index=-1, format="extxyz")
        assert isinstance(atoms, Atoms)  # what an integer index gives
        cells, pbc = atoms.cell[:][None], atoms.pbc[None]
        pairs = search.find_pairs(
            search.wrap(atoms.get_positions(), cells, pbc, np.zeros(len(atoms), dtype=np.int64)),
            cells,
            pbc,
            np.array([len(atoms)]),
            max_radius=cutoff,
            max_neighbors=max_neighbors,
        )
        tied = 0
        for atom in range(len(atoms)):
            distance = np.sort(pairs.distance[pairs.target == atom])
            if len(distance) > max_neighbors:
                gap = distance[max_neighbors] - distance[max_neighbors - 1]
                tied += bool(gap <= truncation.TIE_TOLERANCE)
        counts["structures"] += 1
        counts["structures with a tie"] += tied > 0
        counts["atoms"] += len(atoms)
        counts["atoms with a tie"] += tied
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each kind")
    parser.add_argument("--trials", type=int, default=60, help="random structures of each kind")
    parser.add_argument("--cutoff", type=float, default=12.0, help="Å")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    for distribution, (module, find) in LIBRARIES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            print(f"{distribution}: not installed")
            continue
        entry: dict[str, object] = {"version": importlib.metadata.version(distribution)}
        start = time.perf_counter()
        find(*structures()["Cu primitive cell, 1 atom"], args.cutoff)
        entry["first call, s"] = round(time.perf_counter() - start, 3)
        entry["answers"] = wrong_answers(find, args.trials)
        entry["ms"] = {
            name: median_ms(partial(find, *s, args.cutoff), args.repeats) for name, s in structures().items()
        }
        results[distribution] = entry
    results["radius_graph, ms"] = graph_times(args.repeats, args.cutoff)
    if DATA.is_dir():
        results["ties at 20 neighbours"] = count_ties(args.cutoff, 20)
    print(json.dumps(results, indent=2, ensure_ascii=False))
    if args.json:
        write_json(args.json, {**origin(), **results})


if __name__ == "__main__":
    run_script(main)
