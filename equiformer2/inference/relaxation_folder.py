"""Folder of many relaxations, in which a stopped run continues.

    settings.json             what is relaxed, with what and how
    relaxed.jsonl             one line for every finished structure, in the order in which they finished
    skipped.jsonl             one line for every structure that the last run could not relax, with the reason
    trajectories/SID.traj     its frames (ASE)

What was under way when a run was stopped starts again (`relaxation_log`), and what could not be relaxed is
tried again.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from torch_geometric.data import Data

from equiformer2.errors import InputError
from equiformer2.inference.batched import Frame, Relaxed
from equiformer2.inference.relaxation_log import RelaxationLog, Row, append_line, is_plain_name

SKIPPED = "skipped.jsonl"
#: Fields that a relaxation and its errors depend on, besides the network and the settings.
_USED = ("pos", "atomic_numbers", "cell", "pbc", "tags", "fixed", "y_relaxed", "pos_relaxed")


class RelaxationFolder:
    """Finished relaxations of one dataset.

    Args:
        path: the folder; it is made.
        asked: settings that the results depend on, plain values. A folder of other settings is refused.

    Attributes:
        rows: inside `open`, what is known of every finished structure, by its index in the dataset.
        skipped: name and reason of every structure that this run cannot relax, likewise.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[int, Row] = {}
        self.skipped: dict[int, Row] = {}
        self._log = RelaxationLog(path, asked, keys={"index": int, "sid": str}, alone=True)
        self._sids: dict[str, int] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open the folder for `add` and `skip`, against other processes; `rows` are those of earlier runs.

        Raises:
            InputError: the folder holds other relaxations or something else, or its files cannot be read.
            DataError: another process is relaxing into it.
        """
        with self._log.open() as rows, (self.path / SKIPPED).open("wb") as self._skipped_file:
            self.rows = {row["index"]: row for row in rows}
            self._sids = {row["sid"]: row["index"] for row in rows}
            yield

    def check_name(self, index: int, sid: str) -> None:
        """Raise `InputError` when the structure `index` cannot be told from another by its `sid`."""
        if not is_plain_name(sid):
            raise InputError(
                f"structure {index} has the sid {sid!r}: relaxations are kept by sid, so give it a plain name"
            )
        other = self._sids.setdefault(sid, index)
        if other != index:
            raise InputError(
                f"structures {other} and {index} have the same sid {sid}: relaxations start from one "
                "structure per system (IS2RE data), not from frames of a relaxation"
            )

    def add(self, relaxed: Relaxed, more: Mapping[str, Any]) -> Row:
        """Write the trajectory of a finished structure, and then its line with `more` in it."""
        sid = str(relaxed.start.sid)
        self._log.write_trajectory(sid, self._frames(relaxed.start, relaxed.frames))
        row: Row = {
            "index": relaxed.index,
            "sid": sid,
            "start": self._fingerprint(relaxed.start),
            "natoms": int(relaxed.start.pos.shape[0]),
            "energy": relaxed.energy,
            "initial_energy": relaxed.frames[0].energy,
            "max_force": relaxed.max_force,
            "steps": relaxed.steps,
            "converged": relaxed.converged,
            "failure": relaxed.failure,
            **self._spread(relaxed),
            **more,
        }
        self._log.append(row)
        self.rows[relaxed.index] = row
        return row

    @staticmethod
    def _spread(relaxed: Relaxed) -> Row:
        """Spread of a committee at the last frame, and the sentence with which it ended the relaxation."""
        last = relaxed.frames[-1]
        if last.max_force_std is None:
            return {}
        return {
            "energy_std": last.energy_std,
            "max_force_std": last.max_force_std,
            "stopped": relaxed.stopped,
        }

    def skip(self, index: int, name: str, reason: str) -> None:
        """Record that the structure `index` cannot be relaxed."""
        self.skipped[index] = {"index": index, "name": name, "reason": reason}
        append_line(self._skipped_file, self.skipped[index])

    def check_start(self, index: int, start: Data) -> None:
        """Raise `InputError` unless the finished structure `index` was relaxed from `start`."""
        row = self.rows[index]
        if row.get("start") != self._fingerprint(start):
            raise InputError(
                f"{self.path} holds a relaxation of the system {row['sid']} from another start structure, or "
                f"beside other targets, than structure {index} of the data has now: give another folder, or "
                "the data as they were"
            )

    @staticmethod
    def _fingerprint(start: Data) -> str:
        """Hash every number that a relaxation of `start` or its errors depend on, and its name."""
        digest = hashlib.sha256(str(start.sid).encode())
        for name in _USED:
            if name in start:
                digest.update(name.encode() + start[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @staticmethod
    def _frames(start: Data, frames: list[Frame]) -> Iterator[Atoms]:
        """Frames with energy (eV), raw forces (eV/Å), tags and held atoms."""
        for frame in frames:
            spread = {"energy_std_eV": frame.energy_std, "max_force_std_eV_A": frame.max_force_std}
            spread = {name: value for name, value in spread.items() if value is not None}
            atoms = Atoms(
                numbers=start.atomic_numbers.numpy(),
                positions=frame.positions,
                cell=start.cell.view(3, 3).numpy(),
                pbc=start.pbc.view(3).numpy(),
                tags=start.tags.numpy(),
                constraint=FixAtoms(mask=start.fixed.bool().numpy()),
                info={"sid": str(start.sid), **spread},
            )
            energy = None if math.isnan(frame.energy) else frame.energy
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=frame.forces)
            yield atoms
