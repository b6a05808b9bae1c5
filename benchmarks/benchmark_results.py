"""The results on disk: measurements of several runs, merged, each with where it comes from."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets_oc20.locking import lock
from equiformer2.errors import InputError
from equiformer2.files import write_json
from equiformer2.script import commit

FORMAT = 2
ROOT = Path(__file__).parents[1]


def package_digest(root: Path = ROOT) -> str:
    """SHA-256 (its first 16 digits) of the package's source: another digest, another measurement."""
    digest = hashlib.sha256()
    files = (path for path in (root / "equiformer2").rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Store:
    """Units of measurement by name (`timings/31M/B1`), kept in one JSON file.

    Args:
        path: of the file; what it holds already is kept.
        run: what describes this run: command, machine.
        force: measure again what is complete.

    Raises:
        InputError: the file exists and is no JSON.
    """

    def __init__(self, path: Path, run: dict[str, Any], force: bool) -> None:
        self.path, self.force = path, force
        self.package = package_digest()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.run = run | {"started": now, "commit": commit(), "package": self.package}
        self.content = self._read()

    def _read(self) -> dict[str, Any]:
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text())
            except ValueError as error:
                raise InputError(f"{self.path} is no JSON: move it away to start anew") from error
            if isinstance(content, dict) and content.get("format") == FORMAT:
                return content
        # Files of the first format held one run and cannot be merged with others.
        return {"format": FORMAT, "runs": [], "units": {}}

    def hold(self) -> None:
        """Keep other runs from writing the file, until this process ends.

        Raises:
            DataError: another run holds it; the two would also disturb each other's times.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path.parent / ".benchmark.lock").open("ab")
        lock(self._lock, self.path)
        self.content = self._read()

    def find(self, name: str) -> dict[str, Any] | None:
        """The record of a unit, whenever it was measured."""
        unit = self.content["units"].get(name)
        return None if unit is None else unit["record"]

    def complete(self, name: str, settings: dict[str, Any]) -> bool:
        """Whether the unit was measured with these settings, this package and this processor."""
        unit = self.content["units"].get(name)
        if unit is None or unit["settings"] != settings:
            return False
        run = self.content["runs"][unit["run"]]
        if run is self.run:
            return True
        same_machine = run["machine"]["processor"] == self.run["machine"]["processor"]
        return not self.force and same_machine and run["package"] == self.package

    def put(self, name: str, settings: dict[str, Any], record: dict[str, Any]) -> None:
        """Keep a unit that is complete, in place of an older one, and write the file."""
        runs = self.content["runs"]
        if not any(run is self.run for run in runs):
            runs.append(self.run)
        number = next(index for index, run in enumerate(runs) if run is self.run)
        self.content["units"][name] = {"settings": settings, "run": number, "record": record}
        self._drop_unused_runs()
        write_json(self.path, self.content)

    def _drop_unused_runs(self) -> None:
        units = self.content["units"].values()
        used = sorted({unit["run"] for unit in units})
        self.content["runs"] = [self.content["runs"][number] for number in used]
        for unit in units:
            unit["run"] = used.index(unit["run"])


def records(content: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The records of one part."""
    units = content["units"].items()
    return [unit["record"] for name, unit in units if name.partition("/")[0] == part]
