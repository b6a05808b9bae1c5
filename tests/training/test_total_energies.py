"""Total energies from raw frames to the calculator: references fitted, trained with, carried along."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.io import read
from command_line import run_script_file

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from equiformer2.checkpoint import load_checkpoint
from equiformer2.inference import EquiformerV2Calculator
from equiformer2.training.configuration import parse
from equiformer2.training.run import train

RAW = Path(__file__).parents[2] / "data" / "oc20_trajs"
SYSTEMS = ["random1447590", "random1000100", "random1000120"]


@pytest.fixture(scope="module")
def totals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few frames of three relaxations with their DFT total energies."""
    path = tmp_path_factory.mktemp("totals") / "totals.lmdb"
    options = PreprocessOptions(energy_kind="total", frames=4)
    preprocess(RAW, path, options, systems=SYSTEMS, num_workers=1)
    return path


@pytest.mark.slow
def test_references_are_fitted_trained_with_and_used(
    totals: Path,
    tmp_path: Path,
    tiny_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "references.npz"
    assert run_script_file("fit_references", "--data", totals, "--out", out, "--num-workers", 1) == 0
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed.partition("training run:\n")[2])["data"]["normalizers"]
    record = json.loads(out.with_suffix(".json").read_text())
    assert settings["energy_std"] == pytest.approx(record["residual"]["std"], rel=1e-5)
    assert record["frames"] == 12
    assert {row["element"] for row in record["elements"]} >= {"C", "H"}

    config = tmp_path / "normalizers.yaml"
    config.write_text(yaml.safe_dump({"data": {"normalizers": settings}}))
    kept = [
        argument
        for argument in tiny_arguments
        if not argument.startswith(("--data.train", "--data.val", "--data.energy"))
    ]
    folder = train(
        parse(
            [
                f"--config={config}",
                *kept,
                f"--data.train={totals}",
                f"--data.val={totals}",
                f"--runs_dir={tmp_path}",
                "--trainer.max_steps=2",
                "--data.batch_size=2",
                "--name=total",
            ]
        )
    )
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert checkpoint.energy_kind == "total"
    with np.load(out) as file:
        references = torch.from_numpy(file["coeff"])
    assert checkpoint.normalizers.linear_references is not None
    assert torch.equal(checkpoint.normalizers.linear_references, references)

    atoms = read(RAW / f"{SYSTEMS[0]}.extxyz.xz", index=-1, format="extxyz")
    assert isinstance(atoms, Atoms)
    total = atoms.get_potential_energy()
    atoms.calc = EquiformerV2Calculator(checkpoint)
    assert atoms.calc.energy_kind == "total"
    own_part = settings["energy_std"] * 5 + abs(settings["energy_mean"])
    assert abs(atoms.get_potential_energy() - references[atoms.numbers].sum().item()) < own_part
    assert abs(atoms.get_potential_energy() - total) < abs(total) / 10

    # Fine-tuning on energies with another zero, which the checkpoint's normalizers are not of.
    shifted = tmp_path / "shifted.lmdb"
    with LmdbWriter(shifted, "total") as writer:
        for data in OC20Lmdb(totals):
            data.energy = data.energy - 5000.0
            writer.write(data)
    arguments = [*kept, f"--data.train={shifted}", f"--data.val={shifted}", f"--runs_dir={tmp_path}"]
    start = f"--init_from={folder / 'checkpoints' / 'last.pt'}"
    with pytest.raises(DataError, match=r"shifted\.lmdb: with the normalizers in use .* give data\.normal"):
        train(parse([*arguments, start, "--name=tuned"]))


@pytest.mark.slow
def test_evaluation_refuses_energies_of_the_other_kind(
    totals: Path,
    tmp_path: Path,
    tiny_arguments: list[str],
) -> None:
    """Validation and evaluation data that are called adsorption energies and hold total ones."""
    wrong = tmp_path / "wrong.lmdb"
    with LmdbWriter(wrong, "adsorption") as writer:
        for data in OC20Lmdb(totals):
            writer.write(data)
    with pytest.raises(DataError, match=r"wrong\.lmdb: declared as adsorption"):
        train(parse([*tiny_arguments, f"--data.val={wrong}", f"--runs_dir={tmp_path}", "--name=bad"]))
    folder = train(
        parse(
            [
                *tiny_arguments,
                f"--runs_dir={tmp_path}",
                "--trainer.max_steps=1",
                "--data.batch_size=2",
                "--name=adsorption",
            ]
        )
    )
    status = run_script_file(
        "evaluate",
        *("--checkpoint", folder / "checkpoints" / "last.pt", "--data", wrong, "--out", tmp_path / "o.json"),
    )
    assert status == 2
    assert not (tmp_path / "o.json").exists()
