"""Convert `ase.Atoms` to the package's data object: checks, tags and constraints.

The network reads positions, atomic numbers, cell and pbc only. `tags` and `fixed` are bookkeeping
(which atoms are the adsorbate, which are held in place) and never change an energy or a force.
"""

import logging
import re
from collections.abc import Mapping

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian, FixConstraint, FixedLine, FixedPlane, FixScaled
from ase.data import chemical_symbols
from ase.geometry import wrap_positions
from torch_geometric.data import Data
from vesin import NeighborList

from datasets_oc20.constraints import held_atoms
from datasets_oc20.errors import DataError
from datasets_oc20.periodicity import unused_cell
from datasets_oc20.tags import are_ase_layers
from equiformer2.devices import own_defaults
from equiformer2.errors import InputError
from equiformer2.graph.validation import MAX_COORDINATE, MAX_EXTENT, check_extents, locate_atom

logger = logging.getLogger(__name__)
_told: set[str] = set()

SUBSURFACE, SURFACE, ADSORBATE = 0, 1, 2
"""OC20's tags: held subsurface atoms, free slab atoms, adsorbate atoms."""

_DOUBTFUL = (
    "the tags are read as OC20's (0 subsurface, 1 surface, 2 adsorbate); if they are layer numbers of ASE's "
    "slab builders, set them: 2 for the adsorbate, 0 for held and 1 for free atoms of the slab"
)

COINCIDENT = 0.1
"""Å; no bond of any two elements is that short, so closer atoms are a mistake in the input."""

_WHOLE = 0.999
"""Smallest occupancy of an atom that is always there."""

_SEARCHED = 2.0
"""Å; a cell of 10 x 10 x 30 Å has 750 boxes of this size and 3 million of `COINCIDENT`."""
_NEIGHBOURS = 50
"""Largest number of neighbours of an atom within the searched distance."""
_MOST_BOXES = 1000
"""Along the longest direction of a structure; the search takes time and memory for empty ones too."""


@own_defaults()
def atoms_to_data(atoms: Atoms, *, max_num_elements: int | None = None, notify: bool = True) -> Data:
    """Convert one structure to the data object of `docs/architecture.md`; `atoms` is not changed.

    Positions are wrapped into the cell along periodic directions, as OC20's own conversion does, and stay in
    float64 with the cell: what is rounded to the network's precision are the short edge vectors only. Tags
    follow `oc20_tags`; `fixed` are the atoms that constraints hold in every direction; `sid` is
    `atoms.info["sid"]` and `fid` 0. Results of a calculator are not taken over, because a network needs none:
    `datasets_oc20.write_lmdb` writes structures with energies and forces to a file for training.

    The result is for `Batch.from_data_list` and `Predictor`. A notice is logged once per process for each
    kind of doubt, whatever the number of structures.

    Args:
        atoms: the structure; Å.
        max_num_elements: size of the network's element table; atomic numbers must be smaller.
        notify: log a notice when tags had to be set (see `oc20_tags`), or a cell is not periodic.

    Raises:
        InputError: no atoms, positions or a cell that are not finite or too large, periodic without a lattice
            vector, atoms that coincide, an element the network has no embedding for.
    """
    check_atoms(atoms, max_num_elements)
    tags, notice = oc20_tags(atoms)
    if notice and notify:
        _tell_once(notice)
    if notify and unused_cell(atoms.cell.array, atoms.pbc):
        _tell_once(
            "a structure has a whole cell but pbc F F F, so nothing is seen across its boundary; set "
            f"atoms.pbc if it is a slab or a bulk (first {atoms.get_chemical_formula()})"
        )
    positions = wrap_positions(atoms.get_positions(), atoms.cell, atoms.pbc, eps=0)
    return Data(
        pos=torch.tensor(positions, dtype=torch.float64),
        atomic_numbers=torch.as_tensor(atoms.get_atomic_numbers(), dtype=torch.long),
        cell=torch.tensor(atoms.cell.array, dtype=torch.float64).view(1, 3, 3),
        pbc=torch.as_tensor(atoms.pbc, dtype=torch.bool).view(1, 3),
        natoms=len(atoms),
        tags=torch.as_tensor(tags, dtype=torch.long),
        fixed=torch.as_tensor(fixed_mask(atoms)),
        sid=str(atoms.info.get("sid", "")),
        fid=0,
    )


def _tell_once(notice: str) -> None:
    """Log a notice once per process and kind, which are its first words: a thousand structures give one."""
    kind = re.split(r"[\d(;]", notice)[0]
    if kind not in _told:
        _told.add(kind)
        logger.warning(f"{notice} (said once)")


def fixed_mask(atoms: Atoms) -> np.ndarray:
    """`[N]` bool: atoms that constraints hold in every direction; see `datasets_oc20.constraints`.

    Raises:
        InputError: a constraint of an atom that the structure does not have.
    """
    try:
        return held_atoms(atoms)
    except DataError as error:
        raise InputError(str(error)) from error


def partial_constraints(atoms: Atoms) -> list[FixConstraint]:
    """List the constraints that do more than hold atoms in every direction.

    These are constraints that relate atoms to each other or pull at them (`Hookean`, …), and those that hold
    atoms in some directions only.

    Raises:
        InputError: as `fixed_mask`.
    """
    held = fixed_mask(atoms)
    holding = (FixAtoms, FixCartesian, FixScaled, FixedLine, FixedPlane)
    return [
        one
        for one in atoms.constraints
        if not isinstance(one, FixAtoms) and not (isinstance(one, holding) and held[one.index].all())
    ]


def oc20_tags(atoms: Atoms) -> tuple[np.ndarray, str | None]:
    """Derive tags in OC20's meaning (0 held, 1 free slab, 2 adsorbate), with a notice where they can mislead.

    1. Tags within {0, 1, 2} that are not all 0 are OC20's and kept, wherever the atoms lie. ASE's layer
       numbers of a slab of two layers are within them, too: what looks like that is kept and noticed, unless
       a tag of 2 on a held atom shows that it is no adsorbate.
    2. ASE's slab builders number layers from the top (1, 2, 3, …) and leave adsorbates at 0. Tags above 2
       are recognised by their order (heights fall from layer to layer, untagged atoms are free and above the
       slab) and translated: untagged atoms become 2, held layer atoms 0, free layer atoms 1.
    3. Otherwise (all 0, or other numbers) held atoms become 0 and free atoms 1. Which atoms are the
       adsorbate cannot be known from the structure, so none is marked.
    """
    tags = atoms.get_tags().astype(np.int64)
    fixed = fixed_mask(atoms)
    layers = are_ase_layers(atoms, tags, fixed)
    within = bool(tags.any()) and tags.min() >= SUBSURFACE and tags.max() <= ADSORBATE
    if within and not (layers and fixed[tags == ADSORBATE].any()):
        return tags, _DOUBTFUL if layers else None
    if layers:
        translated = np.where(tags == 0, ADSORBATE, np.where(fixed, SUBSURFACE, SURFACE))
        return translated, (
            "the tags are ASE layer numbers; read as OC20 tags: "
            f"{int((tags == 0).sum())} untagged atoms above the slab as adsorbate (2), "
            "held layer atoms as 0, free layer atoms as 1"
        )
    reason = "no tags are set"
    if tags.any():
        values = np.unique(tags)
        listed = ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")
        reason = f"the tags have values other than 0, 1, 2 ({listed})"
    return np.where(fixed, SUBSURFACE, SURFACE), (
        f"{reason}: held atoms get tag 0 and free atoms tag 1, none is marked as adsorbate (2); "
        "energies and forces do not depend on tags"
    )


@own_defaults()
def check_atoms(atoms: Atoms, max_num_elements: int | None = None) -> None:
    """Raise `InputError` for a structure that has no meaningful energy; see `atoms_to_data`."""
    if len(atoms) == 0:
        raise InputError("the structure has no atoms: give at least one")
    check_elements(torch.as_tensor(atoms.get_atomic_numbers()), max_num_elements)
    _check_occupancies(atoms)
    fixed_mask(atoms)
    symbols = atoms.get_chemical_symbols()
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if len(bad):
        raise InputError(
            f"atom {bad[0]} ({symbols[bad[0]]}) has a non-finite position "
            f"{atoms.positions[bad[0]].tolist()}: correct it in the structure"
        )
    far = np.flatnonzero((np.abs(atoms.positions) > MAX_COORDINATE).any(axis=1))
    if len(far):
        raise InputError(
            f"atom {far[0]} ({symbols[far[0]]}) has the position {atoms.positions[far[0]].tolist()}, more "
            f"than {MAX_COORDINATE:.0f} Å from the origin: give positions in Å and move the structure there"
        )
    _check_cell(atoms)
    _check_distances(atoms, symbols)


def check_elements(
    atomic_numbers: torch.Tensor, max_num_elements: int | None, natoms: torch.Tensor | None = None
) -> None:
    """Raise `InputError` for the first of `atomic_numbers` `[N]` that the network has no embedding for.

    In a batch, `natoms` `[B]` tells the structures apart.
    """
    known = len(chemical_symbols)
    limit = known if max_num_elements is None else max_num_elements
    wrong = torch.nonzero((atomic_numbers < 1) | (atomic_numbers >= limit)).flatten()
    if len(wrong):
        index = int(wrong[0])
        number = int(atomic_numbers[index])
        name, structure = f"atom {index}", 0
        if natoms is not None and natoms.numel() > 1:
            name, structure = locate_atom(index, natoms.reshape(-1).cpu().numpy())
        if not 0 < number < known:
            what = "X, a dummy atom, " if number == 0 else ""
            raise InputError(
                f"{name} ({what}Z = {number}) is no element: atomic numbers are 1 to {known - 1}; "
                "remove the atom or correct its number",
                structure,
            )
        raise InputError(
            f"{name} ({chemical_symbols[number]}, Z = {number}) is outside the network's element table "
            f"(Z = 1 to {limit - 1}): use a checkpoint trained with this element",
            structure,
        )


def _check_occupancies(atoms: Atoms) -> None:
    """Raise `InputError` where a file says that an atom is there in part, or is one of several elements."""
    sites = atoms.info.get("occupancy")  # of ASE's CIF reader: number of the site -> {element: occupancy}
    for site, species in sites.items() if isinstance(sites, Mapping) else ():
        known = species.items() if isinstance(species, Mapping) else ()
        parts = {symbol: part for symbol, part in known if isinstance(part, int | float) and part > 0}
        if len(parts) > 1 or any(part < _WHOLE for part in parts.values()):
            told = ", ".join(f"{symbol} {part:g}" for symbol, part in parts.items())
            raise InputError(
                f"site {site} of the structure is partly occupied ({told}), which nothing here can keep: "
                "choose an element or a vacancy for every atom of a cell that is large enough, and remove "
                'atoms.info["occupancy"]'
            )
    for name in ("occupancy", "occupancies"):  # of PDB and of microscopy files
        values = atoms.arrays.get(name)
        if values is None or values.ndim != 1 or values.dtype.kind not in "fiu":
            continue
        # Programs that do not know occupancies write 0.
        partial = np.flatnonzero((values > 0) & (values < _WHOLE))
        if len(partial):
            raise InputError(
                f"atom {partial[0]} has the occupancy {values[partial[0]]:g}: keep whole atoms only, and "
                f'remove atoms.arrays["{name}"]'
            )


def _check_cell(atoms: Atoms) -> None:
    cell = atoms.cell.array
    if not np.isfinite(cell).all():
        raise InputError("the cell has non-finite entries: correct the lattice vectors")
    lengths = np.linalg.norm(cell, axis=1)
    missing = [axis for axis, periodic, length in zip("abc", atoms.pbc, lengths, strict=True)
               if periodic and length < 1e-6]  # fmt: skip
    if missing:
        raise InputError(
            f"the structure is periodic along {' and '.join(missing)} but has no lattice vector there: "
            "set the cell, or pbc=False"
        )
    if lengths[atoms.pbc].max(initial=0.0) > MAX_EXTENT:
        raise InputError(
            f"a lattice vector is {lengths[atoms.pbc].max():.3g} Å long: give the cell in Å, "
            f"at most {MAX_EXTENT:.0f} Å"
        )
    if atoms.pbc.any() and abs(np.linalg.det(atoms.cell.complete().array)) < 1e-6 * np.prod(
        np.maximum(lengths, 1.0)
    ):
        raise InputError("the lattice vectors of the periodic structure lie in one plane: correct the cell")


def _check_distances(atoms: Atoms, symbols: list[str]) -> None:
    cell = atoms.cell.complete().array
    positions = wrap_positions(atoms.positions, atoms.cell, atoms.pbc, eps=0)
    natoms = np.array([len(atoms)])
    check_extents(positions, atoms.cell.array[None], atoms.pbc[None], natoms)
    # Farther than needed, since the search divides the cell into boxes of that size, but not to more than
    # some ten neighbours per atom: a cell in the wrong unit may be of any size.
    volume = abs(np.linalg.det(cell)) / len(atoms)
    radius = max(COINCIDENT, min(_SEARCHED, (_NEIGHBOURS * volume / 4.2) ** (1 / 3)))
    # The boxes span the structure, however far apart its atoms are.
    longest = max(float(np.ptp(positions, axis=0).max()), float(np.linalg.norm(cell, axis=1).max()))
    radius = max(radius, longest / _MOST_BOXES)
    search = NeighborList(cutoff=radius, full_list=True, n_threads=1)
    pairs, distance = search.compute(positions, cell, atoms.pbc, "Pd", copy=False)
    near = np.flatnonzero(distance <= COINCIDENT)
    if len(near):
        a, b = sorted(pairs[near[0]].tolist())
        where = f"{distance[near[0]]:.3g} Å apart"
        if a == b:
            raise InputError(f"atom {a} ({symbols[a]}) and its periodic image are {where}: correct the cell")
        raise InputError(
            f"atoms {a} ({symbols[a]}) and {b} ({symbols[b]}) are {where} (periodic images included): "
            "remove the duplicate or correct the positions"
        )
