"""Frames of one file, or of a part of it, read by ASE; a frame that cannot be read does not end the file."""

import contextlib
import io
import re
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, TextIO, cast

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import iread
from ase.io.formats import UnknownFileTypeError, filetype, ioformats
from ase.io.trajectory import TrajectoryReader
from ase.io.vasp_parsers.vasp_outcar_parsers import OutcarHeaderParser, outcarchunks

from datasets_oc20.ase_lmdb import AseLmdbFile, open_shard
from datasets_oc20.errors import DataError
from datasets_oc20.own_data.dft_settings import (
    Calculation,
    calculator_settings,
    espresso_calculation,
    outcar_settings,
    outcar_step_converged,
    vasprun_calculation,
)
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.structure_files import (
    COMPRESSED,
    MAX_FILE,
    GuardedText,
    check_claims,
    check_file,
    open_content,
    read_structure,
    reason_of,
)
from datasets_oc20.untrusted import AnyPath, open_compressed

MAX_STREAM = 1 << 40
"""Most bytes of a file that is read frame by frame."""
LMDB = "lmdb"
"""Name here of what ASE does not read: LMDB files of OC20, ours and of `ase-db-backends`."""
_STREAMED = {"extxyz", "vasp-out", "traj", "db", LMDB}
_DIVISIBLE = {"extxyz", "traj", "db", LMDB}
"""Formats in which reading can begin at any frame."""
_HEAD = 1 << 16
_SIGNATURES = {
    "espresso-out": b"PWSCF",
    "castep-md": b"BEGIN header",
    "castep-castep": b"CASTEP",
    "gaussian-out": b"Gaussian",
    "onetep-out": b"ONETEP",
}
"""Words of outputs whose format ASE guesses by an ending that other texts have as well."""
_MOST_ATOMS = 10_000_000
_PROPERTIES = re.compile(r"\bProperties\s*=\s*[\"{]?([^\s\"}]+)")
_NOT_READ = {
    "mysql": "an address of a database",
    "postgresql": "an address of a database",
    "gpw": "a restart file of GPAW; its text output holds the energies",
    "bundletrajectory": "a folder",
}
_BESIDE: dict[str, Callable[[str], list[str]]] = {
    "vasp-out": lambda name: [name.replace("OUTCAR", "CONTCAR"), name.replace("OUTCAR", "POSCAR")],
    "espresso-out": lambda name: [f"{name.rpartition('.')[0]}{end}" for end in (".in", ".pwi")],
}
"""Inputs beside an output that has no constraints, by format."""


class UnreadableError(DataError):
    """A file, or the rest of it, cannot be read; the message is the reason, without the name of the file."""


@dataclass
class ReadFrame:
    """One frame of a file.

    Attributes:
        index: its place in the file, from 0.
        atoms: the structure with its results; None if it could not be read.
        problem: reason why it is not to be used, or empty.
    """

    index: int
    atoms: Atoms | None
    problem: str = ""


@dataclass(frozen=True)
class FilePart:
    """Successive frames of a file, which can be read without those before.

    Attributes:
        first: index of the first one.
        number: number of frames; None for all that follow.
        start: place of the first one: byte of an extended XYZ file, id in a database, else its index.
    """

    first: int
    number: int | None
    start: int


class SourceFile:
    """A file with structures and their energies.

    Args:
        path: the file.

    Attributes:
        path: the file.
        format: its format, by ASE's name.
        calculation: settings, complete when the frames are read.
        energy_kind: kind that the file declares; None for all but LMDB files.
        constraints_from: name of the file beside it whose constraints its frames got; empty for none.

    Raises:
        UnreadableError: ASE does not know the format, or it holds no energies.
        DataError: a pipe, device or folder, too large, or claims that the bytes do not fulfil.
        OSError: missing or unreadable.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path = Path(path)
        self.format = find_format(path)
        check_file(path, MAX_STREAM if self.format in _STREAMED else MAX_FILE)
        self.calculation = Calculation()
        self.energy_kind: str | None = None
        self.constraints_from = ""

    def parts(self, number: int) -> list[FilePart]:
        """Divide the file into parts of `number` frames; one part where that is not possible.

        Raises:
            UnreadableError: the file cannot be read.
        """
        whole = FilePart(0, None, 0)
        if not is_divisible(self.path):
            return [whole]
        with contextlib.ExitStack() as stack, self._reasons():
            if self.format == "extxyz":
                return _extxyz_parts(self._content(stack), number)
            if self.format == "db":
                ids = self._database_ids(stack)
            elif self.format == "traj":
                ids = list(range(len(stack.enter_context(TrajectoryReader(self._content(stack))))))
            else:
                ids = list(range(len(OC20Lmdb(self.path))))
        return [FilePart(first, number, ids[first]) for first in range(0, len(ids), number)] or [whole]

    def frames(self, part: FilePart | None = None) -> Generator[ReadFrame, None, None]:
        """Read the frames in order.

        Args:
            part: one of `parts`; None for all frames.

        Yields:
            Every frame, readable or not.

        Raises:
            UnreadableError: nothing more can be read; frames that were yielded stand.
        """
        readers = {
            "extxyz": self._extxyz,
            "traj": self._trajectory,
            "db": self._database,
            LMDB: self._lmdb,
        }
        whole_readers = {
            "vasp-out": self._outcar,
            "vasp-xml": self._vasprun,
            "espresso-out": self._espresso,
        }
        number = 0
        with warnings.catch_warnings(), contextlib.ExitStack() as stack, self._reasons():
            warnings.simplefilter("ignore")  # of ASE's parsers, about what is checked here
            if self.format in readers:
                frames = readers[self.format](stack, part or FilePart(0, None, 0))
            else:
                frames = whole_readers.get(self.format, self._any)(stack)
            for frame in frames:
                number += 1
                if frame.atoms is not None:
                    self._set_constraints(frame.atoms)
                yield frame
        if not number:
            raise UnreadableError(f"holds no structure with results, read as {self.format}")

    @contextlib.contextmanager
    def _reasons(self) -> Iterator[None]:
        """Give failures of readers as `UnreadableError`."""
        try:
            yield
        except UnreadableError:
            raise
        except DataError as error:
            raise UnreadableError(str(error).removeprefix(f"{self.path}: ").rstrip(".")) from error
        except Exception as error:  # each of ASE's many parsers fails in its own way
            raise UnreadableError(f"not readable as {self.format} ({reason_of(error)})") from error

    def _content(self, stack: contextlib.ExitStack, is_checked: bool = True) -> IO[bytes]:
        file = stack.enter_context(
            open_content(self.path, MAX_STREAM if self.format in _STREAMED else MAX_FILE)
        )
        if is_checked:
            check_claims(self.path, file, self.format)
        return file

    def _text(self, stack: contextlib.ExitStack) -> GuardedText:
        return GuardedText(self.path, self._content(stack))

    def _any(self, stack: contextlib.ExitStack) -> Iterator[ReadFrame]:
        """Read with the reader that ASE has for the format."""
        how = ioformats[self.format]
        if how.acceptsfd:
            given: Any = self._content(stack) if how.isbinary else self._text(stack)
            images = iread(given, index=slice(None), format=self.format)
        else:
            images = iread(self.path, index=slice(None), format=self.format, do_not_split_by_at_sign=True)
        yield from (ReadFrame(index, atoms) for index, atoms in enumerate(images))

    def _extxyz(self, stack: contextlib.ExitStack, part: FilePart) -> Iterator[ReadFrame]:
        """Give ASE one frame at a time, so that one that it cannot read does not hide the others."""
        content = self._content(stack)
        content.seek(part.start)
        text = GuardedText(self.path, content)
        for index in islice(count(part.first), part.number):
            head = text.readline()
            if not head.strip():
                rest = head or text.readline()
                while rest and not rest.strip():
                    rest = text.readline()
                if rest:
                    raise UnreadableError(
                        f"there is an empty line before frame {index}, and what follows is not read; remove "
                        "it"
                    )
                return
            if not head.strip().isdigit() or len(head) > 20 or int(head) > _MOST_ATOMS:
                raise UnreadableError(
                    f"frame {index} begins with {head.strip()[:40]!r}, not a number of atoms"
                )
            lines = [head, *(text.readline() for _ in range(1 + int(head)))]
            if not lines[-1]:
                yield ReadFrame(index, None, "the file ends inside the frame")
                return
            if (problem := _wrong_columns(lines)) is not None:
                yield ReadFrame(index, None, problem)
                continue
            try:
                yield ReadFrame(index, next(iread(io.StringIO("".join(lines)), index=0, format="extxyz")))
            except Exception as error:  # of ASE's parser
                yield ReadFrame(index, None, f"not readable ({reason_of(error)})")

    def _outcar(self, stack: contextlib.ExitStack) -> Iterator[ReadFrame]:
        lines = _OutcarLines(self._text(stack))
        chunks = outcarchunks(cast(TextIO, lines), header_parser=OutcarHeaderParser(workdir=None))
        for index, chunk in enumerate(chunks):
            if not index:
                self.calculation = outcar_settings(lines.head)
            try:
                atoms = chunk.build()
            except Exception as error:  # of ASE's parser
                yield ReadFrame(index, None, f"not readable ({reason_of(error)})")
                continue
            # The first electronic step lies in what ASE takes as the head.
            converged = outcar_step_converged(chunk.lines, self.calculation.max_steps)
            yield ReadFrame(index, atoms, _not_converged(converged, self.calculation.max_steps))
        if lines.is_inside_step:
            yield ReadFrame(lines.steps, None, "the file ends inside this ionic step")

    def _vasprun(self, stack: contextlib.ExitStack) -> Iterator[ReadFrame]:
        file = self._content(stack)
        self.calculation = vasprun_calculation(file)
        file.seek(0)
        flags = self.calculation.converged
        number = 0
        for index, atoms in enumerate(iread(file, index=slice(None), format="vasp-xml")):
            number += 1
            known = flags[index] if index < len(flags) else None
            yield ReadFrame(index, atoms, _not_converged(known, self.calculation.max_steps))
        file.seek(max(0, file.seek(0, io.SEEK_END) - 200))
        if b"</modeling>" not in file.read():
            yield ReadFrame(number, None, "the file ends before the calculation did")

    def _espresso(self, stack: contextlib.ExitStack) -> Iterator[ReadFrame]:
        text = self._text(stack)
        self.calculation = espresso_calculation(iter(text))
        text.seek(0)
        flags = self.calculation.converged
        # All configurations, those without results too, so that they can be counted as `flags` counts them.
        images = iread(text, index=slice(None), format="espresso-out", results_required=False)
        for index, atoms in enumerate(images):
            results = {name for name, value in atoms.calc.results.items() if value is not None}
            converged = flags[index] if index < len(flags) else None
            self.calculation.set_charge(atoms.get_chemical_symbols())
            if not results & {"energy", "forces"} and converged is not False:
                continue  # QE prints the last structure of a relaxation once more
            yield ReadFrame(index, atoms, _not_converged(converged, None))

    def _trajectory(self, stack: contextlib.ExitStack, part: FilePart) -> Iterator[ReadFrame]:
        # The check reads the whole file, and the first part has made it.
        trajectory = stack.enter_context(TrajectoryReader(self._content(stack, not part.first)))
        for index in _range(part, len(trajectory)):
            try:
                atoms = trajectory[index]
            except Exception as error:  # of ASE's parser
                yield ReadFrame(index, None, f"not readable ({reason_of(error)})")
                continue
            if atoms.calc is not None:
                settings = calculator_settings(atoms.calc.name, atoms.calc.parameters)
                self.calculation.note_settings(index, settings)
            yield ReadFrame(index, atoms)

    def _database_ids(self, stack: contextlib.ExitStack) -> list[int]:
        """Read the ids of the rows of an `ase.db` database in SQLite; another database is refused."""
        path = self._unpacked(stack)
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as plain:
            try:
                names = {name for (name,) in plain.execute("SELECT name FROM sqlite_master")}
            except sqlite3.DatabaseError as error:
                raise UnreadableError(f"not readable as a database ({error})") from error
            if "systems" not in names:
                raise UnreadableError("is a database, but not one of ASE (it has no table of systems)")
            return [number for (number,) in plain.execute("SELECT id FROM systems ORDER BY id")]

    def _database(self, stack: contextlib.ExitStack, part: FilePart) -> Iterator[ReadFrame]:
        if not part.first:
            self._database_ids(stack)  # ASE would make a database of any other file
        database = connect(self._unpacked(stack), type="db", use_lock_file=False)
        rows = database.select(f"id>={part.start}", limit=part.number)
        for index, row in enumerate(rows, part.first):
            try:
                atoms = row.toatoms(add_additional_information=True)
                settings = calculator_settings(row.get("calculator"), row.get("calculator_parameters"))
            except Exception as error:  # of ASE's parser
                yield ReadFrame(index, None, f"row {row.get('id')} is not readable ({reason_of(error)})")
                continue
            for names_of in ("key_value_pairs", "data"):
                values = atoms.info.pop(names_of, None)
                atoms.info |= values if isinstance(values, dict) else {}
            self.calculation.note_settings(index, settings)
            yield ReadFrame(index, atoms)

    def _unpacked(self, stack: contextlib.ExitStack) -> Path:
        """Return the path of the content, which for a compressed file is a temporary one."""
        if self.path.suffix not in COMPRESSED:
            return self.path
        copy = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".db"))  # noqa: SIM115
        with open_content(self.path, MAX_FILE) as file:
            while piece := file.read(1 << 20):
                copy.write(piece)
        copy.flush()
        return Path(copy.name)

    def _lmdb(self, stack: contextlib.ExitStack, part: FilePart) -> Iterator[ReadFrame]:
        dataset = OC20Lmdb(self.path)
        self.energy_kind = dataset.energy_kind
        self.calculation.note_settings(part.first, dict(dataset.settings[0][1]) if dataset.settings else {})
        shard = open_shard(dataset.shards[0])
        for index in _range(part, len(dataset)):
            try:
                if isinstance(shard, AseLmdbFile):
                    yield ReadFrame(index, _atoms_of(shard.raw_fields(index)))
                else:
                    yield ReadFrame(index, _atoms_of(dataset[index].to_dict()))
            except DataError as error:
                yield ReadFrame(
                    index, None, str(error).removeprefix(f"{self.path}").lstrip(",: ").rstrip(".")
                )

    def _set_constraints(self, atoms: Atoms) -> None:
        """Take the constraints of an input beside an output that has none."""
        if self.format not in _BESIDE or atoms.constraints:
            return
        if not hasattr(self, "_beside"):
            self._beside = self._find_beside()
        beside = self._beside
        if beside is not None and beside.get_chemical_symbols() == atoms.get_chemical_symbols():
            atoms.set_constraint(beside.constraints)

    def _find_beside(self) -> Atoms | None:
        name = self.path.name.removesuffix(self.path.suffix if self.path.suffix in COMPRESSED else "")
        for other in _BESIDE[self.format](name):
            for ending in ("", *COMPRESSED):
                path = self.path.with_name(other + ending)
                if path == self.path or not path.is_file() or not path.stat().st_size:
                    continue
                with contextlib.suppress(DataError, OSError):  # then there are no constraints from it
                    found = read_structure(path)
                    self.constraints_from = path.name if found.constraints else ""
                    return found
        return None


class _OutcarLines:
    """Lines of an OUTCAR, which note the head and if the file ends inside an ionic step.

    Args:
        text: the open file.
    """

    def __init__(self, text: GuardedText) -> None:
        self.name = text.name
        self.head: list[str] = []
        self.steps = 0
        self.is_inside_step = False
        self._text = text
        self._in_head = True

    def __iter__(self) -> "_OutcarLines":
        return self

    def __next__(self) -> str:
        line = next(self._text)
        if self._in_head:
            self.head.append(line)
        if "Iteration" in line:
            self._in_head, self.is_inside_step = False, True
        elif "FREE ENERGIE OF THE ION-ELECTRON SYSTEM" in line:
            self.is_inside_step = False
            self.steps += 1
        return line


def _range(part: FilePart, total: int) -> range:
    """Indices of a part of a file of `total` frames."""
    return range(part.first, total if part.number is None else min(part.first + part.number, total))


def _wrong_columns(lines: list[str]) -> str | None:
    """Return what is wrong with the columns of a frame, which ASE reads by their place alone."""
    match = _PROPERTIES.search(lines[1])
    if match is None:  # plain XYZ
        return None
    sizes = match[1].split(":")[2::3]
    if not all(size.isdecimal() and len(size) < 6 for size in sizes):
        return None  # ASE says what is wrong
    columns = sum(int(size) for size in sizes)
    for atom, line in enumerate(lines[2:]):
        if (found := len(line.split())) != columns:
            return f"the line of atom {atom} has {found} columns, and Properties names {columns}"
    return None


def _extxyz_parts(file: IO[bytes], number: int) -> list[FilePart]:
    """Find where every `number`-th frame begins; what is unusual is left to the reader of the last part."""
    parts = [FilePart(0, None, 0)]
    file.seek(0)
    for index in count():
        start = file.tell()
        line = file.readline(1 << 16)
        head = line.strip()
        if not line.endswith(b"\n") or not head.isdigit() or len(head) > 20 or int(head) > _MOST_ATOMS:
            return parts
        if index and index % number == 0:
            parts[-1] = replace(parts[-1], number=number)
            parts.append(FilePart(index, None, start))
        for _ in range(1 + int(head)):
            line = file.readline()
            # A text reader takes a lone \r as the end of a line.
            if not line or b"\r" in line.rstrip(b"\r\n"):
                return parts
    raise AssertionError


def find_format(path: AnyPath) -> str:
    """Find the format of a file, by its name and its first bytes.

    Raises:
        UnreadableError: no format of structures.
        DataError: a pipe, device or folder.
        OSError: missing or unreadable.
    """
    path = Path(path)
    check_file(path, None)
    if path.suffix in (".lmdb", ".aselmdb", ".mdb"):
        return LMDB
    with open_compressed(path, MAX_STREAM) as file:
        head = file.read(_HEAD)
    if b"<modeling>" in head:
        return "vasp-xml"
    if head.lstrip().startswith(b"vasp."):
        return "vasp-out"
    if not head:
        raise UnreadableError("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = filetype(str(path))
    except UnknownFileTypeError as error:
        raise UnreadableError("ASE does not know its format") from error
    if found not in ioformats or not ioformats[found].can_read:
        raise UnreadableError("ASE does not know its format")
    if found in _NOT_READ:
        raise UnreadableError(f"is {_NOT_READ[found]}")
    if found == "xyz":
        return "extxyz"  # plain files are a part of it
    if _SIGNATURES.get(found, b"") not in head:
        raise UnreadableError(f"ASE does not know its format (its ending is of {found}, but not its text)")
    return str(found)


def is_divisible(path: AnyPath) -> bool:
    """Tell whether reading of a file can begin at any frame; errors as `find_format`."""
    path = Path(path)
    return path.suffix not in COMPRESSED and find_format(path) in _DIVISIBLE


def _not_converged(converged: bool | None, limit: int | None) -> str:
    """Return the reason for which a step is not used; empty unless it is known not to have converged."""
    if converged is not False:
        return ""
    after = f" within {limit} (NELM)" if limit else ""
    return f"the electronic steps did not converge{after}"


def _atoms_of(fields: dict[str, Any]) -> Atoms:
    """Build a structure with its results from the fields of a record, checked or not."""
    arrays = {
        name: np.asarray(fields[name]) for name in fields if name not in ("sid", "fid", "names", "natoms")
    }
    atoms = Atoms(
        numbers=arrays["atomic_numbers"].reshape(-1),
        positions=arrays["pos"].reshape(-1, 3),
        cell=arrays["cell"].reshape(3, 3),
        pbc=arrays["pbc"].reshape(3),
    )
    if "tags" in arrays:
        atoms.set_tags(arrays["tags"])
    if arrays["fixed"].any():
        atoms.set_constraint(FixAtoms(mask=arrays["fixed"].reshape(-1)))
    results: dict[str, Any] = {}
    if "energy" in arrays:
        results["energy"] = float(arrays["energy"].reshape(-1)[0])
    if "forces" in arrays:
        results["forces"] = arrays["forces"].reshape(-1, 3)
    if "stress" in arrays:
        results["stress"] = arrays["stress"].reshape(3, 3)
    atoms.calc = SinglePointCalculator(atoms, **results)
    names = fields.get("names")  # of an ASE-LMDB file, whose rows have an id where they have no name
    atoms.info |= {"sid": str(fields.get("sid", ""))} if names is None else names
    return atoms
