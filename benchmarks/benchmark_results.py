"""Results file: measurements of several runs, each with its origin; medians, speed-ups and goals of them."""

import hashlib
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets_oc20.locking import exclusive
from equiformer2.errors import InputError
from equiformer2.files import write_json
from equiformer2.script import commit

FORMAT = 2
ROOT = Path(__file__).parents[1]

GOAL_SIZES = ("31M", "83M")
# Times faster than the reference, by device, operation and precision of ours. On a GPU both run in TF32.
SPEED_GOALS: dict[tuple[str, str, str], float] = {
    ("cpu", "forward", "float32"): 2.2,
    ("cpu", "training_step", "float32"): 2.2,
    ("cpu", "forward", "bf16"): 4.0,
    ("cuda", "forward", "tf32"): 6.0,
    ("cuda", "training_step", "tf32"): 4.0,
}
# Share of the reference's peak memory of a training step.
MEMORY_GOALS = {"cpu": 1 / 3, "cuda": 1 / 4}


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
        self._lock = exclusive(self.path.parent / ".benchmark.lock", self.path)
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


def peak_of(record: dict[str, Any], implementation: str, backend: str = "auto") -> dict[str, Any] | None:
    """The peaks of one implementation in a record, if it was measured."""
    for peak in record["peaks"]:
        if (peak["implementation"], peak["backend"]) == (implementation, backend):
            return peak
    return None


def median(call: dict[str, Any]) -> float:
    """Seconds of a timed call."""
    return statistics.median(call["seconds"])


def baseline(calls: list[dict[str, Any]], ours: dict[str, Any]) -> dict[str, Any] | None:
    """The call of the reference that one of ours is measured against: its fastest way to do the same.

    In the same precision; bf16 is measured against the fastest of the reference's precisions.
    """
    kind = ours["operation"].removesuffix("_as_shipped")
    same = [
        call
        for call in calls
        if call["implementation"] == "reference" and call["operation"].removesuffix("_as_shipped") == kind
    ]
    exact = [call for call in same if call["precision"] == ours["precision"]]
    return min(exact or same, key=median, default=None)


def speed_up(calls: list[dict[str, Any]], ours: dict[str, Any]) -> float | None:
    """Median of the reference's fastest call over our median."""
    found = baseline(calls, ours)
    return None if found is None else median(found) / median(ours)


def speed_goal(device: str, size: str, call: dict[str, Any]) -> float | None:
    """The promised speed-up of one of our calls, if there is a promise."""
    if size not in GOAL_SIZES:
        return None
    return SPEED_GOALS.get((device, call["operation"], call["precision"]))


def memory_goal(device: str, size: str) -> float | None:
    """The promised share of the reference's peak memory, if there is a promise."""
    return MEMORY_GOALS[device] if size in GOAL_SIZES else None


def memory_ratio(record: dict[str, Any], backend: str = "auto") -> float | None:
    """Our peak over the reference's."""
    reference, ours = peak_of(record, "reference"), peak_of(record, "ours", backend)
    return None if reference is None or ours is None else ours["peak"] / reference["peak"]


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line.

    Raises:
        ValueError: fewer than two different abscissae.
    """
    if len({x for x, _ in points}) < 2:
        raise ValueError("a line needs two points")
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return slope, intercept
