"""Bulk crystals made from prototypes: pure metals, ordered alloys, rocksalt and zincblende compounds.

The lattice constants are those of the lowest energy of a given potential. The symmetry of the prototype is
kept, so that slabs can be cut along all its planes. An alloy is taken if its energy of formation from the
elements is low enough.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers, covalent_radii, reference_states
from scipy.optimize import minimize_scalar

METALS = (
    *("Mg", "Al", "Ca", "Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Sr", "Y", "Zr", "Nb"),
    *("Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "Hf", "Ta", "W", "Re", "Os", "Ir", "Pt", "Au", "Pb"),
)
#: Elements that take part in alloys and are not close-packed by themselves.
PARTNERS = ("Ga", "In", "Sn", "Si", "Ge", "As", "Sb", "Bi")
ANIONS = ("P", "S", "As", "Se", "Sb", "Te")
ZINCBLENDE_CATIONS = ("Mg", "Al", "Zn", "Ga", "Cd", "In")
KINDS = ("pure", "L12", "L10", "B2", "rocksalt", "zincblende")
#: Crystals of which the lowest energy counts as that of the element, for energies of formation.
ELEMENT_CRYSTALS = ("fcc", "bcc", "hcp", "diamond")
#: Largest energy of formation of an alloy, eV per atom.
MAX_FORMATION = 0.05
#: Multiples of the first guess of a lattice constant at which the search begins, and the limits of c/a as
#: multiples of its first guess. Covalent radii, from which it comes, are up to a fifth too small for metals.
_GRID = np.linspace(0.84, 1.32, 9)
_RATIOS = (0.85, 1.2)
_TOLERANCE = 1e-3
#: Lattice constant over the sum of two covalent radii.
_PER_RADII = {
    "fcc": np.sqrt(2.0),
    "bcc": 2 / np.sqrt(3.0),
    "hcp": 1.0,
    "diamond": 4 / np.sqrt(3.0),
    "rocksalt": 2.0,
    "zincblende": 4 / np.sqrt(3.0),
}
_IDEAL_RATIO = {"hcp": np.sqrt(8 / 3), "L10": 1.0}
_ATOMS_PER_CELL = {"L12": 4, "L10": 4, "B2": 2}


class UnsuitableError(ValueError):
    """A bulk, slab or structure that does not fit the data; the message says why, for the record."""


@dataclass(frozen=True)
class Bulk:
    """A bulk crystal.

    Attributes:
        atoms: its cell.
        origin: prototype it was made from, or its name in the file it was read from.
    """

    atoms: Atoms
    origin: str

    @property
    def formula(self) -> str:
        """Formula of the cell, as `Al2Cu`."""
        return str(self.atoms.get_chemical_formula())


@dataclass(frozen=True)
class Crystal:
    """A crystal of the lowest energy.

    Attributes:
        kind: its structure, one of `ELEMENT_CRYSTALS` or `KINDS`.
        symbols: one or two elements; L1_2 has three of the first for one of the second.
        a: lattice constant, Å.
        ratio: c/a; 1 for cubic crystals.
        energy: eV per atom.
    """

    kind: str
    symbols: tuple[str, ...]
    a: float
    ratio: float
    energy: float

    def atoms(self) -> Atoms:
        """Build the cell, conventional for cubic crystals."""
        return build(self.kind, self.symbols, self.a, self.ratio)


def build(kind: str, symbols: tuple[str, ...], a: float, ratio: float = 1.0) -> Atoms:
    """Build a cell; arguments as the attributes of `Crystal`."""
    first, last = symbols[0], symbols[-1]
    if kind == "hcp":
        return bulk(first, "hcp", a=a, c=a * ratio)
    if kind in ("fcc", "bcc", "diamond"):
        return bulk(first, kind, a=a, cubic=True)
    if kind in ("rocksalt", "zincblende"):
        return bulk(first + last, kind, a=a, cubic=True)
    corner, faces = (0.0, 0.0, 0.0), [(0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5)]
    if kind == "L12":
        names, places = [last, first, first, first], [corner, *faces]
    elif kind == "L10":
        names, places = [first, first, last, last], [corner, *faces]
    else:
        names, places = [first, last], [corner, (0.5, 0.5, 0.5)]
    return Atoms(names, scaled_positions=places, cell=[a, a, a * ratio], pbc=True)


class Prototypes:
    """Source of bulk crystals.

    Args:
        calculator: potential that relaxes lattice constants; total energies.
        found: crystals that were relaxed before, by name, as `state` gives them; they are taken over.

    Attributes:
        found: name -> crystal.
    """

    def __init__(self, calculator: Calculator, found: dict[str, Any] | None = None) -> None:
        self._calculator = calculator
        self.found: dict[str, Crystal] = {
            name: Crystal(**{**one, "symbols": tuple(one["symbols"])}) for name, one in (found or {}).items()
        }

    def state(self) -> dict[str, Any]:
        """Return the relaxed crystals as plain values."""
        return {name: asdict(crystal) for name, crystal in self.found.items()}

    def draw(self, rng: np.random.Generator) -> Bulk:
        """Draw a kind and its elements at random, and relax the lattice constant.

        Raises:
            UnsuitableError: an alloy that is not stable, or a crystal without a lowest energy near its guess.
        """
        kind = str(rng.choice(KINDS))
        if kind == "pure":
            symbol = str(rng.choice([one for one in METALS if _symmetry(one) in ("fcc", "bcc", "hcp")]))
            return Bulk(self.relaxed(_symmetry(symbol), (symbol,)).atoms(), kind)
        if kind in ("rocksalt", "zincblende"):
            cation = str(rng.choice(METALS if kind == "rocksalt" else ZINCBLENDE_CATIONS))
            return Bulk(self.relaxed(kind, (cation, str(rng.choice(ANIONS)))).atoms(), kind)
        metal = str(rng.choice(METALS))
        other = str(rng.choice([one for one in METALS + PARTNERS if one != metal]))
        # Either of the two may be the more frequent one of L1_2.
        pair = (metal, other) if rng.random() < 0.5 else (other, metal)
        crystal = self.relaxed(kind, pair)
        formation = self.formation_energy(crystal)
        if formation > MAX_FORMATION:
            raise UnsuitableError(f"{kind} {'-'.join(pair)}: energy of formation {formation:.3f} eV per atom")
        return Bulk(crystal.atoms(), kind)

    def formation_energy(self, crystal: Crystal) -> float:
        """Energy of formation from the elements, eV per atom.

        Raises:
            UnsuitableError: an element has no crystal of lowest energy.
        """
        symbols = crystal.atoms().get_chemical_symbols()
        return crystal.energy - float(np.mean([self.element(symbol).energy for symbol in symbols]))

    def element(self, symbol: str) -> Crystal:
        """Find the crystal of an element with the lowest energy among `ELEMENT_CRYSTALS`.

        Raises:
            UnsuitableError: there is none.
        """
        crystals = []
        for kind in ELEMENT_CRYSTALS:
            try:
                crystals.append(self.relaxed(kind, (symbol,)))
            except UnsuitableError:
                continue
        if not crystals:
            raise UnsuitableError(f"{symbol}: no crystal has a lowest energy near its covalent radius")
        return min(crystals, key=lambda crystal: crystal.energy)

    def relaxed(self, kind: str, symbols: tuple[str, ...]) -> Crystal:
        """Find the lattice constants of the lowest energy, or take them from `found`.

        Args:
            kind, symbols: as the attributes of `Crystal`.

        Raises:
            UnsuitableError: the energy is lowest at the end of the range that was searched.
        """
        name = f"{kind} {'-'.join(symbols)}"
        if name not in self.found:
            self.found[name] = self._search(name, kind, symbols)
        return self.found[name]

    def _search(self, name: str, kind: str, symbols: tuple[str, ...]) -> Crystal:
        def energy(a: float, ratio: float) -> float:
            atoms = build(kind, symbols, a, ratio)
            atoms.calc = self._calculator
            return float(atoms.get_potential_energy()) / len(atoms)

        guess, ratio = self._guess(kind, symbols), _IDEAL_RATIO.get(kind, 1.0)
        sizes = [energy(guess * factor, ratio) for factor in _GRID]
        lowest = int(np.argmin(sizes))
        if lowest in (0, len(sizes) - 1):
            raise UnsuitableError(f"{name}: no lowest energy near a lattice constant of {guess:.2f} Å")
        a = _lowest(lambda a: energy(a, ratio), guess * _GRID[lowest - 1], guess * _GRID[lowest + 1])
        if kind in _IDEAL_RATIO:
            volume, ideal = a**3 * ratio, ratio
            ratio = _lowest(lambda r: energy((volume / r) ** (1 / 3), r), *(ideal * end for end in _RATIOS))
            a = (volume / ratio) ** (1 / 3)
            a = _lowest(lambda a: energy(a, ratio), 0.95 * a, 1.05 * a)
        return Crystal(kind, symbols, float(a), float(ratio), energy(a, ratio))

    def _guess(self, kind: str, symbols: tuple[str, ...]) -> float:
        """Guess a lattice constant: from covalent radii, or for an alloy from the volumes of its elements."""
        if kind in _PER_RADII:
            radii = [covalent_radii[atomic_numbers[symbol]] for symbol in (symbols[0], symbols[-1])]
            return float(_PER_RADII[kind] * sum(radii))
        volumes = []
        for symbol in build(kind, symbols, 1.0).get_chemical_symbols():
            cell = self.element(symbol).atoms()
            volumes.append(cell.get_volume() / len(cell))
        return float((_ATOMS_PER_CELL[kind] * np.mean(volumes)) ** (1 / 3))


def _symmetry(symbol: str) -> str:
    state = reference_states[atomic_numbers[symbol]]
    return str(state["symmetry"]) if state else ""


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    found = minimize_scalar(function, bounds=(low, high), method="bounded", options={"xatol": _TOLERANCE})
    return float(found.x)
