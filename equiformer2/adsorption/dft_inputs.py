"""DFT input for the best structures of a search: VASP with OC20's settings, and Quantum ESPRESSO."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.io import write

from datasets_oc20.untrusted import AnyPath
from equiformer2.files import write_bytes, write_json
from equiformer2.inference.atoms import fixed_mask

OC20_INCAR: Mapping[str, Any] = {
    "IBRION": 2,
    "NSW": 2000,
    "ISIF": 0,
    "ISPIN": 1,
    "ISYM": 0,
    "LREAL": "Auto",
    "EDIFFG": -0.03,
    "SYMPREC": 1e-10,
    "ENCUT": 350.0,
    "LAECHG": ".FALSE.",
    "LWAVE": ".FALSE.",
    "NCORE": 4,
    "GGA": "RP",
}
"""OC20's settings of slabs with adsorbates (fairchem-data-oc 1.0.2, `utils/vasp_flags.py`), with PBE
potentials: RPBE, no spin polarisation, no +U, no dispersion."""

_K_PRODUCT = 40.0  # Å; OC20: points along a vector times its largest component
#: Settings of Quantum ESPRESSO; the cut-offs (Ry) are usual for ultrasoft potentials, others need others.
_ESPRESSO: Mapping[str, Mapping[str, Any]] = {
    "control": {"calculation": "relax", "tprnfor": True, "forc_conv_thr": 1.2e-3},
    "system": {
        "ecutwfc": 50.0,
        "ecutrho": 400.0,
        "occupations": "smearing",
        "smearing": "mp",
        "degauss": 0.015,
        "input_dft": "RPBE",
    },
}
CANDIDATE = "candidate.json"
_POTENTIALS = (
    "Join the PBE potentials of these elements to POTCAR, in this order (OC20 takes those without a suffix): "
)


class Candidate(NamedTuple):
    """Structure for DFT: `id` of the placement, relaxed `atoms`, and the model's adsorption energy, eV.

    `force_spread` is the largest standard deviation of a committee's force on a free atom, eV/Å, and
    `is_minimum` is False for a relaxation that ended early.
    """

    id: str
    atoms: Atoms
    energy: float | None
    force_spread: float | None = None
    is_minimum: bool = True


def write_dft_input(place: AnyPath, candidate: Candidate, notes: Mapping[str, Any] | None = None) -> None:
    """Write a folder of input for VASP and Quantum ESPRESSO; held atoms stay held.

    Potentials are not written, since their licences do not allow it: `POTCAR.txt` says which to join, and
    Quantum ESPRESSO's input names a file per element that has to be replaced. In VASP's files the atoms are
    sorted by element, as `order` in `candidate.json` says, which is written last.

    Args:
        place: the folder.
        candidate: the structure.
        notes: further plain values for `candidate.json`.
    """
    place = Path(place)
    place.mkdir(parents=True, exist_ok=True)
    order = np.argsort(candidate.atoms.get_chemical_symbols(), kind="stable")
    atoms = candidate.atoms[order]
    points = k_points(atoms)
    files = {
        "POSCAR": _written(atoms, "vasp"),
        "INCAR": "".join(f"{key} = {value}\n" for key, value in OC20_INCAR.items()),
        "KPOINTS": "OC20's density\n0\nMonkhorst-Pack\n{} {} {}\n0 0 0\n".format(*points),
        "POTCAR.txt": f"{_POTENTIALS}{' '.join(dict.fromkeys(atoms.get_chemical_symbols()))}\n",
        "pw.in": _written(
            candidate.atoms,
            "espresso-in",
            input_data={name: dict(values) for name, values in _ESPRESSO.items()},
            pseudopotentials={symbol: f"{symbol}.UPF" for symbol in sorted(set(candidate.atoms.symbols))},
            kpts=points,
        ),
    }
    for file, text in files.items():
        write_bytes(place / file, text.encode())
    record = {"id": candidate.id, "model_eV": candidate.energy, "order": order.tolist()}
    write_json(place / CANDIDATE, {**record, **(notes or {})})


def k_points(atoms: Atoms) -> tuple[int, int, int]:
    """Choose OC20's k-points of a slab, one along the normal.

    Along each surface vector it is 40 Å over the largest component of the vector, rounded to the nearest
    number (`calculate_surface_k_points` of fairchem-data-oc 1.0.2, `utils/vasp.py`).
    """
    components = np.abs(atoms.cell.array[:2]).max(axis=1)
    first, second = (max(1, round(_K_PRODUCT / component)) for component in components.tolist())
    return first, second, 1


def _written(atoms: Atoms, file_format: str, **options: Any) -> str:
    # Without results, which writers would take along. A writer knows some kinds of constraints, and drops
    # the others; all know this one, and no search has atoms that are held in part.
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    held = fixed_mask(atoms)
    plain.set_constraint(FixAtoms(mask=held) if held.any() else None)
    text = StringIO()
    write(text, plain, format=file_format, **options)
    return text.getvalue()
