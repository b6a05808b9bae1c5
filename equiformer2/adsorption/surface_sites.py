"""Sites of a surface: top, bridge, hollow.

The atoms that are seen from above are triangulated in the plane (Delaunay, as OC20 does). Triangles with a
common circle around them are one polygon, so that the square of a (100) surface has one hollow and not two
triangles and a bridge, whichever way rounding would have divided it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from scipy.spatial import Delaunay

from equiformer2.adsorption.symmetry import surface_symmetry
from equiformer2.errors import InputError

PROBE = 0.9
"""Å, radius of the ball that is let down on an atom to see if it lies open: that of a small adsorbate."""

SAME_PLACE = 0.1
"""Å; sites, circumcentres and symmetry copies nearer than this are the same."""

_MARGIN = 10.0
"""Å of surface around the cell that is triangulated with it, so that no triangle of the cell sees its end."""

_BOUNDARY = 1e-3
"""Fraction of a lattice vector within which a site is on the boundary of the cell."""

_FLAT = 1e-3
"""Å² of a triangle without an inside."""

KINDS = ("top", "bridge", "hollow")


@dataclass(frozen=True)
class Site:
    """A place on a surface.

    Attributes:
        position: `[3]` Å; z is the mean height of the atoms around it.
        kind: one of `KINDS`, or "given" or "random".
        coordination: number of surface atoms around it; 0 where it is not known.
    """

    position: tuple[float, float, float]
    kind: str
    coordination: int = 0


def open_atoms(slab: Atoms) -> np.ndarray:
    """Indices of the atoms that are seen from above: a ball of radius `PROBE` let down on them reaches them.

    Args:
        slab: whole, its surface up (`free_side_up`).
    """
    xy = slab.positions[:, :2]
    lateral = _Plane.lengths(xy[:, None] - xy[None], slab.cell.array[:2, :2])
    radii = covalent_radii[slab.numbers]
    contact = radii + PROBE
    heights = slab.positions[:, 2]
    rise = np.sqrt(np.maximum(contact[None, :] ** 2 - lateral**2, 0.0))
    # `[i, j]`: where the ball, let down above i, meets j; rounding must not let equal atoms hide each other.
    meets = np.where(lateral < contact[None, :], heights[None, :] + rise, -np.inf)
    return np.flatnonzero(heights + contact > meets.max(axis=1) - 1e-3)


def surface_sites(slab: Atoms) -> list[Site]:
    """Find the sites of a surface: on top of its atoms, between two of them, in the middle of three or more.

    Args:
        slab: whole, its surface up (`free_side_up`).

    Returns:
        Sites in one cell, by kind and then by their place in the cell; copies by symmetry are among them.

    Raises:
        InputError: the surface cannot be triangulated.
    """
    cell = slab.cell.array[:2, :2]
    points = slab.positions[open_atoms(slab)]
    shifts = np.array(list(_Plane.shifts(cell)))
    tiled = (points[None] + np.pad(shifts @ cell, ((0, 0), (0, 1)))[:, None]).reshape(-1, 3)
    try:
        triangles = Delaunay(tiled[:, :2]).simplices
    except Exception as error:  # of Qhull
        raise InputError(f"the surface of the slab has no triangulation ({type(error).__name__})") from error
    # The far end of the tiles has other triangles; those of a little more than one cell are looked at.
    middles = tiled[triangles, :2].mean(axis=1) @ np.linalg.inv(cell)
    beyond = _MARGIN / 2 / _Plane.widths(cell)
    triangles = triangles[((middles > -beyond) & (middles < 1 + beyond)).all(axis=1)]
    polygons, edges = _Plane.polygons(tiled[:, :2], triangles)
    found = [(point, "top", 1) for point in points]
    found += [(tiled[[a, b]].mean(axis=0), "bridge", 2) for a, b in edges]
    found += [(tiled[corners].mean(axis=0), "hollow", len(corners)) for corners in polygons]
    return _Plane.in_one_cell(found, cell)


def equal_sites(slab: Atoms, sites: Sequence[Site], mirrors: bool = True) -> list[list[Site]]:
    """Group the sites that symmetry operations of the slab carry onto each other.

    Args:
        slab: whole, its surface up; unrelaxed, since a relaxed one has hardly any operations left.
        sites: of `surface_sites`.
        mirrors: count mirror planes and glide planes among the operations; for an adsorbate that is not its
            own mirror image, sites that these alone make equal are different.

    Returns:
        The groups in the order of their first sites, their sites in the order given.
    """
    symmetry = surface_symmetry(slab)
    kept = np.linalg.det(symmetry.rotations) > (-np.inf if mirrors else 0.0)
    cell = slab.cell.array[:2, :2]
    groups: list[list[Site]] = []
    images: list[np.ndarray] = []
    for site in sites:
        place = np.array(site.position[:2])
        for group, copies in zip(groups, images, strict=True):
            if _Plane.lengths(copies - place, cell).min() < SAME_PLACE:
                group.append(site)
                break
        else:
            groups.append([site])
            images.append(symmetry.images(np.array([site.position]))[kept, 0, :2])
    return groups


class _Plane:
    """Geometry of the lattice in the plane of a surface, `[2, 2]` Å."""

    @staticmethod
    def lengths(vectors: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Lengths `[...]` Å of the shortest lattice images of vectors `[..., 2]`."""
        cell = _Plane.reduced(cell)
        fractions = vectors @ np.linalg.inv(cell)
        fractions -= np.round(fractions)
        images = [
            np.linalg.norm((fractions + np.array([i, j])) @ cell, axis=-1)
            for i, j in itertools.product((-1, 0, 1), repeat=2)
        ]
        return np.asarray(np.min(images, axis=0))

    @staticmethod
    def reduced(cell: np.ndarray) -> np.ndarray:
        """Two shortest vectors of the lattice (Gauss); the nearest images are one of them away at most."""
        short, long = sorted(cell, key=lambda vector: float(vector @ vector))
        while turns := round(float(short @ long) / float(short @ short)):
            short, long = sorted((short, long - turns * short), key=lambda vector: float(vector @ vector))
        return np.array([short, long])

    @staticmethod
    def shifts(cell: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield the lattice shifts that surround the cell with `_MARGIN` on every side, (0, 0) among them."""
        reach = np.ceil(_MARGIN / _Plane.widths(cell)).astype(int)
        yield from itertools.product(*(range(-n, n + 1) for n in reach))

    @staticmethod
    def widths(cell: np.ndarray) -> np.ndarray:
        """`[2]` Å between the opposite sides of the cell: its area over the length of the other vector."""
        return np.asarray(abs(np.linalg.det(cell)) / np.linalg.norm(cell[::-1], axis=1))

    @staticmethod
    def polygons(points: np.ndarray, triangles: np.ndarray) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Join neighbouring triangles with one circumcentre.

        Returns:
            The corners of every polygon, and the edges between different ones.
        """
        a, b, c = (points[triangles[:, corner]] for corner in range(3))
        ab, ac = b - a, c - a
        area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
        inside = np.abs(area) > _FLAT
        triangles, a, ab, ac, area = triangles[inside], a[inside], ab[inside], ac[inside], area[inside]
        squares = (ab**2).sum(axis=1), (ac**2).sum(axis=1)
        centre = a + np.stack(
            [ac[:, 1] * squares[0] - ab[:, 1] * squares[1], ab[:, 0] * squares[1] - ac[:, 0] * squares[0]],
            axis=1,
        ) / (2 * area[:, None])
        polygon = np.arange(len(triangles))

        def find(index: int) -> int:
            while polygon[index] != index:
                index = int(polygon[index])
            return index

        owner: dict[tuple[int, int], list[int]] = {}
        for index, corners in enumerate(triangles):
            for pair in itertools.combinations(sorted(map(int, corners)), 2):
                owner.setdefault(pair, []).append(index)
        for sharing in owner.values():
            if len(sharing) == 2 and np.linalg.norm(centre[sharing[0]] - centre[sharing[1]]) < SAME_PLACE:
                polygon[find(sharing[1])] = find(sharing[0])
        corners_of: dict[int, set[int]] = {}
        for index, corners in enumerate(triangles):
            corners_of.setdefault(find(index), set()).update(map(int, corners))
        edges = [pair for pair, sharing in owner.items() if len({find(index) for index in sharing}) == 2]
        return [sorted(corners) for corners in corners_of.values()], edges

    @staticmethod
    def in_one_cell(found: list[tuple[np.ndarray, str, int]], cell: np.ndarray) -> list[Site]:
        """Move sites into the cell, without copies, in an order that does not hang on rounding."""
        sites: list[Site] = []
        for kind in KINDS:
            chosen = [(point, number) for point, name, number in found if name == kind]
            placed = []
            for point, number in chosen:
                fractions = np.linalg.solve(cell.T, point[:2])
                if kind != "top" and not ((fractions > -_BOUNDARY) & (fractions < 1 + _BOUNDARY)).all():
                    continue
                fractions -= np.floor(fractions + _BOUNDARY)  # what lies on the boundary is in the cell once
                placed.append(
                    (tuple(np.round(fractions, 3) + 0.0), fractions @ cell, float(point[2]), number)
                )
            seen = np.empty((0, 2))
            for _, xy, height, number in sorted(placed, key=lambda site: site[0]):
                if len(seen) and _Plane.lengths(seen - xy, cell).min() < SAME_PLACE:
                    continue
                seen = np.vstack([seen, xy])
                sites.append(Site((float(xy[0]), float(xy[1]), height), kind, number))
        return sites
