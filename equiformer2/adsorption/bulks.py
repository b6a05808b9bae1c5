"""Bulk crystals from a file, a formula and its lattice, or a number in a file of bulks."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols, covalent_radii, reference_states
from ase.formula import Formula

from datasets_oc20 import untrusted
from datasets_oc20.errors import DataError
from datasets_oc20.own_data.reading import SourceFile, UnreadableError
from datasets_oc20.structure_files import MAX_FILE, read_structure
from equiformer2.adsorption.adsorbates import is_file
from equiformer2.adsorption.given_structures import given_atoms, path_text
from equiformer2.adsorption.periodic_images import SMALLEST_GAP
from equiformer2.errors import InputError
from equiformer2.files import as_input_error
from equiformer2.inference.atoms import check_atoms

logger = logging.getLogger(__name__)

MOST_BULK_ATOMS = 1000
"""Largest number of atoms of a bulk cell; OC20's have up to some hundred."""

_MOST_BULKS = 1_000_000
_ID_KEYS = ("mpid", "mp_id", "material_id", "src_id", "bulk_id", "id")
"""Names under which files of bulks keep the number, fairchem-data-oc's `src_id` among them."""

_PRIMITIVE_AXES = {
    "fcc": np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2,
    "bcc": np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) / 2,
    "sc": np.eye(3),
}
"""Primitive vectors of lattices with one atom per cell, in units of the lattice constant."""

_COMPOUNDS = {
    "rocksalt": (1, 1),
    "b1": (1, 1),
    "zincblende": (1, 1),
    "b3": (1, 1),
    "wurtzite": (1, 1),
    "cesiumchloride": (1, 1),
    "b2": (1, 1),
    "fluorite": (1, 2),
    "l1_2": (3, 1),
    "l1_0": (1, 1),
}
"""Compounds' crystals, by ASE's names and Strukturbericht symbols: how many atoms each element has."""

_ALIASES = {
    "b1": "rocksalt",
    "b2": "cesiumchloride",
    "b3": "zincblende",
    "a1": "fcc",
    "a2": "bcc",
    "a3": "hcp",
}
_ALLOYS = ("l1_2", "l1_0", "cesiumchloride")
_ELEMENTS = ("fcc", "bcc", "hcp", "sc", "diamond")


@dataclass(frozen=True)
class Bulk:
    """A bulk crystal.

    Attributes:
        atoms: its cell, periodic in all directions.
        name: formula and lattice, number or file.
        crystal: lattice by ASE's name or Strukturbericht symbol; empty where it is not known.
        notices: sentences about it that users should read.
    """

    atoms: Atoms
    name: str
    crystal: str = ""
    notices: tuple[str, ...] = ()

    @property
    def lattice_constant(self) -> float | None:
        """Side of the conventional cube of a lattice with one atom per primitive cell, Å; None for others."""
        if self.crystal not in _PRIMITIVE_AXES or len(self.atoms) != 1:
            return None
        volume = float(self.atoms.get_volume())
        return (volume / abs(float(np.linalg.det(_PRIMITIVE_AXES[self.crystal])))) ** (1 / 3)

    @property
    def primitive_axes(self) -> np.ndarray | None:
        """`[3, 3]` primitive vectors over the lattice constant, of a lattice with one atom per cell."""
        return _PRIMITIVE_AXES[self.crystal] if self.lattice_constant is not None else None


def find_bulk(bulk: Any, bulks: untrusted.AnyPath | None = None) -> Bulk:
    """Make a bulk of what users have.

    Args:
        bulk: Atoms; a pymatgen structure; a file (a path, or text with a dot or a slash that is no formula);
            an element (`Cu`, in its own crystal at ASE's experimental lattice constant); a formula with its
            lattice and lattice constants (`Cu fcc a=3.6`, `Ru hcp a=2.7 c=4.3`, `Cu3Pt L1_2`,
            `NiO rocksalt a=4.2`); a number of `bulks` (`mp-30`).
        bulks: file of bulks: a database of ASE (SQLite or JSON), or a JSON list of objects with `src_id` and
            a structure, as `fairchem-data-oc` has them.

    Raises:
        InputError: none of these, or a structure that is no bulk.
        OSError: a file is missing or unreadable.
    """
    if isinstance(bulk, Bulk):
        return bulk
    bulk = path_text(bulk)
    if not isinstance(bulk, str):
        atoms = given_atoms(bulk, "the bulk")
        return Bulk(_checked(atoms, "the bulk"), str(atoms.get_chemical_formula("metal", empirical=True)))
    if re.fullmatch(r"(mp|mvc|oqmd|jvasp)-?\d+", bulk.strip().lower()):
        return _from_list(bulk.strip().lower(), bulks)
    if bulks is not None:
        raise InputError(f"the bulk {bulk!r} is no number such as mp-30: leave out the file of bulks {bulks}")
    if _Formula.matches(bulk):
        return _Formula.read(bulk)
    if is_file(bulk):
        with as_input_error():
            atoms = read_structure(bulk)
        return Bulk(_checked(atoms, bulk), bulk)
    raise InputError(
        f"there is no bulk {bulk!r}: give an element (Cu), a formula with its lattice ('Cu3Pt L1_2 a=3.7'), "
        "a structure file (a file without extension: ./NAME), or a number such as mp-30 with --bulks FILE"
    )


def read_bulks(path: untrusted.AnyPath) -> Iterator[tuple[str, Atoms]]:
    """Read the bulks of a file one by one: number and structure; those that cannot be read are left out.

    Raises:
        InputError: the file is neither a database of ASE nor JSON of bulks.
        OSError: it is missing or unreadable.
    """
    path = Path(path)
    with as_input_error():
        untrusted.regular_file(path)
        if path.suffix == ".json":
            yield from _Rows.of_json(path)
            return
        source = SourceFile(path)
        try:
            for count, frame in enumerate(source.frames()):
                if count > _MOST_BULKS:
                    raise InputError(f"{path} holds more than {_MOST_BULKS} structures: give a shorter file")
                if frame.atoms is not None:
                    number = _Rows.number(frame.atoms.info)
                    if number:
                        yield number, frame.atoms
        except UnreadableError as error:
            raise InputError(f"{path}: {error}") from error


def _from_list(number: str, bulks: untrusted.AnyPath | None) -> Bulk:
    if bulks is None:
        raise InputError(
            f"the bulk {number} is a number in a database: give the file that holds it with --bulks"
        )
    known, found = 0, []
    for name, atoms in read_bulks(bulks):
        known += 1
        if name.lower() == number:
            found.append(atoms)
    if not found:
        what = "no bulk with a number" if not known else f"{known} bulks and no {number}"
        raise InputError(f"{bulks} holds {what}: give another number or file")
    atoms = _checked(found[0], f"{number} of {bulks}")
    notices = []
    if len(found) > 1:
        volumes = [other.get_volume() / len(other) for other in found]
        notices.append(
            f"{bulks} holds {number} {len(found)} times ({min(volumes):.2f} to {max(volumes):.2f} Å³ per "
            f"atom): the first is taken ({volumes[0]:.2f} Å³ per atom)"
        )
    return Bulk(
        atoms, f"{number} ({atoms.get_chemical_formula('metal', empirical=True)})", "", tuple(notices)
    )


def _checked(atoms: Atoms, name: str) -> Atoms:
    """Copy a bulk without tags, constraints and results; raises `InputError` where it is none."""
    check_atoms(atoms)
    if len(atoms) > MOST_BULK_ATOMS:
        raise InputError(f"{name} has {len(atoms)} atoms: give a bulk cell of at most {MOST_BULK_ATOMS}")
    bulk = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    if abs(np.linalg.det(bulk.cell.array)) < 1e-3:
        raise InputError(f"{name} has no cell of three lattice vectors: give a bulk")
    check_atoms(bulk)
    fractions = np.sort(bulk.get_scaled_positions(wrap=True), axis=0)
    heights = 1 / np.linalg.norm(bulk.cell.reciprocal().array, axis=1)
    gap = float((np.diff(np.vstack([fractions, fractions[0] + 1.0]), axis=0) * heights).max())
    if gap >= SMALLEST_GAP:
        raise InputError(
            f"{name} has {gap:.1f} Å without atoms along a lattice vector, so it is no bulk: give "
            "the bulk itself, and a slab with vacuum as a slab"
        )
    return bulk


class _Formula:
    """Reading of `FORMULA [LATTICE] [a=…] [c=…]`."""

    @staticmethod
    def matches(text: str) -> bool:
        """Tell whether a text is a formula, and not the name of a file."""
        words = text.split()
        if not words or "/" in text:
            return False
        counts = re.findall(r"([A-Z][a-z]?)(\d*)", words[0])
        whole = "".join(symbol + number for symbol, number in counts) == words[0]
        known = whole and all(symbol in chemical_symbols[1:] for symbol, _ in counts)
        return known and (len(words) > 1 or len(counts) == 1 or "." not in text)

    @staticmethod
    def read(text: str) -> Bulk:
        """Build a bulk of `FORMULA [LATTICE] [a=…] [c=…]`."""
        formula, *words = text.split()
        crystal, constants = "", {}
        for word in words:
            name, equals, value = word.partition("=")
            if equals:
                try:
                    constants[name] = float(value)
                except ValueError:
                    constants[name] = np.nan
                if name not in ("a", "c") or not 0.5 < constants[name] < 100:
                    raise InputError(
                        f"{word!r} of the bulk {text!r} is no lattice constant such as a=3.6 (Å)"
                    )
            elif crystal:
                raise InputError(f"the bulk {text!r} names two lattices, {crystal} and {word}: name one")
            else:
                crystal = word.lower().replace("l12", "l1_2").replace("l10", "l1_0")
        crystal = _ALIASES.get(crystal, crystal)
        counts = Formula(formula).count()
        if len(counts) == 1:
            return _Formula._element(next(iter(counts)), crystal, constants)
        if not crystal:
            ratio = tuple(sorted(counts.values()))
            fitting = [name for name, numbers in _COMPOUNDS.items() if tuple(sorted(numbers)) == ratio]
            lattice = (
                f"one of {', '.join(fitting)}, such as '{formula} {fitting[0]} a=4', or " if fitting else ""
            )
            raise InputError(f"the bulk {text!r} needs its lattice: give {lattice}a structure file")
        if crystal not in _COMPOUNDS:
            raise InputError(f"{crystal!r} is no lattice of compounds: use one of {', '.join(_COMPOUNDS)}")
        return _Formula._compound(formula, crystal, constants)

    @staticmethod
    def _element(symbol: str, crystal: str, constants: dict[str, float]) -> Bulk:
        reference = reference_states[atomic_numbers[symbol]] or {}
        own = str(reference.get("symmetry", "unknown"))
        crystal = crystal or own
        if crystal not in _ELEMENTS and crystal != own:
            raise InputError(f"{crystal!r} is no lattice of elements: use one of {', '.join(_ELEMENTS)}")
        if crystal not in _ELEMENTS:
            raise InputError(
                f"{symbol} is {crystal}, which cannot be built: name its lattice ({', '.join(_ELEMENTS)}) "
                "with a=…, or give a structure file"
            )
        if crystal != own and "a" not in constants:
            raise InputError(
                f"{symbol} is {own}: give the lattice constant of its {crystal} crystal with a=…"
            )
        if "c" in constants and crystal != "hcp":
            raise InputError(
                f"c={constants['c']:g} has no meaning for a crystal that is {crystal}: leave it out"
            )
        atoms = ase.build.bulk(symbol, crystal, a=constants.get("a"), c=constants.get("c"))
        return Bulk(_checked(atoms, symbol), f"{symbol} ({crystal})", crystal)

    @staticmethod
    def _compound(formula: str, crystal: str, constants: dict[str, float]) -> Bulk:
        counts = Formula(formula).count()
        ratio = _COMPOUNDS[crystal]
        symbols = list(counts)
        if len(symbols) != 2 or sorted(counts.values()) != sorted(ratio):
            raise InputError(
                f"{formula} is no {crystal} crystal, which has two elements {ratio[0]}:{ratio[1]}: "
                "name another lattice, or give a structure file"
            )
        if ratio[0] != ratio[1] and counts[symbols[0]] != ratio[0]:
            symbols.reverse()
        notices: tuple[str, ...] = ()
        a = constants.get("a")
        if a is None:
            if crystal not in _ALLOYS:
                raise InputError(
                    f"the lattice constant of {formula} ({crystal}) is not known: give it with a=… (Å)"
                )
            a = _Formula._alloy_constant(symbols, crystal)
            notices = (
                f"the lattice constant of {formula} ({crystal}) is {a:.2f} Å from the volumes of its "
                "elements: give it with a=…, or relax the bulk",
            )
        if crystal == "l1_0":
            notices += (
                f"Miller indices of {formula} (l1_0) are those of its standard cell of two atoms, with a "
                "over the square root of 2: the plane h k l of the cell of four atoms is h+k k-h 2l, so that "
                "its close-packed 111 is 101",
            )
        c = constants.get("c", a)
        if "c" in constants and crystal not in ("l1_0", "wurtzite"):
            raise InputError(f"c={c:g} has no meaning for a {crystal} crystal: leave it out")
        first, second = symbols
        corners = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
        if crystal == "l1_2":
            atoms = Atoms([second, first, first, first], scaled_positions=corners, cell=[a, a, a], pbc=True)
        elif crystal == "l1_0":
            atoms = Atoms([first, first, second, second], scaled_positions=corners, cell=[a, a, c], pbc=True)
        else:
            name = "".join(symbols) + ("2" if crystal == "fluorite" else "")
            atoms = ase.build.bulk(name, crystal, a=a, c=constants.get("c"))
        return Bulk(_checked(atoms, formula), f"{formula} ({crystal})", crystal, notices)

    @staticmethod
    def _alloy_constant(symbols: list[str], crystal: str) -> float:
        """Lattice constant, Å, of an alloy in which every atom has the volume of its element (Zen's law)."""
        ratio = _COMPOUNDS[crystal]
        volumes = [_Formula._volume(atomic_numbers[symbol]) for symbol in symbols]
        volume = sum(n * each for n, each in zip(ratio, volumes, strict=True)) / sum(ratio)
        return float((volume * (2 if crystal == "cesiumchloride" else 4)) ** (1 / 3))

    @staticmethod
    def _volume(number: int) -> float:
        """Å³ per atom of an element in ASE's reference state, or of touching spheres without one."""
        reference = reference_states[number] or {}
        if reference.get("symmetry") in ("fcc", "bcc", "hcp"):
            atoms = ase.build.bulk(chemical_symbols[number])
            return float(atoms.get_volume() / len(atoms))
        return float(4 * np.sqrt(2.0) * covalent_radii[number] ** 3)


class _Rows:
    """Structures and numbers of bulks, from the plain values of files."""

    @staticmethod
    def number(info: dict[str, Any]) -> str:
        """Return the number of a row, empty where it has none."""
        for key in _ID_KEYS:
            value = info.get(key)
            if isinstance(value, str) and value:
                return value
        return ""

    @staticmethod
    def of_json(path: Path) -> Iterator[tuple[str, Atoms]]:
        """Read the rows of a JSON file."""
        document = untrusted.load_json(
            untrusted.read_bounded(path, MAX_FILE), str(path), limit=MAX_FILE, nonfinite=True
        )
        rows: list[Any]
        if isinstance(document, dict) and "ids" in document:  # a JSON database of ASE
            rows = [value for key, value in document.items() if key.isdigit()]
        elif isinstance(document, dict):
            rows = [{"src_id": key, **value} for key, value in document.items() if isinstance(value, dict)]
        else:
            rows = document if isinstance(document, list) else []
        if not rows:
            raise DataError(f"{path}: is no list of bulks with src_id and atoms.")
        for row in rows:
            if not isinstance(row, dict):
                continue
            number = _Rows.number(
                {**row, **_Rows._mapping(row.get("key_value_pairs")), **_Rows._mapping(row.get("info"))}
            )
            body = next(
                (row[key] for key in ("atoms", "structure", "bulk") if isinstance(row.get(key), dict)), row
            )
            atoms = _Rows._atoms(body)
            if number and atoms is not None:
                yield number, atoms

    @staticmethod
    def _mapping(value: Any) -> dict[str, Any]:
        return value if isinstance(value, dict) else {}

    @staticmethod
    def _atoms(body: dict[str, Any]) -> Atoms | None:
        """Return the structure of plain arrays, ASE's JSON or pymatgen's `as_dict`; None where it is none."""
        makers: list[Callable[[], Atoms]] = [
            lambda: Atoms(
                _Rows._array(body["numbers"]).astype(int) if "numbers" in body else list(body["symbols"]),
                _Rows._array(body["positions"]),
                cell=_Rows._array(body["cell"]),
                pbc=True,
            ),
            lambda: Atoms(
                [site["species"][0]["element"] for site in body["sites"]],
                scaled_positions=[site["abc"] for site in body["sites"]],
                cell=np.array(body["lattice"]["matrix"], dtype=float),
                pbc=True,
            ),
        ]
        for make in makers:
            try:
                return make()
            except (KeyError, IndexError, TypeError, ValueError):
                continue
        return None

    @staticmethod
    def _array(value: Any) -> np.ndarray:
        """Array of nested lists, or of ASE's `__ndarray__` with its shape checked against its numbers."""
        if isinstance(value, dict) and "array" in value:  # a cell
            value = value["array"]
        if isinstance(value, dict):
            shape, kind, flat = value["__ndarray__"]
            if not str(kind).startswith(("int", "float", "bool")):
                raise ValueError(f"an array of {kind}")
            return np.array(flat, dtype=float).reshape([int(length) for length in shape])
        return np.array(value, dtype=float)
