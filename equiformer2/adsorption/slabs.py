"""Slabs of any bulk, Miller indices and termination, with OC20's tags and constraints.

The rules are those of `fairchem-data-oc` 1.0.2 (`core/slab.py`, MIT), which built OC20's slabs: at least 7 Å
thick and 8 Å along both surface vectors, at least 20 Å of vacuum, both sides of a slab that cannot be turned
over. An atom is of the surface (tag 1) if it is within 2 Å of the highest one along the third lattice vector,
or in the upper half with fewer neighbours (Voronoi) than any atom of its element has in the bulk; all others
are held (tag 0).
"""

import itertools
import logging
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixScaled
from ase.neighborlist import neighbor_list
from tqdm import tqdm

from datasets_oc20.structure_files import read_structure
from datasets_oc20.tags import surface_height
from equiformer2.adsorption.adsorbates import is_file
from equiformer2.adsorption.bulks import Bulk, find_bulk
from equiformer2.adsorption.given_structures import given_atoms, path_text
from equiformer2.adsorption.named_structures import MOST_ATOMS, build_slab
from equiformer2.adsorption.open_catalyst import EXTRA
from equiformer2.adsorption.periodic_images import SMALLEST_GAP, whole_slab
from equiformer2.errors import InputError
from equiformer2.files import as_input_error
from equiformer2.inference.atoms import ADSORBATE, SUBSURFACE, SURFACE, check_atoms, fixed_mask, oc20_tags

logger = logging.getLogger(__name__)

THICKNESS, WIDTH, VACUUM = 7.0, 8.0, 20.0
"""Å: least thickness, least length of both surface vectors, and vacuum of a built slab (OC20's)."""

SURFACE_DEPTH = 2.0
"""Å below the highest atom that belong to the surface (OC20's)."""

MOST_MILLER = 10
"""Largest Miller index."""

_MOST_CUT, _MANY_CUT = 2000, 300
"""Atoms of a slab of one surface cell that are cut at most, and that take minutes."""

_SAME = 0.1
"""Å within which atoms of the two sides of a slab are at the same depth."""


@dataclass(frozen=True)
class SlabReport:
    """Description of a slab, with the source of its tags and constraints.

    Attributes:
        origin: name, bulk or file.
        formula: of the whole slab.
        miller: Miller indices of the conventional cell; None for a slab from a file.
        termination: number among the distinct terminations, from 0; None for a slab from a file.
        terminations: number of distinct terminations; None where it is not known.
        bottom_up: the bulk's other side is up.
        atoms, held: numbers of atoms.
        thickness, vacuum: Å along the normal; the vacuum is None for a slab that is not periodic there.
        lengths: Å of the surface vectors.
        constraints_from: "file", "name" (free layers of a slab built by name) or "OC20's rule".
        tags_from: "file", "constraints", "name" or "OC20's rule".
        asymmetric: the two sides differ, so that the slab may have a dipole.
        notices: sentences that users should read.
    """

    origin: str
    formula: str
    miller: tuple[int, int, int] | None
    termination: int | None
    terminations: int | None
    bottom_up: bool
    atoms: int
    held: int
    thickness: float
    lengths: tuple[float, float]
    vacuum: float | None
    constraints_from: str
    tags_from: str
    asymmetric: bool
    notices: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        plain = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }
        lengths = ("thickness", "lengths", "vacuum")
        return {f"{key}_A" if key in lengths else key: value for key, value in plain.items()}

    def __str__(self) -> str:
        vacuum = "no image above it" if self.vacuum is None else f"{self.vacuum:.1f} Å of vacuum"
        held = f"{self.held} held by {self.constraints_from}, tags from {self.tags_from}"
        differ = ", sides differ" if self.asymmetric else ""
        return (
            f"{self.origin}: {self.formula}, {self.atoms} atoms ({held}), {self.thickness:.1f} Å thick, "
            f"{self.lengths[0]:.1f} x {self.lengths[1]:.1f} Å, {vacuum}{differ}"
        )


@dataclass(frozen=True)
class CleanSlab:
    """A clean slab, its surface up, with OC20 tags and constraints.

    Attributes:
        atoms: the slab.
        report: where it is from.
        bulk: what it was cut from, or the element of a slab by name; None for a slab from a file.
    """

    atoms: Atoms
    report: SlabReport
    bulk: Bulk | None = None


def find_slab(slab: Any, **name_options: Any) -> CleanSlab:
    """Make a slab of a name (`Pt111`), a file, Atoms or a pymatgen slab.

    Constraints are kept. A slab without a held atom gets OC20's: those of its tags 0 where it has OC20's
    tags, else those of the rule at the top of this file. Tags follow from the constraints where it has none.
    DFT codes need three lattice vectors in a right-handed order: the first two are exchanged where they are
    not, and a slab that is not periodic along its normal gets a third one beyond its atoms.

    Args:
        slab: name, file or slab, see `given_atoms`.
        **name_options: of `build_slab`, for a name.

    Raises:
        InputError: an unknown name, no slab, one with adsorbate atoms.
        OSError: the file is missing or unreadable.
    """
    slab = path_text(slab)
    if isinstance(slab, str) and not is_file(slab):
        atoms = build_slab(slab, **name_options)
        digits = tuple(map(int, re.findall(r"\d", slab)))
        miller = parse_miller(",".join(map(str, digits)))
        symbol, constant = atoms.get_chemical_symbols()[0], name_options.get("lattice_constant")
        crystal = find_bulk(symbol).crystal
        bulk = find_bulk(symbol if constant is None else f"{symbol} {crystal} a={constant}")
        return CleanSlab(atoms, _report(atoms, slab, "name", "name", miller=miller), bulk)
    if name_options:
        raise InputError(f"{', '.join(name_options)} only apply to a slab built by name")
    origin = "the slab"
    if isinstance(slab, str):
        origin = slab
        with as_input_error():
            slab = read_structure(slab)
    slab = given_atoms(slab, origin)
    check_atoms(slab)
    return _completed(slab, origin)


def slabs_of_bulk(
    bulk: Any,
    miller: str | Sequence[int] = "all",
    termination: int | str | None = None,
    *,
    max_miller: int = 1,
    bulks: str | Path | None = None,
    thickness: float = THICKNESS,
    width: float = WIDTH,
    vacuum: float = VACUUM,
) -> list[CleanSlab]:
    """Cut slabs out of a bulk.

    Miller indices are of the conventional standard cell. Lattices with one atom per primitive cell (fcc, bcc,
    sc elements by name) need no other package; everything else is cut by pymatgen's `SlabGenerator` (extra
    `surfaces`), as OC20 did.

    Args:
        bulk: what `find_bulk` takes.
        miller: as `111`, `1,1,-1`, `0001`, three whole numbers, or "all": every distinct plane up to
            `max_miller`.
        termination: its number from 0, "all", or None for the first.
        max_miller: largest index for "all".
        bulks: file of bulks, for a number.
        thickness, width, vacuum: Å at least, see `THICKNESS`.

    Raises:
        InputError: an unknown bulk, impossible indices, no such termination, pymatgen is missing.
        OSError: a file is missing or unreadable.
    """
    for name, value in (("thickness", thickness), ("width", width), ("vacuum", vacuum)):
        if not 0 < value <= 200:
            raise InputError(f"the {name} of the slab is {value:g} Å: give a number above 0, at most 200")
    if vacuum <= SMALLEST_GAP:
        raise InputError(
            f"a vacuum of {vacuum:g} Å is too thin, since a slab has more than {SMALLEST_GAP:g} Å: give more "
            "(--vacuum; OC20 has 20)"
        )
    if not 1 <= max_miller <= MOST_MILLER:
        raise InputError(f"the largest Miller index is {max_miller}: give 1 to {MOST_MILLER}")
    found = find_bulk(bulk, bulks)
    cutter = _LatticeCutter(found) if found.primitive_axes is not None else _Pymatgen(found)
    plane = check_miller(miller)
    if plane is not None and len(_whole_numbers(miller, "")) == 4 and not cutter.is_hexagonal:
        raise InputError(
            f"{miller!r} are four indices, which planes of hexagonal crystals have, and {found.name} is "
            "none: give three"
        )
    planes = cutter.distinct_planes(max_miller) if plane is None else [plane]
    slabs: list[CleanSlab] = []
    # One plane takes no time to speak of; hundreds take minutes.
    quiet = True if len(planes) == 1 else None
    for plane in tqdm(planes, desc="cutting slabs", unit="plane", disable=quiet, leave=False):
        cuts = cutter.cut(plane, thickness, width, vacuum)
        if not cuts:
            raise InputError(f"{found.name} has no slab with the Miller indices {plane}")
        for number in _Cutter.chosen(termination, len(cuts), found.name, plane):
            atoms, bottom_up = cuts[number]
            name = "".join(map(str, plane)) if min(plane) >= 0 else ",".join(map(str, plane))
            origin = f"{found.name} ({name})" + (f" termination {number}" if len(cuts) > 1 else "")
            details = {"miller": plane, "termination": number, "terminations": len(cuts)}
            rule = "OC20's rule"
            report = _report(atoms, origin, rule, rule, bottom_up=bottom_up, **details)
            notices = found.notices
            if termination is None and len(cuts) > 1:
                notices += (
                    f"{found.name} ({name}) has {len(cuts)} terminations and the first is taken: choose with "
                    f"termination 0 to {len(cuts) - 1}, or all",
                )
            slabs.append(CleanSlab(atoms, replace(report, notices=report.notices + notices), found))
    return slabs


def check_miller(miller: str | Sequence[int]) -> tuple[int, int, int] | None:
    """Read what `slabs_of_bulk` takes as Miller indices, None for "all", before longer work.

    Raises:
        InputError: see `parse_miller`.
    """
    if isinstance(miller, str) and miller.strip().lower() == "all":
        return None
    return parse_miller(miller)


def parse_miller(miller: str | Sequence[int]) -> tuple[int, int, int]:
    """Read Miller indices: `111`, `1-10`, `1,1,-1`, `1 1 -1`, four indices of hexagonal crystals, or numbers.

    Raises:
        InputError: not three (or four) whole numbers, all 0, or larger than `MOST_MILLER`.
    """
    advice = "give three whole numbers, not all 0, such as 111 or 1,1,-1"
    indices = _whole_numbers(miller, advice)
    if len(indices) == 4:
        if indices[2] != -(indices[0] + indices[1]):
            raise InputError(
                f"{miller!r} are no Miller-Bravais indices, since the third is not minus the sum of the "
                "first two: correct them, or give three indices"
            )
        indices = [indices[0], indices[1], indices[3]]
    if len(indices) != 3 or not any(indices):
        raise InputError(f"{miller!r} are no Miller indices: {advice}")
    divisor = math.gcd(*indices)
    first, second, third = (index // divisor for index in indices)
    if max(abs(first), abs(second), abs(third)) > MOST_MILLER:
        raise InputError(f"the Miller indices {miller!r} are larger than {MOST_MILLER}: {advice}")
    return first, second, third


def _whole_numbers(miller: str | Sequence[int], advice: str) -> list[int]:
    """List the indices as they are written; raises `InputError`, with advice, where they are none."""
    if isinstance(miller, str):
        text = miller.strip().strip("()[]{}")
        pattern = r"-?\d+" if re.search(r"[,\s]", text) else r"-?\d"
        separated = re.fullmatch(rf"(?:{pattern}[,\s]*){{3,4}}", text)
        if not separated:
            raise InputError(f"{miller!r} are no Miller indices: {advice}")
        indices = [int(part) for part in re.findall(pattern, text)]
    else:
        try:
            indices = [int(index) for index in miller]
            whole = all(float(index) == int(index) for index in miller)
        except (TypeError, ValueError):
            whole = False
        if not whole:
            raise InputError(f"{miller!r} are no Miller indices: {advice}")
    return indices


def height_tags(slab: Atoms) -> np.ndarray:
    """`[N]` tags by OC20's rule of heights: 1 within `SURFACE_DEPTH` of the highest atom, else 0."""
    length = float(np.linalg.norm(slab.cell.array[2]))
    if length < 1e-6 or not slab.pbc[2]:
        heights = slab.positions[:, 2]
        return np.where(heights >= heights.max() - SURFACE_DEPTH, SURFACE, SUBSURFACE)
    fractions = slab.get_scaled_positions(wrap=False)[:, 2]
    return np.where(fractions >= fractions.max() - SURFACE_DEPTH / length, SURFACE, SUBSURFACE)


def sides_differ(slab: Atoms) -> bool:
    """Tell whether a whole slab's upper side has other atoms, or at other depths, than its lower one."""
    z = surface_height(slab)
    profiles = []
    for depth in (z.max() - z, z - z.min()):
        order = np.lexsort((slab.numbers, np.round(depth / _SAME)))
        profiles.append((slab.numbers[order], depth[order]))
    (numbers, depths), (others, other_depths) = profiles
    return bool((numbers != others).any() or (np.abs(depths - other_depths) > _SAME).any())


def _completed(slab: Atoms, origin: str) -> CleanSlab:
    """Give a slab tags, and constraints where none of its atoms is held."""
    tags, notice = oc20_tags(slab)
    if (tags == ADSORBATE).any():
        raise InputError(f"{origin} already has adsorbate atoms (tag 2): give the clean slab")
    whole = whole_slab(slab)
    atoms = whole.atoms
    atoms.info = {}
    atoms.calc = None
    lattice_notices = _complete_lattice(atoms, origin)
    had_tags = bool(slab.get_tags().any()) and notice is None
    notices: tuple[str, ...] = () if notice is None or not slab.get_tags().any() else (f"{origin}: {notice}",)
    if fixed_mask(atoms).any():
        constraints_from, tags_from = "file", "file" if had_tags else "constraints"
        if tags_from == "constraints" and not (tags == SURFACE).any():  # all held: they tell no surface
            tags, tags_from = height_tags(atoms), "OC20's rule"
    else:
        constraints_from = "OC20's rule"
        tags_from = "file" if had_tags and (tags == SUBSURFACE).any() else "OC20's rule"
        tags = tags if tags_from == "file" else height_tags(atoms)
        held = tags == SUBSURFACE
        if held.any():
            atoms.set_constraint([*atoms.constraints, FixAtoms(mask=held)])
        else:
            notices += (f"{origin} is no thicker than {SURFACE_DEPTH:g} Å: none of its atoms is held",)
    atoms.set_tags(tags)
    report = _report(atoms, origin, constraints_from, tags_from)
    return CleanSlab(atoms, replace(report, notices=lattice_notices + notices + report.notices))


def _complete_lattice(slab: Atoms, origin: str) -> tuple[str, ...]:
    """Give a whole slab three lattice vectors in a right-handed order, in place; sentences about it."""
    notices: tuple[str, ...] = ()
    cell = slab.cell.array.copy()
    normal = np.cross(cell[0], cell[1])
    area = float(np.linalg.norm(normal))
    if area < 1e-6:
        return ()  # told where its surface is looked for
    normal /= area
    thickness = float(np.ptp(slab.positions @ normal))
    if not slab.pbc[2] and abs(cell[2] @ normal) < thickness + SMALLEST_GAP:
        up = -normal if normal[2] < -1.0 + 1e-6 else normal  # of slabs that lie along z, z is up
        cell[2] = up * (thickness + VACUUM)
        notices += (
            f"{origin} has no third lattice vector beyond its atoms: in files for DFT, which knows periodic "
            f"cells only, it has {VACUUM:g} Å of vacuum",
        )
    if np.linalg.det(cell) < 0:
        cell[[0, 1]] = cell[[1, 0]]
        slab.set_constraint(
            [
                FixScaled(one.index, one.mask[[1, 0, 2]]) if isinstance(one, FixScaled) else one
                for one in slab.constraints
            ]
        )
        notices += (
            f"the lattice vectors of {origin} are left-handed, which VASP refuses: the first two change "
            "places",
        )
    slab.set_cell(cell)
    return notices


def _report(atoms: Atoms, origin: str, constraints_from: str, tags_from: str, **details: Any) -> SlabReport:
    whole = whole_slab(atoms)
    z = surface_height(whole.atoms)
    lengths = np.linalg.norm(atoms.cell.array[:2], axis=1)
    differ = sides_differ(whole.atoms)
    notices: tuple[str, ...] = ()
    if differ and len(set(atoms.numbers)) > 1:
        notices = (
            f"the two sides of {origin} differ, so that the slab may have a dipole: its field crosses the "
            "vacuum, and DFT needs a dipole correction",
        )
    known = {"miller": None, "termination": None, "terminations": None, "bottom_up": False, **details}
    return SlabReport(
        origin=origin,
        formula=str(atoms.get_chemical_formula("metal")),
        atoms=len(atoms),
        held=int(fixed_mask(atoms).sum()),
        thickness=round(float(np.ptp(z)), 4),
        lengths=(round(float(lengths[0]), 4), round(float(lengths[1]), 4)),
        vacuum=round(whole.gap, 4) if math.isfinite(whole.gap) else None,
        constraints_from=constraints_from,
        tags_from=tags_from,
        asymmetric=differ,
        notices=notices,
        **known,
    )


class _Cutter:
    """Steps that all slabs go through."""

    @staticmethod
    def tiled(slab: Atoms, width: float) -> Atoms:
        """Repeat a slab until both surface vectors are at least `width` Å long."""
        repeats = [math.ceil(width / np.linalg.norm(vector) - 1e-9) for vector in slab.cell.array[:2]]
        if len(slab) * math.prod(repeats) > MOST_ATOMS:
            raise InputError(
                f"the slab would have more than {MOST_ATOMS} atoms: give a smaller width or thickness"
            )
        return slab.repeat((*repeats, 1))

    @staticmethod
    def held(slab: Atoms) -> Atoms:
        """Hold the atoms of tag 0, as OC20's `set_fixed_atom_constraints`."""
        slab.set_constraint(FixAtoms(mask=slab.get_tags() == SUBSURFACE))
        return slab

    @staticmethod
    def upright(slab: Atoms) -> Atoms:
        """Turn a slab so that its first vector is along x, the second in the xy plane and the third up."""
        cell = slab.cell.array.copy()
        fractions = slab.get_scaled_positions(wrap=False)
        if np.linalg.det(cell) < 0:
            cell[[0, 1]] = cell[[1, 0]]
            fractions[:, [0, 1]] = fractions[:, [1, 0]]
        standard, _ = Atoms(cell=cell).cell.standard_form()
        turned = slab.copy()
        turned.set_constraint()
        turned.set_cell(standard)
        turned.set_scaled_positions(fractions)
        return turned

    @staticmethod
    def chosen(
        termination: int | str | None, count: int, name: str, plane: tuple[int, int, int]
    ) -> Sequence[int]:
        """Numbers of the terminations that are wanted."""
        if isinstance(termination, str) and termination.strip().lower() == "all":
            return range(count)
        try:
            number = 0 if termination is None else int(termination)
        except ValueError:
            raise InputError(f"the termination {termination!r} is neither a number nor all") from None
        if not 0 <= number < count:
            raise InputError(
                f"{name} {plane} has {count} distinct termination{'s' * (count > 1)} and no number {number}: "
                "give 0" + (f" to {count - 1}, or all" if count > 1 else "")
            )
        return [number]


class _LatticeCutter:
    """Slabs of a cubic lattice with one atom per primitive cell, whose planes have one termination each.

    Args:
        bulk: the lattice.
    """

    is_hexagonal = False

    def __init__(self, bulk: Bulk) -> None:
        self.symbol = bulk.atoms.get_chemical_symbols()[0]
        assert bulk.primitive_axes is not None
        assert bulk.lattice_constant is not None
        self.axes = bulk.primitive_axes * bulk.lattice_constant
        self.constant = bulk.lattice_constant

    def distinct_planes(self, max_miller: int) -> list[tuple[int, int, int]]:
        """Planes that no operation of the cube carries onto each other."""
        descending = range(max_miller, -1, -1)
        planes = [
            (h, k, l)
            for h, k, l in itertools.product(descending, repeat=3)
            if h >= k >= l and math.gcd(h, k, l) == 1
        ]
        return sorted(planes, key=lambda plane: (max(plane), plane))

    def cut(
        self, plane: tuple[int, int, int], thickness: float, width: float, vacuum: float
    ) -> list[tuple[Atoms, bool]]:
        """Cut the one slab of a plane."""
        normal = np.array(plane) / np.linalg.norm(plane)
        # Layers that each primitive vector climbs, in whole numbers.
        layers = np.round(2 * self.axes @ np.array(plane) / self.constant).astype(int)
        layers //= math.gcd(*map(int, layers))
        reach = range(-MOST_MILLER, MOST_MILLER + 1)
        nearest_first = sorted(itertools.product(reach, repeat=3), key=lambda c: (sum(map(abs, c)), c))
        up = np.array(next(c for c in nearest_first if np.dot(c, layers) == 1))
        spacing = float(up @ self.axes @ normal)
        first, second, third = (combination @ self.axes for combination in (*self._basis(layers), up))
        if np.cross(first, second) @ normal < 0:
            first, second = second, first
        count = math.ceil(thickness / spacing - 1e-9) + 1
        cell = [first, second, third * count]
        atoms = Atoms([self.symbol] * count, [number * third for number in range(count)], cell=cell, pbc=True)
        atoms = _Cutter.upright(atoms)
        height = spacing * (count - 1)
        atoms.set_cell([*atoms.cell.array[:2], [0, 0, height + vacuum]])
        atoms.positions[:, 2] += vacuum / 2 - atoms.positions[:, 2].min()
        atoms.wrap()
        atoms = _Cutter.tiled(atoms, width)
        atoms.set_tags(self._tags(atoms))
        return [(_Cutter.held(atoms), False)]

    def _basis(self, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two shortest primitive combinations within the plane that span it."""
        reach = range(-int(np.abs(layers).max()), int(np.abs(layers).max()) + 1)
        candidates = [
            np.array(c) for c in itertools.product(reach, repeat=3) if any(c) and np.dot(c, layers) == 0
        ]
        lengths = [float(np.linalg.norm(c @ self.axes)) for c in candidates]
        order = sorted(range(len(candidates)), key=lambda n: (round(lengths[n], 6), *(-candidates[n])))
        first = candidates[order[0]]
        for index in order[1:]:
            second = candidates[index]
            cross = np.cross(first, second)
            if np.abs(cross).sum() and np.array_equal(np.abs(cross), np.abs(layers)):
                return first, second
        raise InputError(f"the plane {layers.tolist()} has no surface cell")

    @staticmethod
    def _tags(slab: Atoms) -> np.ndarray:
        """OC20's tags, with the neighbours within 1.2 times the nearest distance in place of Voronoi's."""
        tags = height_tags(slab)
        nearest = float(neighbor_list("d", slab, 4.5).min(initial=4.5))
        counts = np.bincount(neighbor_list("i", slab, 1.2 * nearest), minlength=len(slab))
        upper = slab.positions[:, 2] >= slab.positions[:, 2].mean()
        tags[upper & (counts < counts.max())] = SURFACE
        return tags


class _Pymatgen:
    """Slabs of any bulk by pymatgen's generator, with OC20's settings.

    Args:
        bulk: the bulk.

    Raises:
        InputError: pymatgen or spglib is not installed.
    """

    def __init__(self, bulk: Bulk) -> None:
        try:
            import spglib  # noqa: F401
            from pymatgen.core import Lattice, Structure
            from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
        except ImportError as error:
            raise InputError(f"slabs of {bulk.name} need more packages ({error}): run {EXTRA}") from error
        self.bulk = bulk
        structure = Structure(
            Lattice(bulk.atoms.cell.array),
            bulk.atoms.get_chemical_symbols(),
            bulk.atoms.get_scaled_positions(),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.analyzer = SpacegroupAnalyzer(structure, symprec=0.1)
            self.standard = self.analyzer.get_conventional_standard_structure()
        self.is_hexagonal = bool(self.standard.lattice.is_hexagonal())
        self._least: dict[str, float] = {}

    def distinct_planes(self, max_miller: int) -> list[tuple[int, int, int]]:
        """Planes that no operation of the bulk carries onto each other."""
        from pymatgen.core.surface import get_symmetrically_distinct_miller_indices

        planes = get_symmetrically_distinct_miller_indices(self.standard, max_miller)
        return sorted(
            {parse_miller(plane) for plane in planes}, key=lambda plane: (max(map(abs, plane)), plane)
        )

    def cut(
        self, plane: tuple[int, int, int], thickness: float, width: float, vacuum: float
    ) -> list[tuple[Atoms, bool]]:
        """Cut the slabs of a plane: every distinct termination, and its other side where that differs."""
        from pymatgen.core.surface import SlabGenerator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                generator = SlabGenerator(
                    initial_structure=self.standard,
                    miller_index=plane,
                    min_slab_size=thickness,
                    min_vacuum_size=vacuum,
                    lll_reduce=False,
                    center_slab=True,
                    primitive=True,
                    max_normal_search=1,
                )
                self._check_size(generator.oriented_unit_cell, plane, thickness)
                slabs = generator.get_slabs(tol=0.3, bonds=None, max_broken_bonds=0, symmetrize=False)
            except InputError:
                raise
            except (ValueError, ArithmeticError, IndexError) as error:
                raise InputError(f"{self.bulk.name} {plane} has no slab ({error})") from error
            sides = [(slab, False) for slab in slabs]
            sides += [(slab, True) for slab in slabs if not self._can_be_turned_over(slab)]
            return [(self._finished(slab, other, width), other) for slab, other in sides]

    def _check_size(self, cell: Any, plane: tuple[int, int, int], thickness: float) -> None:
        """Refuse a plane whose slab would take hours to cut, and tell of minutes.

        Args:
            cell: that the slab is made of, its third vector across the plane.
            plane: Miller indices.
            thickness: Å, of the slab.
        """
        first, second, _ = cell.lattice.matrix
        height = cell.lattice.volume / float(np.linalg.norm(np.cross(first, second)))
        atoms = len(cell) * math.ceil(thickness / height)
        if atoms > _MOST_CUT:
            raise InputError(
                f"{self.bulk.name} {plane} has a slab of {atoms} atoms before it is made wide, and at most "
                f"{_MOST_CUT} are cut: give smaller Miller indices, or a thinner slab"
            )
        if atoms > _MANY_CUT:
            logger.warning(f"{self.bulk.name} {plane} has a slab of {atoms} atoms: cutting it takes minutes")

    @staticmethod
    def _can_be_turned_over(slab: Any) -> bool:
        from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

        operations = SpacegroupAnalyzer(slab, symprec=0.1).get_symmetry_operations()
        # The fractional matrix: pymatgen's slabs need not have their normal along z.
        return any(
            round(float(op.affine_matrix[2, 2])) == -1 and np.abs(op.affine_matrix[2, :2]).max() < 1e-6
            for op in operations
        )

    def _finished(self, slab: Any, bottom_up: bool, width: float) -> Atoms:
        atoms = Atoms(
            [specie.symbol for specie in slab.species],
            scaled_positions=slab.frac_coords,
            cell=slab.lattice.matrix,
            pbc=True,
        )
        atoms = whole_slab(_Cutter.upright(atoms)).atoms
        if bottom_up:  # turned by 180° about x, and the third vector up again
            atoms.positions *= (1.0, -1.0, -1.0)
            atoms.set_cell(atoms.cell.array * np.array([[1.0, -1, -1], [1, -1, -1], [-1, 1, 1]]))
            atoms = _Cutter.upright(atoms)
            atoms = whole_slab(atoms).atoms
        z = atoms.positions[:, 2]
        atoms.positions += atoms.cell.array[2] * (0.5 - (z.max() + z.min()) / 2 / atoms.cell[2, 2])
        atoms.set_tags(self._tags(atoms))
        return _Cutter.held(_Cutter.tiled(atoms, width))

    def _tags(self, slab: Atoms) -> np.ndarray:
        """OC20's tags: by height, and by coordination in the upper half."""
        from pymatgen.analysis.local_env import VoronoiNN
        from pymatgen.core import Lattice, Structure

        tags = height_tags(slab)
        structure = Structure(
            Lattice(slab.cell.array), slab.get_chemical_symbols(), slab.get_scaled_positions(wrap=False)
        )
        neighbours = VoronoiNN(tol=0.1)
        if not self._least:
            symmetric = self.analyzer.get_symmetrized_structure()
            for indices in symmetric.equivalent_indices:
                symbol = symmetric[indices[0]].specie.symbol
                number = round(neighbours.get_cn(symmetric, indices[0], use_weights=True), 5)
                self._least[symbol] = min(number, self._least.get(symbol, np.inf))
        fractions = slab.get_scaled_positions(wrap=False)[:, 2]
        middle = float(np.average(fractions, weights=slab.get_masses()))
        for index in np.flatnonzero((tags == SUBSURFACE) & (fractions >= middle)):
            try:
                number = round(neighbours.get_cn(structure, int(index), use_weights=True), 5)
            except (RuntimeError, ValueError):  # OC20's: an atom without a Voronoi cell is on the surface
                number = -1.0
            if number < self._least[slab.get_chemical_symbols()[index]]:
                tags[index] = SURFACE
        return tags
