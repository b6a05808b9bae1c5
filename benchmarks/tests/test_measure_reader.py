"""The script behind docs/results/reader.json."""

import json
from pathlib import Path

import pytest

from benchmarks import measure_reader
from equiformer2.errors import InputError


def test_a_loader_reads_what_it_is_asked_for(tmp_path: Path) -> None:
    measure_reader.write_shards(tmp_path, 40, 2, 3)
    times = iter([10.0, 12.0])
    # Four batches of 2 pass before the clock starts; 12 records in 2 s.
    assert measure_reader.loaded_per_second(str(tmp_path), 0, 2, 12, lambda: next(times)) == 6.0


def test_too_few_records_are_no_rate(tmp_path: Path) -> None:
    measure_reader.write_shards(tmp_path, 8, 2, 3)
    with pytest.raises(InputError, match="8 records are too few to time 4 batches: ask for more --keys"):
        measure_reader.loaded_per_second(str(tmp_path), 0, 2, 12)


@pytest.mark.slow
def test_the_file_has_both_numbers_of_records(tmp_path: Path) -> None:
    target = tmp_path / "reader.json"
    sizes = ["--keys=400", "--shards=2", "--atoms=3", "--reads=50", "--batch-size=4", "--workers=0"]
    measure_reader.main([*sizes, f"--folder={tmp_path}", f"--json={target}"])
    found = json.loads(target.read_text())["datasets"]
    assert [one["keys"] for one in found] == [40, 400]
    for one in found:
        assert one["shards"] == 2
        assert one["records_per_second"] > 0
        assert one["loaded_per_second"] > 0
        assert one["private_after"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["reader.json"]
