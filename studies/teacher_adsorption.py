"""Adsorption energies of SevenNet-0 on the DFT systems that the demo relaxes, from the same start structures.

    python -m studies.teacher_adsorption               # a few minutes; needs the package sevenn

Writes data/oc20_trajs/teacher.json. Slab with adsorbate, and the slab without it, are relaxed from the first
frame of the DFT relaxation; the adsorbate's atoms have the energies that data/teacher was made with (from H2,
H2O, CO and N2 with the same potential). A stopped command goes on with the next system.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets_oc20.structure_files import read_structure
from equiformer2.adsorption import adsorption_energy
from equiformer2.demo.plan import RELAXED_SYSTEMS
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.script import origin, run_script

DATA = Path("data/oc20_trajs")
#: data/README.md, eV per atom.
GAS_ATOMS = {"H": -3.323, "O": -7.449, "N": -8.242, "C": -7.044}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", default=list(RELAXED_SYSTEMS))
    parser.add_argument("--out", type=Path, default=DATA / "teacher.json")
    arguments = parser.parse_args()
    try:
        from sevenn.calculator import SevenNetCalculator
    except ImportError as error:
        raise InputError("the package sevenn is missing: pip install sevenn==0.13.0") from error
    calculator = SevenNetCalculator("7net-0", device="cpu")
    known: dict[str, Any] = read_json(arguments.out)["systems"] if arguments.out.exists() else {}
    for system in arguments.systems:
        if system in known:
            continue
        start = read_structure(DATA / f"{system}.extxyz.xz", 0)
        start.calc = None
        result = adsorption_energy(
            start,
            calculator,
            energy_kind="total",
            gas_references=GAS_ATOMS,
            optimizer="LBFGS",
            fmax=0.05,
            steps=300,
            progress=True,
        )
        known[system] = {
            "adsorption_energy_eV": result.energy,
            "converged": result.converged,
            "steps": result.system.steps,
            "anomalies": [anomaly.name for anomaly in result.anomalies],
        }
        print(f"{system}: {result.energy:.3f} eV, {result.system.outcome()}")
        _write(arguments.out, known)
    _write(arguments.out, known)


def _write(path: Path, systems: dict[str, Any]) -> None:
    write_json(path, {**origin(), "potential": "SevenNet-0, not DFT", "systems": systems})


if __name__ == "__main__":
    run_script(main)
