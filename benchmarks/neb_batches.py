"""Measure a nudged elastic band whose images are calculated in one batch, against ASE's way of one by one.

    python -m benchmarks.neb_batches [--checkpoint oc20_small] [--images 10] [--steps 5] [--device cpu]

An oxygen atom goes from the fcc to the hcp hollow of Pt(111). Three bands take the same steps of FIRE: that
of `equiformer2.adsorption.neb`, ASE's with a calculator for every image (on one network), and ASE's with one
calculator for all (`allow_shared_calculator`), which remembers one structure only and so computes images
again.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.mep import NEB
from ase.optimize import FIRE

from benchmarks.machine import describe_machine
from equiformer2 import EquiformerV2Calculator, Predictor
from equiformer2.adsorption import PlacementOptions, SlabOptions, prepare_system
from equiformer2.adsorption.neb import find_path
from equiformer2.devices import usable_device
from equiformer2.files import check_target, write_json
from equiformer2.script import origin, run_script
from equiformer2.shipped import find_checkpoint

_NEVER = 1e-9
"""eV/Å; a threshold that no band reaches."""


class Counting(EquiformerV2Calculator):
    """Calculator that counts the passes of its network."""

    passes = 0

    def calculate(self, *arguments: Any, **options: Any) -> None:
        type(self).passes += 1
        super().calculate(*arguments, **options)


def ends(size: tuple[int, int, int]) -> tuple[Atoms, Atoms]:
    """Oxygen in the two hollows, not relaxed."""
    slab = SlabOptions(size=size)
    first, last = (prepare_system("Pt111", "O", slab, PlacementOptions(site=site)) for site in ("fcc", "hcp"))
    return first, last


def one_by_one(first: Atoms, last: Atoms, predictor: Predictor, images: int, steps: int, shared: bool) -> int:
    """Take the steps with ASE's band, and return the number of evaluations."""
    Counting.passes = 0
    band = [first, *(first.copy() for _ in range(images)), last]
    calculator = Counting(predictor)
    for image in band:
        image.calc = calculator if shared else Counting(predictor)
    neb = NEB(band, k=1.0, method="improvedtangent", allow_shared_calculator=shared)
    neb.interpolate("idpp", mic=True)
    FIRE(neb, logfile=None).run(fmax=_NEVER, steps=steps)
    return Counting.passes


def in_batches(first: Atoms, last: Atoms, predictor: Predictor, images: int, steps: int) -> int:
    """Take the steps with all images in one batch, and return the number of evaluations."""
    return find_path(first, last, predictor, images=images, fmax=_NEVER, steps=steps).model_evaluations


def measure(predictor: Predictor, images: int, steps: int, size: tuple[int, int, int]) -> dict[str, Any]:
    """Evaluations and seconds of the three bands; each runs once before for a step, which is not counted."""
    ways: dict[str, Callable[[int], int]] = {
        "one batch": lambda taken: in_batches(*ends(size), predictor, images, taken),
        "a calculator per image": lambda taken: one_by_one(*ends(size), predictor, images, taken, False),
        "one calculator": lambda taken: one_by_one(*ends(size), predictor, images, taken, True),
    }
    found = {}
    for name, way in ways.items():
        way(1)
        began = time.perf_counter()
        evaluations = way(steps)
        found[name] = {"evaluations": evaluations, "seconds": round(time.perf_counter() - began, 3)}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="oc20_small", help="network (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10, help="images between the ends")
    parser.add_argument("--steps", type=int, default=5, help="steps of the optimiser")
    parser.add_argument("--size", type=int, nargs=3, default=(3, 3, 4), help="repetitions of the slab")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also written as JSON")
    options = parser.parse_args(argv)
    if options.json is not None:
        check_target(options.json)
    predictor = Predictor(find_checkpoint(options.checkpoint), device=usable_device(options.device))
    bands = measure(predictor, options.images, options.steps, tuple(options.size))
    print(f"{'band':26}{'evaluations':>12}{'seconds':>10}")
    for name, one in bands.items():
        print(f"{name:26}{one['evaluations']:12}{one['seconds']:10.2f}")
    record = {
        **origin(),
        "machine": describe_machine(),
        "checkpoint": str(options.checkpoint),
        "atoms": len(ends(tuple(options.size))[0]),
        "images": options.images,
        "steps": options.steps,
        "bands": bands,
    }
    if options.json is not None:
        write_json(options.json, record)


if __name__ == "__main__":
    run_script(main)
