"""Results never replace their input."""

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import compare_loss_curves, measure_batches
from equiformer2.errors import InputError


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (measure_batches, ("--data", "there.lmdb", "--json", "there.lmdb")),
        (compare_loss_curves, ("--data", "there.json", "--out", "there")),
    ],
)
def test_results_do_not_replace_the_input(
    program: ModuleType, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.lmdb", "there.json"):
        Path(name).write_text("keep")
    with pytest.raises(InputError, match="input"):
        program.main(arguments)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"keep"}
