"""Time and weigh equiformer2 against fairchem-core's EquiformerV2 on this machine.

    make benchmark                               # builds the reference's environment first
    make benchmark BENCHMARK_ARGS="--quick"      # one call each, as a check that it runs

Same parameters, same structures, same allocator setting, same number of threads; the answers are compared
before anything is timed. Writes benchmark_cpu.json, .md and .png into the output folder (benchmark_cuda.*
with --device cuda); parts and sizes measured one after the other are merged there. docs/benchmark.md
explains the parts.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import benchmark_parts, part_atoms
from benchmarks.benchmark_context import Benchmark
from benchmarks.benchmark_figures import ATOMS_AXIS, atoms_figure, figure
from benchmarks.benchmark_report import markdown
from benchmarks.benchmark_results import Store
from benchmarks.benchmark_settings import BACKENDS, DEVICES, PARTS_WITHOUT_REFERENCE, Settings
from benchmarks.benchmark_structures import BATCHES
from benchmarks.machine import PRECISIONS, describe_machine
from benchmarks.network_sizes import SIZES
from benchmarks.worker_session import ALLOCATORS, BenchmarkError
from equiformer2.errors import InputError
from equiformer2.files import write_bytes
from equiformer2.script import run_script

# Memory comes before the timings: it tells what fits into this machine.
MEASUREMENTS = {
    "memory": benchmark_parts.measure_memory,
    "timings": benchmark_parts.measure_timings,
    "precision": benchmark_parts.measure_precision,
    "relaxation": benchmark_parts.measure_relaxation,
    "breakdown": benchmark_parts.measure_breakdown,
    "atoms": part_atoms.measure,
    "training_atoms": part_atoms.measure_training,
}
# What `--precisions` is without being told: bf16 on a CPU is asked for, since few processors have it.
DEFAULT_PRECISIONS = {"cpu": "float32", "cuda": "float32,tf32,bf16"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--reference-python",
        default=".bench-venv/bin/python",
        help="Python of an environment with fairchem-core 1.10.0 (default: %(default)s); the parts "
        f"{', '.join(PARTS_WITHOUT_REFERENCE)} run without one",
    )
    add("--parts", default="memory,timings", help=f"of {', '.join(MEASUREMENTS)} (default: %(default)s)")
    add("--sizes", help=f"of {', '.join(SIZES)} (default: 31M,83M; with --quick: 31M)")
    add("--batches", help=f"of {', '.join(BATCHES)} (default: B1,B4; with --quick: B1)")
    add("--allocators", default="default", help=f"of {', '.join(ALLOCATORS)} (default: %(default)s)")
    add("--device", default="cpu", choices=DEVICES, help="default: %(default)s")
    add(
        "--precisions",
        help=f"of {', '.join(PRECISIONS)} (default: float32; with --device cuda all three)",
    )
    add("--backends", default="auto", help=f"of {', '.join(BACKENDS)} (default: %(default)s)")
    add("--repeats", type=int, help="timed calls of each (default: 5; with --quick: 1)")
    add("--threads", type=int, default=2, help="default: %(default)s")
    add(
        "--atoms",
        default="16,75,150,300,600,1200,2500,5000,10000",
        help="parts atoms and training_atoms: about how many atoms (default: %(default)s)",
    )
    add(
        "--max-seconds",
        type=float,
        default=120.0,
        help="the same parts: no larger structure once a call would take longer (default: %(default)s)",
    )
    add("--force", action="store_true", help="measure again what is complete")
    add("--output", type=Path, help="folder (default: docs/results; with --quick: runs/benchmark)")
    add(
        "--quick",
        action="store_true",
        help="other defaults: one call each of the 31M network on one structure",
    )
    given = parser.parse_args(arguments)
    defaults = ("31M", "B1", 1) if given.quick else ("31M,83M", "B1,B4", 5)
    for name, default in zip(("sizes", "batches", "repeats"), defaults, strict=True):
        if getattr(given, name) is None:
            setattr(given, name, default)
    if given.output is None:
        given.output = Path("runs/benchmark" if given.quick else "docs/results")
    if given.precisions is None:
        given.precisions = DEFAULT_PRECISIONS[given.device]
    return given


def chosen(option: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The comma-separated names of an option, checked."""
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise InputError(f"--{option} {name}: known are {', '.join(known)}")
    return names


def make_settings(given: argparse.Namespace) -> Settings:
    """The settings that the options ask for.

    Raises:
        InputError: an option is unknown, or does not go with another.
    """
    if given.repeats < 1 or given.threads < 1:
        raise InputError("--repeats and --threads must be at least 1")
    if not given.max_seconds > 0:
        raise InputError("--max-seconds must be above 0")
    try:
        atoms = tuple(int(number) for number in given.atoms.split(","))
    except ValueError as error:
        raise InputError(f"--atoms {given.atoms}: give whole numbers with commas between them") from error
    if min(atoms) < 1:
        raise InputError(f"--atoms {given.atoms}: numbers of atoms are at least 1")
    parts = chosen("parts", given.parts, MEASUREMENTS)
    reference: str | None = given.reference_python
    if not Path(given.reference_python).exists():
        if not set(parts) <= set(PARTS_WITHOUT_REFERENCE):
            raise InputError(
                f"{given.reference_python} not found: run `make benchmark`, or give --reference-python"
            )
        reference = None
    precisions = chosen("precisions", given.precisions, PRECISIONS)
    backends = chosen("backends", given.backends, BACKENDS)
    if "float32" not in precisions or "auto" not in backends:
        raise InputError("--precisions needs float32 and --backends auto: the others are compared with them")
    if "tf32" in precisions and given.device == "cpu":
        raise InputError("--precisions tf32 exists on a GPU only: add --device cuda")
    allocators = chosen("allocators", given.allocators, ALLOCATORS)
    if given.device == "cuda" and allocators != ("default",):
        raise InputError("--allocators concerns memory of the CPU: leave it out with --device cuda")
    return Settings(
        ours_python=sys.executable,
        reference_python=reference,
        parts=parts,
        sizes=chosen("sizes", given.sizes, SIZES),
        batches=chosen("batches", given.batches, BATCHES),
        allocators=allocators,
        # Float32 first: the warm-up and the comparison begin with it.
        precisions=tuple(name for name in PRECISIONS if name in precisions),
        backends=tuple(name for name in BACKENDS if name in backends),
        device=given.device,
        repeats=given.repeats,
        threads=given.threads,
        atoms=atoms,
        max_seconds=given.max_seconds,
    )


def command(settings: Settings) -> str:
    """Format the command that measures this again."""
    options: dict[str, Any] = {
        "parts": ",".join(settings.parts),
        "sizes": ",".join(settings.sizes),
        "batches": ",".join(settings.batches),
        "allocators": ",".join(settings.allocators),
        "precisions": ",".join(settings.precisions),
        "backends": ",".join(settings.backends),
        "device": settings.device,
        "repeats": settings.repeats,
        "threads": settings.threads,
    }
    if {"atoms", "training_atoms"} & set(settings.parts):
        options |= {"atoms": ",".join(map(str, settings.atoms)), "max-seconds": f"{settings.max_seconds:g}"}
    return " ".join(["python scripts/benchmark.py", *(f"--{key} {value}" for key, value in options.items())])


def measure_all(bench: Benchmark) -> None:
    """Measure all parts that are not complete, size by size."""
    for size in bench.settings.sizes:
        for part in (name for name in MEASUREMENTS if name in bench.settings.parts):
            MEASUREMENTS[part](bench, size)


def main() -> int:
    given = parse_arguments()
    settings = make_settings(given)
    given.output.mkdir(parents=True, exist_ok=True)
    name = f"benchmark_{settings.device}"
    run = {"command": command(settings), "machine": describe_machine()}
    store = Store(given.output / f"{name}.json", run, given.force)
    store.hold()

    def save() -> None:
        content = store.content
        pictures = {name: figure(content)}
        pictures |= {f"{name}_{part}": atoms_figure(content, part) for part in ATOMS_AXIS}
        drawn = {title: plot for title, plot in pictures.items() if plot is not None}
        for title, plot in drawn.items():
            image = io.BytesIO()
            plot.savefig(image, format="png", dpi=130)
            write_bytes(given.output / f"{title}.png", image.getvalue())
        write_bytes(given.output / f"{name}.md", markdown(content, name, list(drawn)).encode())

    try:
        with tempfile.TemporaryDirectory() as folder:
            measure_all(Benchmark(settings, store, Path(folder), save, lambda line: print(line, flush=True)))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # Also when nothing had to be measured: the report may have changed.
    save()
    print((given.output / f"{name}.md").read_text())
    return 0


if __name__ == "__main__":
    run_script(main)
