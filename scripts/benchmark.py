"""Time and weigh equiformer2 against fairchem-core's EquiformerV2 on this machine's CPU.

    make benchmark                               # builds the reference's environment first
    make benchmark BENCHMARK_ARGS="--quick"      # one call each, as a check that it runs

Same parameters, same structures, same allocator setting, same number of threads; the answers are compared
before anything is timed. Writes benchmark_cpu.json, .md and .png into the output folder.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from bench.measure import Benchmark, Settings
from bench.report import describe_machine, figure, markdown
from bench.session import ALLOCATORS, BenchmarkError
from bench.sizes import SIZES
from bench.structures import BATCHES
from equiformer2.errors import InputError
from equiformer2.files import write_bytes, write_json
from equiformer2.script import run_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference-python",
        default=".bench-venv/bin/python",
        help="Python of an environment with fairchem-core 1.10.0 (default: %(default)s)",
    )
    parser.add_argument("--sizes", default="31M,83M", help=f"of {', '.join(SIZES)} (default: %(default)s)")
    parser.add_argument(
        "--batches", default="B1,B4", help="of B1 (73 atoms), B4 (300 atoms) (default: %(default)s)"
    )
    parser.add_argument(
        "--allocators", default="default", help=f"of {', '.join(ALLOCATORS)} (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, help="folder (default: docs/results; with --quick: runs/benchmark)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one call each of the 31M network on one structure"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.batches, arguments.repeats = "31M", "B1", 1
    if arguments.output is None:
        arguments.output = Path("runs/benchmark" if arguments.quick else "docs/results")
    return arguments


def chosen(option: str, text: str, known: Any) -> tuple[str, ...]:
    """The comma-separated names of an option, checked."""
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise InputError(f"--{option} {name}: known are {', '.join(known)}")
    return names


def command(settings: Settings) -> str:
    """What to type to measure this again."""
    options = {
        "sizes": ",".join(settings.sizes),
        "batches": ",".join(settings.batches),
        "allocators": ",".join(settings.allocators),
        "repeats": settings.repeats,
        "threads": settings.threads,
    }
    return " ".join(["python scripts/benchmark.py", *(f"--{key} {value}" for key, value in options.items())])


def main() -> int:
    arguments = parse_arguments()
    if not Path(arguments.reference_python).exists():
        raise InputError(
            f"{arguments.reference_python} not found: run `make benchmark`, or give --reference-python"
        )
    if arguments.repeats < 1 or arguments.threads < 1:
        raise InputError("--repeats and --threads must be at least 1")
    settings = Settings(
        ours_python=sys.executable,
        reference_python=arguments.reference_python,
        sizes=chosen("sizes", arguments.sizes, SIZES),
        batches=chosen("batches", arguments.batches, BATCHES),
        allocators=chosen("allocators", arguments.allocators, ALLOCATORS),
        repeats=arguments.repeats,
        threads=arguments.threads,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()

    def save(results: dict[str, Any]) -> None:
        content = {"command": command(settings), "machine": machine} | results
        # Where the interpreters stood says nothing to a reader.
        content["settings"] = {k: v for k, v in results["settings"].items() if not k.endswith("_python")}
        write_json(arguments.output / "benchmark_cpu.json", content)
        write_bytes(arguments.output / "benchmark_cpu.md", markdown(content).encode())
        image = io.BytesIO()
        figure(content).savefig(image, format="png", dpi=130)
        write_bytes(arguments.output / "benchmark_cpu.png", image.getvalue())

    try:
        Benchmark(settings, save, lambda line: print(line, flush=True)).run()
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((arguments.output / "benchmark_cpu.md").read_text())
    return 0


if __name__ == "__main__":
    run_script(main)
