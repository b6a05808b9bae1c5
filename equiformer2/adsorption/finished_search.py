"""Results of a finished search, read from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms

from datasets_oc20.structure_files import read_structure
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.dft_inputs import Candidate
from equiformer2.adsorption.search_folder import (
    BEST,
    CLEAN_SLAB,
    SEARCH,
    SETTINGS,
    TRAJECTORIES,
    check_has_best,
)
from equiformer2.adsorption.symmetry import SurfaceSymmetry, surface_symmetry
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json
from equiformer2.inference.dispersion import recorded_dispersion, with_dispersion
from equiformer2.inference.engines import Engine, Engineable, open_engine
from equiformer2.inference.record import given_or_recorded
from equiformer2.shipped import find_checkpoint


@dataclass(frozen=True)
class FinishedSearch:
    """Record and structures that a finished search has left in its folder.

    Attributes:
        folder: of the search.
        record: content of `search.json`.
        best: relaxed structure of the best placement.
        clean_slab: relaxed without the adsorbate.
    """

    folder: Path
    record: dict[str, Any]
    best: Atoms
    clean_slab: Atoms

    @classmethod
    def read(cls, folder: AnyPath) -> "FinishedSearch":
        """Read the folder of a search.

        Raises:
            InputError: there is no finished search in it, none of its placements has relaxed to the intended
                adsorbate, or its files cannot be read.
        """
        folder = Path(folder)
        if not (folder / SEARCH).is_file():
            raise InputError(f"{folder} holds no finished search ({SEARCH}): give the folder of one")
        record = read_json(folder / SEARCH)
        _check_whole(folder / SEARCH, record)
        check_has_best(folder, record)
        with as_input_error():
            structures = [read_structure(folder / name) for name in (BEST, CLEAN_SLAB)]
        return cls(folder, record, *structures)

    @property
    def adsorbate(self) -> Atoms:
        """Atoms of the adsorbate of the best placement."""
        return self.best[len(self.clean_slab) :]

    def symmetry(self) -> SurfaceSymmetry:
        """Operations of the clean slab as it was cut that its relaxation has kept.

        Those of the relaxed slab alone are fewer: what a network leaves of a symmetry is hardly exact. A
        clean slab that was taken from another search has no other structure here.
        """
        file = self.folder / TRAJECTORIES / Path(CLEAN_SLAB).with_suffix(".traj")
        as_cut = self.clean_slab
        if file.is_file():
            with as_input_error():
                as_cut = read_structure(file, 0)
        return surface_symmetry(as_cut, self.clean_slab)

    def model(self, given: Engineable | None = None, adapter: AnyPath | None = None) -> Engine:
        """Open the model of the search, from what is given or else from its own checkpoint.

        A checkpoint that is given is opened with the weights, the precision and the adapter of the search, so
        that a copy of the search's is the same model.

        Args:
            given: model in place of the search's.
            adapter: file in place of that of the search's adapter.

        Raises:
            InputError: neither is there, or it is another model than that of the search.
        """
        record = self.record["model"]
        if given is None and record.get("checkpoint") is None:
            raise InputError(f"{self.folder} was searched with a calculator: give it again (--calculator)")
        given = given_or_recorded(record, given, adapter)
        engine = open_engine(with_dispersion(given, recorded_dispersion(self.record.get("d3_eV"))))
        self._check_same(engine)
        return engine

    def checkpoint(self, given: object = None) -> str | list[str] | None:
        """File, or files, of the network behind results of `model(given)`; None for a calculator."""
        files = self.record["model"].get("checkpoint") if given is None else given
        if isinstance(files, list):
            return [str(find_checkpoint(str(file))) for file in files]
        return str(find_checkpoint(files)) if isinstance(files, str) else None

    def _check_same(self, engine: Engine) -> None:
        """Raise `InputError` where an engine is not the model that the search was made with."""
        if not (self.folder / SETTINGS).is_file():
            raise InputError(
                f"{self.folder} has no {SETTINGS}, which says by which model it was searched: give the whole "
                "folder of a search"
            )
        known = read_json(self.folder / SETTINGS).get("model")
        now = json.loads(json.dumps(engine.identity(), default=str))
        if now != known:
            names = [_model_name(one) for one in (known, now)]
            other = f"{names[1]}, not {names[0]}" if names[0] != names[1] else f"{names[1]} of other settings"
            raise InputError(
                f"the search in {self.folder} was made with another model (this one is {other}): give the "
                "search's, or search again with this one"
            )

    def minimum(self, name: str) -> Atoms:
        """Relaxed structure of a placement, or of the one that it is a copy of.

        Raises:
            InputError: there is no such placement, or it was not relaxed.
        """
        rows = {row["id"]: row for row in self.record["placements"]}
        if name not in rows:
            raise InputError(
                f"{self.folder} has no placement {name}: give one of {', '.join(list(rows)[:8])}, …"
            )
        name = rows[name]["merged_into"] or name
        if rows[name]["energy_eV"] is None:
            raise InputError(f"the placement {name} was not relaxed ({rows[name]['status']}): give another")
        # One that was on a saddle point has the structure of the relaxation that has left it.
        file = Path(rows[name].get("trajectory") or f"{name}.traj").name
        with as_input_error():
            return read_structure(self.folder / TRAJECTORIES / file)

    def end_of_path(self, name: str) -> Atoms:
        """Relaxed structure of a placement, as `minimum`, where a path may begin or end.

        Raises:
            InputError: as `minimum`, or the relaxation has failed or not converged.
        """
        found = self.minimum(name)
        rows = {row["id"]: row for row in self.record["placements"]}
        status = rows[rows[name]["merged_into"] or name]["status"]
        if status in ("failed", "unconverged"):
            raise InputError(
                f"the relaxation of {name} has not converged ({status}), so it is no end of a path: give "
                "another placement, or search with more --steps"
            )
        return found

    def candidates(self) -> list[Candidate]:
        """The lowest placement of every minimum, lowest first."""
        rows = [row for row in self.record["placements"] if row["basin"] == row["id"]]
        rows = rows or [row for row in self.record["placements"] if row["id"] == self.record["best"]["id"]]
        return self._as_candidates(rows, is_minimum=True)

    def unfinished(self) -> list[Candidate]:
        """Placements that have not relaxed to the end, such as those that a committee's spread has ended."""
        rows = [row for row in self.record["placements"] if row["status"] == "unconverged"]
        named = {one.id for one in self.candidates()}
        return self._as_candidates([row for row in rows if row["id"] not in named], is_minimum=False)

    def _as_candidates(self, rows: list[dict[str, Any]], is_minimum: bool) -> list[Candidate]:
        found = []
        for row in sorted(rows, key=lambda row: float(row["energy_eV"])):
            atoms = self.minimum(row["id"])
            spread = atoms.info.get("max_force_std_eV_A")
            found.append(Candidate(row["id"], atoms, row["energy_eV"], spread, is_minimum))
        return found


def _check_whole(file: Path, record: dict[str, Any]) -> None:
    """Raise `InputError` for a record that lacks what other commands read of it."""
    kinds: dict[str, Any] = {"placements": list, "settings": dict, "model": dict, "energy_kind": str}
    kinds |= {"converged": bool, "best": dict | None, "adsorption_energy_eV": float | int | None}
    text = str | None
    of_row: dict[str, Any] = {"id": str, "status": str, "merged_into": text, "basin": text}
    of_row |= {"energy_eV": float | int | None}

    def has(values: Any, wanted: dict[str, Any]) -> bool:
        return isinstance(values, dict) and all(
            name in values and isinstance(values[name], kind) for name, kind in wanted.items()
        )

    is_whole = has(record, kinds) and all(has(row, of_row) for row in record["placements"])
    if is_whole and record["best"] is not None:
        names = {row["id"] for row in record["placements"]}
        is_whole = record["best"].get("id") in names and record["adsorption_energy_eV"] is not None
    if not is_whole:
        raise InputError(
            f"{file} is broken, or no record of a search: remove it and search again, for which the "
            "relaxations are kept"
        )


def _model_name(identity: Any) -> str:
    """Short name of the identity of an engine, for messages."""
    identity = identity if isinstance(identity, dict) else {}
    if "calculator" in identity:
        return f"the calculator {identity['calculator']}"
    sums = identity.get("weights_sha256")
    sums = sums if isinstance(sums, list) else [sums]
    return f"the network with the weights {', '.join(str(one)[:12] for one in sums)}"
