"""relax: results, trajectories that survive a kill, and models that misbehave."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read
from inference_helpers import KindedEMT

from equiformer2.errors import InputError
from equiformer2.inference import relax
from tests.disk import full_disk


class BreaksAt(KindedEMT):
    """EMT whose forces or energy stop being numbers at one call."""

    def __init__(self, call: int, what: str) -> None:
        super().__init__("total")
        self.call, self.what = call, what

    def calculate(self, *args: object, **kwargs: object) -> None:
        super().calculate(*args, **kwargs)
        if self.calls >= self.call:
            if self.what == "forces":
                self.results["forces"] = np.array(self.results["forces"])
                self.results["forces"][12, 1] = np.nan
            else:
                self.results["energy"] = self.results["free_energy"] = np.inf


@pytest.mark.parametrize("optimizer", ["LBFGS", "FIRE", "BFGS"])
def test_reaches_the_threshold(oxygen_on_copper: Atoms, tmp_path: Path, optimizer: str) -> None:
    start = oxygen_on_copper.copy()
    path = tmp_path / "new" / "run.traj"
    result = relax(oxygen_on_copper, KindedEMT("total"), optimizer=optimizer, fmax=0.05, trajectory=path)
    assert result.converged
    assert result.max_force < 0.05
    assert result.energy < result.energies[0]
    assert np.array_equal(oxygen_on_copper.positions, start.positions)
    assert np.array_equal(result.atoms.positions[:8], start.positions[:8])  # fixed
    frames = read(path, ":")
    assert len(frames) == result.steps + 1 == len(result.energies) == len(result.max_forces)
    assert [frame.get_potential_energy() for frame in frames] == pytest.approx(result.energies)
    assert np.abs(frames[-1].get_forces(apply_constraint=False)[:8]).max() > 0  # raw forces are kept
    assert result.atoms.get_tags().tolist() == start.get_tags().tolist() == frames[0].get_tags().tolist()
    check = result.atoms.copy()
    check.calc = KindedEMT("total")
    assert check.get_potential_energy() == pytest.approx(result.energy)
    assert np.linalg.norm(check.get_forces(), axis=1).max() == pytest.approx(result.max_force)


def test_steps_limit(oxygen_on_copper: Atoms) -> None:
    result = relax(oxygen_on_copper, KindedEMT("total"), steps=2, fmax=1e-4)
    assert not result.converged
    assert result.steps == 2
    single = relax(oxygen_on_copper, KindedEMT("total"), steps=0)
    assert single.steps == 0
    assert np.array_equal(single.atoms.positions, oxygen_on_copper.positions)


@pytest.mark.parametrize(("what", "message"), [("forces", r"force on atom 12 \(O\)"), ("energy", "energy")])
def test_non_finite_numbers_stop_it(oxygen_on_copper: Atoms, tmp_path: Path, what: str, message: str) -> None:
    path = tmp_path / "run.traj"
    with pytest.raises(InputError, match=f"non-finite {message} at step 2"):
        relax(oxygen_on_copper, BreaksAt(3, what), fmax=1e-3, trajectory=path)
    frames = read(path, ":")
    assert len(frames) == 2
    assert np.isfinite(frames[-1].get_forces()).all()


def test_bad_start_writes_nothing(oxygen_on_copper: Atoms, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at step 0"):
        relax(oxygen_on_copper, BreaksAt(1, "forces"), trajectory=tmp_path / "new" / "run.traj")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file_and_keeps_the_frames_before(
    oxygen_on_copper: Atoms, tmp_path: Path
) -> None:
    path = tmp_path / "run.traj"
    relax(oxygen_on_copper, KindedEMT("total"), fmax=1e-3, steps=1, trajectory=path)
    with full_disk(path.stat().st_size + 100), pytest.raises(OSError, match=r"run\.traj"):
        relax(oxygen_on_copper, KindedEMT("total"), fmax=1e-3, trajectory=path)
    assert len(read(path, ":")) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "NEWTON"}, "'NEWTON'.*LBFGS"),
        ({"fmax": 0.0}, "fmax is 0"),
        ({"fmax": float("nan")}, "fmax is nan"),
        ({"steps": -1}, "steps is -1"),
        ({"trajectory": "run.xyz"}, r"\.traj"),
    ],
)
def test_wrong_settings(oxygen_on_copper: Atoms, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        relax(oxygen_on_copper, KindedEMT("total"), **settings)


def test_model_without_forces(oxygen_on_copper: Atoms) -> None:
    calculator = KindedEMT("total")
    calculator.implemented_properties = ["energy"]
    with pytest.raises(InputError, match="no forces"):
        relax(oxygen_on_copper, calculator)


KILLED_RUN = """
import sys, time
from ase.build import fcc111
from ase.calculators.emt import EMT
from equiformer2.inference import relax

class Slow(EMT):
    def calculate(self, *args, **kwargs):
        time.sleep(0.02)
        super().calculate(*args, **kwargs)

atoms = fcc111("Cu", (2, 2, 3), vacuum=8.0, periodic=True)
atoms.rattle(0.2, seed=1)
relax(atoms, Slow(), fmax=1e-9, steps=10000, trajectory=sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_leaves_a_readable_trajectory(tmp_path: Path) -> None:
    path = tmp_path / "run.traj"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, str(path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.stat().st_size > 20_000):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    frames = read(path, ":")
    assert len(frames) > 3
    assert all(np.isfinite(frame.get_potential_energy()) for frame in frames)
