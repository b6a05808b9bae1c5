"""Placements of an adsorbate on a slab: the starts of a search.

Placement number n is drawn from a generator of its own, of the seed and n, so that it is the same whatever
the number of placements and the machine.
"""

import itertools
import logging
import re
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import minkowski_reduce
from scipy.spatial.transform import Rotation

from equiformer2.adsorption.adsorbates import check_binding_atoms, find_adsorbate
from equiformer2.adsorption.anomalies import SKIN
from equiformer2.adsorption.given_structures import given_atoms, path_text
from equiformer2.adsorption.named_structures import (
    SHORTEST_BOND,
    free_side_up,
    place_adsorbate,
    turn_back,
    turned_point,
)
from equiformer2.adsorption.open_catalyst import numpy_seed, open_catalyst
from equiformer2.adsorption.periodic_images import Slab, lowest_atom_index, whole_molecule
from equiformer2.adsorption.start_checks import MORE_VACUUM, check_start, check_vacuum, image_contact
from equiformer2.adsorption.surface_sites import (
    KINDS,
    SAME_PLACE,
    Site,
    equal_sites,
    open_atoms,
    surface_sites,
)
from equiformer2.adsorption.symmetry import SurfaceSymmetry
from equiformer2.errors import InputError
from equiformer2.inference.atoms import ADSORBATE, SUBSURFACE, SURFACE, check_atoms, oc20_tags

logger = logging.getLogger(__name__)

OC20_MODE = "random_site_heuristic_placement"
"""Mode with which OC20's successors and AdsorbML placed most adsorbates; `fairchem-data-oc` does it."""

MODES = ("heuristic", "random", OC20_MODE, "symmetry", "positions")

GAP = 0.1
"""Å between the covalent spheres of adsorbate and slab at the start (OC20's `interstitial_gap`)."""

CONE = np.pi / 9
"""Largest tilt of an adsorbate at a heuristic site, rad (OC20's)."""

_GOLDEN = (np.sqrt(5) - 1) / 2
"""Turns between successive rotations: they spread evenly over the circle, however many there are."""

_UPRIGHT = 0.01
"""Å that the atoms of an upright molecule are off its axis."""

_MOST = 100_000
"""Largest number of placements."""

_FARTHEST = 1e4
"""Å, largest coordinate of a position; it may be outside of the cell, whose images are all the same."""

_FRUITLESS = 5
"""Arrangements of several adsorbates that fail before they count as impossible."""

_TURNS = 200
"""Turns of an adsorbate that are tried before it counts as too large."""

_TRIES = 20
"""Placements that are tried for each one wanted."""

_MOST_TRIALS = 5_000
"""Sites that are tried in one arrangement of several adsorbates."""

Adsorbate = str | PathLike[str] | Atoms | tuple[Atoms, Sequence[int]]


@dataclass(frozen=True)
class Placement:
    """An adsorbate on a slab.

    Attributes:
        id: name that stays the same for the same slab, adsorbate, mode and seed.
        atoms: slab and adsorbate, with OC20 tags and the slab's constraints; adsorbate atoms come last.
        site: where the adsorbate was put.
        rotation: rotation vector, degrees, from the adsorbate as `find_adsorbate` returns it.
        mode: one of `MODES`, or "coverage".
        molecules: indices of the atoms of each adsorbate.
    """

    id: str
    atoms: Atoms
    site: Site
    rotation: tuple[float, float, float]
    mode: str
    molecules: tuple[tuple[int, ...], ...]

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record; without the structure."""
        return {
            "id": self.id,
            "mode": self.mode,
            "site": {
                "kind": self.site.kind,
                "coordination": self.site.coordination,
                "position_A": [round(value, 4) for value in self.site.position],
            },
            "rotation_degrees": [round(value, 3) for value in self.rotation],
            "molecules": [list(molecule) for molecule in self.molecules],
        }


class Placements(list[Placement]):
    """Placements in the order of their numbers.

    Attributes:
        left_out: id and faults of those that `check_start` refused.
    """

    def __init__(self, found: Sequence[Placement] = ()) -> None:
        super().__init__(found)
        self.left_out: list[tuple[str, list[str]]] = []

    def reasons(self) -> dict[str, int]:
        """Count the placements left out by their first fault, its numbers replaced by dots."""
        kinds = (re.sub(r"-?\d+(\.\d+)?", "…", faults[0]) for _, faults in self.left_out)
        return dict(Counter(kinds).most_common())


def placements(
    slab: Atoms,
    adsorbate: Adsorbate,
    mode: str = "heuristic",
    number: int | None = None,
    seed: int = 0,
    *,
    positions: Sequence[tuple[float, float]] | None = None,
    height: float | None = None,
    cutoff: float | None = None,
) -> Placements:
    """Place an adsorbate on a slab in many ways.

    * heuristic: at the top, bridge and hollow sites of the surface, kinds in turn, each in an order of the
      seed; turned at random about the normal and tilted by up to `CONE`.
    * symmetry: the same at one of every set of sites that symmetry makes equal, rotations spread evenly, no
      tilt. Mirror planes of the slab make no sites equal for an adsorbate that is handed as it stands.
    * random: at points spread uniformly over the surface, in uniformly random orientations.
    * random_site_heuristic_placement: OC20's own, by `fairchem-data-oc` (extra `surfaces`).
    * positions: at the given points in turn, first as the adsorbate is oriented, then turned as in symmetry.

    The adsorbate is lowered until it is `GAP` from touching the slab, or, with `height`, to that height.
    Starts that `check_start` refuses are left out and others are drawn in their place.

    Args:
        slab: clean slab; tags that are no OC20's are set (`oc20_tags`), constraints are kept.
        adsorbate: name, file, Atoms or a pymatgen molecule (the lowest atom binds), or one of these and
            indices of binding atoms.
        mode: one of `MODES`.
        number: number of placements; None places one at every site (not for random modes). A single atom is
            placed once at each of the distinct sites, so that fewer can come back in mode symmetry.
        seed: of all that is drawn.
        positions: x and y in Å, for mode positions.
        height: Å of the binding atom above the highest slab atom, for mode positions.
        cutoff: Å, the calculator's, which the vacuum must have.

    Raises:
        InputError: unknown mode, impossible number, a slab that is none or with too little vacuum, a missing
            package, no placement that passes the checks.
    """
    _check_arguments(mode, number, positions, height)
    molecule, binding = as_adsorbate(adsorbate)
    whole, turn = _clean_side_up(slab, cutoff)
    surface = whole.atoms
    place = _Place(surface, molecule, binding, mode, seed, height, whole.gap)
    top = float(surface.positions[:, 2].max())
    found = Placements()
    wanted, draws = place.plan(
        number, [turned_point(xy, turn, top) for xy in ([] if positions is None else positions)]
    )
    for index in range(wanted * _TRIES if place.endless else wanted):
        if len(found) == wanted:
            break
        name = f"{mode}-{index:04d}"
        try:
            atoms, site, rotation = draws(index)
        except InputError as error:
            found.left_out.append((name, [str(error)]))
            continue
        members = tuple(range(len(surface), len(atoms)))
        faults = check_start(
            atoms, cutoff=cutoff, closest=SHORTEST_BOND if height is not None else 1.0, molecules=[members]
        )
        if faults:
            found.left_out.append((name, faults))
            continue
        turn_back(atoms, turn, slab)
        x, y, z = np.array(site.position) @ turn.T
        site = Site((float(x), float(y), float(z)), site.kind, site.coordination)
        found.append(Placement(name, atoms, site, _Draw.degrees(rotation), mode, (members,)))
    if not found:
        reason = found.left_out[0][1][0] if found.left_out else "no site was found"
        raise InputError(f"none of {len(found.left_out)} placements can be used: {reason}")
    if mode == "positions":
        for name, faults in found.left_out:
            logger.warning(f"{name} is left out: {faults[0]}")
    return found


def coverage_placements(
    slab: Atoms,
    adsorbates: Sequence[Adsorbate],
    number: int = 1,
    seed: int = 0,
    *,
    min_distance: float = 2.5,
    cutoff: float | None = None,
) -> Placements:
    """Place several adsorbates on one slab, at heuristic sites apart from each other.

    Arrangements take turns: at any sites, and then, as in ordered layers, at sites of one kind and all turned
    alike, for every set of sites that symmetry makes equal and that is large enough. Of a mixture every other
    arrangement is at any sites.

    Args:
        slab: clean slab, as in `placements`.
        adsorbates: one entry per adsorbate, as in `placements`; the same one may come several times.
        number: number of arrangements.
        seed: of all that is drawn.
        min_distance: Å between atoms of different adsorbates, periodic images included.
        cutoff: as in `placements`.

    Raises:
        InputError: they do not fit, and what `placements` raises.
    """
    if not adsorbates:
        raise InputError("no adsorbate is given: give at least one")
    if not 0 <= min_distance < np.inf:
        raise InputError(f"the distance between adsorbates is {min_distance}: give 0 or more Å")
    _check_arguments("heuristic", number, None, None)
    molecules = [as_adsorbate(adsorbate) for adsorbate in adsorbates]
    whole, turn = _clean_side_up(slab, cutoff)
    surface = whole.atoms
    sites = surface_sites(surface)
    pools = [sites, *(equal for equal in equal_sites(surface, sites) if len(equal) >= len(molecules))]
    if any(one != molecules[0][0] for one, _ in molecules):  # different adsorbates prefer different sites
        pools = [pool for one in pools[1:] for pool in (sites, one)] or pools
    found = Placements()
    for index in range(number + _TRIES):
        if len(found) == number or (not found and index >= _FRUITLESS):
            break
        name = f"coverage-{index:04d}"
        try:
            kind = index % len(pools)
            ordered = pools[kind] is not sites
            arrangement = _Arrangement(
                surface, pools[kind], molecules, (seed, index), min_distance, ordered, whole.gap
            )
            atoms, used, groups = arrangement.find()
        except InputError as error:
            found.left_out.append((name, [str(error)]))
            continue
        faults = check_start(atoms, cutoff=cutoff, closest=1.0, molecules=groups)
        if faults:
            found.left_out.append((name, faults))
            continue
        turn_back(atoms, turn, slab)
        found.append(Placement(name, atoms, used[0], (0.0, 0.0, 0.0), "coverage", groups))
    if not found:
        raise InputError(found.left_out[0][1][0])
    return found


@dataclass
class _Place:
    """One way of placing an adsorbate on a surface.

    Args:
        surface: whole slab, its surface up.
        molecule, binding: the adsorbate and its binding atoms.
        mode, seed, height: of `placements`.
        gap: Å of vacuum; infinite without an image above.
    """

    surface: Atoms
    molecule: Atoms
    binding: Sequence[int]
    mode: str
    seed: int
    height: float | None
    gap: float = np.inf
    endless: bool = True
    _sites: list[Site] = field(default_factory=list)
    _core: Any = None

    def plan(
        self, number: int | None, positions: Sequence[np.ndarray]
    ) -> tuple[int, Callable[[int], tuple[Atoms, Site, Rotation]]]:
        """Choose the number of placements and the function that makes placement n."""
        if self.mode == "random":
            assert number is not None  # see `_check_arguments`
            return number, self._random
        if self.mode == OC20_MODE:
            assert number is not None
            self._check_some_turn_fits()
            self._core = open_catalyst()
            return number, self._oc20
        if self.mode == "positions":
            top = float(self.surface.positions[:, 2].max())
            self._sites = [Site((float(x), float(y), top), "given") for x, y in positions]
        else:
            sites = surface_sites(self.surface)
            if self.mode == "symmetry":
                mirrors = all(_is_own_mirror_image(self.molecule, atom) for atom in self.binding)
                sites = [group[0] for group in equal_sites(self.surface, sites, mirrors)]
            self._sites = self._in_turn(sites)
        # An atom at a site, or an upright line of atoms, is the same whichever way it is turned.
        axis = self.molecule.positions[:, :2] - self.molecule.positions[0, :2]
        upright = bool(np.abs(axis).max() < _UPRIGHT) and len(self.binding) == 1
        once = len(self.molecule) == 1 or (upright and self.mode != "heuristic")
        self.endless = not once and number is not None
        limit = len(self._sites)
        return (min(number or limit, limit) if once else number or limit), self._at_site

    def _in_turn(self, sites: list[Site]) -> list[Site]:
        """Order sites so that their kinds take turns; within a kind by the seed, as they are for symmetry."""
        queues = []
        for kind in KINDS:
            queue = [site for site in sites if site.kind == kind]
            if self.mode == "heuristic":
                keys = _Draw.generator(self.seed, KINDS.index(kind), 0).random(len(queue))
                queue = [queue[index] for index in np.argsort(keys, kind="stable")]
            queues.append(queue)
        turns = itertools.zip_longest(*queues)
        return [site for group in turns for site in group if site is not None]

    def _at_site(self, index: int) -> tuple[Atoms, Site, Rotation]:
        """Place at site number `index`; the sites are used again and again with other rotations."""
        round_, number = divmod(index, len(self._sites))
        site = self._sites[number]
        draw = _Draw.generator(self.seed, index, 1).random(4)
        binding = self.binding[int(draw[0] * len(self.binding))]
        if self.mode == "heuristic":
            rotation = _Draw.tilted(draw[1:])
        else:
            start = 0.0 if self.mode == "positions" else _Draw.generator(self.seed, 0, 2).random()
            angle = 2 * np.pi * (start * (self.mode == "symmetry") + _GOLDEN * round_)
            rotation = Rotation.from_rotvec([0.0, 0.0, angle % (2 * np.pi)])
            binding = self.binding[round_ % len(self.binding)]
        if len(self.molecule) == 1:
            rotation = Rotation.identity()
        turned = self._turned(rotation)
        atoms = place_adsorbate(
            self.surface, turned, binding, position=site.position[:2], height=self.height, gap=GAP
        )
        return atoms, site, rotation

    def _random(self, index: int) -> tuple[Atoms, Site, Rotation]:
        """Place the centre of mass above a random point, in a random orientation."""
        draw = _Draw.generator(self.seed, index, 1).random(5)
        xy = draw[:2] @ self.surface.cell.array[:2, :2]
        rotation = Rotation.identity() if len(self.molecule) == 1 else _Draw.uniform(draw[2:])
        turned = self._turned(rotation)
        # The binding atom is put so that the centre of mass is at the point.
        position = xy + turned.positions[0, :2] - turned.get_center_of_mass()[:2]
        atoms = place_adsorbate(self.surface, turned, 0, position=tuple(position), gap=GAP)
        top = float(self.surface.positions[:, 2].max())
        return atoms, Site((float(xy[0]), float(xy[1]), top), "random"), rotation

    def _oc20(self, index: int) -> tuple[Atoms, Site, Rotation]:
        """Place with `fairchem-data-oc`: one site of one call, whose global random numbers are seeded."""
        slab = self.surface.copy()
        slab.set_constraint()
        cell = slab.cell.array.copy()
        if np.linalg.det(cell[:2, :2]) < 0:  # its normal is the cross product of the first two vectors
            cell[[0, 1]] = cell[[1, 0]]
        cell[2] *= np.sign(cell[2, 2])
        slab.set_cell(cell)
        if not (slab.get_tags() == SURFACE).any():
            slab.set_tags(np.where(np.isin(np.arange(len(slab)), open_atoms(slab)), SURFACE, SUBSURFACE))
        holder = types.SimpleNamespace(atoms=slab, has_surface_tagged=lambda: True)
        adsorbate = self._core.Adsorbate(self.molecule, adsorbate_binding_indices=list(self.binding))
        with numpy_seed(self.seed, index):
            made = self._core.AdsorbateSlabConfig(
                holder, adsorbate, num_sites=1, interstitial_gap=GAP, mode=OC20_MODE
            )
        if not made.atoms_list:
            raise InputError("fairchem-data-oc found no site on the slab")
        atoms = self.surface.copy()
        placed = made.atoms_list[0][len(slab) :]
        atoms.extend(Atoms(placed.numbers, placed.positions, tags=np.full(len(placed), ADSORBATE)))
        rotation = Rotation.identity()
        if len(self.molecule) > 1:
            before = self.molecule.positions - self.molecule.positions.mean(axis=0)
            rotation = _Draw.superposing(before, placed.positions - placed.positions.mean(axis=0))
        x, y, z = map(float, made.metadata_list[0]["site"])
        return atoms, Site((x, y, z), "random"), rotation

    def _check_some_turn_fits(self) -> None:
        """Raise `InputError` where no turn of the adsorbate fits, as far as `_TURNS` of OC20's kind tell."""
        draw = _Draw.generator(self.seed, 0, 5)
        for last in reversed(range(_TURNS)):
            try:
                self._turned(_Draw.tilted(draw.random(3)))
                return
            except InputError:
                if not last:
                    raise

    def _turned(self, rotation: Rotation) -> Atoms:
        molecule = self.molecule.copy()
        molecule.positions = rotation.apply(molecule.positions)
        _check_fits(molecule, self.surface, self.gap)
        return molecule


class _Arrangement:
    """Places of several adsorbates on a surface, apart from each other, all drawn from one seed.

    Every adsorbate takes the sites in an order of its own. Where one finds no site, the one before it moves
    on to its next.

    Args:
        surface: whole slab, its surface up.
        sites: that may be taken.
        molecules: adsorbates and their binding atoms.
        seed: seed and number of the arrangement.
        min_distance: Å between atoms of different adsorbates, and more where they would be in contact.
        ordered: turn all alike about the normal, without a tilt; else each by itself, with a tilt.
        gap: Å of vacuum.

    Raises:
        InputError: an adsorbate touches its own image, or is taller than the vacuum.
    """

    def __init__(
        self,
        surface: Atoms,
        sites: Sequence[Site],
        molecules: Sequence[tuple[Atoms, list[int]]],
        seed: tuple[int, int],
        min_distance: float,
        ordered: bool,
        gap: float,
    ) -> None:
        self.surface, self.sites, self.min_distance = surface, sites, min_distance
        generator = _Draw.generator(*seed, 3)
        alike = Rotation.from_rotvec([0.0, 0.0, 2 * np.pi * _Draw.generator(*seed, 4).random()])
        self.orders: list[list[int]] = []
        self.turned: list[tuple[Atoms, int]] = []
        for molecule, binding in molecules:
            self.orders.append(list(np.argsort(generator.random(len(sites)), kind="stable")))
            draw = generator.random(4)
            turned = molecule.copy()
            turned.positions = (alike if ordered else _Draw.tilted(draw[1:])).apply(turned.positions)
            _check_fits(turned, surface, gap)
            self.turned.append((turned, binding[int(draw[0] * len(binding))]))
        self._placed: dict[tuple[int, int], Atoms | None] = {}
        self._apart: dict[tuple[int, int, int, int], bool] = {}
        plane = surface.cell.array.copy()
        plane[2] = [0, 0, 1]
        self._lattice, _ = minkowski_reduce(plane, (True, True, False))
        self._images = np.array(list(itertools.product((-1, 0, 1), (-1, 0, 1), (0,)))) @ self._lattice

    def find(self) -> tuple[Atoms, list[Site], tuple[tuple[int, ...], ...]]:
        """Slab with all adsorbates, their sites, and the atoms of each.

        Raises:
            InputError: there is no such arrangement, or none among the first `_MOST_TRIALS`.
        """
        chosen: list[int] = []
        untried = [iter(self.orders[0])]
        deepest = trials = 0
        while untried and len(chosen) < len(self.turned) and trials < _MOST_TRIALS:
            for site in untried[-1]:
                trials += 1
                if self._fits(site, chosen):
                    chosen.append(site)
                    deepest = max(deepest, len(chosen))
                    untried.append(iter(self.orders[len(chosen) % len(self.turned)]))
                    break
            else:
                untried.pop()
                if chosen:
                    chosen.pop()
        if len(chosen) < len(self.turned):
            raise InputError(
                f"adsorbate {deepest} of {len(self.turned)} has no site {self.min_distance:g} Å from the "
                "others: place fewer, give a wider slab, or a smaller distance"
            )
        atoms = self.surface.copy()
        groups = []
        for number, site in enumerate(chosen):
            molecule = self._at(number, site)
            assert molecule is not None  # it fitted
            groups.append(tuple(range(len(atoms), len(atoms) + len(molecule))))
            atoms.extend(molecule)
        return atoms, [self.sites[site] for site in chosen], tuple(groups)

    def _fits(self, site: int, chosen: Sequence[int]) -> bool:
        """Tell whether the next adsorbate can be at a site beside those that are placed."""
        for number, other in enumerate(chosen):
            key = number, other, len(chosen), site
            if key not in self._apart:
                self._apart[key] = self._are_apart(*key)
            if not self._apart[key]:
                return False
        return self._at(len(chosen), site) is not None

    def _are_apart(self, number: int, site: int, other: int, other_site: int) -> bool:
        """Tell whether two adsorbates at two sites are far enough from each other."""
        positions = (np.array([self.sites[index].position]) for index in (site, other_site))
        flat = [position * (1, 1, 0) for position in positions]
        if self._distances(*flat).min() < self.min_distance / 2:
            return False
        first, second = self._at(number, site), self._at(other, other_site)
        if first is None or second is None:
            return False
        contact = covalent_radii[first.numbers][:, None] + covalent_radii[second.numbers] + SKIN
        distances = self._distances(first.positions, second.positions)
        return bool((distances >= np.maximum(contact, self.min_distance)).all())

    def _distances(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """`[A, B]` Å between points and the nearest images of others in the plane."""
        vectors = first[:, None] - second[None]
        shifts = np.round(np.linalg.solve(self._lattice.T, vectors[..., None])[..., 0]) * (1, 1, 0)
        vectors = vectors - shifts @ self._lattice
        return np.asarray(np.linalg.norm(vectors[..., None, :] - self._images, axis=-1).min(axis=-1))

    def _at(self, number: int, site: int) -> Atoms | None:
        """An adsorbate at a site; None where it cannot be."""
        key = number, site
        if key not in self._placed:
            turned, binding = self.turned[number]
            try:
                placed = place_adsorbate(
                    self.surface, turned, binding, position=self.sites[site].position[:2], gap=GAP
                )
                self._placed[key] = placed[len(self.surface) :]
            except InputError:
                self._placed[key] = None
        return self._placed[key]


def _check_fits(molecule: Atoms, surface: Atoms, gap: float) -> None:
    """Raise `InputError` for a turned adsorbate that has no place on the slab, whatever the site.

    Args:
        molecule: whole, turned.
        surface: slab, its surface up.
        gap: Å of vacuum.
    """
    in_cell = Atoms(molecule.numbers, molecule.positions, cell=surface.cell, pbc=surface.pbc)
    contact = image_contact(in_cell, "the adsorbate")
    if contact is not None:
        raise InputError(contact)
    tall = float(np.ptp(molecule.positions[:, 2]))
    if tall >= gap:
        raise InputError(
            f"the adsorbate is {tall:.1f} Å tall, and the vacuum of the slab is {gap:.1f} Å: give more "
            f"vacuum ({MORE_VACUUM})"
        )


def _clean_side_up(slab: Atoms, cutoff: float | None) -> tuple[Slab, np.ndarray]:
    """Check a clean slab and turn a copy with OC20's tags as `free_side_up` does.

    Args:
        slab: as in `placements`.
        cutoff: as in `placements`.

    Raises:
        InputError: impossible atoms, adsorbate atoms, a vacuum thinner than `cutoff`, and what `free_side_up`
            raises.
    """
    check_atoms(slab)
    tags = oc20_tags(slab)[0]
    if (tags == ADSORBATE).any():
        raise InputError("the slab has adsorbate atoms (tag 2) already: give the clean slab")
    whole, turn = free_side_up(slab)
    if cutoff is not None:
        check_vacuum(slab, cutoff)
    whole.atoms.info = {}
    whole.atoms.set_tags(tags)
    _tell_of_open_subsurface(whole.atoms)
    return whole, turn


def _tell_of_open_subsurface(surface: Atoms) -> None:
    """Log a warning for a surface with sites at atoms that count as subsurface, such as bcc (111)."""
    number = int((surface.get_tags()[open_atoms(surface)] == SUBSURFACE).sum())
    if number:
        logger.warning(
            f"{number} atoms of tag 0 lie open on the surface, and an adsorbate that touches one counts as "
            "inside the slab (intercalated): let more layers move (--free-layers, or tags 1 in the file)"
        )


def _is_own_mirror_image(molecule: Atoms, atom: int) -> bool:
    """Tell whether a turn about the normal through an atom carries an adsorbate onto its mirror image.

    Molecules without a handedness have one on a surface where no mirror plane of theirs stands upright.
    """
    arms = molecule.positions - molecule.positions[atom]
    mirrored = arms * (1.0, -1.0, 1.0)
    angles = np.arctan2(arms[:, 1], arms[:, 0])
    farthest = int(np.linalg.norm(arms[:, :2], axis=1).argmax())
    for other in np.flatnonzero(molecule.numbers == molecule.numbers[farthest]):
        turned = Rotation.from_rotvec([0.0, 0.0, angles[other] + angles[farthest]]).apply(mirrored)
        lengths = np.linalg.norm(turned[:, None] - arms[None], axis=2)
        if SurfaceSymmetry.matched(lengths, molecule.numbers, molecule.numbers) < SAME_PLACE:
            return True
    return False


def _check_arguments(
    mode: str,
    number: int | None,
    positions: Sequence[tuple[float, float]] | None,
    height: float | None,
) -> None:
    """Raise `InputError` for arguments of `placements` that contradict each other or mean nothing."""
    if mode not in MODES:
        raise InputError(f"the placement mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if number is None and mode in ("random", OC20_MODE):
        raise InputError(f"the placement mode {mode} has no end: give the number of placements")
    if number is not None and not (isinstance(number, int | np.integer) and 1 <= number <= _MOST):
        raise InputError(f"the number of placements is {number!r}: give a whole number from 1 to {_MOST}")
    if (mode == "positions") != (positions is not None and len(positions) > 0):
        raise InputError(
            "positions and the mode positions go together: give x and y in Å with that mode, and only with it"
        )
    if height is not None and mode != "positions":
        raise InputError(f"a height has no meaning with the mode {mode}: give it with positions")
    if positions is None:
        return
    for xy in positions:
        try:
            point = np.asarray(xy, dtype=float)
        except (TypeError, ValueError):
            point = np.empty(0)
        if point.shape != (2,) or not (np.abs(point) <= _FARTHEST).all():
            raise InputError(
                f"the position {xy!r} must be two numbers x and y in Å, of at most {_FARTHEST:g}"
            )
    if number is not None and number < len(positions):
        raise InputError(
            f"there are {len(positions)} positions and only {number} placements: give at least as many"
        )


def separate_adsorbates(given: Adsorbate | Sequence[Adsorbate]) -> list[Adsorbate]:
    """List adsorbates; of one by itself, with or without the indices of its binding atoms, there is one."""
    parts: Any = given
    if not isinstance(given, tuple | list):
        return [parts]
    indices: Any = parts[1] if len(given) == 2 else None
    is_list = isinstance(indices, tuple | list | np.ndarray)
    if is_list and all(isinstance(index, int | np.integer) for index in indices):
        return [(parts[0], indices)]
    if not given:
        raise InputError("no adsorbate is given: give at least one")
    return list(parts)


def as_adsorbate(adsorbate: Adsorbate) -> tuple[Atoms, list[int]]:
    """Return a whole molecule without constraints, and its binding atoms."""
    adsorbate = path_text(adsorbate)
    if isinstance(adsorbate, str):
        molecule, binding = find_adsorbate(adsorbate)
    elif isinstance(adsorbate, tuple | list) and len(adsorbate) == 2:
        given, indices = given_atoms(adsorbate[0], "the adsorbate"), adsorbate[1]
        check_atoms(given)
        molecule = whole_molecule(given, "the adsorbate")
        try:
            binding = [int(index) for index in indices]
        except (TypeError, ValueError):
            raise InputError(f"the binding atoms {indices!r} are no list of indices") from None
        if not binding:
            raise InputError("the adsorbate has no binding atom: give the index of at least one")
        check_binding_atoms(molecule, binding, "the adsorbate")
    else:
        given = given_atoms(adsorbate, "the adsorbate")
        check_atoms(given)
        molecule = whole_molecule(given, "the adsorbate")
        binding = [lowest_atom_index(molecule.positions)]
    return Atoms(molecule.numbers, molecule.positions), binding


class _Draw:
    """Random numbers that are the same on every machine, and rotations of them."""

    @staticmethod
    def generator(*seed: int) -> np.random.Generator:
        """Return a generator of the seed; PCG64 and its doubles are the same on every machine."""
        if seed[0] < 0:
            raise InputError(f"the seed is {seed[0]}: give a number from 0 on")
        return np.random.Generator(np.random.PCG64(seed))

    @staticmethod
    def tilted(draw: np.ndarray) -> Rotation:
        """Rotation about z by any angle and then a tilt within `CONE`, from three numbers in [0, 1)."""
        about = Rotation.from_rotvec([0.0, 0.0, 2 * np.pi * draw[0]])
        tilt = np.arccos(1 - draw[1] * (1 - np.cos(CONE)))  # even over the cap of the sphere
        direction = 2 * np.pi * draw[2]
        return Rotation.from_rotvec(tilt * np.array([-np.sin(direction), np.cos(direction), 0.0])) * about

    @staticmethod
    def uniform(draw: np.ndarray) -> Rotation:
        """Rotation of a uniform distribution, from three numbers in [0, 1) (Shoemake's quaternions)."""
        low, high = np.sqrt(1 - draw[0]), np.sqrt(draw[0])
        first, second = 2 * np.pi * draw[1:]
        return Rotation.from_quat(
            [low * np.sin(first), low * np.cos(first), high * np.sin(second), high * np.cos(second)]
        )

    @staticmethod
    def superposing(before: np.ndarray, after: np.ndarray) -> Rotation:
        """Rotation that carries centred points onto others (Kabsch)."""
        u, _, vt = np.linalg.svd(before.T @ after)
        mirror = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
        return Rotation.from_matrix((u @ mirror @ vt).T)

    @staticmethod
    def degrees(rotation: Rotation) -> tuple[float, float, float]:
        """Rotation vector in degrees."""
        x, y, z = map(float, np.degrees(rotation.as_rotvec()))
        return x, y, z
