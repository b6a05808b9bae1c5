"""Folder of a run: configuration, log, metrics, figures and checkpoints."""

import csv
import io
import logging
import os
import re
import sys
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.rank_zero import rank_zero_module
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.tensor_files import write_tensors
from equiformer2.errors import InputError
from equiformer2.files import write_bytes
from equiformer2.training.guard import DUMP_PREFIX
from equiformer2.training.resume import rows_until
from equiformer2.training.resume_state import read_resume_state
from equiformer2.training.wandb_logging import LONGEST_NAME, WandbSettings

Row = Mapping[str, Any]
#: Lightning's warnings about intended settings: a resumed folder, the average in evaluation mode, small data.
_EXPECTED_WARNINGS = (
    "Experiment logs directory",
    "does not have many workers",
    "in eval mode at the start of training",
    "The number of training batches",
    "find_unused_parameters=True was specified",
    "isinstance.treespec, LeafSpec",
)
#: Beginnings of Lightning's notes about hardware and services that the run does not use.
_USELESS_NOTES = ("💡 Tip: ", "GPU available: False", "TPU available: False")


def read_rows(path: AnyPath) -> list[dict[str, str]]:
    """Read the finished rows of a metrics file; a row that a killed process left unfinished is skipped.

    Args:
        path: `metrics.csv`; a missing file has no rows.
    """
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
        if not set(row) <= set(self._columns):
            self._write([row])
            return
        try:
            with self._path.open("a", newline="") as file:
                file.write(self._csv(self._columns, [row]))
        except OSError as error:  # the system's own names no file
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    @staticmethod
    def _csv(columns: list[str], rows: Iterable[Row]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, columns).writerows(rows)
        return text.getvalue()

    def _write(self, more: list[Row]) -> None:
        rows = [*(self._rows or (read_rows(self._path) if self._columns else [])), *more]
        self._rows = []
        self._columns = sorted({name for row in rows for name in row})
        header = self._csv(self._columns, [dict(zip(self._columns, self._columns, strict=True))])
        write_bytes(self._path, (header + self._csv(self._columns, rows)).encode())


class RunFolder:
    """Paths inside `runs_dir/name`, and the rule that no run overwrites another.

    Args:
        path: the folder.
        resume: what to resume from: `last` for the folder's own last checkpoint, `auto` for that where it is
            there, a path, or None.

    Raises:
        InputError: nothing there to resume from, or a run already there and not resumed. What a run leaves
            that ended before its first logged step is no run.
    """

    def __init__(self, path: Path, resume: str | None) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.metrics = path / "metrics.csv"
        self.last = self.checkpoints / "last.ckpt"
        own = resume == "last" or (resume == "auto" and self.last.is_file())
        self.resume_from = self.last if own else Path(resume) if resume and resume != "auto" else None
        self._may_begin_again = resume == "auto"
        if self.resume_from is not None and not self.resume_from.is_file():
            begin = "; --ckpt_path auto begins anew where there is none" if resume == "last" else ""
            raise InputError(f"ckpt_path: there is no checkpoint {self.resume_from} to resume from{begin}")
        # Other processes of a DDP run come here after the first one has made the folder.
        if _is_first_process() and self._is_taken():
            or_else = ""
            if self.last.is_file():
                or_else = ", or continue it with --ckpt_path auto"
            elif self._is_only_begun():
                or_else = ", or begin it again with --ckpt_path auto (it ended before its first checkpoint)"
            raise InputError(f"{path} holds a run already: choose another name{or_else}")

    def _is_taken(self) -> bool:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: choose another name for the run")
        return not self.continues and any(map(self._worth_keeping, self.path.rglob("*")))

    def _is_only_begun(self) -> bool:
        """Tell whether the folder's run wrote rows of metrics and nothing else that is worth keeping."""
        kept = [path for path in self.path.rglob("*") if self._worth_keeping(path)]
        return kept == [self.metrics]

    @property
    def continues(self) -> bool:
        """True where the resumed run is the folder's own."""
        return (
            self.resume_from is not None and self.resume_from.resolve().parent == self.checkpoints.resolve()
        )

    def _worth_keeping(self, path: Path) -> bool:
        """Tell whether a file is more than a run leaves that ended before its first logged step."""
        inside = path.relative_to(self.path)
        if not path.is_file() or inside.parts[0] == "wandb" or path.suffix == ".tmp":
            return False
        if path.name.startswith(DUMP_PREFIX):
            return False
        if path == self.metrics:
            return not self._may_begin_again and bool(read_rows(path))
        return str(inside) not in ("config.yaml", "log.txt", "wandb_id.txt")

    @rank_zero_only
    def save_config(self, text: str) -> None:
        """Write the resolved configuration, `config.yaml`."""
        write_bytes(self.path / "config.yaml", text.encode())

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder; inside, what is logged or warned goes to `log.txt`, and ours to the screen.

        Raises:
            InputError: another process is training in this folder.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if not _is_first_process():
            yield
            return
        stream = (self.path / "log.txt").open("a")
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            raise InputError(
                f"{self.path} holds a run that is still going on: choose another name"
            ) from error
        except (ImportError, OSError):  # Windows, and some network disks, have no such locks
            pass
        if not self.continues:
            stream.truncate(0)
        # Of a process that was killed while it wrote a checkpoint: this one alone is here now.
        for unfinished in self.checkpoints.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        file, console = logging.StreamHandler(stream), logging.Handler()
        failed: list[BaseException | None] = []

        def tell_once(record: logging.LogRecord) -> None:
            """Say in one sentence that the log ends here: the run's results do not depend on it."""
            if not failed:
                failed.append(sys.exception())
                tqdm.write(f"{stream.name} cannot be written any more ({failed[0]})", file=sys.stderr)

        file.handleError = tell_once  # type: ignore[method-assign]
        # Above the progress bar instead of into it.
        console.emit = lambda record: tqdm.write(console.format(record))  # type: ignore[method-assign]
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        ours = logging.getLogger("equiformer2")
        to_file = [ours, logging.getLogger("pytorch_lightning"), logging.getLogger("py.warnings")]
        level, ours.propagate = ours.level, False
        ours.setLevel(logging.INFO)
        ours.addHandler(console)
        for logger in to_file:
            logger.addHandler(file)

        def is_useful(record: logging.LogRecord) -> bool:
            return not record.getMessage().startswith(_USELESS_NOTES)

        rank_zero_module.log.addFilter(is_useful)
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=f".*{message}")
            logging.captureWarnings(True)
            try:
                yield
            finally:
                logging.captureWarnings(False)
                rank_zero_module.log.removeFilter(is_useful)
                for logger in to_file:
                    logger.removeHandler(file)
                ours.removeHandler(console)
                ours.setLevel(level)
                ours.propagate = True
                with suppress(OSError):  # told above; what was not written is tried again at the end
                    stream.close()

    def loggers(self, wandb: WandbSettings) -> list[Logger]:
        """The CSV logger, always, and W&B when asked for.

        Raises:
            InputError: W&B is asked for and not installed.
        """
        loggers: list[Logger] = [self._metrics_file()]
        if wandb.project is not None:
            loggers.append(self._wandb_logger(wandb))
        return loggers

    def _metrics_file(self) -> MetricsFile:
        if not _is_first_process() or self.resume_from is None or not self.continues:
            return MetricsFile(self.metrics)
        state = read_resume_state(self.resume_from)
        return MetricsFile(self.metrics, rows_until(state, read_rows(self.metrics)))

    def _wandb_logger(self, settings: WandbSettings) -> Logger:
        from pytorch_lightning.loggers import WandbLogger

        # The id is kept with the run, so that a resumed run goes on in the same place.
        id_file = self.path / "wandb_id.txt"
        run_id = None
        if _is_first_process():  # the others log nothing, and may come here before the file is written
            if self.resume_from is None or not id_file.exists():
                write_bytes(id_file, uuid.uuid4().hex[:8].encode())
            run_id = id_file.read_text(encoding="utf-8", errors="replace").strip()
            if not re.fullmatch(r"[\w-]{1,128}", run_id, re.ASCII):
                raise InputError(
                    f"{id_file} holds no id of a W&B run: remove it, and the run goes on under a new one"
                )
        return WandbLogger(
            project=settings.project,
            entity=settings.entity,
            name=self.path.name[:LONGEST_NAME],
            id=run_id,
            resume="allow",
            save_dir=self.path,
            offline=settings.offline,
        )


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, written whole or not at all.

    Lightning's own way moves a file from the system's temporary folder, which is a copy, and can be
    half a copy, when that lies on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Temporary file beside `path`, fsync, rename."""
        write_tensors(path, checkpoint)


def _is_first_process() -> bool:
    # Set by Lightning from the launcher's environment variables, before any process group exists.
    return getattr(rank_zero_only, "rank", 0) == 0
