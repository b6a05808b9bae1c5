"""Relaxed systems per hour: batches of this package, one by one through ASE, and fairchem's batched loop.

    python -m benchmarks.measure_relaxations --checkpoint models/study_teacher.pt --systems 32
    python -m benchmarks.measure_relaxations --size 31M --systems 8 --reference-python .bench-venv/bin/python

All methods relax the same starts (the benchmark's slabs, adsorbate and free atoms displaced at random) with
the same L-BFGS (memory, largest step, damping, curvature), threshold and number of steps, in turn within
every round, so that a machine that slows down slows all of them. With --checkpoint the network is a trained
one and relaxations converge; fairchem cannot load that. With --size all have the same random parameters, with
which nothing converges: every system takes all --steps. fairchem's loop (`ml_relax`) keeps a batch until all
of it has converged; it is measured where --reference-python is the environment of setup_reference.sh.
Writes relaxations_NETWORK.json and .md into --output, NETWORK being the size or the checkpoint's name.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.benchmark_structures import save_starts
from benchmarks.machine import describe_machine
from benchmarks.network_sizes import SIZES
from benchmarks.worker import NEVER
from benchmarks.worker_session import BenchmarkError, Session
from equiformer2.errors import InputError
from equiformer2.files import check_target, write_bytes, write_json
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint

#: Method -> (implementation, its name for the worker, text of the table).
METHODS = {
    "batched": ("ours", "batched", "this package, batches that stay full"),
    "ase": ("ours", "ase", "this package, one by one through ASE"),
    "fairchem_loop": ("reference", "batched", "fairchem-core, its batched loop"),
    "fairchem_ase": ("reference", "ase", "fairchem-core's network, one by one through ASE"),
}
OPTIMIZER = {"max_step": 0.04, "memory": 50, "alpha": 70.0, "damping": 1.0}
Row = dict[str, Any]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """Run all methods in turn, `--repeats` times, after a warm-up of each on one system.

    Returns:
        For each method `seconds` of every round, and what the worker tells of the last one.
    """
    starts = save_starts(folder / "starts.pt", options.systems, options.seed)
    first = save_starts(folder / "first.pt", 1, options.seed)
    pythons = {"ours": sys.executable}
    if options.reference_python is not None:
        pythons["reference"] = options.reference_python
    methods = {name: row for name, row in METHODS.items() if row[0] in pythons}
    fmax = NEVER if options.checkpoint is None else options.fmax
    request = {
        "settings": {**OPTIMIZER, "fmax": fmax, "steps": options.steps},
        "batch_size": options.batch_size,
    }
    rows: dict[str, Row] = {name: {"seconds": []} for name in methods}
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(Session(name, python, options.threads, "default", options.device))
            for name, python in pythons.items()
        }
        parameters = str(folder / "parameters.pt")
        # The first one draws the parameters: the reference's initialisation where it is there.
        for number, name in enumerate(sorted(sessions, reverse=True)):
            if options.checkpoint is not None:
                sessions[name].ask("load", checkpoint=str(options.checkpoint), batch="B1")
                continue
            network = {"config": SIZES[options.size], "parameters": parameters, "create": number == 0}
            sessions[name].ask("build", **network, batch="B1")
        for method in methods.values():
            warm = {**request, "settings": {**request["settings"], "steps": 1}}
            sessions[method[0]].ask("relax_systems", starts=str(first), method=method[1], **warm)
        for turn in range(options.repeats):
            for name, method in methods.items():
                found = sessions[method[0]].ask(
                    "relax_systems", starts=str(starts), method=method[1], **request
                )
                rows[name]["seconds"].append(found.pop("seconds"))
                rows[name] |= found
                rate = 3600 * options.systems / rows[name]["seconds"][-1]
                print(f"round {turn + 1}, {method[2]}: {rate:.0f} systems per hour", flush=True)
    return rows


def summarise(rows: Mapping[str, Row], systems: int) -> dict[str, Row]:
    """Systems per hour of every method, and how far its energies are from those of the batches."""
    first = rows["batched"]["energies_eV"]
    found = {}
    for name, row in rows.items():
        rates = [3600 * systems / seconds for seconds in row["seconds"]]
        differences = [abs(one - other) for one, other in zip(row["energies_eV"], first, strict=True)]
        found[name] = {
            "systems_per_hour": statistics.median(rates),
            "slowest_round": min(rates),
            "fastest_round": max(rates),
            "seconds": row["seconds"],
            "model_evaluations": row["evaluations"],
            "converged": row["converged"],
            "largest_energy_difference_eV": max(differences),
            "energies_eV": row["energies_eV"],
        }
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """Page of the results."""
    settings = record["settings"]
    network = settings["checkpoint"] or f"{settings['size']}, random parameters"
    batches = "chosen by itself" if settings["batch_size"] is None else f"{settings['batch_size']} systems"
    lines = [
        "# Relaxed systems per hour",
        "",
        f"Made by `{record['command']}`, whose help says what is compared.",
        "",
        f"{settings['systems']} systems, network: {network}, {settings['device']} with "
        f"{settings['threads']} threads, at most {settings['steps']} steps, "
        + ("no threshold" if settings["fmax_eV_A"] is None else f"threshold {settings['fmax_eV_A']:g} eV/Å")
        + f", batches: {batches} (fairchem: {settings['fairchem_batch_size']}). Machine: "
        f"{record['machine']['processor']}. Medians of {settings['repeats']} rounds, in which the methods "
        "take turns. *Energy*: largest difference of a final energy from that of the first method.",
        "",
        "| method | systems per hour | slowest and fastest round | times as fast as ASE | calls of the "
        "network | converged | energy (eV) |",
        "|---|---|---|---|---|---|---|",
    ]
    base = record["methods"]["ase"]["systems_per_hour"]
    for name, row in record["methods"].items():
        lines.append(
            f"| {METHODS[name][2]} | {row['systems_per_hour']:.0f} | {row['slowest_round']:.0f} to "
            f"{row['fastest_round']:.0f} | {row['systems_per_hour'] / base:.2f} | {row['model_evaluations']} "
            f"| {row['converged']} | {row['largest_energy_difference_eV']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--checkpoint", help="trained network: a file, or the name of a shipped one")
    network.add_argument("--size", choices=SIZES, help="network of this size with random parameters")
    parser.add_argument(
        "--reference-python", help="Python of an environment with fairchem-core 1.10.0 (only with --size)"
    )
    parser.add_argument("--systems", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=50, help="maximum number of steps per system (default: %(default)s)"
    )
    parser.add_argument(
        "--fmax", type=float, default=0.05, help="threshold with --checkpoint, eV/Å (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, help="systems per batch (default: chosen; fairchem: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the starts (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="default: %(default)s")
    options = parser.parse_args(words)
    for name in ("systems", "steps", "repeats", "threads", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
    if options.checkpoint is not None:
        if options.reference_python is not None:
            raise InputError("fairchem cannot load this package's checkpoint: give --size, or no reference")
        options.checkpoint = find_checkpoint(options.checkpoint).absolute()
    if options.reference_python is not None and not Path(options.reference_python).exists():
        raise InputError(f"{options.reference_python} not found: see benchmarks/setup_reference.sh")
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = parse_arguments(words)
    network = options.size if options.checkpoint is None else options.checkpoint.stem
    targets = [options.output / f"relaxations_{network}{suffix}" for suffix in (".json", ".md")]
    for target in targets:
        check_target(target)
    machine = describe_machine()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(options, Path(folder))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = {
        **{name: getattr(options, name) for name in ("size", "systems", "steps", "batch_size", "repeats")},
        **{name: getattr(options, name) for name in ("threads", "device", "seed")},
        "checkpoint": None if options.checkpoint is None else options.checkpoint.name,
        "fmax_eV_A": None if options.checkpoint is None else options.fmax,
        "fairchem_batch_size": options.batch_size or 8,
        **OPTIMIZER,
    }
    record = {
        **header("relaxations/1", options.checkpoint),
        "machine": machine,
        "settings": settings,
        "methods": summarise(rows, options.systems),
    }
    write_json(targets[0], record, make_folder=True)
    write_bytes(targets[1], markdown(record).encode())
    print(markdown(record))
    return 0


if __name__ == "__main__":
    run_script(main)
