"""Records of structures with results of DFT: energy, forces, stress, fixed atoms and tags."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import complete_cell, wrap_positions
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import Bohr, GPa, Hartree, Rydberg, kcal, kJ, mol
from scipy.spatial import cKDTree

from datasets_oc20.constraints import held_atoms
from datasets_oc20.errors import DataError
from datasets_oc20.own_data.atom_rules import AtomRule
from datasets_oc20.own_data.selection import FrameSelection
from datasets_oc20.schema import LARGEST_COORDINATE
from datasets_oc20.structure_record import check_energy_kind
from datasets_oc20.tags import are_ase_layers

ENERGY_UNITS = {
    "eV": 1.0,
    "Ha": Hartree,
    "Ry": Rydberg,
    "kcal/mol": kcal / mol,
    "kJ/mol": kJ / mol,
    "meV": 1e-3,
}
FORCE_UNITS = {
    "eV/A": 1.0,
    "Ha/bohr": Hartree / Bohr,
    "Ry/bohr": Rydberg / Bohr,
    "eV/bohr": 1.0 / Bohr,
    "kcal/mol/A": kcal / mol,
    "kJ/mol/A": kJ / mol,
    "meV/A": 1e-3,
}
STRESS_UNITS = {"eV/A^3": 1.0, "GPa": GPa, "kbar": 0.1 * GPa}
STRESS_SIGNS = ("tension", "compression")
_SAME_PLACE = 0.01
"""Å; atoms of which one is nearer to another, or to its image, have no direction to it."""
_FLAT = 1e-6
"""Å³ per volume of a box of the same edges; a cell below has no volume."""


@dataclass(frozen=True)
class LabelOptions:
    """Choices that only who made the calculations knows, with ASE's conventions as defaults.

    Attributes:
        energy: "energy" (ASE's `get_potential_energy()`, in VASP for σ → 0) or "free_energy" (consistent with
            the forces).
        energy_key: key of a structure, or of a row of a database, with its energy; None takes ASE's result.
        forces_key: likewise for the forces `[N, 3]`.
        stress_key: likewise for the stress, of six or nine numbers; a name with "virial" is a virial (eV).
        energy_unit: unit of the energies, a key of `ENERGY_UNITS`.
        forces_unit: unit of the forces, a key of `FORCE_UNITS`.
        stress_unit: unit of the stress, a key of `STRESS_UNITS`.
        stress_sign: the deformation for which a stress is positive; ASE's is "tension".
        pbc: periodic directions of all structures; None takes those of the files.
        adsorbate: rule for the atoms that get tag 2 (`AtomRule`); None takes the tags of the files.
        fixed: rule for the atoms that DFT held; None takes the constraints of the files.
        group_key: key of a structure that names its group for splits.
        select: condition for frames to be used; None takes all.

    Raises:
        DataError: a value that is not among the choices.
    """

    energy: str = "energy"
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    energy_unit: str = "eV"
    forces_unit: str = "eV/A"
    stress_unit: str = "eV/A^3"
    stress_sign: str = "tension"
    pbc: tuple[bool, bool, bool] | None = None
    adsorbate: AtomRule | None = None
    fixed: AtomRule | None = None
    group_key: str | None = None
    select: FrameSelection | None = None

    def __post_init__(self) -> None:
        choices: Mapping[str, Any] = {
            "energy": ("energy", "free_energy"),
            "energy_unit": ENERGY_UNITS,
            "forces_unit": FORCE_UNITS,
            "stress_unit": STRESS_UNITS,
            "stress_sign": STRESS_SIGNS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise DataError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")


@dataclass
class Labelled:
    """A structure as fields of a record, and where some of them come from.

    Attributes:
        fields: as `structure_record.make_data` takes them, without `sid` and `fid`.
        tags_from: origin of the tags.
        fixed_from: origin of the fixed atoms.
        notices: kinds of notices that concern the structure.
        sid: name of the system that the file states; empty without.
        group: value of the group key; empty without.
    """

    fields: dict[str, Any]
    tags_from: str
    fixed_from: str
    notices: set[str] = field(default_factory=set)
    sid: str = ""
    group: str = ""


NOTICES = {
    "other tags": "tags beyond 0, 1, 2 (such as layer numbers of ASE's slab builders) were ignored: fixed "
    "atoms get tag 0 and others 1; --adsorbate marks the adsorbate",
    "layer tags": "the tags were taken as OC20's (2 for the adsorbate), but look like numbers of two layers "
    "as ASE's "
    "slab builders count; if they are, give --adsorbate with the atoms of the adsorbate, or none",
    "no adsorbate": "no atom is marked as adsorbate (tag 2), which energies and forces do not need; "
    "--adsorbate "
    "'last 2' or a formula marks it",
    "other forces": "structures have no forces under ASE's name, but numbers for every atom under {key}; if "
    "these are the forces, give --forces-key {key}",
    "no such adsorbate": "no atom fulfils the rule of --adsorbate",
    "no such fixed": "no atom fulfils the rule of --fixed",
    "magnetic": "magnetic moments are not kept: the network sees positions and elements only, and learns the "
    "energy of one magnetic state per structure",
    "charged": "structures state a charge, which the network does not see; do not mix charges in one set",
    "no cell": "structures without a cell were taken as molecules in vacuum",
    "not periodic": "structures have a whole cell but pbc F F F, so nothing is seen across its boundary; "
    "--pbc T,T,T "
    "or T,T,F sets the periodic directions",
}
"""Sentences of notices, by kind; each is told once, with the number of structures."""


def notice_sentence(kind: str) -> str:
    """Return the sentence of a kind of notice, which may name a key: `other forces: REF_forces`."""
    name, _, key = kind.partition(": ")
    return NOTICES[name].format(key=key)


def label(atoms: Atoms, options: LabelOptions, needs_energy: bool = True) -> Labelled:
    """Build the fields of a record from a structure and its results; nothing is guessed unsaid.

    Args:
        atoms: the structure; its calculator, info and arrays hold the results. Not changed.
        options: keys, units and rules.
        needs_energy: refuse a structure without an energy.

    Raises:
        DataError: no usable energy, forces, stress, cell or elements; the message is the reason alone.
    """
    if len(atoms) == 0:
        raise DataError("the structure has no atoms")
    results = dict(atoms.calc.results) if atoms.calc is not None and hasattr(atoms.calc, "results") else {}
    results = {name: value for name, value in results.items() if value is not None}
    pbc = np.array(atoms.pbc if options.pbc is None else options.pbc, dtype=bool)
    cell = atoms.cell.array
    _check_positions(atoms.positions)
    notices = _check_cell(cell, pbc)
    _check_apart(atoms.positions, cell, pbc)
    fields: dict[str, Any] = {
        "pos": wrap_positions(atoms.get_positions(), atoms.cell, pbc, eps=0),
        "atomic_numbers": atoms.get_atomic_numbers(),
        "cell": cell,
        "pbc": pbc,
    }
    energy = _energy(atoms, results, options)
    if energy is None and needs_energy:
        raise DataError(_no_energy(atoms, results, options))
    if energy is not None:
        fields["energy"] = energy
    forces = _found(atoms, results, options.forces_key, "forces")
    if forces is not None:
        fields["forces"] = _numbers(forces, "forces", len(atoms)) * FORCE_UNITS[options.forces_unit]
    elif (key := _key_like_forces(atoms)) is not None:
        notices.add(f"other forces: {key}")
    stress = _stress(atoms, results, options)
    if stress is not None:
        fields["stress"] = stress
    fixed, fixed_from = _fixed(atoms, options)
    tags, tags_from, other = _tags(atoms, fixed, options)
    fields |= {"fixed": fixed, "tags": tags}
    notices |= other
    for rule, chosen, kind in (
        (options.adsorbate, tags == 2, "no such adsorbate"),
        (options.fixed, fixed, "no such fixed"),
    ):
        if rule is not None and not rule.is_none and not chosen.any():
            notices.add(kind)
    magnetic = results.get("magmoms", results.get("magmom", 0.0))
    if np.any(np.abs(np.nan_to_num(np.asarray(magnetic, dtype=float))) > 1e-3):
        notices.add("magnetic")
    charge = next((atoms.info[key] for key in ("charge", "total_charge") if key in atoms.info), 0)
    if isinstance(charge, int | float | np.number) and charge:
        notices.add("charged")
    return Labelled(fields, tags_from, fixed_from, notices, _system(atoms), _group(atoms, options))


def _check_positions(positions: np.ndarray) -> None:
    """Raise `DataError` for positions `[N, 3]` (Å) that wrapping into the cell would make look usable."""
    wrong = np.flatnonzero(~(np.abs(positions) <= LARGEST_COORDINATE).all(axis=1))
    if not len(wrong):
        return
    atom = int(wrong[0])
    if not np.isfinite(positions[atom]).all():
        raise DataError(f"the position of atom {atom} is not finite (NaN)")
    raise DataError(
        f"atom {atom} is {np.abs(positions[atom]).max():.3g} Å away from the origin, too far to tell where "
        "it is among the others; move the structure to the origin"
    )


def _check_apart(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> None:
    """Raise `DataError` for two atoms at the same place, which no network takes."""
    box = complete_cell(cell)
    places = np.linalg.solve(box.T, positions.T).T
    places[:, pbc] -= np.floor(places[:, pbc])
    places[:, pbc] = np.where(places[:, pbc] < 1.0, places[:, pbc], 0.0)
    # A difference of fractions is at most this long where atoms are so near.
    reach = min(_SAME_PLACE / np.linalg.svd(box, compute_uv=False).min(), 0.49)
    pairs = cKDTree(places, boxsize=pbc.astype(float)).query_pairs(reach, output_type="ndarray")
    between = places[pairs[:, 0]] - places[pairs[:, 1]]
    between[:, pbc] -= np.round(between[:, pbc])
    near = np.flatnonzero(np.linalg.norm(between @ box, axis=1) <= _SAME_PLACE)
    if len(near):
        first, second = sorted(pairs[near[0]].tolist())
        raise DataError(
            f"atoms {first} and {second} are at the same place (a periodic image counts); remove one of "
            "them, or correct the cell or --pbc"
        )


def _key_like_forces(atoms: Atoms) -> str | None:
    """Return a key that has forces in its name and three numbers per atom, if there is one."""
    for key, value in {**atoms.info, **atoms.arrays}.items():
        is_named = isinstance(key, str) and "force" in key.lower()
        if is_named and isinstance(value, np.ndarray) and value.shape == (len(atoms), 3):
            return key[:40]
    return None


def _check_cell(cell: np.ndarray, pbc: np.ndarray) -> set[str]:
    """Return notices about a cell `[3, 3]` (Å); raise `DataError` for one that is not possible."""
    if not np.isfinite(cell).all():
        raise DataError("the cell holds numbers that are not finite")
    lengths = np.linalg.norm(cell, axis=1)
    missing = [
        axis for axis, periodic, length in zip("abc", pbc, lengths, strict=True) if periodic and length < 1e-6
    ]
    if missing:
        raise DataError(
            f"the structure is periodic along {' and '.join(missing)} but has no lattice vector there; set "
            "the cell, or --pbc"
        )
    box = np.where(lengths[:, None] < 1e-6, 0.0, cell)
    with np.errstate(invalid="ignore"):  # NaN for parallel vectors
        box = box if (lengths >= 1e-6).all() else complete_cell(box)
        is_whole = abs(np.linalg.det(box)) >= _FLAT * np.prod(np.linalg.norm(box, axis=1))
    if not is_whole:
        raise DataError("the cell has no volume: its lattice vectors lie in one plane")
    if (lengths < 1e-6).any():
        return {"no cell"} if not pbc.any() else set()
    return set() if pbc.any() else {"not periodic"}


def _find(atoms: Atoms, results: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key in a structure, wherever its format keeps it; None without."""
    for place in (atoms.info, atoms.arrays, results):
        if place.get(key) is not None:
            return place[key]
    return None


def _found(atoms: Atoms, results: Mapping[str, Any], key: str | None, name: str) -> Any:
    """Return a result under its own key or ASE's; raise `DataError` if a key was given and is not there."""
    if key is None:
        return results.get(name)
    value = _find(atoms, results, key)
    if value is None:
        raise DataError(f"there is no {key} ({_keys(atoms, results)})")
    return value


def _keys(atoms: Atoms, results: Mapping[str, Any]) -> str:
    """List the keys of a structure, for a message."""
    own = {
        "numbers",
        "positions",
        "tags",
        "sid",
        "unique_id",
        "adsorbate_info",
        "initial_magmoms",
        "initial_charges",
        "momenta",
    }
    names = sorted(({*atoms.info, *atoms.arrays, *results}) - own)
    shown = ", ".join(str(name)[:40] for name in names[:12]) + (", …" if len(names) > 12 else "")
    return f"its keys are {shown}" if names else "it has no results"


def _numbers(value: Any, name: str, natoms: int) -> np.ndarray:
    """Return `[natoms, 3]` finite numbers."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"the {name} are not numbers") from error
    if array.shape != (natoms, 3):
        raise DataError(f"the {name} have shape {list(array.shape)}, not [{natoms}, 3]")
    if not np.isfinite(array).all():
        atom = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise DataError(f"the {name} on atom {atom} are not finite (NaN)")
    return array


def _energy(atoms: Atoms, results: Mapping[str, Any], options: LabelOptions) -> float | None:
    """Return the energy in eV; None without one."""
    value = _found(atoms, results, options.energy_key, options.energy)
    if value is None:
        return None
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise DataError(f"the energy is {str(value)[:40]!r}, not a number")
    energy = float(array.reshape(-1)[0])
    if not math.isfinite(energy):
        raise DataError("the energy is not finite (NaN)")
    return energy * ENERGY_UNITS[options.energy_unit]


def _no_energy(atoms: Atoms, results: Mapping[str, Any], options: LabelOptions) -> str:
    """Return the reason for which a structure has no energy, with a remedy where one is in sight."""
    other = "free_energy" if options.energy == "energy" else "energy"
    if other in results:
        return f"it has no {options.energy}, but a {other}; --energy {other} takes it"
    alike = [str(key) for key in {**atoms.info, **results} if "energy" in str(key).lower()]
    hint = f"; --energy-key {alike[0][:40]} takes that key" if alike else f" ({_keys(atoms, results)})"
    return f"it has no energy{hint}"


def _stress(atoms: Atoms, results: Mapping[str, Any], options: LabelOptions) -> np.ndarray | None:
    """Return the stress `[3, 3]` in eV/Å^3 with ASE's sign; None without one."""
    key = options.stress_key
    value = _found(atoms, results, key, "stress")
    if value is None:
        return None
    try:
        array = np.asarray(value, dtype=np.float64)
        full = voigt_6_to_full_3x3_stress(array.reshape(6)) if array.size == 6 else array.reshape(3, 3)
    except (TypeError, ValueError) as error:
        raise DataError("the stress is neither six nor nine numbers") from error
    if not np.isfinite(full).all():
        raise DataError("the stress is not finite (NaN)")
    if key is not None and "virial" in key.lower():
        volume = abs(np.linalg.det(atoms.cell.array))
        if not volume:
            raise DataError("it has a virial, but its cell has no volume")
        return np.asarray(-full * ENERGY_UNITS[options.energy_unit] / volume)
    sign = 1.0 if options.stress_sign == "tension" else -1.0
    return np.asarray(sign * full * STRESS_UNITS[options.stress_unit])


def _fixed(atoms: Atoms, options: LabelOptions) -> tuple[np.ndarray, str]:
    """Return the fixed atoms `[N]` and where they come from."""
    if options.fixed is not None:
        return options.fixed.choose(atoms), f"--fixed '{options.fixed.text}'"
    fixed = held_atoms(atoms)
    return fixed, "constraints" if fixed.any() else "none (no constraints)"


def _tags(atoms: Atoms, fixed: np.ndarray, options: LabelOptions) -> tuple[np.ndarray, str, set[str]]:
    """Return tags `[N]` in OC20's meaning, where they come from, and notices.

    Tags of the file are taken if they are 0, 1 and 2 and not all 0; else fixed atoms get 0 and others 1.
    """
    given = atoms.get_tags() if atoms.has("tags") else np.zeros(len(atoms), dtype=int)
    if given.dtype.kind not in "iuf" or not (np.isfinite(given) & (given == np.round(given))).all():
        raise DataError("its tags are not whole numbers; correct them, or remove them from the file")
    is_oc20 = bool(given.any()) and given.min() >= 0 and given.max() <= 2
    notices = set()
    if is_oc20 and are_ase_layers(atoms, given, fixed):
        is_oc20 = not fixed[given == 2].any()  # a held atom is no adsorbate
        notices |= {"layer tags"} if is_oc20 else set()
    if given.any() and not is_oc20:
        notices.add("other tags")
    tags = given.astype(np.int64) if is_oc20 else np.where(fixed, 0, 1)
    origin = (
        "tags of the file" if is_oc20 else "constraints" if fixed.any() else "none (bulk: all atoms are 1)"
    )
    if options.adsorbate is not None:
        chosen = options.adsorbate.choose(atoms)
        tags = np.where(chosen, 2, np.where(tags == 2, 1, tags))
        origin = f"--adsorbate '{options.adsorbate.text}', others from {origin}"
    elif fixed.any() and not (tags == 2).any() and not notices:
        notices.add("no adsorbate")
    return tags, origin, notices


def _system(atoms: Atoms) -> str:
    """Return the name of the system that a structure states, or empty text."""
    for key in ("sid", "system_id"):
        value = atoms.info.get(key)
        if isinstance(value, str | int | np.integer) and not isinstance(value, bool) and str(value):
            return str(value)[:200]
    return ""


def _group(atoms: Atoms, options: LabelOptions) -> str:
    """Return the value of the group key."""
    if options.group_key is None:
        return ""
    value = atoms.info.get(options.group_key)
    if value is None:
        raise DataError(f"there is no {options.group_key} ({_keys(atoms, {})}), which --group-key names")
    return str(value)[:200]


def check_kind(kind: str) -> str:
    """Return the kind of energies, "adsorption" or "total"; raise `DataError` for another."""
    if check_energy_kind(kind) is None:
        raise DataError("energy_kind must be adsorption or total.")
    return kind
