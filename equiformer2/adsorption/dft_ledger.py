"""Memory of a search folder for DFT: what was asked, what was answered, and what is open.

    dft/01, dft/02, …, dft/slab   input of every structure that was asked
    dft/ledger.json               the questions and the answers
    dft/answers.traj              frames of all answers, with DFT's total energies and forces

An input folder is never written again, since it may hold settings and results of its own. The ledger is
written whole after the files that it tells of, so that a kill loses nothing.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import write

from datasets_oc20.own_data.dft_settings import Settings
from datasets_oc20.own_data.reading import SourceFile
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.dft_inputs import CANDIDATE, Candidate, write_dft_input
from equiformer2.adsorption.search_folder import DFT
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json, write_bytes, write_json
from equiformer2.inference.atoms import fixed_mask
from equiformer2.inference.extras import plain
from equiformer2.script import header

CLEAN_SLAB_ID = "slab"
"""Name of the clean slab among the structures that are asked."""
LEDGER, ANSWERS = "ledger.json", "answers.traj"
_GRID, _OFF_GRID = 1e-3, 1.2345678e-4


@dataclass(frozen=True)
class Answer:
    """DFT of one structure that was asked.

    Attributes:
        id: of the candidate, or `CLEAN_SLAB_ID`.
        files: outputs it is from.
        frames: steps whose electronic steps have converged, in the candidate's order of atoms, with its tags
            and held atoms; the energies are DFT's total ones, eV.
        settings: of DFT, as far as the outputs tell them.
        answered: time.
        problem: reason why a later step of the outputs is not among the frames, or empty.
    """

    id: str
    files: tuple[str, ...]
    frames: list[Atoms]
    settings: Settings = field(default_factory=dict)
    answered: str = ""
    problem: str = ""

    @property
    def energy(self) -> float:
        """Total energy of the last frame, eV."""
        return float(self.frames[-1].get_potential_energy(apply_constraint=False))

    @property
    def max_force(self) -> float | None:
        """Largest force on a free atom of the last frame, eV/Å; None where DFT gave no forces."""
        last = self.frames[-1]
        if last.calc is None or "forces" not in last.calc.results:
            return None
        forces = np.linalg.norm(last.calc.results["forces"], axis=1)
        return float(forces[~fixed_mask(last)].max(initial=0.0))

    def summary(self) -> dict[str, Any]:
        """Plain values for the ledger."""
        return {
            "id": self.id,
            "files": list(self.files),
            "total_energy_eV": self.energy,
            "frames": len(self.frames),
            "max_force_eV_A": self.max_force,
            "settings": dict(self.settings),
            "answered": self.answered,
            "problem": self.problem,
        }


class DftLedger:
    """Ledger of one search.

    Args:
        search: folder of the search; a ledger that is there is read.

    Attributes:
        folder: `dft` in it.
        asked: a row per structure: `id`, `folder`, `structure_sha256`, `model_eV`, `max_force_std_eV_A`,
            `asked` (time).
        answers: by id.

    Raises:
        InputError: the ledger or the frames cannot be read.
    """

    def __init__(self, search: AnyPath) -> None:
        self.folder = Path(search) / DFT
        self.asked: list[dict[str, Any]] = []
        self.answers: dict[str, Answer] = {}
        file = self.folder / LEDGER
        if not file.is_file():
            return
        record = read_json(file)
        try:
            self.asked = [
                {**row, "id": str(row["id"]), "folder": str(row["folder"])} for row in record["asked"]
            ]
            rows = {str(row["id"]): row for row in record["answered"]}
            frames: dict[str, list[Atoms]] = {name: [] for name in rows}
            if rows:
                for frame in self._read_frames():
                    frames.setdefault(str(frame.info["sid"]), []).append(frame)
            self.answers = {
                name: Answer(
                    name,
                    tuple(row["files"]),
                    frames[name],
                    *(row[key] for key in ("settings", "answered", "problem")),
                )
                for name, row in rows.items()
            }
            if not all(answer.frames for answer in self.answers.values()):
                raise KeyError("frames of an answer")
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} and {self.folder / ANSWERS} do not belong together ({error} is missing): put both "
                "back, or remove both and collect again"
            ) from error

    def _read_frames(self) -> list[Atoms]:
        with as_input_error():
            return [one.atoms for one in SourceFile(self.folder / ANSWERS).frames() if one.atoms is not None]

    def open_questions(self) -> list[dict[str, Any]]:
        """Rows of the structures that have no answer, in the order in which they were asked."""
        return [row for row in self.asked if row["id"] not in self.answers]

    def ask(self, candidates: Iterable[Candidate], clean_slab: Atoms) -> list[Path]:
        """Write input for structures that were not asked before, and for the clean slab, and remember them.

        Args:
            candidates: in the order of their numbers.
            clean_slab: relaxed by the model.

        Returns:
            The new folders.
        """
        written = []
        for candidate in [*candidates, Candidate(CLEAN_SLAB_ID, clean_slab, None)]:
            digest = structure_digest(candidate.atoms)
            if any(row["id"] == candidate.id and row["structure_sha256"] == digest for row in self.asked):
                continue
            name = self._folder_of(candidate.id, digest)
            row = {
                "id": candidate.id,
                "folder": name,
                "structure_sha256": digest,
                "model_eV": candidate.energy,
                "max_force_std_eV_A": candidate.force_spread,
                "asked": now(),
            }
            if not (self.folder / name / CANDIDATE).exists():
                write_dft_input(self.folder / name, candidate, {"structure_sha256": digest})
            self.asked.append(row)
            written.append(self.folder / name)
        if written:
            self._write()
        return written

    def answer(self, answers: Sequence[Answer]) -> None:
        """Remember answers, in place of earlier ones of the same structures."""
        self.answers.update({one.id: one for one in answers})
        frames = []
        for name, answer in self.answers.items():
            for number, frame in enumerate(answer.frames):
                frame.info = {"sid": name, "fid": number}
                frames.append(frame)
        content = BytesIO()
        write(content, frames, format="traj")
        # The ledger of an earlier state is one of fewer answers, whose frames are here, too.
        write_bytes(self.folder / ANSWERS, content.getvalue(), make_folder=True)
        self._write()

    def _write(self) -> None:
        record = {
            **header("adsorption-dft-ledger/1"),
            "asked": self.asked,
            "answered": [answer.summary() for answer in self.answers.values()],
            "open": [row["id"] for row in self.open_questions()],
        }
        write_json(self.folder / LEDGER, plain(record), make_folder=True)

    def _folder_of(self, name: str, digest: str) -> str:
        """Name of a new input folder, or of one that a kill has left without a line in the ledger."""
        if name == CLEAN_SLAB_ID:
            return CLEAN_SLAB_ID
        known = {row["folder"] for row in self.asked}
        there = sorted(path.name for path in self.folder.glob("*") if re.fullmatch(r"\d+", path.name))
        for folder in there:
            record = self.folder / folder / CANDIDATE
            if folder not in known and record.is_file():
                left: Mapping[str, Any] = read_json(record)
                if left.get("id") == name and left.get("structure_sha256") == digest:
                    return folder
        return f"{1 + max((int(folder) for folder in there), default=0):02d}"


def structure_digest(atoms: Atoms) -> str:
    """Hash elements, positions and cell to 0.001 Å, and held atoms."""

    def on_grid(values: np.ndarray) -> bytes:
        return bytes(np.floor((np.asarray(values) + _OFF_GRID) / _GRID).astype(np.int64).tobytes())

    digest = hashlib.sha256(atoms.numbers.astype(np.int64).tobytes())
    digest.update(on_grid(atoms.positions) + on_grid(atoms.cell.array) + fixed_mask(atoms).tobytes())
    return digest.hexdigest()


def now() -> str:
    """Time for the ledger."""
    return datetime.now(UTC).isoformat(timespec="seconds")
