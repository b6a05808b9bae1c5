"""From a folder of OUTCARs to a structure relaxed by the tuned model, in three commands."""

import json
import shutil
from pathlib import Path

from ase.io import read
from command_line import run_command

OUTCARS = Path(__file__).parents[1] / "data" / "own_data"


def test_from_a_folder_of_outcars_to_a_relaxed_structure(adsorption_checkpoint: Path, tmp_path: Path) -> None:
    folder, data, out = tmp_path / "calculations", tmp_path / "my.lmdb", tmp_path / "tuned"
    folder.mkdir()
    for number in (5, 6, 7):
        shutil.copy(OUTCARS / f"hfo2_OUTCAR_{number}.gz", folder / f"OUTCAR_{number}.gz")
    assert run_command("data import", folder, "--out", data) == 0
    words = ["--data", data, "--checkpoint", adsorption_checkpoint, "--out", out, "--reset-head"]
    assert run_command("finetune", *words, "--steps", 2, "--no-scratch") == 0
    record = json.loads((out / "finetune.json").read_text())
    assert record["energy_kind"] == "total"
    assert set(record["references_eV"]) == {"Hf", "O"}
    assert "easy case" in " ".join(record["decisions"])
    structure = tmp_path / "start.extxyz"
    read(folder / "OUTCAR_5.gz", format="vasp-out").write(structure)
    relaxed = tmp_path / "relaxed"
    words = ["--checkpoint", out / "model.pt", "--out", relaxed, "--steps", 2]
    assert run_command("relax", structure, *words) in (0, 3)
    assert json.loads((relaxed / "relaxation.json").read_text())["energy_kind"] == "total"
