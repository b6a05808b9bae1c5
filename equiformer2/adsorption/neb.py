"""Barrier between two minima of a search: nudged elastic band with a climbing image, all images in one batch.

The band and its forces are ASE's (`ase.mep`); only the calls of the model are put together, since one call
for all images takes a fraction of the time of one call each.
"""

import math
from dataclasses import dataclass
from itertools import pairwise, permutations, product
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic
from ase.mep import NEB
from ase.optimize import FIRE
from ase.utils.forcecurve import fit_images
from scipy.optimize import linear_sum_assignment
from scipy.signal import find_peaks

from equiformer2.adsorption.anomalies import SKIN
from equiformer2.adsorption.basins import SAME_POSITIONS
from equiformer2.adsorption.symmetry import SurfaceSymmetry, surface_symmetry
from equiformer2.errors import InputError
from equiformer2.inference.atoms import fixed_mask
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.engines import Engineable, open_engine
from equiformer2.inference.many import predict
from equiformer2.inference.pictures import new_figure, png_bytes

#: Images between the ends at most.
_MOST_IMAGES = 1000
#: Å; ends whose atoms are nearer than this are the same minimum.
_SAME = 0.05
#: eV/Å at which the highest image begins to climb: before, it may not yet be the highest.
_CLIMB = 0.3
#: eV; an image from which the path climbs by more on both sides is in a minimum of its own.
_VALLEY = 0.01
#: Orders of the atoms of a molecule that are looked at.
_MOST_ORDERS = 5000
#: Volume of three unit vectors to the neighbours of an atom below which it lies in their plane.
_FLAT = 0.2


@dataclass(frozen=True)
class EnergyPath:
    """Minimum-energy path.

    Attributes:
        images: structures from one end to the other, with energy and forces.
        energies: of them, eV, relative to the first.
        converged: whether the largest force on the band is below the threshold.
        max_force: eV/Å, of the last step.
        steps: of the optimiser, with and without the climbing image.
        model_evaluations: structures that were calculated.
    """

    images: list[Atoms]
    energies: np.ndarray
    converged: bool
    max_force: float
    steps: int
    model_evaluations: int

    @property
    def intermediate_minima(self) -> list[int]:
        """Images between the ends from which the path climbs by more than 0.01 eV on both sides."""
        return [int(image) for image in find_peaks(-self.energies, prominence=_VALLEY)[0]]

    @property
    def barrier(self) -> float:
        """Highest climb on the way from the first image to the last, eV.

        It begins at the first image or at an intermediate minimum, and ends at the highest image after that.
        Without intermediate minima it is the energy of the highest image above the first.
        """
        return self._highest_climb([0, *self.intermediate_minima])

    @property
    def reverse_barrier(self) -> float:
        """Highest climb on the way back, eV: from the last image or an intermediate minimum."""
        count = len(self.energies)
        minima = [count - 1 - image for image in self.intermediate_minima]
        return self._highest_climb([0, *minima], back=True)

    def _highest_climb(self, starts: list[int], back: bool = False) -> float:
        energies = self.energies[::-1] if back else self.energies
        return max(float(energies[start:].max() - energies[start]) for start in starts)

    @property
    def warnings(self) -> list[str]:
        """Sentences about minima between the ends, or about a path without a barrier."""
        minima = self.intermediate_minima
        if not minima and self.energies.argmax() in (0, len(self.energies) - 1):
            return ["the highest structure is an end: between the ends there is no barrier"]
        if not minima:
            return []
        listed = ", ".join(f"image {image} at {self.energies[image]:+.3f} eV" for image in minima)
        return [
            f"the path crosses {'another minimum' if len(minima) == 1 else 'other minima'} ({listed}): the "
            "barriers are the highest climbs from an end or such a minimum; relax these images, and find the "
            "paths to them"
        ]

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "barrier_eV": self.barrier,
            "reverse_barrier_eV": self.reverse_barrier,
            "reaction_energy_eV": float(self.energies[-1]),
            "energies_eV": self.energies.tolist(),
            "highest_image": int(self.energies.argmax()),
            "intermediate_minima": [
                {"image": image, "energy_eV": float(self.energies[image])}
                for image in self.intermediate_minima
            ],
            "warnings": self.warnings,
            "converged": self.converged,
            "max_force_eV_A": self.max_force,
            "steps": self.steps,
            "model_evaluations": self.model_evaluations,
        }


class _BatchedNEB(NEB):
    """ASE's band whose images are calculated together before each of its steps."""

    def __init__(self, images: list[Atoms], model: Engineable) -> None:
        super().__init__(images, k=1.0, method="improvedtangent", climb=False)
        self.model = model
        self.evaluations = 0
        self._calculated: np.ndarray | None = None

    def get_forces(self) -> np.ndarray:
        moving = self.images[1:-1]
        positions = np.array([image.positions for image in moving])
        if self._calculated is not None and np.array_equal(positions, self._calculated):
            return np.asarray(super().get_forces())  # optimisers ask several times in a step
        self._calculated = positions
        for image, found in zip(moving, predict(moving, self.model), strict=True):
            image.info = dict(found.info)  # with the spread of a committee
            image.calc = found.calc
            image.calc.atoms = image.copy()
        self.evaluations += len(moving)
        return np.asarray(super().get_forces())


def find_path(
    first: Atoms,
    last: Atoms,
    model: Engineable,
    images: int = 7,
    fmax: float = 0.05,
    steps: int = 300,
) -> EnergyPath:
    """Find the minimum-energy path between two relaxed structures of the same atoms in the same order.

    Args:
        first, last: relaxed ends; held atoms are those of `first`.
        model: any model with forces.
        images: number of structures between them.
        fmax: threshold of the forces on the band, eV/Å.
        steps: most steps of the optimiser (FIRE), with and without the climbing image together.

    Raises:
        InputError: ends of other atoms or cells, the same end twice, no image, a threshold or number of steps
            without sense, and what the model refuses.
    """
    if not np.array_equal(first.numbers, last.numbers) or not np.allclose(first.cell, last.cell, atol=1e-6):
        raise InputError("the ends of the path have other atoms, another order or another cell")
    if images < 1:
        raise InputError(f"{images} images lie between the ends: give at least 1")
    if images > _MOST_IMAGES:
        raise InputError(f"{images} images lie between the ends: give at most {_MOST_IMAGES}")
    RelaxationSettings(fmax=fmax, steps=steps)  # refuses thresholds and steps that are none
    engine = open_engine(model)
    ends = predict([first, last], engine)
    band = [ends[0], *(first.copy() for _ in range(images)), ends[1]]
    for image in band[1:]:
        image.set_constraint(first.constraints)
    moved = ends[1].positions - ends[0].positions
    held = fixed_mask(first)
    if np.abs(moved[held]).max(initial=0.0) > _SAME:
        raise InputError("an atom that is held lies elsewhere in the two ends: give minima of the same slab")
    NEB(band, method="improvedtangent").interpolate(method="idpp", mic=True, apply_constraint=False)
    neb = _BatchedNEB(band, engine)
    if _largest(band[0], band[-1]) < _SAME:
        raise InputError("the two ends are the same minimum: give two different ones")
    optimizer = FIRE(neb, logfile=None)
    optimizer.run(fmax=max(_CLIMB, fmax), steps=steps)
    neb.climb = True
    converged = bool(optimizer.run(fmax=fmax, steps=max(0, steps - optimizer.nsteps)))
    energies = np.array([image.get_potential_energy() for image in band])
    forces = neb.get_forces().reshape(-1, 3)
    return EnergyPath(
        band,
        energies - energies[0],
        converged,
        float(np.linalg.norm(forces, axis=1).max()),
        int(optimizer.nsteps),
        neb.evaluations + 2,
    )


def nearest_copy(
    first: Atoms, last: Atoms, clean_slab: Atoms, symmetry: SurfaceSymmetry | None = None
) -> Atoms:
    """Move the end of a path to its copy whose adsorbate is nearest to that of the start.

    Copies are those by the operations of the clean slab, its lattice translations among them, and by another
    order of equal atoms within the molecule (`_orders`). Slab atoms are put into the order of the start, and
    every atom into the periodic image nearest to it. A copy whose adsorbate is within 0.3 Å of that of the
    start is in the start's own place and is left out, so that a path between two copies of one minimum leads
    to the nearest other one.

    Args:
        first, last: relaxed structures, clean slab first, then the adsorbate, in the same order.
        clean_slab: relaxed.
        symmetry: of the clean slab; None finds what the relaxation has left of it.

    Returns:
        A copy of `last`, as it is where no copy is nearer, or where it is itself in the place of the start.
    """
    count = len(clean_slab)
    symmetry = surface_symmetry(clean_slab) if symmetry is None else symmetry
    orders, hands = _orders(last[count:])
    towards = symmetry.images(last.positions[count:])[:, None] - first.positions[count:][:, None]
    lengths = find_mic(towards.reshape(-1, 3), symmetry.cell, symmetry.pbc)[1].reshape(towards.shape[:3])
    # `[G, P, n]` from atom i of the start to the atom of an image that an order puts into its place; the
    # first operation is the identity, and so is the first order.
    distances = lengths[:, np.arange(orders.shape[1]), orders]
    moved = distances.max(axis=2, initial=0.0)
    # An operation that mirrors needs an order that mirrors: a group of atoms does not turn inside out.
    turns = np.sign(np.linalg.det(symmetry.rotations))
    allowed = (turns[:, None, None] * hands[None] >= 0).all(axis=2) & (moved > SAME_POSITIONS)
    squared = np.where(allowed, (distances**2).sum(axis=2), np.inf)
    best, order = map(int, np.unravel_index(int(squared.argmin()), squared.shape))
    copy = last.copy()
    if moved[0, 0] <= SAME_POSITIONS or not squared[best, order] < squared[0, 0] - _SAME**2:
        return copy
    image = symmetry.images(last.positions)[best]
    place = _permutation(clean_slab, symmetry, best)
    ordered = np.concatenate([image[:count][np.argsort(place)], image[count:][orders[order]]])
    shift = find_mic(ordered - first.positions, symmetry.cell, symmetry.pbc)[0]
    copy.set_positions(first.positions + shift, apply_constraint=False)
    return copy


def _orders(molecule: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Orders of equal atoms that leave the bonds of a molecule as they are.

    Returns:
        `[P, n]` indices, the order that is there first; and `[P, centres]` for each atom with three or more
        bonds 1 where the order keeps its handedness, -1 where it mirrors it, 0 where it is flat. A molecule
        with more than `_MOST_ORDERS` orders of its atoms stays as it is.
    """
    count = len(molecule)
    vectors, lengths = find_mic(
        (molecule.positions[None] - molecule.positions[:, None]).reshape(-1, 3), molecule.cell, molecule.pbc
    )
    vectors, lengths = np.reshape(vectors, (count, count, 3)), np.reshape(lengths, (count, count))
    radii = covalent_radii[molecule.numbers]
    bonds = (lengths < radii[:, None] + radii + SKIN) & ~np.eye(count, dtype=bool)
    kinds = [np.flatnonzero(molecule.numbers == number) for number in np.unique(molecule.numbers)]
    orders = [np.arange(count)]
    if math.prod(math.factorial(len(kind)) for kind in kinds) <= _MOST_ORDERS:
        for parts in product(*(permutations(kind) for kind in kinds)):
            order = np.arange(count)
            for kind, part in zip(kinds, parts, strict=True):
                order[kind] = part
            if (bonds[np.ix_(order, order)] == bonds).all() and (order != orders[0]).any():
                orders.append(order)
    hands = []
    for centre in np.flatnonzero(bonds.sum(axis=1) >= 3).tolist():
        around = np.flatnonzero(bonds[centre])[:3]

        def hand(order: np.ndarray, centre: int = centre, around: np.ndarray = around) -> float:
            arms = vectors[order[centre], order[around]]
            volume = np.linalg.det(arms / np.linalg.norm(arms, axis=1, keepdims=True))
            return float(np.sign(volume)) if abs(volume) > _FLAT else 0.0

        hands.append([hand(order) * hand(orders[0]) for order in orders])
    return np.array(orders), np.array(hands).reshape(len(hands), len(orders)).T


def _permutation(slab: Atoms, symmetry: SurfaceSymmetry, operation: int) -> np.ndarray:
    """For each atom of a slab the index of the atom that an operation of the slab maps it onto."""
    vectors = slab.positions[None] - symmetry.images(slab.positions)[operation][:, None]
    lengths = find_mic(vectors.reshape(-1, 3), symmetry.cell, symmetry.pbc)[1].reshape(len(slab), len(slab))
    different = slab.numbers[:, None] != slab.numbers
    return np.asarray(linear_sum_assignment(np.where(different, 1e6, lengths**2))[1])


def _largest(first: Atoms, last: Atoms) -> float:
    vectors = last.get_positions() - first.get_positions()
    return float(find_mic(vectors, first.cell, first.pbc)[1].max())


def path_picture(path: EnergyPath) -> bytes:
    """Draw the energies along a path against the distance that the atoms have moved, as PNG.

    The curve between the images is a cubic through their energies, with the slopes of their forces (ASE).
    """
    moved = [
        float(np.linalg.norm(find_mic(after.positions - before.positions, after.cell, after.pbc)[0]))
        for before, after in pairwise(path.images)
    ]
    curve = fit_images(path.images)
    figure = new_figure(6.0, 4.0)
    axis = figure.subplots()
    axis.plot(curve.fit_path, curve.fit_energies, "-", color="#1f4e79", linewidth=1.2)
    axis.plot(np.cumsum([0.0, *moved]), path.energies, "o", color="#1f4e79", markersize=5)
    title = f"barrier {path.barrier:.3f} eV"
    if path.intermediate_minima:
        images = ", ".join(map(str, path.intermediate_minima))
        title += f"; other minima between the ends (image {images})"
        axis.plot(
            np.cumsum([0.0, *moved])[path.intermediate_minima],
            path.energies[path.intermediate_minima],
            "o",
            color="#c0392b",
            markersize=8,
            fillstyle="none",
        )
    axis.set(xlabel="path (Å)", ylabel="energy (eV)")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    return png_bytes(figure)
