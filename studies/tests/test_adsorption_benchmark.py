"""The benchmark of atoms on metals: offsets, errors and rankings of models that are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from equiformer2.errors import InputError
from studies.adsorption_benchmark import judge, main, page, read_structures


def test_a_constant_per_element_is_no_error() -> None:
    rows = [row for row, _ in read_structures()]
    dft = np.array([row["energy_eV"] for row in rows])
    shift = np.array([{"C": 1.0, "H": -2.0, "N": 0.5, "O": 7.0}[row["adsorbate"]] for row in rows])
    found = judge(rows, dft - shift)
    assert found["offset_eV"] == pytest.approx({"C": 1.0, "H": -2.0, "N": 0.5, "O": 7.0})
    assert found["mae_eV"]["all"] == pytest.approx(0.0, abs=1e-9)
    assert (found["sites"], found["metals"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found["trivial_mae_eV"]["all"] > 0.3


def test_an_upside_down_model_ranks_upside_down() -> None:
    rows = [row for row, _ in read_structures()]
    found = judge(rows, -np.array([row["energy_eV"] for row in rows]))
    assert found["sites"] == pytest.approx(-1.0)
    assert found["mae_eV"]["all"] > 0.5


def test_the_command_writes_a_page(tmp_path: Path) -> None:
    data = json.loads(Path("data/xu_kitchin/adsorption.json").read_text())
    kept = [
        row for row in data["structures"] if row["metal"] in ("Cu", "Pt", "Pd") and row["adsorbate"] in "HO"
    ]
    (tmp_path / "data.json").write_text(json.dumps({"structures": kept}))
    main(["--calculators", "emt", "--data", str(tmp_path / "data.json"), "--results", str(tmp_path / "r")])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["models"]["emt"]["energy_kind"] == "total"
    assert (tmp_path / "r.md").read_text() == page(record)


def test_metals_that_a_model_leaves_out_are_left_out_of_its_trivial_answer() -> None:
    rows = [row for row, _ in read_structures()]
    fewer = [row for row in rows if row["metal"] != "Pt"]
    models = {
        name: {"left_out": left_out, **judge(own, np.zeros(len(own)))}
        for name, left_out, own in (("a", [], rows), ("b", ["Pt"], fewer))
    }
    text = page({"command": "x", "models": models})
    assert text.count("| trivial |") == 1
    assert text.count("| trivial, without Pt |") == 1
    with pytest.raises(InputError, match="fitted on Cu"):
        judge([row for row in rows if row["metal"] != "Cu"], np.zeros(1))
    with pytest.raises(InputError, match="fitted on Cu"):
        judge([], np.empty(0))
