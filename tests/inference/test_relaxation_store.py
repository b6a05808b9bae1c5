"""Relaxations that are kept: a stopped search goes on, nothing is done twice, drafts are verified."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read
from inference_helpers import SYSTEMS, KindedEMT, slab

from datasets_oc20 import DataError
from equiformer2.errors import InputError
from equiformer2.inference import RelaxationStore, open_engine, relax_draft_and_verify, relax_many
from equiformer2.inference.batched import RelaxationSettings

IDENTITY = {"calculator": "emt"}
SETTINGS = RelaxationSettings(fmax=0.05)
NAMES = ("a", "b_00", "c", "d")


def starts() -> Iterator[tuple[str, Atoms]]:
    return ((name, slab(*system)) for name, system in zip(NAMES, SYSTEMS, strict=True))


def relax_all(folder: Path, calculator: KindedEMT, **options: object) -> dict[str, object]:
    settings = options.pop("settings", SETTINGS)
    with RelaxationStore(folder, options.pop("identity", IDENTITY)) as store:  # type: ignore[arg-type]
        found = store.relax(starts(), open_engine(calculator), settings, **options)  # type: ignore[arg-type]
        return {result.id: result for result in found}


def test_a_second_run_reads_and_calculates_nothing(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text("{}")  # of the search that keeps its relaxations here
    first, calculator = relax_all(tmp_path, KindedEMT("total")), KindedEMT("total")
    second = relax_all(tmp_path, calculator)
    assert calculator.calls == 0
    assert list(second) == list(NAMES)
    for name in NAMES:
        one, other = first[name], second[name]
        for value in ("status", "energy_eV", "start_energy_eV", "max_force_eV_A", "steps", "reason"):
            assert getattr(one, value) == getattr(other, value)
        assert one.model_evaluations == other.model_evaluations == one.steps + 1
        np.testing.assert_array_equal(one.atoms.positions, other.atoms.positions)
        np.testing.assert_array_equal(one.atoms.get_forces(), other.atoms.get_forces())
        assert one.atoms.get_potential_energy() == other.atoms.get_potential_energy() == one.energy_eV
        assert other.trajectory == one.trajectory == tmp_path / "trajectories" / f"{name}.traj"
        frames = read(one.trajectory, ":")
        assert len(frames) == one.steps + 1
        assert frames[0].get_potential_energy() == one.start_energy_eV
    lines = [json.loads(line) for line in (tmp_path / "relaxed.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(first)
    assert json.loads((tmp_path / "settings.json").read_text()) == IDENTITY


class Dying(KindedEMT):
    """Effective medium theory whose process is killed at a call."""

    def __init__(self, last: int) -> None:
        super().__init__("total")
        self.last = last

    def calculate(self, *args: object) -> None:
        if self.calls == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        super().calculate(*args)


def test_a_killed_run_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    whole = relax_all(tmp_path / "whole", KindedEMT("total"))
    cost = {name: result.model_evaluations for name, result in whole.items()}
    if (child := os.fork()) == 0:
        try:
            relax_all(tmp_path / "killed", Dying(cost["a"] + cost["b_00"] + 3))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    log = tmp_path / "killed" / "relaxed.jsonl"
    assert len(log.read_text().splitlines()) == 2
    with log.open("ab") as file:  # the kill may come within a line, or within a trajectory
        file.write(b'{"id": "c", "ene')
    (tmp_path / "killed" / "trajectories" / ".c.traj.host-1.tmp").write_bytes(b"half")
    calculator = KindedEMT("total")
    again = relax_all(tmp_path / "killed", calculator)
    assert calculator.calls == cost["c"] + cost["d"]
    assert list(again) == list(NAMES)
    for name, result in again.items():
        assert result.energy_eV == whole[name].energy_eV
    assert not list((tmp_path / "killed" / "trajectories").glob(".*"))


def test_results_that_nobody_waits_for_are_kept(tmp_path: Path) -> None:
    with RelaxationStore(tmp_path, IDENTITY) as store:
        for result in store.relax(starts(), open_engine(EMT()), SETTINGS):
            if result.id == "b_00":
                break
        assert store.finished == ["a", "b_00"]
        clean = slab("Cu", 0)[:-1]
        (other,) = store.relax([("clean_slab", clean)], open_engine(EMT()), SETTINGS)
        assert other.converged
    calculator = KindedEMT("total")
    results = relax_all(tmp_path, calculator)
    assert list(results) == list(NAMES)
    assert calculator.calls == sum(results[name].model_evaluations for name in ("c", "d"))


def test_failed_ones_have_a_line_and_their_reason(tmp_path: Path) -> None:
    silicon = Atoms("Si2", [[0, 0, 0], [0, 0, 2.2]])
    given = [("bad", silicon), ("good", slab("Cu", 0)), ("broken", Atoms("Cu", [[0, 0, np.nan]]))]
    for run in range(2):
        calculator = KindedEMT("total")
        with RelaxationStore(tmp_path, IDENTITY) as store:
            results = {one.id: one for one in store.relax(given, open_engine(calculator), SETTINGS)}
        assert (calculator.calls > 0) == (run == 0)
        assert results["good"].converged
        assert results["bad"].status == results["broken"].status == "failed"
        assert "No EMT-potential for Si" in str(results["bad"].reason)
        assert "non-finite position" in str(results["broken"].reason)
        assert results["bad"].energy_eV is None
        assert results["bad"].trajectory is None
        np.testing.assert_array_equal(results["bad"].atoms.positions, silicon.positions)


def moved(name: str) -> Iterator[tuple[str, Atoms]]:
    for start, atoms in starts():
        if start == name:
            atoms.positions[-1, 2] += 0.1
        yield start, atoms


def test_another_search_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    first = relax_all(tmp_path, KindedEMT("total"))
    log = tmp_path / "relaxed.jsonl"
    before = log.read_bytes()
    engine = open_engine(EMT())
    with pytest.raises(InputError, match="calculator 'emt', not 'lj'"):
        relax_all(tmp_path, KindedEMT("total"), identity={"calculator": "lj"})
    another = "a relaxation of c from another start structure or with other settings"
    with RelaxationStore(tmp_path, IDENTITY) as store, pytest.raises(InputError, match=another):
        list(store.relax(moved("c"), engine, SETTINGS))
    with pytest.raises(InputError, match="or with other settings"):
        relax_all(tmp_path, KindedEMT("total"), settings=RelaxationSettings(fmax=0.1))
    with RelaxationStore(tmp_path, IDENTITY) as store:
        with pytest.raises(DataError, match="another process is writing here"):
            RelaxationStore(tmp_path, IDENTITY).__enter__()
        with pytest.raises(InputError, match="two starts are called a"):
            list(store.relax([("a", slab("Cu", 0)), ("a", slab("Cu", 1))], engine, SETTINGS))
        for name in ("", "../a", ".a", "a\n", "a" * 300, 3):
            with pytest.raises(InputError, match="which no file can be"):
                list(store.relax([(name, slab("Cu", 0))], engine, SETTINGS))  # type: ignore[list-item]
    assert log.read_bytes() == before
    # Rounding does not make another start.
    with RelaxationStore(tmp_path, IDENTITY) as store:
        shaken = [(name, atoms) for name, atoms in starts()]
        for _, atoms in shaken:
            atoms.positions += 1e-10
        assert len(list(store.relax(shaken, engine, SETTINGS))) == 4
        Path(str(first["c"].trajectory)).write_bytes(b"- of ulm? no")
        with pytest.raises(InputError, match=r"c\.traj cannot be read .*remove the line of c"):
            list(store.relax(starts(), engine, SETTINGS))


@pytest.mark.parametrize("content", [b"{}\n", b"[1]\n", b'{"id": 3}\n', b"no json\n"])
def test_a_damaged_log_is_named(tmp_path: Path, content: bytes) -> None:
    relax_all(tmp_path, KindedEMT("total"))
    with (tmp_path / "relaxed.jsonl").open("ab") as file:
        file.write(content)
    with pytest.raises(InputError, match="line 5 is damaged"):
        RelaxationStore(tmp_path, IDENTITY).__enter__()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("of another program")
    with pytest.raises(InputError, match="holds something else than relaxations"):
        RelaxationStore(tmp_path, IDENTITY).__enter__()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="holds something else than relaxations"):
        RelaxationStore(file, IDENTITY).__enter__()


class Cheap(KindedEMT):
    """Effective medium theory with forces that are somewhat wrong, and none for platinum."""

    def __init__(self) -> None:
        super().__init__("total")

    def calculate(self, atoms: Atoms | None = None, *args: object) -> None:
        super().calculate(atoms, *args)
        assert atoms is not None
        if "Pt" in atoms.symbols:
            raise ArithmeticError("no platinum")
        self.results["forces"] = 0.8 * self.results["forces"]


def test_a_draft_saves_calls_and_the_minimum_is_the_full_models() -> None:
    alone = relax_many([atoms for _, atoms in starts()], EMT(), settings=SETTINGS)
    full, cheap = KindedEMT("total"), Cheap()
    found = relax_draft_and_verify(starts(), open_engine(cheap), open_engine(full), SETTINGS)
    results = {result.id: result for result in found}
    for name, other in zip(NAMES, alone, strict=True):
        result = results[name]
        assert result.converged
        assert result.max_force_eV_A < SETTINGS.fmax
        assert result.energy_eV == pytest.approx(other.energy_eV, abs=5e-3)
        check = result.atoms.copy()
        check.calc = EMT()
        assert result.energy_eV == pytest.approx(check.get_potential_energy(), abs=1e-9)
        if name == "c":  # its draft failed
            assert result.model_evaluations == other.model_evaluations
            assert result.draft_evaluations == 1
            assert result.start_energy_eV == pytest.approx(other.start_energy_eV, abs=1e-9)
        else:
            assert result.model_evaluations < other.model_evaluations
            assert result.draft_evaluations > 3
            assert result.start_energy_eV is None
    assert full.calls == sum(result.model_evaluations for result in results.values())
    assert cheap.calls == sum(result.draft_evaluations for result in results.values())


def test_drafts_in_a_store(tmp_path: Path) -> None:
    options = {"draft": open_engine(Cheap())}
    first = relax_all(tmp_path, KindedEMT("total"), **options)
    calculator = KindedEMT("total")
    second = relax_all(tmp_path, calculator, **options)
    assert calculator.calls == 0
    for name, result in first.items():
        assert second[name].draft_evaluations == result.draft_evaluations > 0
        assert second[name].start_energy_eV == result.start_energy_eV
    with pytest.raises(InputError, match="with other settings"):
        relax_all(tmp_path, KindedEMT("total"))
