"""Measure what forces and energies do at sites of high symmetry, where neighbours tie and tensors vanish.

    python -m benchmarks.measure_symmetric_sites [--reference-python .bench-venv/bin/python] [--output FOLDER]

Perfect crystals and clean slabs, through `models/oc20_small.pt`, and through a network of random weights that
fairchem-core 1.10.0 takes as well (`make benchmark` makes its environment). Per structure: the force on atoms
that have none by symmetry, and the changes of forces and energy under changes that should make none.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, fcc100, fcc111
from ase.io import read, write

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "models" / "oc20_small.pt"
SHIFTS = 20
STEPS_A = (1e-7, 1e-4)
REMEDY_A = 0.01
"""Å; standard deviation of the displacements that take a crystal away from its symmetry."""
Answers = Callable[[list[Atoms]], list[tuple[float, np.ndarray]]]


def structures() -> dict[str, Atoms]:
    """Crystals in which no atom feels a force, and slabs in which none feels one along the surface."""
    return {
        "Cu fcc, 4 atoms": bulk("Cu", "fcc", a=3.6, cubic=True),
        "Fe bcc, 2 atoms": bulk("Fe", "bcc", a=2.87, cubic=True),
        "MgO, 8 atoms": bulk("MgO", "rocksalt", a=4.2, cubic=True),
        "Cu(111), 36 atoms": fcc111("Cu", (3, 3, 4), vacuum=8.0, periodic=True),
        "Cu(100), 36 atoms": fcc100("Cu", (3, 3, 4), vacuum=8.0, periodic=True),
    }


def variants(atoms: Atoms) -> tuple[list[Atoms], list[str]]:
    """`atoms` and changes of it that should change nothing, or next to nothing; and what each is."""
    random = np.random.default_rng(0)
    made, kinds = [atoms, atoms.copy()], ["itself", "repeated"]
    for _ in range(SHIFTS):
        shifted = atoms.copy()
        shifted.positions += random.integers(-5, 6, size=(len(atoms), 3)) @ atoms.cell.array
        made, kinds = [*made, shifted], [*kinds, "images"]
    for step in STEPS_A:
        for _ in range(5):
            moved = atoms.copy()
            direction = random.normal(size=3)
            moved.positions[0] += step * direction / np.linalg.norm(direction)
            made, kinds = [*made, moved], [*kinds, f"moved {step:g}"]
    for scale, kind in ((REMEDY_A, "remedy"), (0.1, "rattled")):
        rattled = atoms.copy()
        rattled.rattle(scale, seed=0)
        made, kinds = [*made, rattled], [*kinds, kind]
        if kind == "remedy":
            for _ in range(5):
                moved = rattled.copy()
                direction = random.normal(size=3)
                moved.positions[0] += STEPS_A[-1] * direction / np.linalg.norm(direction)
                made, kinds = [*made, moved], [*kinds, "remedy moved"]
    return made, kinds


def measure(atoms: Atoms, answers: Answers) -> dict[str, float]:
    """The row of one structure; energies in meV and forces in eV/Å, or in the network's units."""
    made, kinds = variants(atoms)
    found = answers(made)
    forces = found[0][1]

    def largest(kind: str, since: str = "itself") -> tuple[float, float]:
        energy, forces = found[kinds.index(since)]
        here = [answer for answer, name in zip(found, kinds, strict=True) if name == kind]
        energies, changes = zip(*((abs(e - energy), np.abs(f - forces).max()) for e, f in here), strict=True)
        return 1e3 * max(energies), float(max(changes))

    # Along the surface of a slab and in every direction of a crystal symmetry leaves no force.
    free = forces[:, :2] if np.ptp(atoms.positions[:, 2]) < atoms.cell[2, 2] - 10 else forces
    row = {"force_of_symmetry_zero": float(np.abs(free).max())}
    row["rms_force_rattled"] = float(np.sqrt((found[-1][1] ** 2).mean()))
    for name, kind in (
        ("repeated", "repeated"),
        ("images", "images"),
        *((f"moved_{s:g}_A", f"moved {s:g}") for s in STEPS_A),
    ):
        row[f"energy_{name}_milli"], row[f"force_{name}"] = largest(kind)
    step = f"displaced_and_moved_{STEPS_A[-1]:g}_A"
    row[f"energy_{step}_milli"], row[f"force_{step}"] = largest("remedy moved", "remedy")
    return row


def ours(path: Path, strict: bool, backend: str = "auto") -> Answers:
    """Answers of a checkpoint file of this package."""
    from equiformer2.checkpoint import load_checkpoint
    from equiformer2.inference import Predictor
    from equiformer2.inference.atoms import atoms_to_data

    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    model.config = dataclasses.replace(model.config, enforce_max_neighbors_strictly=strict)
    predictor = Predictor(checkpoint, backend=backend)

    def answers(made: list[Atoms]) -> list[tuple[float, np.ndarray]]:
        outs = [predictor.predict(atoms_to_data(atoms, notify=False)) for atoms in made]
        return [(float(out["energy"][0]), out["forces"].double().numpy()) for out in outs]

    return answers


def reference(python: str, parameters: Path) -> Answers:
    """Answers of fairchem-core with the same parameters, in a process of its own environment."""

    def answers(made: list[Atoms]) -> list[tuple[float, np.ndarray]]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "structures.traj"
            write(path, made)
            options = ["--answer", str(path), "--parameters", str(parameters)]
            command = [os.path.abspath(python), "-m", "benchmarks.measure_symmetric_sites", *options]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
        rows = json.loads(done.stdout.splitlines()[-1])
        return [(energy, np.array(forces)) for energy, forces in rows]

    return answers


def answer(path: str, parameters: str) -> None:
    """Print the reference's answers; runs in its environment."""
    from benchmarks.fairchem_network import ReferenceCalculator, build
    from benchmarks.network_sizes import SIZES

    model = build(SIZES["small"], torch.load(parameters, weights_only=True))
    calculator = ReferenceCalculator(model, "cpu")
    rows = []
    for atoms in read(path, index=":"):
        calculator.reset()
        atoms.calc = calculator
        rows.append((atoms.get_potential_energy(), atoms.get_forces().tolist()))
    print(json.dumps(rows))


def random_network(folder: Path) -> tuple[Path, Path]:
    """A network of random weights as a checkpoint of ours, and its parameters for the reference."""
    from benchmarks.equiformer2_network import build
    from benchmarks.network_sizes import SIZES
    from equiformer2.checkpoint import Normalizer, Normalizers, save_checkpoint

    torch.manual_seed(0)
    model = build(SIZES["small"], None).eval()
    checkpoint, parameters = folder / "network.pt", folder / "parameters.pt"
    torch.save(dict(model.named_parameters()), parameters)
    unit = Normalizers(energy=Normalizer(0.0, 1.0), forces=Normalizer(0.0, 1.0))
    state = model.state_dict()
    save_checkpoint(
        checkpoint,
        model=model,
        raw_state=state,
        averaged_state=None,
        normalizers=unit,
        energy_kind="total",
        provenance={},
    )
    return checkpoint, parameters


def main() -> None:
    from equiformer2.files import write_json
    from equiformer2.script import origin

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference-python", metavar="FILE", help="Python of the reference's environment")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the results")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    parser.add_argument("--parameters", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, parameters = random_network(Path(folder))
        ways: dict[tuple[str, str], Answers] = {
            ("oc20_small", "strict"): ours(CHECKPOINT, True),
            ("oc20_small", "whole shells"): ours(CHECKPOINT, False),
            ("random", "strict"): ours(checkpoint, True),
        }
        if options.reference_python:
            ways["random", "reference"] = reference(options.reference_python, parameters)
        torch_only = ours(CHECKPOINT, True, "torch")
        for name, atoms in structures().items():
            for (network, way), answers in ways.items():
                row = {"structure": name, "network": network, "way": way} | measure(atoms, answers)
                if (network, way) == ("oc20_small", "strict"):
                    (energy, forces), (other, others) = answers([atoms])[0], torch_only([atoms])[0]
                    row["energy_backends_milli"] = 1e3 * abs(energy - other)
                    row["force_backends"] = float(np.abs(forces - others).max())
                rows.append(row)
                print({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    units = {"oc20_small": "meV and eV/Å", "random": "a thousandth of the energy's unit and the forces' unit"}
    write_json(options.output / "symmetric_sites.json", {**origin(), "measured_in": units, "sites": rows})


if __name__ == "__main__":
    if "--answer" in sys.argv:  # in the reference's environment, which has no equiformer2
        answer(sys.argv[2], sys.argv[4])
    else:
        from equiformer2.script import run_script

        run_script(main)
