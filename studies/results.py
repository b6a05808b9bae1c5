"""Results of the runs of a study, one file each, and the page about them.

A study that was stopped goes on where it was. Runs that the published page holds are not computed again, so
that a study also goes on in a fresh clone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from equiformer2.errors import InputError
from equiformer2.files import read_json, write_bytes, write_json
from equiformer2.script import origin

Row = dict[str, Any]
_ENDING = ".result.json"


class Results:
    """Results by the name of their run.

    Args:
        folder: of the files, `NAME.result.json`.
        about: takes the name of a run and returns what its result must be of: settings, hashes of inputs;
            None for a name that the study does not have.
        page: path of the published page, with any ending; its numbers may be missing.

    Raises:
        InputError: the page has a run of other settings, which a new page would no longer show.
    """

    def __init__(
        self, folder: Path, about: Callable[[str], Mapping[str, Any] | None], page: Path | None = None
    ) -> None:
        self._folder, self._about = folder, about
        numbers = page and page.with_suffix(".json")
        rows = read_json(numbers)["runs"] if numbers and numbers.exists() else []
        self._published = {row["run"]: row for row in rows if about(row["run"]) is not None}
        for run, row in self._published.items():
            if row["about"] != about(run):
                raise InputError(f"{numbers} has {run} with other settings: name another page with --results")

    def get(self, run: str) -> Row | None:
        """Return the result of a run, or None.

        Raises:
            InputError: its file is of other settings.
        """
        path = self.path(run)
        if not path.exists():
            return self._published.get(run)
        row: Row = read_json(path)
        if row["about"] != self._about(run):
            raise InputError(f"{path} is of other settings: remove it, or give another folder for the runs")
        return row

    def keep(self, run: str, content: Mapping[str, Any]) -> Row:
        """Write the result of a run, with its name and what it is of."""
        row = {"run": run, "about": self._about(run), **content}
        write_json(self.path(run), row, make_folder=True)
        return row

    def path(self, run: str) -> Path:
        """File of a run."""
        return self._folder / f"{run}{_ENDING}"

    def all(self) -> list[Row]:
        """Return what there is, by name.

        Raises:
            InputError: there is nothing, or a file is of other settings.
        """
        found = {path.name.removesuffix(_ENDING) for path in self._folder.glob(f"*{_ENDING}")}
        rows = [self.get(run) for run in sorted(found | self._published.keys())]
        if not rows:
            raise InputError(f"{self._folder} holds no finished run: leave --collect out")
        return [row for row in rows if row is not None]


def write_page(page: Path, rows: Sequence[Row], text: str, **more: Any) -> None:
    """Write the numbers of runs and the page about them, and print the page.

    Args:
        page: path with any ending, for `.json` and `.md`.
        rows: one record per run.
        text: the page.
        more: further numbers.
    """
    write_json(page.with_suffix(".json"), {**origin(), "runs": list(rows), **more}, make_folder=True)
    write_bytes(page.with_suffix(".md"), text.encode())
    print(text)
