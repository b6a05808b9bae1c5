"""Energies over coverage: against ASE's relaxations one by one, going on, anomalies, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read, write

from equiformer2.adsorption.cards import verify_card
from equiformer2.adsorption.coverage_rows import CoverageRow, CoverageSeries, Species, attraction_notices
from equiformer2.adsorption.coverage_series import CoverageSettings, coverage_series, molecule_anomalies
from equiformer2.adsorption.named_structures import build_slab
from equiformer2.adsorption.placements import coverage_placements
from equiformer2.errors import InputError
from tests.adsorption.emt_coverage import relaxed_energy, slab
from tests.adsorption.interrupted import interrupted_emt

QUICK = CoverageSettings(placements=3, fmax=0.1, steps=60, check_minima=0)


class AdsorptionModel(EMT):
    """EMT that calls its energies adsorption energies."""

    energy_kind = "adsorption"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CoverageSeries]:
    folder = tmp_path_factory.mktemp("coverage") / "o"
    return folder, coverage_series(slab(), "*O", EMT(), [1, 2, 4], QUICK, out=folder)


def test_energies_are_those_of_ase_one_by_one(finished: tuple[Path, CoverageSeries]) -> None:
    series = finished[1]
    clean = relaxed_energy(slab(), QUICK)
    gas = Atoms("O", cell=[20.0] * 3, calculator=EMT()).get_potential_energy()
    totals = {}
    for count in (1, 2, 4):
        starts = coverage_placements(slab(), ["*O"] * count, QUICK.placements, QUICK.seed)
        totals[count] = min(relaxed_energy(start.atoms, QUICK) for start in starts) - clean - count * gas
    assert series.converged
    assert series.surface_atoms == 4
    for row in series.rows:
        assert row.total == pytest.approx(totals[row.count], abs=1e-4)
        assert row.average == pytest.approx(totals[row.count] / row.count, abs=1e-4)
        assert row.coverage == row.count / 4
    differential = [totals[1], totals[2] - totals[1], (totals[4] - totals[2]) / 2]
    assert [row.differential for row in series.rows] == pytest.approx(differential, abs=2e-4)
    assert [row.differential_from for row in series.rows] == [0, 1, 2]


def test_files(finished: tuple[Path, CoverageSeries]) -> None:
    folder, series = finished
    record = json.loads((folder / "coverage.json").read_text())
    assert record == json.loads(json.dumps(series.record))
    assert {"schema", "command", "commit", "checkpoint_sha256", "seconds"} <= set(record)
    assert all((folder / name).exists() for name in record["files"])
    assert (folder / "coverage.png").read_bytes().startswith(b"\x89PNG")
    for row in record["coverages"]:
        best = read(folder / row["file"])
        assert np.count_nonzero(best.get_tags() == 2) == row["molecules"]
        total = best.get_potential_energy() - record["terms_eV"]["slab"]
        total -= row["molecules"] * record["terms_eV"]["gas_per_molecule"]
        assert total == pytest.approx(row["total_adsorption_energy_eV"], abs=1e-6)
        assert row["coverage_per_A2"] * record["area_A2"] == pytest.approx(row["molecules"])
    assert f"{series.rows[1].average:.4f}" in str(series)


def test_copies_are_not_relaxed() -> None:
    settings = replace(QUICK, placements=8, steps=0, gas_per_atom={"O": 4.6})
    rows = coverage_series(slab(), "*O", EMT(), [1], settings).record["arrangements"]
    relaxed = {row["id"] for row in rows if row["model_evaluations"]}
    merged = [row for row in rows if row["status"] == "merged"]
    assert merged
    assert len(relaxed) + len(merged) == len(rows) == 8
    assert {row["merged_into"] for row in merged} <= relaxed


def test_a_finished_series_relaxes_nothing_again(
    finished: tuple[Path, CoverageSeries], tmp_path: Path
) -> None:
    series, folder = finished[1], shutil.copytree(finished[0], tmp_path / "copy")
    before = (folder / "relaxed.jsonl").read_bytes()
    stored = (folder / "coverage.json").read_bytes()
    same = coverage_series(slab(), "*O", EMT(), [4, 2, 1], QUICK, out=folder)
    assert same.record == json.loads(stored)
    assert [row.total for row in same.rows] == [row.total for row in series.rows]
    assert (folder / "coverage.json").read_bytes() == stored
    for counts, other, name in (
        ([1, 2], QUICK, "counts"),
        ([1, 2, 4], replace(QUICK, fmax=0.05), "fmax"),
        ([1, 2, 4], replace(QUICK, placements=4), "placements"),
    ):
        with pytest.raises(InputError, match=rf"holds a finished series with other settings \({name}\)"):
            coverage_series(slab(), "*O", EMT(), counts, other, out=folder)
    assert (folder / "coverage.json").read_bytes() == stored
    again = coverage_series(slab(), "*O", EMT(), [1, 2], QUICK, out=folder, overwrite=True)
    assert (folder / "relaxed.jsonl").read_bytes() == before
    assert [row.total for row in again.rows] == pytest.approx([row.total for row in series.rows[:2]])
    with pytest.raises(InputError, match="holds relaxations with"):
        coverage_series(slab(), "*H", EMT(), [1], QUICK, out=folder, overwrite=True)


def test_the_lowest_arrangement_leaves_a_saddle_point(tmp_path: Path) -> None:
    """EMT's bridge on Cu(111) is a saddle point 0.03 eV above the hollow, where this start is."""
    settings = replace(QUICK, placements=1, seed=4, gas_per_atom={"O": 4.6}, steps=100)
    on_saddle = coverage_series(slab(), "*O", EMT(), [1], settings).rows[0]
    series = coverage_series(slab(), "*O", EMT(), [1], replace(settings, check_minima=1), out=tmp_path / "s")
    assert series.rows[0].total == pytest.approx(on_saddle.total - 0.03, abs=0.01)
    record = json.loads((tmp_path / "s" / "coverage.json").read_text())
    (check,) = record["saddle_check"]["checks"]
    assert check["fell"]
    assert check["energy_before_eV"] == pytest.approx(on_saddle.total)
    assert check["energy_eV"] == series.rows[0].total
    (row,) = record["arrangements"]
    assert row["checked_by"] == check["checked_by"] == "n01-coverage-0000.check"
    assert row["saddle_model_energy_eV"] == pytest.approx(on_saddle.best.relaxation.energy_eV)
    before = (tmp_path / "s" / "relaxed.jsonl").read_bytes()
    again = coverage_series(
        slab(), "*O", EMT(), [1], replace(settings, check_minima=1), out=tmp_path / "s", overwrite=True
    )
    assert again.rows[0].total == series.rows[0].total
    assert (tmp_path / "s" / "relaxed.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="check_minima is -1"):
        CoverageSettings(check_minima=-1)


def test_molecules_that_bind_when_displaced_are_told() -> None:
    settings = replace(QUICK, placements=1, gas_per_atom={"O": 4.6}, steps=100, check_minima=1)
    series = coverage_series(slab(), "*O", EMT(), [2], settings)
    assert any(
        "open whether n02-coverage-0000" in text and "bound to each" in text for text in series.notices
    )


def test_molecules_that_seem_to_attract_each_other_are_told() -> None:
    def row(count: int, average: float | None) -> CoverageRow:
        total = None if average is None else count * average
        return CoverageRow((count,), count / 4, total, average, (None,), (None,), None, None, {})

    alone = Species(("*O",))
    assert attraction_notices([row(1, -1.0), row(2, -0.9), row(3, -0.91)], alone) == []
    (sentence,) = attraction_notices([row(1, -1.0), row(2, None), row(3, -1.2)], alone)
    assert "falls from -1.000 eV with 1 in the cell to -1.200 eV with 3" in sentence
    assert "attract each other, or it is an artefact" in sentence


def test_the_card_is_recomputed(finished: tuple[Path, CoverageSeries], tmp_path: Path) -> None:
    folder = finished[0]
    card = json.loads((folder / "card.json").read_text())
    assert card["schema"] == "adsorption-coverage-card/1"
    assert {"label_physics", "settings", "model", "gas", "notices", "saddle_check"} <= set(card)
    assert [one["name"] for one in card["structures"]] == ["clean_slab", "n01", "n02", "n04"]
    rows = verify_card(folder / "card.json", EMT())
    assert {"terms_eV.slab", "n04.total_adsorption_energy_eV", "n02.extxyz.sha256"} <= set(rows)
    assert all(one["ok"] for one in rows.values())
    copy = shutil.copytree(folder, tmp_path / "copy")
    card["coverages"][1]["total_adsorption_energy_eV"] += 0.1
    (copy / "card.json").write_text(json.dumps(card))
    moved = read(copy / "n04.extxyz")
    moved.positions[-1, 2] += 0.3
    write(copy / "n04.extxyz", moved)
    wrong = {name for name, one in verify_card(copy / "card.json", EMT()).items() if not one["ok"]}
    assert {"n02.total_adsorption_energy_eV", "n04.extxyz.sha256", "n04.model_energy_eV"} <= wrong
    assert "n02.model_energy_eV" not in wrong
    with pytest.raises(InputError, match="names no checkpoint"):
        verify_card(folder / "card.json")
    card["structures"][0].pop("file")
    (copy / "card.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="is broken: its structures"):
        verify_card(copy / "card.json", EMT())


def test_a_stopped_series_goes_on(tmp_path: Path) -> None:
    interrupted = interrupted_emt(40)
    settings = CoverageSettings(placements=2, fmax=0.1, steps=60, gas_per_atom={"O": 4.6})
    with pytest.raises(KeyboardInterrupt):
        coverage_series(slab(), "*O", interrupted(), [1, 2], settings, out=tmp_path / "s")
    lines = (tmp_path / "s" / "relaxed.jsonl").read_text().splitlines()
    assert 1 < len(lines) < 5
    assert not (tmp_path / "s" / "coverage.json").exists()
    series = coverage_series(slab(), "*O", interrupted(), [1, 2], settings, out=tmp_path / "s")
    after = (tmp_path / "s" / "relaxed.jsonl").read_text().splitlines()
    assert after[: len(lines)] == lines
    assert len({json.loads(line)["id"] for line in after}) == len(after)
    whole = coverage_series(slab(), "*O", EMT(), [1, 2], settings)
    assert [row.total for row in series.rows] == pytest.approx([row.total for row in whole.rows], abs=1e-6)


def test_a_model_of_adsorption_energies_has_one_mean_per_structure() -> None:
    settings = CoverageSettings(placements=2, fmax=0.2, steps=30)
    series = coverage_series(slab(), "*O", AdsorptionModel(), [1, 2], settings)
    assert "one mean per structure" in series.notices[0]
    single, pair = series.rows
    assert single.total == single.average == single.differential == single.best.relaxation.energy_eV
    assert (pair.total, pair.average, pair.differential) == (None, None, None)
    assert pair.best is not None  # the structure is compared all the same
    assert "not defined" in str(series)


def test_every_molecule_is_judged_by_itself() -> None:
    (placement,) = coverage_placements(slab(), ["*CO", "*CO"], 1, 0)
    first, second = (list(group) for group in placement.molecules)
    good = placement.atoms.copy()
    assert molecule_anomalies(placement, good, slab()) == []
    gone = good.copy()
    gone.positions[second] += (0, 0, 4)
    assert [text.split(":")[0] for text in molecule_anomalies(placement, gone, slab())] == ["molecule 1"]
    apart = good.copy()
    apart.positions[first[1]] += (0, 0, 2)
    assert any(
        "molecule 0: the adsorbate has dissociated" in text
        for text in molecule_anomalies(placement, apart, slab())
    )
    bound = good.copy()
    bound.positions[second] += good.positions[first[0]] - good.positions[second[0]] + (0.9, 0.9, 0)
    assert "molecules 0 and 1 have bound to each other" in molecule_anomalies(placement, bound, slab())


def test_default_counts_end_where_no_more_fit() -> None:
    settings = CoverageSettings(placements=1, fmax=0.3, steps=5, min_distance=4.0, gas_per_atom={"H": 3.2})
    series = coverage_series(slab(), "*H", EMT(), None, settings)
    assert [row.count for row in series.rows] == [1]
    assert "2 molecules do not fit" in series.notices[0]
    with pytest.raises(InputError, match="2 of the adsorbate: adsorbate 1 of 2 has no site 4 Å"):
        coverage_series(slab(), "*H", EMT(), [2], settings)


def test_open_surfaces_tell_how_a_monolayer_is_counted() -> None:
    ridges = build_slab("Cu110", (2, 2, 3), free_layers=1)
    quick = replace(QUICK, placements=1, steps=1)
    series = coverage_series(ridges, "*O", EMT(), [1], quick)
    assert series.surface_atoms == 8
    assert any("4 of them are the outermost layer" in notice for notice in series.notices)
    assert not any(
        "outermost" in notice for notice in coverage_series(slab(), "*O", EMT(), [1], quick).notices
    )


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        ([0], {}, "must be whole, from 1 to 100"),
        ([1.5], {}, "must be whole"),
        (["a"], {}, "must be whole"),
        ([float("nan")], {}, "must be whole"),
        ([], {}, "must be whole"),
        ([101], {}, "must be whole"),
        ([1], {"placements": 0}, "number of placements is 0"),
        ([1], {"seed": -1}, "seed is -1"),
        ([1], {"min_distance": float("nan")}, "distance between adsorbates"),
        ([1], {"fmax": -1.0}, "fmax is -1"),
        ([1], {"gas_per_atom": {"H": 1.0}}, "no gas reference for O"),
    ],
)
def test_bad_input(tmp_path: Path, counts: list, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        coverage_series(slab(), "*O", EMT(), counts, CoverageSettings(**changes), out=tmp_path / "x")
