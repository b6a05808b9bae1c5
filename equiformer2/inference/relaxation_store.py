"""Store of named relaxations, for searches that can be stopped at any moment.

    settings.json             what is relaxed, with what and how
    relaxed.jsonl             one line for every finished relaxation, in the order in which they finished
    trajectories/ID.traj      its frames (ASE)

No relaxation that has a line is done again. What was under way when a run was stopped starts again. The draft
of a relaxation has a line of its own, `ID.draft`.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from datasets_oc20.errors import DataError
from datasets_oc20.structure_files import read_structure
from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.inference.atoms import fixed_mask
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.inference.engines import Engine
from equiformer2.inference.extras import plain
from equiformer2.inference.many import Relaxation, draft_settings, finish_drafts, relax_starts
from equiformer2.inference.relaxation_log import RelaxationLog, Row, is_plain_name

logger = logging.getLogger(__name__)

_NOT_KEPT = ("id", "atoms", "trajectory", "frames")
_KEPT = tuple(one.name for one in dataclasses.fields(Relaxation) if one.name not in _NOT_KEPT)
"""Attributes of a result that its line holds under their names."""
DRAFT = ".draft"
"""Ending of the name of a draft."""
_GRID, _OFF_GRID = 1e-3, 1.2345678e-4
"""Å: starts whose atoms are nearer than this are the same; positions by construction lie on no edge."""


class RelaxationStore:
    """Finished relaxations in a folder, for starts with names; a context manager.

    Args:
        folder: it is made; files of other names may be in it.
        settings_identity: what the results depend on, plain values: sums of checkpoints or `Engine.identity`,
            how starts were made. A folder of other settings is refused.

    Attributes:
        folder: see there.

    Raises:
        InputError: on entering, a folder of other settings, or whose files cannot be read.
        DataError: on entering, another process is relaxing into it.
    """

    def __init__(self, folder: AnyPath, settings_identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        keys = {"id": str, "start": str, "status": str, "steps": int, "model_evaluations": int}
        self._log = RelaxationLog(self.folder, settings_identity, keys, alone=False)
        self._rows: dict[str, Row] = {}

    def __enter__(self) -> "RelaxationStore":
        with ExitStack() as stack:
            self._rows = {row["id"]: row for row in stack.enter_context(self._log.open())}
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @property
    def finished(self) -> list[str]:
        """Names of the finished relaxations, in the order in which they finished."""
        return list(self._rows)

    def relax(
        self,
        starts: Iterable[tuple[str, Atoms]],
        engine: Engine,
        settings: RelaxationSettings | None = None,
        batch_size: int | str = "auto",
        *,
        max_atoms: int | None = None,
        draft: Engine | None = None,
    ) -> Iterator[Relaxation]:
        """Give the results of all starts: those of earlier runs first, the others as they finish.

        A relaxation that failed has a line, too, and is not tried again; remove the line to try it.

        Args:
            starts: (name, structure); the name is that of its trajectory.
            engine: the model, see `equiformer2.inference.engines.open_engine`.
            settings: of the relaxations.
            batch_size, max_atoms: as in `relax_many`.
            draft: a cheaper model that moves every start first, see `relax_draft_and_verify`; what it does
                is kept, too.

        Raises:
            InputError: two starts of one name, a name that no file can have, a name under which another start
                was relaxed or with other settings, and what `relax_many` raises.
            OSError: the disk is full; nothing is half-written.
        """
        settings = settings or RelaxationSettings()
        sums: dict[str, str] = {}
        known: list[tuple[str, Atoms]] = []
        missing: list[tuple[str, Atoms]] = []
        for name, atoms in starts:
            self._check_name(name, sums)
            sums[name] = _fingerprint(atoms, settings, draft is not None)
            if name in self._rows:
                self._check_same(name, sums[name])
            (known if name in self._rows else missing).append((name, atoms))
        for name, atoms in known:
            yield self._read(name, atoms)
        if draft is None:
            found = relax_starts(missing, engine, settings, batch_size=batch_size, max_atoms=max_atoms)
        else:
            given = dict(missing)
            drafts = self.relax(
                [(f"{name}{DRAFT}", atoms) for name, atoms in missing],
                draft,
                draft_settings(settings),
                batch_size,
                max_atoms=max_atoms,
            )
            names = ((one.id.removesuffix(DRAFT), one) for one in drafts)
            paired = ((given[name], dataclasses.replace(one, id=name)) for name, one in names)
            found = finish_drafts(paired, engine, settings, batch_size=batch_size, max_atoms=max_atoms)
        for result in found:
            yield self._keep(result, sums[result.id])

    def check(
        self, starts: Iterable[tuple[str, Atoms]], settings: RelaxationSettings, drafted: bool = False
    ) -> None:
        """Raise `InputError` where `relax` would for a name under which something else was relaxed."""
        for name, atoms in starts:
            if name in self._rows:
                self._check_same(name, _fingerprint(atoms, settings, drafted))

    def adopt(self, result: Relaxation, start: Atoms, settings: RelaxationSettings) -> None:
        """Keep a relaxation that was done elsewhere, as one that took no call of the model here.

        Its trajectory here has the last frame alone. A name that has a line already stays as it is.

        Args:
            result: the relaxation, with a structure.
            start: structure that it began with.
            settings: of the relaxation.
        """
        if result.id not in self._rows:
            copy = dataclasses.replace(
                result, model_evaluations=0, draft_evaluations=0, frames=[result.atoms.copy()]
            )
            copy.frames[0].calc = result.atoms.calc
            self._keep(copy, _fingerprint(start, settings, False))

    def _keep(self, result: Relaxation, start: str) -> Relaxation:
        """Write the trajectory of a result, and then its line."""
        if result.frames:  # else there is no structure with an energy
            for frame in result.frames:  # ASE's trajectories hold plain values only
                frame.info = plain(frame.info)
            result.trajectory = self._log.write_trajectory(result.id, result.frames)
        row = {"id": result.id, "start": start, **{name: getattr(result, name) for name in _KEPT}}
        self._log.append(row)
        self._rows[result.id] = row
        result.frames = []
        return result

    def _read(self, name: str, start: Atoms) -> Relaxation:
        row, path = self._rows[name], self._log.trajectory(name)
        values = {key: row[key] for key in _KEPT if key in row}
        if row.get("energy_eV") is None:
            return Relaxation(id=name, atoms=start.copy(), **values)
        try:
            atoms = read_structure(path, -1)
        except (OSError, DataError) as error:
            raise InputError(
                f"{path} cannot be read ({error}): put it back, or remove the line of {name} in "
                f"{self._log.file} to relax it again"
            ) from error
        return Relaxation(id=name, atoms=atoms, trajectory=path, **values)

    def _check_name(self, name: str, names: Mapping[str, str]) -> None:
        if not isinstance(name, str) or not is_plain_name(name):
            raise InputError(f"a start is called {name!r}, which no file can be: give it a plain name")
        if name in names:
            raise InputError(f"two starts are called {name}: give each a name of its own")

    def _check_same(self, name: str, start: str) -> None:
        if self._rows[name]["start"] != start:
            raise InputError(
                f"{self.folder} holds a relaxation of {name} from another start structure or with other "
                "settings: give another folder"
            )


def _fingerprint(atoms: Atoms, settings: RelaxationSettings, drafted: bool) -> str:
    """Hash what a relaxation depends on; positions that differ by rounding have the same."""

    def on_grid(values: np.ndarray) -> bytes:
        if not np.isfinite(values).all():  # refused when it is its turn
            return repr(values.tolist()).encode()
        return bytes(np.floor((values + _OFF_GRID) / _GRID).astype(np.int64).tobytes())

    digest = hashlib.sha256(repr(sorted(dataclasses.asdict(settings).items())).encode())
    digest.update(atoms.numbers.tobytes() + on_grid(atoms.positions) + on_grid(atoms.cell.array))
    digest.update(np.asarray(atoms.pbc).tobytes() + atoms.get_tags().tobytes() + bytes([drafted]))
    try:
        digest.update(fixed_mask(atoms).tobytes())
    except InputError:  # it cannot be relaxed
        digest.update(b"unknown")
    for name in ("initial_magmoms", "initial_charges"):
        if atoms.has(name):
            digest.update(name.encode() + on_grid(atoms.get_array(name)))
    return digest.hexdigest()[:16]
