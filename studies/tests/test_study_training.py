"""Training runs of the study network: divided data, refusals, and the page of results."""

import itertools
from pathlib import Path

import pytest

from equiformer2.errors import InputError
from equiformer2.files import write_json
from studies import study_training
from studies.results import Results, Row
from studies.study_data import FRACTIONS, System, divide


def system(number: int, bulk: str, adsorbate: str = "*CO") -> System:
    return System(f"s{number}", bulk, adsorbate, 10, "mp-1", "teacher")


METALS = ("Pt", "Cu", "Ni", "Au", "Ag", "Pd", "Rh", "Ir", "Fe", "Co", "Ru", "Os", "W", "Mo", "Ti", "Zr")
TRAIN = [system(number, bulk) for number, bulk in enumerate(METALS * 2)]
TEST = [system(100, "CuAu")]


def test_parts_share_no_bulk_and_fractions_are_nested() -> None:
    kept_out = [system(50, "CuSe"), system(51, "Pt", "*NNCH3"), system(52, "CuAu")]
    parts = divide([*TRAIN, *kept_out], [system(60, "CuAu"), system(61, "PtSn")], TEST, 0.2, 0)
    bulks = {name: {each.bulk for each in systems} for name, systems in parts.items()}
    assert not bulks["train"] & bulks["val"]
    assert not (bulks["train"] | bulks["val"] | bulks["older"]) & bulks["test"]
    names = ["train", *(f"train_{share.numerator}_{share.denominator}" for share in FRACTIONS)]
    sizes = [len(parts[name]) for name in names]
    assert all(bulks[small] < bulks[large] for large, small in itertools.pairwise(names))
    assert sizes[1] == pytest.approx(sizes[0] / 2, abs=2)
    trained = {each.sid for name in (*names, "older", "val") for each in parts[name]}
    assert not trained & {"s50", "s51"}


@pytest.mark.parametrize(
    ("train", "share", "told"),
    [
        (TRAIN[:1], 0.2, "1 bulk"),
        (TRAIN, 0.001, "val would hold no system"),
        (TRAIN[:2], 0.5, "would hold no"),
    ],
)
def test_data_that_cannot_be_divided(train: list[System], share: float, told: str) -> None:
    with pytest.raises(InputError, match=told):
        divide(train, TRAIN, TEST, share, 0)


def test_missing_files_and_results_of_other_settings(tmp_path: Path) -> None:
    words = ["--runs", str(tmp_path), "--results", str(tmp_path / "page"), "--data", str(tmp_path)]
    part = ["--part", "variants", "--only", "base"]
    with pytest.raises(InputError, match="run `python -m"):
        study_training.main([*words, *part])
    with pytest.raises(InputError, match="no finished run"):
        study_training.main(words)
    write_json(tmp_path / "variants-base.result.json", {"about": {"steps": 1, "options": [], "data": []}})
    with pytest.raises(InputError, match="other settings"):
        study_training.main([*words, *part])


def test_slope_of_the_learning_curve() -> None:
    rows = [
        {
            "part": "curve",
            "frames": frames,
            "errors": {"test": {"force_ratio": 0.8**n, "force_cosine": 1 - 0.5**n, "energy_ratio": 1.0}},
        }
        for n, frames in ((1, 100), (2, 200), (3, 400))
    ]
    found = study_training.doubling(rows)["test"]
    assert found == pytest.approx({"force_ratio": 0.8, "force_cosine": 0.5, "energy_ratio": 1.0})
    assert study_training.doubling(rows[:2]) == {}
    assert "| test | 0.800 | 0.500 | 1.000 |" in study_training.markdown(
        [{**row, "name": "x", "about": {"steps": 1}} for row in rows], {"test": found}, {}, "x.png"
    )


def test_data_steps_and_size_are_compared_once_their_rows_are_there() -> None:
    def row(name: str, force: float) -> Row:
        errors = {"force_ratio": force, "force_cosine": 0.5, "energy_ratio": 0.4}
        return {"name": name, "errors": {"val": dict.fromkeys(errors, 9.0), "test": errors}}

    rows = [row("1/2", 0.6), row("all", 0.5), row("seed 0", 0.30), row("seed 2", 0.32)]
    found = study_training.levers(rows)
    assert {change.split(":")[0]: errors["force_ratio"] for change, errors in found.items()} == {
        "data": [0.6, 0.5]
    }
    found = study_training.levers([*rows, row("fewer steps", 0.7)])
    assert {change.split(":")[0]: errors["force_ratio"] for change, errors in found.items()} == {
        "data": [0.6, 0.5],
        "steps": [0.7, 0.5],
        "parameters": [0.7, pytest.approx(0.31)],
    }
    assert "0.700 → 0.500" in study_training.markdown([], {}, found, "x.png")


def test_page_of_results(tmp_path: Path) -> None:
    errors = {"force_ratio": 0.5, "force_cosine": 0.6, "energy_ratio": 0.4}
    results = Results(tmp_path / "runs", study_training.about)
    for number, (name, part) in enumerate([("base", "variants"), ("1/8", "curve"), ("all", "curve")]):
        row = {"name": name, "part": part, "frames": 10 ** (number + 1), "errors": {"val": errors}}
        results.keep(study_training.run_name(name), row)
    study_training.report(results, tmp_path / "page")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| 1/8 | 100 | 6,000 | val | 0.500 | 0.600 | 0.400 |" in text
    assert text.index("Variants") < text.index("Learning curve")
    assert (tmp_path / "page.png").stat().st_size > 1000
