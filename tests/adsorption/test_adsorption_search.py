"""The search over placements: merging, ranking, stopping, going on, its files, and DFT results read back."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read, write
from ase.optimize import LBFGS
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.cards import label_physics, verify_card
from equiformer2.adsorption.find import earlier_minima, find_adsorption_energy
from equiformer2.adsorption.finished_search import FinishedSearch
from equiformer2.adsorption.placements import placements
from equiformer2.adsorption.search import SearchResult, SearchSettings, search_placements
from equiformer2.adsorption.search_output import search_record, write_search
from equiformer2.adsorption.slabs import find_slab
from equiformer2.errors import InputError
from tests.adsorption.interrupted import interrupted_emt
from tests.observed import observed

QUICK = SearchSettings(fmax=0.1, steps=60)
SETTINGS = {"mode": "heuristic", "placements": 8, "seed": 3, "fmax_eV_A": 0.05, "steps": 60, "stop": True}
SITES = ("ontop", "fcc", "hcp", "bridge")


def base() -> Atoms:
    return slab(size=(2, 2, 3))


def placed(
    name: str = "O", sites: tuple[str, ...] = SITES, turns: tuple[float, ...] = (0.0,)
) -> list[tuple[str, Atoms]]:
    found = [
        with_adsorbate(base(), name, site, offset, turn)
        for site in sites
        for offset in ((0, 0), (1, 0))
        for turn in turns
    ]
    return [(f"p{number:02d}", atoms) for number, atoms in enumerate(found)]


class Counting(EMT):
    """EMT that counts its calculations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def calculate(self, *arguments: object, **more: object) -> None:
        self.calls += 1
        super().calculate(*arguments, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    folder = tmp_path_factory.mktemp("search") / "o"
    result = search_placements(base(), placed(), EMT(), folder, QUICK)
    settings = dict(SETTINGS)
    settings["slab"] = find_slab(base()).report.summary() | {"miller": [1, 1, 1]}
    write_search(folder, result, {"calculator": "emt", "checkpoint": None}, settings)
    return folder, result


def test_the_energy_is_that_of_the_lowest_placement_relaxed_alone(
    finished: tuple[Path, SearchResult],
) -> None:
    energies = {}
    for site in SITES:
        atoms = with_adsorbate(base(), "O", site)
        atoms.calc = EMT()
        LBFGS(atoms, logfile=None, maxstep=0.04).run(fmax=0.1, steps=60)
        energies[site] = atoms.get_potential_energy()
    clean = base()
    clean.calc = EMT()
    LBFGS(clean, logfile=None, maxstep=0.04).run(fmax=0.1, steps=60)
    oxygen = Atoms("O", cell=[20.0] * 3, calculator=EMT())
    expected = min(energies.values()) - clean.get_potential_energy() - oxygen.get_potential_energy()
    result = finished[1]
    assert result.energy == pytest.approx(expected, abs=1e-4)
    assert result.terms["slab"] == pytest.approx(clean.get_potential_energy(), abs=1e-4)


def test_copies_are_not_relaxed_and_inherit(finished: tuple[Path, SearchResult]) -> None:
    result = finished[1]
    assert [one.merged_into for one in result.found] == [None, "p00", None, "p02", None, "p04", None, "p06"]
    assert [one.status for one in result.found] == ["converged", "merged"] * 4
    assert all(one.energy == result.found[n - 1].energy for n, one in enumerate(result.found) if n % 2)
    assert result.coverage.draws == 8
    assert result.reason == "all placements were relaxed"


class AdsorptionEMT(EMT):
    """EMT that calls its energies adsorption energies."""

    energy_kind = "adsorption"


@pytest.mark.parametrize(
    "settings", [SearchSettings(gas="molecules"), SearchSettings(gas_per_atom={"O": 1.0})]
)
def test_a_model_of_adsorption_energies_takes_no_gas_references(
    tmp_path: Path, settings: SearchSettings
) -> None:
    with pytest.raises(InputError, match="leave the gas references out"):
        search_placements(base(), placed(), AdsorptionEMT(), tmp_path, settings)


def test_what_an_energy_rests_on_must_have_converged(tmp_path: Path) -> None:
    settings = SearchSettings(fmax=0.4, steps=1, gas="molecules", check_minima=0)
    result = search_placements(base(), placed(sites=("fcc",)), EMT(), tmp_path, settings)
    assert result.best is not None
    assert "the gas references" in result.unconverged
    record = search_record(result, {"checkpoint": None}, SETTINGS)
    assert record["converged"] is False
    assert record["unconverged"] == result.unconverged


def test_with_no_start_left_the_estimate_is_of_as_many_again(finished: tuple[Path, SearchResult]) -> None:
    coverage = finished[1].coverage
    assert coverage.further == 8
    assert 0.0 < coverage.p_lower < 1.0
    assert coverage.unseen_basins > 0.0


def test_a_check_that_does_not_converge_leaves_it_open(finished: tuple[Path, SearchResult]) -> None:
    (check,) = finished[1].checks
    assert check.stays
    assert "is a minimum" in check.sentence
    dissociated = replace(check, status="anomalous", energy=check.before - 1.0)
    assert not dissociated.stays
    assert not dissociated.fell
    assert "it is open" in dissociated.sentence


def test_files_hold_the_keys_of_the_contract(finished: tuple[Path, SearchResult]) -> None:
    folder, result = finished
    record = json.loads((folder / "search.json").read_text())
    assert {"schema", "command", "commit", "checkpoint_sha256", "seconds"} <= set(record)
    assert record["adsorption_energy_eV"] == result.energy
    assert {"id", "file", "start_energy_eV", "max_force_eV_A", "converged", "anomalies"} <= set(
        record["best"]
    )
    assert all(
        {"id", "status", "merged_into", "basin", "steps", "energy_eV"} <= set(row)
        for row in record["placements"]
    )
    assert {"reason", "unseen_probability", "p_lower"} <= set(record["stop"])
    best = read(folder / record["best"]["file"])
    assert best.get_potential_energy() == pytest.approx(result.best.relaxation.energy_eV)
    basins = json.loads((folder / "basins.json").read_text())
    assert sum(basin["multiplicity"] for basin in basins["basins"]) == 8
    assert len(list((folder / "trajectories").glob("*.traj"))) == 6  # clean slab, 4 placements, one check
    page = (folder / "report.html").read_text()
    assert "showStructures" in page
    assert f"{result.energy:.3f} eV" in page
    assert "at most 8, random seed 3" in page
    plain = re.sub(r"\s*<[^>]*>\s*", " ", page)
    for basin in basins["basins"]:
        row = (
            f"{basin['id']} {basin['energy_eV']:.3f} {basin['multiplicity']} {', '.join(basin['placements'])}"
        )
        assert row in re.sub(r"\s+", " ", plain)
    assert f"4 placements were not relaxed, which saved about {basins['steps_saved']} steps" in page
    assert "Miller indices (1, 1, 1)" in page
    assert "8 more placements find a minimum lower" in page  # all were relaxed: as many again


def test_a_finished_search_calculates_nothing_again(finished: tuple[Path, SearchResult]) -> None:
    folder, result = finished
    calculator = Counting()
    with observed(EMT.calculate) as calls:
        again = search_placements(base(), placed(), EMT(), folder, QUICK)
    assert not calls
    assert again.energy == pytest.approx(result.energy, abs=1e-6)
    assert again.model_evaluations == result.model_evaluations
    with pytest.raises(InputError, match="model"):  # another model is another search
        search_placements(base(), placed(), calculator, folder, QUICK)
    assert calculator.calls == 0
    with pytest.raises(InputError, match="another start structure"):
        search_placements(base(), [("p00", with_adsorbate(base(), "O", "fcc"))], EMT(), folder, QUICK)


def test_a_stopped_search_goes_on(tmp_path: Path) -> None:
    interrupted = interrupted_emt(30)
    folder = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        search_placements(base(), placed(), interrupted(), folder, QUICK)
    finished_before = (folder / "relaxed.jsonl").read_text().splitlines()
    assert 1 < len(finished_before) < 5
    result = search_placements(base(), placed(), interrupted(), folder, QUICK)
    assert (folder / "relaxed.jsonl").read_text().splitlines()[: len(finished_before)] == finished_before
    whole = search_placements(base(), placed(), EMT(), tmp_path / "whole", QUICK)
    assert result.energy == pytest.approx(whole.energy, abs=1e-6)
    assert [one.summary()["steps"] for one in result.found] == [one.summary()["steps"] for one in whole.found]


def test_placements_with_an_anomaly_do_not_count(tmp_path: Path) -> None:
    far = with_adsorbate(base(), "CO", "fcc")
    far.positions[-2:, 2] += 3.5  # desorbed, and EMT sees nothing there
    result = search_placements(
        base(), [("far", far), ("near", with_adsorbate(base(), "CO", "fcc"))], EMT(), tmp_path / "s", QUICK
    )
    assert [one.status for one in result.found] == ["anomalous", "converged"]
    assert result.best.id == "near"
    assert result.found[0].basin is None


def test_a_search_without_a_result_keeps_its_record(tmp_path: Path) -> None:
    far = with_adsorbate(base(), "CO", "fcc")
    far.positions[-2:, 2] += 3.5
    result = search_placements(base(), [("far", far)], EMT(), tmp_path / "s", QUICK)
    assert (result.best, result.energy) == (None, None)
    record = write_search(tmp_path / "s", result, {"calculator": "emt", "checkpoint": None}, {})
    assert record == json.loads((tmp_path / "s" / "search.json").read_text())
    assert (record["best"], record["adsorption_energy_eV"], record["converged"]) == (None, None, False)
    assert "1 have an anomaly (1 desorbed)" in record["reason"]
    assert [row["status"] for row in record["placements"]] == ["anomalous"]
    assert not (tmp_path / "s" / "card.json").exists()
    with pytest.raises(InputError, match=r"has found no energy: .* 1 have an anomaly"):
        FinishedSearch.read(tmp_path / "s")


class Cheap(EMT):
    """EMT with forces that are off by a factor, and energies of another scale; it fails for one structure."""

    calls = 0

    def calculate(self, *arguments: object, **more: object) -> None:
        type(self).calls += 1
        super().calculate(*arguments, **more)
        if arguments and "H" in arguments[0].symbols:
            raise ValueError("no such element")
        self.results["energy"] += 100.0
        self.results["forces"] = 0.8 * self.results["forces"]


def test_a_draft_saves_calls_and_the_minimum_is_the_full_model_s(
    finished: tuple[Path, SearchResult], tmp_path: Path
) -> None:
    alone = finished[1]
    starts = placed()[::2]
    result = search_placements(base(), starts, EMT(), tmp_path / "s", QUICK, draft=Cheap())
    assert result.energy == pytest.approx(alone.energy, abs=5e-3)
    assert result.best.start_energy == pytest.approx(alone.best.start_energy, abs=1e-6)
    for one, other in zip(result.found, alone.found[::2], strict=True):
        assert one.relaxation.max_force_eV_A < QUICK.fmax
        assert one.own.model_evaluations < other.own.model_evaluations
    record = write_search(
        tmp_path / "s", result, {"calculator": "emt", "checkpoint": None}, SETTINGS, draft={"calculator": "x"}
    )
    assert record["draft"] == {
        **{"calculator": "x", "evaluations": result.draft_evaluations, "placements": 4, "failed": 0}
    }
    rows = [json.loads(line) for line in (tmp_path / "s" / "relaxed.jsonl").read_text().splitlines()]
    drafts = [row for row in rows if row["id"].endswith(".draft")]
    assert result.draft_evaluations == sum(row["model_evaluations"] for row in drafts)
    assert result.model_evaluations == sum(row["model_evaluations"] for row in rows if row not in drafts)
    calls = Cheap.calls
    again = search_placements(base(), starts, EMT(), tmp_path / "s", QUICK, draft=Cheap())
    assert Cheap.calls == calls
    assert (again.energy, again.draft_evaluations) == (result.energy, result.draft_evaluations)
    for other_draft in (None, EMT()):
        with pytest.raises(InputError, match="draft"):
            search_placements(base(), starts, EMT(), tmp_path / "s", QUICK, draft=other_draft)


def test_finished_drafts_are_not_done_again(tmp_path: Path) -> None:
    interrupted = interrupted_emt(30)
    starts = placed()[::2]
    with pytest.raises(KeyboardInterrupt):
        search_placements(base(), starts, interrupted(), tmp_path / "s", QUICK, draft=Cheap())
    before = (tmp_path / "s" / "relaxed.jsonl").read_text()
    assert ".draft" in before
    search_placements(base(), starts, interrupted(), tmp_path / "s", QUICK, draft=Cheap())
    after = (tmp_path / "s" / "relaxed.jsonl").read_text()
    assert after.startswith(before)
    names = [json.loads(line)["id"] for line in after.splitlines()]
    assert len(names) == len(set(names))


def test_a_draft_that_fails_is_left_out(tmp_path: Path) -> None:
    starts = [("h", with_adsorbate(base(), "H", "fcc"))]
    result = search_placements(base(), starts, EMT(), tmp_path / "s", QUICK, draft=Cheap())
    alone = search_placements(base(), starts, EMT(), tmp_path / "t", QUICK)
    assert result.energy == pytest.approx(alone.energy, abs=1e-9)
    assert result.best.start_energy == pytest.approx(alone.best.start_energy)
    record = search_record(result, {}, {}, {})
    assert (record["draft"]["placements"], record["draft"]["failed"]) == (1, 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"forces": np.full((13, 3), np.nan)}, "non-finite energy or force"),
        ({"energy": np.inf}, "non-finite energy or force"),
        ({"forces": np.zeros((12, 3))}, "forces of the shape [12, 3]"),
        ({"energy": np.zeros(2)}, "TypeError"),
        ({"forces": None}, "shape"),
    ],
)
def test_one_wrong_answer_of_a_calculator_fails_one_placement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: dict[str, object], said: str
) -> None:
    class Wrong(EMT):
        """Wrong about oxygen above z = 9 Å, which is that of one start."""

        def calculate(self, *arguments: object, **more: object) -> None:
            super().calculate(*arguments, **more)
            if len(self.atoms) == 13 and self.atoms.positions[-1, 2] > HIGH:
                self.results.update(wrong)

    good, bad = with_adsorbate(base(), "O", "fcc"), with_adsorbate(base(), "O", "ontop")
    bad.positions[-1, 2] += 2.0
    HIGH = bad.positions[-1, 2] - 0.1
    result = search_placements(
        base(),
        [("good", good), ("bad", bad)],
        Wrong(),
        tmp_path / "s",
        SearchSettings(0.1, 60, gas_per_atom={"O": 4.6}),
    )
    assert [one.status for one in result.found] == ["converged", "failed"]
    assert said in result.found[1].relaxation.reason
    assert any("bad" in line and said in line for line in caplog.messages)
    assert result.best.id == "good"


def test_minima_of_another_adsorbate_are_no_starts(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"placements": 1, "steps": 1, "check_minima": 0}
    find_adsorption_energy(base(), "*OH", EMT(), out=tmp_path / "oh", **settings)
    with pytest.raises(InputError, match=r"is a search of another adsorbate \(HO, here O\)"):
        find_adsorption_energy(base(), "*O", EMT(), starts_from=tmp_path / "oh", **settings)
    start = read(tmp_path / "oh" / "trajectories" / "heuristic-0000.traj", 0)
    ((name, atoms),) = earlier_minima(tmp_path / "oh", base(), start)
    assert (name, len(atoms)) == ("earlier-heuristic-0000", len(start))
    start.positions[-1, 2] += 2.0  # not bound within the adsorbate, as in an isomer
    with pytest.raises(InputError, match="is a search of another adsorbate: its"):
        earlier_minima(tmp_path / "oh", base(), start)
    mixed = [*placed("O", ("fcc",)), ("other", with_adsorbate(base(), "H", "fcc", (0, 0), 0.0))]
    with pytest.raises(InputError, match="p00 and other are of different adsorbates"):
        search_placements(base(), mixed, EMT(), tmp_path / "mixed", QUICK)


def test_a_calculator_by_name(tmp_path: Path) -> None:
    found = find_adsorption_energy(
        base(), "*O", "emt", placements=1, steps=1, out=tmp_path / "s", draft="emt", check_minima=0
    )
    assert found.record["model"]["calculator"] == "ase.calculators.emt.EMT"
    assert found.record["draft"]["calculator"] == "ase.calculators.emt.EMT"
    with pytest.raises(InputError, match="no checkpoint emmt"):
        find_adsorption_energy(base(), "*O", "emmt", placements=1)
    with pytest.raises(InputError, match="cannot be imported"):
        find_adsorption_energy(base(), "*O", "no_such_module:make", placements=1)


def test_a_search_may_stop_early(tmp_path: Path) -> None:
    """Many starts in two minima of nearly the same energy; without the rule all are relaxed."""
    starts = []
    random = np.random.default_rng(0)
    for number in range(24):
        atoms = with_adsorbate(base(), "O", ("fcc", "hcp")[number % 2])
        atoms.positions[-1] += random.uniform(-0.3, 0.3, 3)
        starts.append((f"p{number:02d}", atoms))
    result = search_placements(base(), starts, EMT(), tmp_path / "s", QUICK)
    assert result.coverage.basins == 2
    assert {"converged", "stopped"} <= {one.status for one in result.found}
    assert "has a probability of" in result.reason
    every = search_placements(
        base(), starts, EMT(), tmp_path / "t", SearchSettings(fmax=0.1, steps=60, stop=False)
    )
    assert {one.status for one in every.found} <= {"converged", "merged"}


def test_what_is_no_search_is_refused(tmp_path: Path) -> None:
    good = with_adsorbate(base(), "O", "fcc")
    for starts, message in (
        ([], "there is no placement"),
        ([("a", base())], "not an adsorbate on this slab"),
        ([("a", good[::-1])], "not an adsorbate on this slab"),
        ([("a", good), ("a", good)], "the same name"),
    ):
        with pytest.raises(InputError, match=message):
            search_placements(base(), starts, EMT(), tmp_path / "s", QUICK)
    with pytest.raises(InputError, match="gas"):
        search_placements(base(), [("a", good)], EMT(), tmp_path / "s", SearchSettings(gas="air"))


def test_a_card_is_recomputed(finished: tuple[Path, SearchResult], tmp_path: Path) -> None:
    folder, _ = finished
    rows = verify_card(folder / "card.json", EMT())
    assert all(row["ok"] for row in rows.values())
    card = json.loads((folder / "card.json").read_text())
    card["verifiable"]["model_energy_eV"] += 0.01
    (tmp_path / "card.json").write_text(json.dumps(card))
    write(tmp_path / "best.extxyz", read(folder / "best.extxyz")[::-1])
    rows = verify_card(tmp_path / "card.json", EMT())
    assert {name for name, row in rows.items() if not row["ok"]} == {"model_energy_eV", "structure_sha256"}
    card["verifiable"]["model_energy_eV"] -= 0.005
    for precision, differs in (("float32", True), ("bf16", False), (["float32", "bf16"], False)):
        card["model"]["precision"] = precision
        (tmp_path / "card.json").write_text(json.dumps(card))
        assert verify_card(tmp_path / "card.json", EMT())["model_energy_eV"]["ok"] != differs
    with pytest.raises(InputError, match="names no checkpoint"):
        verify_card(folder / "card.json")
    with pytest.raises(InputError, match="is no trust card"):
        verify_card(folder / "search.json")


@pytest.mark.parametrize(
    ("keys", "by", "differ"),
    [
        (["adsorption_energy_eV"], -0.5, {"adsorption_energy_eV", "search.adsorption_energy_eV"}),
        (
            ["terms_eV", "slab"],
            0.5,
            {"adsorption_energy_eV", "terms_eV.slab", "search.terms_eV.slab"},
        ),
        (["terms_eV", "gas"], 0.5, {"adsorption_energy_eV", "terms_eV.gas", "search.terms_eV.gas"}),
        (["anomaly_checks", 1, "margin_A"], 0.5, {"desorbed.margin_A"}),
    ],
)
def test_an_altered_card_differs(
    finished: tuple[Path, SearchResult], tmp_path: Path, keys: list[str | int], by: float, differ: set[str]
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "s")
    card = json.loads((folder / "card.json").read_text())
    place = card
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] += by
    (folder / "card.json").write_text(json.dumps(card))
    rows = verify_card(folder / "card.json", EMT())
    assert {name for name, row in rows.items() if not row["ok"]} == differ


def test_a_card_and_a_record_that_were_altered_alike_differ(
    finished: tuple[Path, SearchResult], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "s")
    for name in ("card.json", "search.json"):
        record = json.loads((folder / name).read_text())
        record["adsorption_energy_eV"] -= 0.5
        record["terms_eV"]["slab"] += 0.5
        (folder / name).write_text(json.dumps(record))
    rows = verify_card(folder / "card.json", EMT())
    assert {name for name, row in rows.items() if not row["ok"]} == {"terms_eV.slab"}


def test_physics_that_labels_leave_out_is_said() -> None:
    iron = Atoms("FeO", tags=[1, 1])
    said = " ".join(label_physics(iron, "adsorption", {}))
    assert "RPBE" in said
    assert "Fe, which is magnetic" in said
    assert "needs a +U" in said
    assert "magnetic" not in " ".join(label_physics(Atoms("CuO", tags=[1, 2]), "adsorption", {}))
    stage = {"elements": {"Cu": 1}, "labels": ["SevenNet-0, not DFT"], "earlier": []}
    assert "SevenNet-0, not DFT" in label_physics(iron, "adsorption", {"training_data": stage})[0]


def test_an_isomer_has_a_gas_energy_of_its_own(tmp_path: Path) -> None:
    """A search that was stopped once the molecule was known goes on with another of the same formula."""
    settings = SearchSettings(steps=1, check_minima=0)

    def gas_energy(name: str, folder: str) -> float:
        starts = [(one.id, one.atoms) for one in placements(base(), name, number=1)]
        return search_placements(base(), starts, EMT(), tmp_path / folder, settings).gas["energy_eV"]

    first, second = gas_energy("*COH", "first"), gas_energy("*CHO", "second")
    assert abs(first - second) > 0.1
    log, file = tmp_path / "first" / "relaxed.jsonl", tmp_path / "first" / "gas.json"
    clean_slab = log.read_text().splitlines(keepends=True)[0]
    for broken in (file.read_text(), "{}"):
        log.write_text(clean_slab)
        file.write_text(broken)
        assert gas_energy("*CHO", "first") == pytest.approx(second, abs=1e-6)
