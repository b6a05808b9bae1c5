"""Memory of a reading process and records per second at random, against the number of records.

    python -m benchmarks.measure_reader [--keys 200000] [--shards 64] [--atoms 4] [--workers 2] [--json FILE]

Writes synthetic LMDB files (small records, so that many fit on a disk), reads at random in a process
of its own, then through a training loader with workers, and removes them. `--atoms 75` gives records of
OC20's size. Private memory is what the process holds for itself; mapped pages of the files belong to the
system's cache, which takes them back when needed. The loader's batches are used for nothing: its rate is that
at which its workers can feed a training.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Data

from datasets_oc20 import LmdbWriter, OC20Lmdb, structure_record
from equiformer2.errors import InputError
from equiformer2.files import write_json
from equiformer2.script import origin, run_script


@dataclass(frozen=True)
class Measured:
    """Readings of one dataset: memory in MiB before and after it is opened, and after reading at random.

    `loaded_per_second`: records in batches of `batch_size` from a loader with `workers`.
    """

    keys: int
    shards: int
    atoms: int
    private_before: float
    private_opened: float
    private_after: float
    reads: int
    records_per_second: float
    workers: int = 0
    batch_size: int = 0
    loaded_per_second: float = 0.0


def write_shards(folder: Path, keys: int, shards: int, atoms: int) -> None:
    """`shards` files with `keys` records together."""
    rng = np.random.default_rng(0)
    data = Data(
        pos=torch.from_numpy(rng.uniform(0.0, 10.0, (atoms, 3)).astype(np.float32)),
        atomic_numbers=torch.full((atoms,), 29),
        cell=10.0 * torch.eye(3)[None],
        pbc=torch.ones(1, 3, dtype=torch.bool),
        natoms=atoms,
        tags=torch.ones(atoms, dtype=torch.long),
        fixed=torch.zeros(atoms, dtype=torch.bool),
        energy=torch.zeros(1),
        forces=torch.zeros(atoms, 3),
        sid="synthetic",
        fid=0,
    )
    value = structure_record.pack(data)
    for shard in range(shards):
        with LmdbWriter(folder / f"data.{shard:04d}.lmdb", "adsorption") as writer:
            for _ in range(keys * shard // shards, keys * (shard + 1) // shards):
                writer.write_packed(value, atoms)


def private_mebibytes() -> float:
    """Memory that this process does not share with files (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def read_at_random(folder: str, atoms: int, reads: int) -> Measured:
    """In a process of its own."""
    torch.set_num_threads(1)
    before = private_mebibytes()
    data = OC20Lmdb(folder)
    opened = private_mebibytes()
    places = np.random.default_rng(1).integers(0, len(data), reads).tolist()
    start = time.perf_counter()
    for place in places:
        data[place]
    rate = reads / (time.perf_counter() - start)
    shards, after = len(data.shards), private_mebibytes()
    return Measured(len(data), shards, atoms, before, opened, after, reads, rate)


def loaded_per_second(
    folder: str,
    workers: int,
    batch_size: int,
    reads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Records per second of `clock` in the batches of a training loader."""
    # Lightning would count in the memory of the reading process, which imports this file, too.
    from datasets_oc20.datamodule import collate
    from datasets_oc20.sampler import BalancedBatchSampler

    data = OC20Lmdb(folder)
    sampler = BalancedBatchSampler(len(data), batch_size, shuffle=True, seed=0)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    # The first batches wait for the workers to start.
    warm_up = 4 * max(workers, 1)
    batches = islice(loader, warm_up + max(1, reads // batch_size))
    for _ in islice(batches, warm_up):
        pass
    start = clock()
    found = sum(batch.num_graphs for batch in batches)
    if not found:
        raise InputError(f"{len(data):,} records are too few to time {warm_up} batches: ask for more --keys")
    return found / (clock() - start)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--atoms", type=int, default=4, help="atoms per record")
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2, help="number of worker processes of the loader")
    parser.add_argument("--batch-size", type=int, default=32, help="records in a batch of the loader")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    found = []
    for keys in (options.keys // 10, options.keys):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_shards(Path(folder), keys, options.shards, options.atoms)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                one = pool.apply(read_at_random, (folder, options.atoms, options.reads))
            workers, size = options.workers, options.batch_size
            rate = loaded_per_second(folder, workers, size, options.reads)
            one = replace(one, workers=workers, batch_size=size, loaded_per_second=rate)
        found.append(one)
        print(
            f"{one.keys:,} records in {one.shards} files: private {one.private_before:.0f} MiB, opened "
            f"{one.private_opened:.0f}, after {one.reads:,} reads {one.private_after:.0f}; "
            f"{one.records_per_second:,.0f} records/s, {one.loaded_per_second:,.0f} in batches of "
            f"{one.batch_size} from {one.workers} workers"
        )
    if options.json is not None:
        write_json(options.json, {**origin(), "datasets": [asdict(one) for one in found]}, make_folder=True)


if __name__ == "__main__":
    run_script(main)
