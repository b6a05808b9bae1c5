"""Reading structures that users give."""

from pathlib import Path

from ase import Atoms
from ase.io import read
from ase.io.formats import filetype

from equiformer2.errors import InputError


def read_structure(path: str | Path, index: int = -1) -> Atoms:
    """One structure from any file ASE can read (`index` of a trajectory, last by default).

    Raises:
        InputError: not a structure file, or no such frame.
        OSError: missing or unreadable.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a structure file")
    with path.open("rb"):  # a missing file is named before ASE guesses at formats
        pass
    try:
        # Databases and network addresses are no structure files; everything else ASE parses as data.
        if filetype(str(path)) in {"db", "mysql", "postgresql"}:
            raise InputError(f"{path} is a database: export the structure to a file first")
        # "@" in a name is ASE's frame syntax; do_not_split_by_at_sign takes the name as it is.
        atoms = read(path, index=index, do_not_split_by_at_sign=True)
    except InputError:
        raise
    except Exception as error:  # each of ASE's many parsers fails in its own way
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's own; some parsers call a wrong format an OSError too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: no structure could be read at index {index} ({reason})") from error
    if not isinstance(atoms, Atoms):
        raise InputError(f"{path}: index {index} is not a single structure")
    return atoms
