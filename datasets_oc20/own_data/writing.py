"""`write_lmdb`: ASE structures with results to one LMDB file."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ase import Atoms

from datasets_oc20.errors import DataError
from datasets_oc20.own_data.labels import LabelOptions, check_kind, label, notice_sentence
from datasets_oc20.structure_record import pack
from datasets_oc20.writer import LmdbWriter

_LOG = logging.getLogger(__name__)


def write_lmdb(
    path: str | os.PathLike[str],
    structures: Iterable[Atoms],
    energy_kind: str,
    *,
    overwrite: bool = False,
    options: LabelOptions | None = None,
    metadata: dict[str, Any] | None = None,
) -> int:
    """Write structures and their results for training and evaluation.

    Energy, forces and stress come from `atoms.calc` (results that are stored, as after reading a file;
    nothing is computed), fixed atoms from the constraints, tags from `atoms.get_tags()` where they are OC20's
    (0 subsurface, 1 surface, 2 adsorbate; not all 0), else 0 for fixed and 1 for other atoms. The system of a
    structure is `atoms.info["sid"]`, its frame `atoms.info["fid"]`; without, the composition and its number.

    Args:
        path: the file, which appears when it is complete.
        structures: structures with energies in eV, forces in eV/Å, stress in eV/Å^3 with ASE's sign. All of
            them must have forces (or stress), or none.
        energy_kind: "adsorption" or "total".
        overwrite: replace an existing file.
        options: other keys, units and rules.
        metadata: provenance to keep with the data (JSON values).

    Returns:
        Number of structures.

    Raises:
        DataError: the file exists, nothing is given, or a structure is not usable; its number is named.
        OSError: the disk is full or the folder not writable.
    """
    check_kind(energy_kind)
    if os.path.lexists(path) and not overwrite:
        raise DataError(f"{path}: exists already; give another name, or overwrite=True.")
    notices: Counter[str] = Counter()
    expected: set[str] | None = None
    with LmdbWriter(path, energy_kind, metadata) as writer:
        for index, atoms in enumerate(structures):
            where = f"structure {index}"
            if not isinstance(atoms, Atoms):
                raise DataError(
                    f"{where}: is a {type(atoms).__name__}, not an ase.Atoms; give structures of ASE."
                )
            try:
                found = label(atoms, options or LabelOptions())
            except DataError as error:
                raise DataError(f"{where} ({atoms.get_chemical_formula()}): {error}.") from error
            notices.update(found.notices)
            targets = found.fields.keys() & {"forces", "stress"}
            if expected is not None and targets != expected:
                odd = ", ".join(sorted(targets ^ expected))
                raise DataError(
                    f"{where}: only some structures have {odd}; give all of them, or write two files."
                )
            expected = targets
            fields = found.fields | {
                "sid": found.sid or atoms.get_chemical_formula(),
                "fid": atoms.info.get("fid", index),
            }
            writer.write_packed(pack(fields, where), len(atoms))
        count = writer.count
    for kind, number in notices.items():
        _LOG.warning("%d of %d structures: %s.", number, count, notice_sentence(kind))
    return count
