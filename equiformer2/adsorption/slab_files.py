"""Files of clean slabs: structures with their tags and constraints, and the record beside them."""

import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import write
from ase.io.formats import UnknownFileTypeError, filetype, ioformats

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.slabs import CleanSlab
from equiformer2.errors import InputError
from equiformer2.files import check_target, write_bytes, write_json

RECORD = "slabs.json"
"""The file that is written last into a folder of slabs."""

_WITH_CONSTRAINTS = ("extxyz", "traj", "vasp", "json")


def slab_targets(
    out: AnyPath, slabs: Sequence[CleanSlab], inputs: Iterable[AnyPath] = (), overwrite: bool = False
) -> list[Path]:
    """Choose and check the file of every slab: `out` itself for one slab and a name with an ending.

    Raises:
        InputError: a format that ASE cannot write, a file that is there or read, several slabs for a file.
    """
    out = Path(out)
    if out.suffix and not out.is_dir():
        if len(slabs) > 1:
            raise InputError(f"{out} is one file for {len(slabs)} slabs: name a folder, or choose one")
        _Files.format_of(out)
        check_target(out, inputs=inputs, overwrite=overwrite)
        return [out]
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file without an ending: give a folder, or a file such as slab.extxyz")
    paths = [out / f"{name}.extxyz" for name in _Files.names(slabs)]
    for path in (*paths, out / RECORD):
        check_target(path, inputs=inputs, overwrite=overwrite)
    return paths


def write_slabs(
    paths: Sequence[Path], slabs: Sequence[CleanSlab], record: dict[str, Any], is_folder: bool
) -> list[str]:
    """Write every slab to its file, and for a folder `record` last, as `slabs.json`.

    Args:
        paths: of `slab_targets`.
        slabs: in the same order.
        record: plain values.
        is_folder: the files are in a folder of their own.

    Returns:
        Sentences about what the formats cannot hold.
    """
    notices = []
    for path, slab in zip(paths, slabs, strict=True):
        write_bytes(path, _Files.content(path, slab.atoms), make_folder=True)
        if _Files.format_of(path) not in _WITH_CONSTRAINTS:
            notices.append(f"{path} holds no tags and constraints: name a .extxyz or .traj file for them")
    if is_folder:
        write_json(paths[0].with_name(RECORD), record)
    return notices


class _Files:
    """Names, formats and contents of files of slabs."""

    @staticmethod
    def names(slabs: Sequence[CleanSlab]) -> list[str]:
        """Names of slabs without an ending, all different."""
        names: list[str] = []
        for slab in slabs:
            report = slab.report
            parts = [str(slab.atoms.get_chemical_formula("metal", empirical=True))]
            if report.miller is not None:
                parts.append("".join(str(index).replace("-", "m") for index in report.miller))
            if report.terminations is not None and report.terminations > 1:
                parts.append(str(report.termination))
            name = re.sub(r"[^\w.-]", "", "_".join(parts))
            names.append(name if name not in names else f"{name}_{len(names)}")
        return names

    @staticmethod
    def format_of(path: Path) -> str:
        """ASE's name of the format of a path; raises `InputError` where ASE does not write it."""
        try:
            format_ = str(filetype(str(path), read=False))
        except UnknownFileTypeError:
            format_ = ""
        if format_ not in ioformats or not ioformats[format_].can_write:
            raise InputError(
                f"{path}: ASE writes no structures with this ending: name a .extxyz or .traj file"
            )
        return format_

    @staticmethod
    def content(path: Path, atoms: Atoms) -> bytes:
        """Bytes of a structure in the format of the path."""
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            write(temporary, atoms, format=_Files.format_of(path))
            return temporary.read_bytes()
