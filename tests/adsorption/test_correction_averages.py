"""Corrections from the DFT of several searches: averages, what is refused, and their use."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from command_line import run_command

from equiformer2.adsorption.correction_averages import correction_averages
from equiformer2.adsorption.corrections import Corrections
from equiformer2.adsorption.find import find_adsorption_energy
from equiformer2.errors import InputError

MODEL = {"checkpoint_sha256": "a", "adapter_sha256": None, "energy_kind": "total", "identity": {"x": 1}}


def write_collected(folder: Path, *differences: float, **changes: Any) -> Path:
    """Record of `adsorption collect` with these differences, its model's energies drawn."""
    drawn = np.random.default_rng(len(list(folder.parent.iterdir()))).normal(-1.0, 0.3, 99)
    rows = [
        {"model_eV": float(energy), "dft_eV": float(energy) + difference, "in_correction": True}
        for energy, difference in zip(drawn, differences, strict=False)
    ]
    record = {
        "schema": "adsorption-collect/2",
        "adsorbate": "*CO",
        "slab": folder.name,
        "ranking": [*rows, {"model_eV": 0.0, "dft_eV": 9.0, "in_correction": False}],
        "dft_energy": "adsorption",
        "gas_per_atom_eV": {"C": -7.3, "O": -7.2},
        "model": MODEL | {"gas": {"source": "vacuum", "per_atom_eV": {}}},
        "dft_settings": {"code": "VASP", "functional": "RPBE"},
        "warnings": [],
    } | changes
    folder.mkdir(parents=True)
    (folder / "collect.json").write_text(json.dumps(record))
    return folder


def test_the_mean_of_one_point_per_search(tmp_path: Path) -> None:
    values = [0.10, 0.14, 0.12, 0.08]
    folders = [write_collected(tmp_path / f"s{n}", value) for n, value in enumerate(values)]
    found = correction_averages([*folders[:3], folders[3] / "collect.json"])
    row = found["species"]["*CO"]
    assert found["species_eV"] == {"*CO": pytest.approx(np.mean(values))}
    assert (row["points"], row["searches"]) == (4, 4)
    assert row["standard_error_eV"] == pytest.approx(np.std(values, ddof=1) / 2)
    assert (row["lowest_eV"], row["highest_eV"]) == pytest.approx((0.08, 0.14))
    assert found["warnings"] == []


def test_points_of_one_search_are_no_independent_ones(tmp_path: Path) -> None:
    """All the spread is between searches, so that a hundred points of two searches are worth two."""
    first = write_collected(tmp_path / "a", *[0.1] * 50)
    second = write_collected(tmp_path / "b", *[0.14] * 50)
    row = correction_averages([first, second])["species"]["*CO"]
    assert row["points"] == 100
    assert row["standard_error_eV"] == pytest.approx(np.std([0.1, 0.14], ddof=1) / math.sqrt(2))
    alone = correction_averages([write_collected(tmp_path / "c", 0.1, 0.2)])["species"]["*CO"]
    assert alone["standard_error_eV"] == pytest.approx(0.05)


def test_several_adsorbates_are_averaged_by_themselves(tmp_path: Path) -> None:
    folders = [write_collected(tmp_path / name, value) for name, value in (("a", 0.1), ("b", 0.2))]
    folders += [
        write_collected(tmp_path / "c", -0.3, adsorbate="*OH", gas_per_atom_eV={"O": -7.2, "H": -3.5})
    ]
    found = correction_averages(folders)
    assert found["species_eV"] == pytest.approx({"*CO": 0.15, "*OH": -0.3})
    assert found["gas_per_atom_eV"] == {"C": -7.3, "O": -7.2, "H": -3.5}
    assert found["species"]["*OH"]["standard_error_eV"] is None
    assert any("*OH: the correction is of one result of DFT" in text for text in found["warnings"])


def test_a_wide_spread_and_a_small_mean_are_told(tmp_path: Path) -> None:
    folders = [write_collected(tmp_path / name, value) for name, value in (("a", -0.3), ("b", 0.25))]
    told = correction_averages(folders)["warnings"]
    assert "spreads from -0.300 to +0.250 eV" in told[0]
    assert f"{tmp_path / 'a'} has -0.300 eV and {tmp_path / 'b'} +0.250 eV" in told[0]
    assert "cannot be told from none" in told[1]
    copied = shutil.copytree(tmp_path / "a", tmp_path / "copy")
    found = correction_averages([tmp_path / "a", copied])
    assert found["species"]["*CO"]["points"] == 1
    assert "one result of DFT" in found["warnings"][0]
    warned = write_collected(tmp_path / "c", 0.1, 0.1, warnings=["relaxations have not ended"])
    assert correction_averages([warned])["warnings"] == [f"{warned}: relaxations have not ended"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL | {"checkpoint_sha256": "b"}}, "have different checkpoints"),
        ({"model": MODEL | {"adapter_sha256": "b"}}, "have different adapters"),
        ({"model": MODEL | {"energy_kind": "adsorption"}}, "have different kinds of energy"),
        ({"model": MODEL | {"identity": {"x": 2}}}, "different models, or settings of the model's energies"),
        ({"model": MODEL | {"gas": {"source": "given"}}}, "different gas references of the model"),
        ({"gas_per_atom_eV": {"C": -7.3, "O": -7.0}}, "different gas references of DFT"),
        ({"dft_settings": {"functional": "PBE"}}, "functional is RPBE in .* and PBE in"),
        ({"dft_energy": "total"}, "compares with total energies of DFT"),
        ({"schema": "adsorption-search/1"}, "no record of adsorption collect"),
        ({"model": None}, "earlier version or broken"),
        ({"ranking": [{"model_eV": 1.0, "dft_eV": 2.0}]}, "earlier version or broken"),
        ({"ranking": [{"model_eV": 1, "dft_eV": 99, "in_correction": True}]}, "the correction of"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    folders = [write_collected(tmp_path / "a", 0.1), write_collected(tmp_path / "b", 0.2, **changes)]
    with pytest.raises(InputError, match=message):
        correction_averages(folders)


def test_what_is_no_search(tmp_path: Path) -> None:
    first = write_collected(tmp_path / "a", 0.1)
    with pytest.raises(InputError, match="is given twice"):
        correction_averages([first, first / "collect.json"])
    with pytest.raises(InputError, match="run adsorption collect for this search first"):
        correction_averages([tmp_path])
    (first / "collect.json").write_text("{")
    with pytest.raises(InputError, match=r"collect.json"):
        correction_averages([first])


def test_from_two_searches_to_a_corrected_energy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EMT is the model, and EMT with 0.2 eV more for the adsorbate stands for DFT."""
    common = ["--calculator", "emt", "--adsorbate", "*O", "--gas", "O=4.6", "--fmax", "0.1"]
    common += ["--placements", "1", "--check-minima", "0", "--size", "2x2x3"]
    for slab, error in (("Cu111", 0.2), ("Ni111", 0.26)):
        folder = tmp_path / slab
        assert run_command("adsorption search", *common, "--slab", slab, "--out", folder) == 0
        for row in json.loads((folder / "dft" / "ledger.json").read_text())["asked"]:
            atoms = read(folder / "dft" / row["folder"] / "POSCAR")
            atoms.calc = EMT()
            energy = atoms.get_potential_energy() + (error if row["id"] != "slab" else 0.0)
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
            write(folder / "dft" / row["folder"] / "result.traj", atoms)
        assert run_command("adsorption corrections", folder, "--out", tmp_path / "no.json") == 2
        assert "run adsorption collect for this search first" in capsys.readouterr().err
        assert run_command("adsorption collect", "--search", folder) == 0
        assert run_command("adsorption corrections", folder, "--out", tmp_path / "no.json") == 2
        assert "--gas" in capsys.readouterr().err
        assert run_command("adsorption collect", "--search", folder, "--gas", "O=4.6") == 0
    out = tmp_path / "corrections.json"
    words = ["adsorption corrections", tmp_path / "Cu111", tmp_path / "Ni111", "--out", out]
    capsys.readouterr()
    assert run_command(*words, "--json") == 0
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert {"schema", "command", "commit", "checkpoint_sha256", "seconds"} <= set(record)
    rows = record["species"]["*O"]["by_search"]
    assert [row["correction_eV"] for row in rows] == pytest.approx([0.2, 0.26], abs=1e-3)
    assert run_command(*words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run_command(*words, "--overwrite") == 0
    assert "0.2" in capsys.readouterr().out
    assert run_command(*words[:-1], tmp_path / "Cu111" / "collect.json", "--overwrite") == 2
    corrections = Corrections.read(out)
    assert corrections.species == record["species_eV"]
    corrected = find_adsorption_energy(
        "Cu111", "*O", EMT(), placements=1, steps=0, gas_per_atom={"O": 4.6}, corrections=corrections
    )
    assert corrected.record["settings"]["corrections"]["species_eV"] == record["species_eV"]
    with pytest.raises(InputError, match="corrects another model than this one"):
        find_adsorption_energy("Cu111", "*O", EMT(asap_cutoff=True), placements=1, corrections=corrections)
