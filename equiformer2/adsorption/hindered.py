"""Entropy of an adsorbate that slides and turns on the surface: hindered translator and rotor.

The model is ASE's (Sprowl, Campbell and Árnadóttir, J. Phys. Chem. C 2016, 120, 9719): the three softest
modes are replaced by two hindered translations and a hindered rotation about the normal of the surface.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from ase.geometry import find_mic
from ase.thermochemistry import HinderedThermo

from datasets_oc20.structure_files import read_structure
from equiformer2.adsorption.finished_search import FinishedSearch
from equiformer2.adsorption.named_structures import free_side_up
from equiformer2.adsorption.periodic_images import whole_molecule
from equiformer2.adsorption.saddle_points import FALL
from equiformer2.adsorption.search import MIGRATION
from equiformer2.adsorption.search_folder import NEB
from equiformer2.adsorption.symmetry import SurfaceSymmetry
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json

#: amu Å²; below it nothing turns about the normal: a linear adsorbate that stands upright.
_LEAST_INERTIA = 0.1
#: Å below the highest atom of the slab; atoms in between are its outermost layer.
_TOP_LAYER = 1.0
#: Å; an operation of the slab that moves the adsorbate's centre less keeps its site.
_SAME_SITE = 0.3


@dataclass(frozen=True)
class HinderedMotion:
    """Motions of an adsorbate along the surface.

    Attributes:
        translation_barrier: eV, of diffusion to the next site.
        rotation_barrier: eV, of turning about the normal.
        site_density: sites per cm².
        rotational_minima: equal minima in a full turn.
        inertia: amu Å², about the normal through the centre of mass.
        mass: amu.
        symmetry_number: of the adsorbate, about the normal.
        sources: where each value is from, in words.
    """

    translation_barrier: float
    rotation_barrier: float
    site_density: float
    rotational_minima: int
    inertia: float
    mass: float
    symmetry_number: int = 1
    sources: dict[str, str] = field(default_factory=dict)

    def thermo(self, frequencies: np.ndarray, temperature: float, lowest: float) -> dict[str, float]:
        """Compute the contributions to the free energy.

        Args:
            frequencies: `[3 n]` cm^-1, imaginary ones negative; the three lowest are replaced.
            temperature: K.
            lowest: cm^-1; softer ones among the others count as this.

        Returns:
            `zpe_eV`, `heat_eV` (internal energy above it) and `entropy_eV` (temperature times entropy, at the
            standard state of the model: the density of an ideal gas of 1 bar to the power of 2/3).

        Raises:
            InputError: too few modes, or a barrier so high or a temperature so low that nothing moves.
        """
        if len(frequencies) < 6:
            raise InputError(
                f"the adsorbate has {len(frequencies)} modes, and two translations and a rotation leave no "
                "vibration: use --entropy harmonic"
            )
        stiff = np.maximum(np.sort(frequencies)[3:], lowest) * units.invcm
        model = HinderedThermo(
            # ASE drops three itself, the softest.
            np.concatenate([np.zeros(3), stiff]),
            self.translation_barrier,
            self.rotation_barrier,
            self.site_density,
            self.rotational_minima,
            mass=self.mass,
            inertia=self.inertia,
            symmetrynumber=self.symmetry_number,
        )
        zero_point = float(model.get_zero_point_energy(verbose=False))
        with np.errstate(over="ignore", invalid="ignore"):
            heat = float(model.get_internal_energy(temperature, verbose=False)) - zero_point
            entropy = float(model.get_entropy(temperature, verbose=False)) * temperature
        if not np.isfinite([heat, entropy]).all():
            raise InputError(
                f"at {temperature:g} K nothing crosses barriers of {self.translation_barrier:g} and "
                f"{self.rotation_barrier:g} eV, so the model of hindered motions has no answer: use "
                "--entropy harmonic"
            )
        return {"zpe_eV": zero_point, "heat_eV": heat, "entropy_eV": entropy}

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "translation_barrier_eV": self.translation_barrier,
            "rotation_barrier_eV": self.rotation_barrier,
            "site_density_per_cm2": self.site_density,
            "rotational_minima": self.rotational_minima,
            "inertia_amu_A2": self.inertia,
            "mass_amu": self.mass,
            "symmetry_number": self.symmetry_number,
            "sources": self.sources,
        }


def hindered_motion(
    search: FinishedSearch,
    translation_barrier: float | None = None,
    rotation_barrier: float | None = None,
    rotational_minima: int | None = None,
    symmetry_number: int = 1,
) -> HinderedMotion:
    """Collect what the model of hindered motions needs from a search.

    A barrier that is not given is the lowest one of the search's own elastic bands from the best minimum
    (`adsorption neb`): the highest energy along the band above that minimum, whatever other minima lie on the
    way. Without a band it is the energy of the next minimum, on another site or turned on the same one:
    at least that much is to be overcome. The rotational minima that are not given are counted by the
    rotations of the clean slab about the site.

    Args:
        search: finished.
        translation_barrier, rotation_barrier: eV.
        rotational_minima: equal minima in a full turn.
        symmetry_number: of the adsorbate, about the normal.

    Raises:
        InputError: an atom or an upright linear adsorbate, which have no rotor, a barrier that is neither
            given nor in the search, a band through a minimum lower than the best, values without sense.
    """
    barriers = {"translation": translation_barrier, "rotation": rotation_barrier}
    for name, value in {
        **barriers,
        "rotational minima": rotational_minima,
        "symmetry": symmetry_number,
    }.items():
        if value is not None and not (np.isfinite(value) and value > 0):
            raise InputError(f"the {name} of the hindered motion is {value:g}: give a value above 0")
    adsorbate = whole_molecule(search.adsorbate, "the adsorbate")
    if len(adsorbate) < 2:
        raise InputError("an adsorbate of one atom has no rotor: use --entropy harmonic")
    normal = np.cross(search.best.cell[0], search.best.cell[1])
    area = float(np.linalg.norm(normal))
    normal = normal / area
    arms = adsorbate.positions - adsorbate.get_center_of_mass()
    arms = arms - np.outer(arms @ normal, normal)
    masses = adsorbate.get_masses()
    inertia = float(masses @ (arms**2).sum(axis=1))
    if inertia < _LEAST_INERTIA:
        raise InputError(
            f"{adsorbate.get_chemical_formula()} is linear and stands upright, so nothing turns about the "
            "normal of the surface: use --entropy harmonic"
        )
    heights = free_side_up(search.clean_slab)[0].atoms.positions[:, 2]
    sites = int((heights > heights.max() - _TOP_LAYER).sum())
    symmetry = search.symmetry()
    sources = {"inertia": "relaxed structure", "site_density": "atoms of the outermost layer"}
    sources["rotational_minima"] = "given"
    if rotational_minima is None:
        rotational_minima = _rotations_about(adsorbate.positions.mean(axis=0), symmetry)
        sources["rotational_minima"] = "rotations of the clean slab about the site"
    known = _known_barriers(search, symmetry) if None in barriers.values() else {}
    found: dict[str, float] = {}
    for kind, given in barriers.items():
        if given is None and kind not in known:
            raise InputError(
                f"the search has no other minimum that tells the barrier of {kind}: give --{kind}-barrier in "
                "eV, or use --entropy harmonic"
            )
        found[kind], sources[f"{kind}_barrier"] = known[kind] if given is None else (given, "given")
    return HinderedMotion(
        found["translation"],
        found["rotation"],
        sites / (area * 1e-16),
        rotational_minima,
        inertia,
        float(masses.sum()),
        symmetry_number,
        sources,
    )


def _rotations_about(place: np.ndarray, symmetry: SurfaceSymmetry) -> int:
    """Count the rotations that keep a place on the surface, the identity included."""
    kept = 0
    for rotation, image in zip(symmetry.rotations, symmetry.images(place[None]), strict=True):
        moved = find_mic(image - place, symmetry.cell, symmetry.pbc)[1][0]
        kept += bool(np.linalg.det(rotation) > 0.0 and moved < _SAME_SITE)
    return kept


def _known_barriers(search: FinishedSearch, symmetry: SurfaceSymmetry) -> dict[str, tuple[float, str]]:
    """Barriers of translation and rotation from the best minimum, eV, and where each is from."""
    rows = {row["id"]: row for row in search.record["placements"]}
    best = rows[search.record["best"]["id"]]["basin"]
    if best is None:  # not converged
        return {}
    centre = search.adsorbate.positions.mean(axis=0)
    images = symmetry.images(centre[None])[:, 0]
    found: list[tuple[str, float, str]] = []
    for row in rows.values():
        if row["basin"] == row["id"] and row["id"] != best:
            other = search.minimum(row["id"])[len(search.clean_slab) :].positions.mean(axis=0)
            above = float(row["energy_eV"]) - float(rows[best]["energy_eV"])
            said = f"energy of the minimum {row['id']} above the best: a lower bound"
            found.append((_kind_of(images - other, symmetry), above, said))
    bands: list[tuple[str, float, str]] = []
    for file in sorted((search.folder / NEB).glob("*/neb.json")):
        path = read_json(file)
        ends = [rows.get(str(path.get(key)), {}).get("basin") for key in ("start", "end")]
        if best in ends and None not in ends and path.get("converged"):
            barrier = _climb_from_best(file, path, at_end=ends[0] != best)
            with as_input_error():
                first, last = (read_structure(file.with_name("neb.traj"), place) for place in (0, -1))
            count = len(search.clean_slab)
            moved = (last.positions - first.positions)[count:].mean(axis=0)
            bands.append((_kind_of(moved[None], symmetry), barrier, f"elastic band {file.parent.name}"))
    # The lowest barrier of each kind that is one at all; bands come before differences of minima.
    lowest: dict[str, tuple[float, str]] = {}
    for known in (found, bands):
        for kind, barrier, source in sorted(known, key=lambda one: -one[1]):
            if barrier > 0.0:
                lowest[kind] = barrier, source
    return lowest


def _kind_of(moved: np.ndarray, symmetry: SurfaceSymmetry) -> str:
    """Tell a translation from a rotation by vectors `[N, 3]` Å to all copies of the adsorbate's centre."""
    moved = find_mic(moved, symmetry.cell, symmetry.pbc)[0]
    normal = np.cross(symmetry.cell[0], symmetry.cell[1])
    normal /= np.linalg.norm(normal)
    along = moved - np.outer(moved @ normal, normal)
    return "translation" if np.linalg.norm(along, axis=1).min() > MIGRATION else "rotation"


def _climb_from_best(file: Path, path: Mapping[str, Any], at_end: bool) -> float:
    """Highest energy along a band above its end in the best minimum, eV.

    `barrier_eV` of the record is another number where the path crosses further minima: its climb may begin at
    one of these.

    Raises:
        InputError: the record has no energies, or the band crosses a lower minimum.
    """
    try:
        energies = np.array(path["energies_eV"], dtype=float)
    except (KeyError, TypeError, ValueError):
        energies = np.empty(0)
    if energies.ndim != 1 or len(energies) < 3 or not np.isfinite(energies).all():
        raise InputError(f"{file} has no energies of its images: find the path again")
    own = float(energies[-1 if at_end else 0])
    minimum = int(energies.argmin())
    if energies[minimum] < own - FALL:
        raise InputError(
            f"image {minimum} of the elastic band {file.parent.name} lies {own - energies[minimum]:.3f} eV "
            "below the best minimum of the search, from which barriers are counted: search with more "
            "placements, or give --translation-barrier and --rotation-barrier"
        )
    return float(energies.max()) - own
