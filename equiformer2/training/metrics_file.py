"""`metrics.csv`: a row is in the file as soon as it is logged, and a killed process leaves no torn one."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from datasets_oc20.untrusted import AnyPath
from equiformer2.files import write_bytes

Row = Mapping[str, Any]


def read_rows(path: AnyPath) -> list[dict[str, str]]:
    """The rows of a metrics file, without one that a killed process has not finished; none without a file."""
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_bytes().decode()
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(whole, newline="")))


class MetricsFile(Logger):
    """Logs to a CSV file with a column per metric and the columns `epoch` and `step`.

    Lightning's own logger keeps rows in memory and rewrites the file in place for a new column; both lose
    rows of a process that is killed. Here a row is appended at once, and a new column makes a new file.

    Args:
        path: the file; replaced when the first row is logged.
        rows: to begin with, of a run that goes on.
    """

    def __init__(self, path: AnyPath, rows: Iterable[Row] = ()) -> None:
        path = Path(path)
        super().__init__()
        self._path = path
        self._columns: list[str] = []
        self._rows = list(rows)
        if self._rows:
            self._write([])

    @property
    def name(self) -> str:
        """Empty: the file lies in the run's folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return os.fspath(self._path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row."""
        row = {**{name: float(value) for name, value in metrics.items()}, "step": step}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])  # type: ignore[arg-type]
        if set(row) <= set(self._columns):
            with self._path.open("a", newline="") as file:
                file.write(_as_csv(self._columns, [row]))
        else:
            self._write([row])

    def _write(self, more: list[Row]) -> None:
        rows = [*(self._rows or (read_rows(self._path) if self._columns else [])), *more]
        self._rows = []
        self._columns = sorted({name for row in rows for name in row})
        header = _as_csv(self._columns, [dict(zip(self._columns, self._columns, strict=True))])
        write_bytes(self._path, (header + _as_csv(self._columns, rows)).encode())


def _as_csv(columns: list[str], rows: Iterable[Row]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()
