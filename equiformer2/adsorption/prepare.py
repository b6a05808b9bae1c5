"""Prepare the start structure of an adsorption calculation from names or files."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ase import Atoms

from datasets_oc20.structure_files import read_structure
from equiformer2.adsorption.adsorbates import is_file
from equiformer2.adsorption.named_structures import build_adsorbate, build_slab, lowest_atom, place_adsorbate
from equiformer2.adsorption.periodic_images import whole_molecule
from equiformer2.errors import InputError
from equiformer2.files import as_input_error
from equiformer2.inference.atoms import ADSORBATE, check_atoms, oc20_tags

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlabOptions:
    """Options of `build_slab`; None means its default.

    Attributes:
        size: repetitions along the surface vectors, and layers.
        vacuum: Å of vacuum on either side.
        free_layers: number of layers, from the top, that may move.
        lattice_constant: a in Å.
    """

    size: tuple[int, int, int] | None = None
    vacuum: float | None = None
    free_layers: int | None = None
    lattice_constant: float | None = None

    def given(self) -> dict[str, object]:
        """Collect the options that were set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class PlacementOptions:
    """Options of `build_adsorbate` and `place_adsorbate`; None means their default.

    Attributes:
        site: name of the site.
        position: x and y in Å instead of a site.
        height: Å of the binding atom above the highest slab atom.
        binding_atom: index of the atom that binds.
        flat: lay the adsorbate flat.
    """

    site: str | None = None
    position: tuple[float, float] | None = None
    height: float | None = None
    binding_atom: int | None = None
    flat: bool = False

    def given(self) -> dict[str, object]:
        """Collect the options that were set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


def prepare_system(
    slab: str,
    adsorbate: str,
    slab_options: SlabOptions | None = None,
    placement: PlacementOptions | None = None,
) -> Atoms:
    """Place `adsorbate` on `slab`, with OC20 tags.

    Each is a name (`Pt111`, `*CO`) or a file any ASE reader takes; text with a dot or a slash is a file.
    An adsorbate from a file keeps its orientation, and its lowest atom binds unless another is named.

    Args:
        slab: name or file of the slab.
        adsorbate: name or file of the adsorbate.
        slab_options: options for a slab built by name.
        placement: site, height and orientation.

    Raises:
        InputError: unknown names, options that do not apply, structures without meaning.
        OSError: a file that is missing or unreadable.
    """
    placement = placement or PlacementOptions()
    if placement.site is not None and placement.position is not None:
        raise InputError("site and position were both given: give one of them")
    base = prepare_slab(slab, slab_options)
    if is_file(adsorbate):
        if placement.flat:
            raise InputError(f"{adsorbate} is a file and keeps its orientation: leave out flat")
        with as_input_error():
            molecule = read_structure(adsorbate)
        check_atoms(molecule)
        molecule = whole_molecule(molecule, adsorbate)
        binding_atom = lowest_atom(molecule, placement.binding_atom, adsorbate)
    else:
        molecule, binding_atom = build_adsorbate(
            adsorbate, binding_atom=placement.binding_atom, flat=placement.flat
        )
    system = place_adsorbate(
        base,
        molecule,
        binding_atom,
        site=placement.site or "ontop",
        position=placement.position,
        height=placement.height,
    )
    check_atoms(system)
    return system


def prepare_slab(slab: str, slab_options: SlabOptions | None = None) -> Atoms:
    """Build a clean slab by name, or read it from a file, with OC20 tags.

    Args:
        slab: name or file; text with a dot or a slash is a file.
        slab_options: options for a slab built by name.

    Raises:
        InputError: unknown names, options that do not apply, structures without meaning, an adsorbate.
        OSError: a file that is missing or unreadable.
    """
    slab_options = slab_options or SlabOptions()
    if not is_file(slab):
        return build_slab(slab, **slab_options.given())  # type: ignore[arg-type]
    if slab_options.given():
        raise InputError(
            f"{slab} is a file: {', '.join(slab_options.given())} only apply to a slab built by name"
        )
    with as_input_error():
        base = read_structure(slab)
    check_atoms(base)
    tags, notice = oc20_tags(base)
    if notice:
        logger.warning(f"{slab}: {notice}")
    if (tags == ADSORBATE).any():
        raise InputError(f"{slab} already has adsorbate atoms (tag 2): give it as the whole system instead")
    base.set_tags(tags)
    base.info = {}  # ASE's site names no longer fit once a slab was moved or relaxed
    return base


def load_system(path: str, adsorbate_indices: Sequence[int] | None = None) -> Atoms:
    """Read slab plus adsorbate from one file.

    Args:
        path: structure file.
        adsorbate_indices: numbers of the adsorbate's atoms, from 0; None for a file that tags them with 2.

    Raises:
        InputError: not a structure file, or an index it does not have.
        OSError: missing or unreadable.
    """
    with as_input_error():
        system = read_structure(path)
    if adsorbate_indices is not None:
        outside = [index for index in adsorbate_indices if not 0 <= index < len(system)]
        if outside or not adsorbate_indices:
            wrong = (
                f"the adsorbate index {outside[0]} is not in {path}"
                if outside
                else "no adsorbate index is given"
            )
            raise InputError(f"{wrong}: give numbers from 0 to {len(system) - 1}")
        system.set_tags(0)
        tags, _ = oc20_tags(system)
        tags[list(adsorbate_indices)] = ADSORBATE
        system.set_tags(tags)
    return system
