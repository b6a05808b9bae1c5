"""Reading of CatBench's adsorption benchmarks: structures of reactions with DFT's adsorption energies.

A file is a JSON object with an entry per reaction (CatBench, J. Moon, MIT, https://github.com/JinukMoon/catbench):

    {"Cu111_O": {"raw": {"star":   {"stoi": -1,   "energy_ref": -95.1, "atoms_json": "{…}"},
                         "Ostar":  {"stoi": 1,    "energy_ref": -100.9, "atoms_json": "{…}"},
                         "O2gas":  {"stoi": -0.5, "energy_ref": -9.9, "ref": "3f…"}},
                 "ref_ads_eng": -0.85, "adsorbate_indices": [48]},
     "_structures": {"3f…": "{…}"}}

`star` is the clean slab, names that hold `gas` are molecules, the other one ends in `star` and is the slab
with its adsorbate. Structures are texts in ASE's JSON format, or references to `_structures`. They are read
here as plain values, and nothing in them is imported or run.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from datasets_oc20.errors import DataError
from datasets_oc20.untrusted import AnyPath, load_json, open_compressed

_LARGEST_FILE = 1 << 31
_LARGEST_STRUCTURE = 1 << 24
_MOST_ATOMS = 100_000
_MOST_REACTIONS = 1_000_000
_STRUCTURES = "_structures"


@dataclass(frozen=True)
class Reaction:
    """Adsorption of one adsorbate on one slab.

    Attributes:
        name: key in the file.
        adsorbate: name of the adsorbate.
        energy: DFT's adsorption energy, eV, negative for what is bound.
        system: slab with adsorbate, with tag 2 on the adsorbate.
        slab: clean slab; None where the file has none.
        terms: structures whose energies make the adsorption energy, by their names in the file, with their
            factors.
        adsorbate_atoms: indices in `system`.
    """

    name: str
    adsorbate: str
    energy: float
    system: Atoms
    slab: Atoms | None
    terms: dict[str, tuple[Atoms, float]] = field(default_factory=dict)
    adsorbate_atoms: tuple[int, ...] = ()


def read_catbench(path: AnyPath) -> tuple[list[Reaction], dict[str, str]]:
    """Read a file of adsorption reactions, compressed (`.gz`, …) or not.

    Returns:
        The reactions; and name and reason of entries that are none, or whose numbers of atoms do not balance.

    Raises:
        DataError: another file format, or no reaction can be used.
        OSError: the file is missing or unreadable.
    """
    with open_compressed(path, _LARGEST_FILE) as file:
        content = load_json(file.read(), str(path), _LARGEST_FILE)
    if not isinstance(content, dict) or len(content) > _MOST_REACTIONS:
        raise DataError(
            f"{path} is no benchmark of CatBench: it must be an object with an entry per reaction."
        )
    shared = content.pop(_STRUCTURES, {})
    known: dict[str, Atoms] = {}
    found: list[Reaction] = []
    left_out: dict[str, str] = {}
    for name, entry in content.items():
        try:
            found.append(_reaction(str(name), entry, shared, known))
        except DataError as error:
            left_out[name] = str(error).rstrip(".")
        except KeyError as error:
            left_out[name] = f"{error.args[0]} is missing"
        except (AttributeError, TypeError, ValueError, IndexError):
            left_out[name] = "it is not laid out as an adsorption reaction of CatBench"
    if not found:
        first = next((f": {name}: {reason}" for name, reason in left_out.items()), "")
        raise DataError(f"{path} holds no adsorption reaction that can be used{first}.")
    return found, left_out


def _reaction(name: str, entry: Any, shared: Any, known: dict[str, Atoms]) -> Reaction:
    raw = entry["raw"]
    terms: dict[str, tuple[Atoms, float]] = {}
    for key, one in raw.items():
        factor = float(one["stoi"])
        if not math.isfinite(factor):
            raise DataError(f"the factor of {key} is not finite")
        terms[str(key)] = (_structure(one, shared, known), factor)
    systems = [key for key in terms if "gas" not in key and key != "star"]
    if len(systems) != 1:
        raise DataError(f"it must have one structure of slab and adsorbate, not {len(systems)}")
    energy = float(entry["ref_ads_eng"])
    if not math.isfinite(energy):
        raise DataError("the adsorption energy is not finite")
    system = terms[systems[0]][0].copy()
    slab = terms["star"][0] if "star" in terms else None
    if "star" in terms and any("gas" in key for key in terms):
        _check_balance(terms)
    atoms = entry.get("adsorbate_indices")
    if atoms is None and slab is not None:
        atoms = range(len(slab), len(system))
    indices = tuple(sorted(int(index) for index in atoms or ()))
    if indices and not 0 <= indices[0] <= indices[-1] < len(system):
        raise DataError(f"the adsorbate's atoms {list(indices)[:5]} are not in the structure")
    tags = np.ones(len(system), dtype=int)
    tags[list(indices)] = 2
    system.set_tags(tags)
    terms[systems[0]] = (system, terms[systems[0]][1])
    return Reaction(name, systems[0].removesuffix("star") or systems[0], energy, system, slab, terms, indices)


def _check_balance(terms: Mapping[str, tuple[Atoms, float]]) -> None:
    """Raise `DataError` where atoms appear or vanish."""
    total = np.zeros(120)
    for atoms, factor in terms.values():
        total += factor * np.bincount(atoms.numbers, minlength=120)[:120]
    if np.abs(total).max() > 1e-3:
        number = int(np.abs(total).argmax())
        raise DataError(
            f"its structures and factors do not balance: {total[number]:+.3g} atoms of number {number}"
        )


def _structure(one: Mapping[str, Any], shared: Any, known: dict[str, Atoms]) -> Atoms:
    """Structure of an entry, or the one that it refers to."""
    text = one.get("atoms_json")
    if text is None:
        reference = one["ref"]
        if not isinstance(shared, dict) or reference not in shared:
            raise DataError(f"the structure {str(reference)[:40]!r} is not in {_STRUCTURES}")
        text = shared[reference]
    if not isinstance(text, str) or len(text) > _LARGEST_STRUCTURE:
        raise DataError("a structure is no text of ASE's JSON format")
    if text not in known:
        known[text] = _atoms(load_json(text, "a structure", _LARGEST_STRUCTURE))
    return known[text]


def _atoms(content: Any) -> Atoms:
    """Build a structure from the plain values of ASE's JSON format."""
    row = content[str(content["ids"][0])]
    numbers = _array(row["numbers"]).astype(int).reshape(-1)
    if not 0 < len(numbers) <= _MOST_ATOMS or numbers.min() < 1 or numbers.max() > 118:
        raise DataError("a structure has no atoms, too many, or none of known elements")
    cell = row.get("cell")
    if isinstance(cell, dict) and "array" in cell:
        cell = cell["array"]
    atoms = Atoms(
        numbers,
        _array(row["positions"]).astype(float).reshape(len(numbers), 3),
        cell=np.zeros((3, 3)) if cell is None else _array(cell).astype(float).reshape(3, 3),
        pbc=_array(row.get("pbc", False)).astype(bool),
    )
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise DataError("a structure has positions or a cell that are not finite")
    held = sorted(set(_held(row.get("constraints") or [])))
    if held:
        if not 0 <= held[0] <= held[-1] < len(atoms):
            raise DataError(f"a held atom ({held[-1]}) is not in its structure")
        atoms.set_constraint(FixAtoms(held))
    return atoms


def _held(constraints: Any) -> Iterator[int]:
    """Indices of atoms that `FixAtoms` holds; CatBench takes no other constraints."""
    if isinstance(constraints, str):
        constraints = load_json(constraints, "constraints")
    for one in constraints:
        if one.get("name") == "FixAtoms":
            yield from (int(index) for index in _array(one["kwargs"]["indices"]).reshape(-1))


def _array(value: Any) -> np.ndarray:
    """Array of ASE's JSON format, or a list."""
    if isinstance(value, dict):
        shape, _, values = value["__ndarray__"]
        return np.asarray(values).reshape(shape)
    return np.asarray(value)
