"""Train a small EquiformerV2 on bundled OC20 relaxations and relax an adsorbate with it."""

import argparse
from pathlib import Path

from equiformer2.script import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="a minute instead of eight; its errors mean nothing"
    )
    parser.add_argument(
        "--out", type=Path, help="new folder for everything (default: runs/demo, or the next free name)"
    )
    arguments = parser.parse_args()
    from equiformer2.demo.plan import DemoPlan
    from equiformer2.demo.run import run_demo

    root = Path(__file__).resolve().parent.parent
    out = arguments.out or free_name(root / "runs" / "demo")
    plan = DemoPlan.short() if arguments.short else DemoPlan()
    print(f"report: {run_demo(root, out, plan)}")


def free_name(path: Path) -> Path:
    """The path, or the first of path-2, path-3, … that does not exist."""
    candidates = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))]
    return next(candidate for candidate in candidates if not candidate.exists())


if __name__ == "__main__":
    run_script(main)
