"""Studies in processes of their own: all results, the logs, what fails, what is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from equiformer2.errors import InputError
from studies.campaign import read_campaign
from studies.parallel_studies import _next, run_studies
from tests.pruning.search_helpers import save_tiny, slab, slabs, write_lmdb

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content = {
        "jobs": 2,
        "models": {"tiny": str(save_tiny(tmp_path / "tiny.pt"))},
        "calibration": [str(write_lmdb(tmp_path / "calibration.lmdb", slabs(), labels=False))],
        "held_out": {"dft": str(write_lmdb(tmp_path / "dft.lmdb", [slab("x", "Pd")]))},
        "held_out_structures": 2,
        "seeds": [0],
        "structures": 2,
        "tries": 1,
        "router": {},
        "studies": {
            "widths": {"model": "tiny", "keep": [0.7], "methods": ["uniform", "magnitude"]},
            "drawn": {"model": "tiny", "keep": [0.7], "methods": ["random"]},
            "again": {"model": "tiny", "keep": [0.8], "methods": ["uniform"]},
        },
        "distill_config": "",
        "distill_val": "",
        "speed": {},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def changed(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return path


@pytest.mark.slow
def test_all_results_are_there_and_kept(config: Path, tmp_path: Path) -> None:
    campaign, out, names = read_campaign(config), tmp_path / "out", ("widths", "drawn")
    before = dict(os.environ)
    run_studies(campaign, config, names, out)
    assert dict(os.environ) == before
    found = {str(path.relative_to(out)) for path in out.glob("*/results/*.json")}
    assert found == {
        "widths/results/dense.json",
        "widths/results/uniform_0.7_0.json",
        "widths/results/magnitude_0.7_0.json",
        "drawn/results/dense.json",
        "drawn/results/random_0.7_0.json",
    }
    assert all((out / name / "study.log").stat().st_size > 0 for name in names)
    gone = out / "drawn" / "results" / "random_0.7_0.json"
    gone.unlink()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/results/*.json")}
    run_studies(campaign, config, ("drawn",), out)
    assert gone.exists()
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_what_shares_a_search_waits(config: Path) -> None:
    campaign, names = read_campaign(config), ("widths", "again", "drawn")
    assert _next(campaign, names, ()) == "widths"
    assert _next(campaign, names[1:], ("widths",)) == "drawn"
    assert _next(campaign, ("again",), ("widths", "drawn")) is None
    assert _next(campaign, (), ()) is None


@pytest.mark.slow
def test_a_failure_names_the_log(config: Path, tmp_path: Path) -> None:
    campaign = read_campaign(changed(config, held_out={"dft": str(tmp_path / "missing.lmdb")}))
    with pytest.raises(InputError, match=r"the study drawn ended .*study\.log: error: .*missing"):
        run_studies(campaign, config, ("drawn",), tmp_path / "out")


@pytest.mark.parametrize("jobs", [0, "two", 1.5, True])
def test_jobs_are_counted(config: Path, jobs: object) -> None:
    with pytest.raises(InputError, match=r"jobs is .*: give the number of studies"):
        read_campaign(changed(config, jobs=jobs))


@pytest.mark.slow
def test_studies_end_with_a_killed_caller(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "studies.pruning", "--config", str(config), "--out", str(out)]
    command += ["--parts", "studies"]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as caller:
        try:
            waited_for(lambda: (out / "widths" / "study.log").exists(), 240)
            caller.kill()
            caller.wait()
            waited_for(lambda: not alive(caller.pid), 60)
        finally:
            if alive(caller.pid):
                os.killpg(caller.pid, signal.SIGKILL)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def waited_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
