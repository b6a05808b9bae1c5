"""`metrics.csv` holds every logged row at once, and no torn one is read."""

from pathlib import Path

from equiformer2.training.folder import MetricsFile, read_rows
from equiformer2.training.resume import rows_until


def test_rows_are_there_at_once_and_columns_may_come_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    logger.log_metrics({"train/loss": 1.5, "epoch": 0}, 0)
    assert read_rows(path) == [{"epoch": "0", "step": "0", "train/loss": "1.5"}]
    logger.log_metrics({"val/energy_mae": 0.1, "epoch": 0}, 0)
    logger.log_metrics({"train/loss": 0.5, "epoch": 1}, 1)
    assert [(row["step"], row["train/loss"], row["val/energy_mae"]) for row in read_rows(path)] == [
        ("0", "1.5", ""),
        ("0", "", "0.1"),
        ("1", "0.5", ""),
    ]


def test_a_torn_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    for step in (11, 12):
        logger.log_metrics({"train/loss": step + 0.25}, step)
    content = path.read_bytes()
    for cut in range(1, 9):
        path.write_bytes(content[:-cut])
        assert [row["step"] for row in read_rows(path)] == ["11"]


def test_the_rows_of_a_resumed_run_are_those_before_its_checkpoint() -> None:
    rows = [{"step": str(step), "train/loss": "1"} for step in range(4)]
    rows.insert(2, {"step": "1", "train/loss": ""})  # a validation after step 1
    last = {"step": 1, "train/loss": 1.0}

    def steps(callback: dict, rows: list) -> list[tuple[int, bool]]:
        state = {"global_step": 2, "callbacks": {"ResumeCheckpoint": callback}}
        return [(int(row["step"]), bool(row["train/loss"])) for row in rows_until(state, rows)]

    assert steps({"row": last}, rows) == [(0, True), (1, True), (1, False)]
    assert steps({"before_validation": True}, rows) == [(0, True), (1, True)]
    assert steps({"row": last}, rows[:1]) == [(0, True), (1, True)]  # killed before the row was written
    assert steps({}, rows[:1]) == [(0, True)]
