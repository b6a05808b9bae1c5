"""A tiny model trained end to end on genuine OC20 frames, evaluated and continued."""

import csv
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.training.configuration import parse
from equiformer2.training.evaluation import (
    average,
    draw_figures,
    evaluate,
    open_dataset,
    report,
)
from equiformer2.training.folder import WholeFiles
from equiformer2.training.metrics import ENERGY_METRICS
from equiformer2.training.prediction import predict_dataset, write_predictions
from equiformer2.training.run import RunConfig, train
from tests.disk import full_disk
from tests.hooks import with_hooks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first_run(runs: Path, tiny_arguments: list[str]) -> Path:
    return train(
        parse([*tiny_arguments, f"--runs_dir={runs}", "--name=first", "--checkpoint_every_n_steps=3"])
    )


def train_losses(folder: Path) -> dict[int, str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


def same_weights(one: Path, other: Path) -> bool:
    left, right = (torch.load(path, weights_only=True)["weights"] for path in (one, other))
    return all(torch.equal(value, right[kind][name]) for kind in left for name, value in left[kind].items())


def test_the_folder_holds_everything(first_run: Path) -> None:
    for name in (
        "config.yaml",
        "log.txt",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "figures/loss.png",
        "figures/parity_energy.png",
        "figures/parity_forces.png",
    ):
        assert (first_run / name).stat().st_size > 0, name
    assert not list(first_run.rglob("*.tmp"))
    log = (first_run / "log.txt").read_text()
    assert "val energy MAE" in log
    assert not [line for line in log.splitlines() if "litlogger" in line or "TPU available" in line]


def test_it_learns_and_logs(first_run: Path) -> None:
    with (first_run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    forces = [float(row["val/forces_mae"]) for row in rows if row["val/forces_mae"]]
    assert len(forces) == 2
    assert forces[1] < forces[0]
    assert len(train_losses(first_run)) == 8


def test_the_native_checkpoint_keeps_both_sets_of_weights(first_run: Path) -> None:
    raw, averaged = (
        load_checkpoint(first_run / "checkpoints/last.pt", weights=w) for w in ("raw", "averaged")
    )
    assert raw.energy_kind == "adsorption"
    assert raw.normalizers.energy.mean == pytest.approx(2.4877, abs=1e-3)
    assert raw.provenance["step"] == 8
    different = [
        not torch.equal(value, averaged.model.state_dict()[name])
        for name, value in raw.model.state_dict().items()
        if value.is_floating_point()
    ]
    assert any(different)


@pytest.mark.slow
def test_the_saved_config_repeats_the_run(first_run: Path, runs: Path) -> None:
    arguments = ["--config", str(first_run / "config.yaml"), "--name=again"]
    again = train(parse(arguments))
    assert train_losses(again) == train_losses(first_run)


def test_evaluation_agrees_with_the_runs_validation(first_run: Path, lmdb_path: Path, tmp_path: Path) -> None:
    predictor = Predictor(first_run / "checkpoints/last.pt")
    evaluation = evaluate(predictor, open_dataset(lmdb_path, predictor, "adsorption"), batch_size=7)
    validation = predictor.checkpoint.provenance["validation"]
    for name, value in validation.items():
        assert evaluation.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    energies = evaluation.energy_pairs[:, 0]
    assert (evaluation.structures, evaluation.systems) == (20, 1)
    assert evaluation.baselines["system_mean_energy"]["energy_mae"] == pytest.approx(
        np.abs(energies - energies.mean()).mean()
    )
    data = OC20Lmdb(lmdb_path)
    free = torch.cat([data[i].forces[~data[i].fixed] for i in range(20)])
    assert evaluation.baselines["zero_force"]["forces_mae"] == pytest.approx(
        free.abs().mean().item(), rel=1e-5
    )
    numbers = report(predictor, {"val.lmdb": evaluation})
    assert numbers["average"]["metrics"] == numbers["datasets"]["val.lmdb"]["metrics"]
    assert all(path.exists() for path in draw_figures(tmp_path, {"val.lmdb": evaluation}))


def test_kinds_of_energy_are_not_mixed(first_run: Path, lmdb_path: Path) -> None:
    predictor = Predictor(first_run / "checkpoints/last.pt")
    with pytest.raises(InputError, match="predicts adsorption energies"):
        open_dataset(lmdb_path, predictor, "total")
    with pytest.raises(InputError, match="give --energy-kind"):
        open_dataset(lmdb_path, predictor, None)


@pytest.mark.parametrize("ending", ["npz", "json"])
def test_predictions_are_written(first_run: Path, lmdb_path: Path, tmp_path: Path, ending: str) -> None:
    predictor = Predictor(first_run / "checkpoints/last.pt")
    arrays = predict_dataset(predictor.predict_batches, OC20Lmdb(lmdb_path))
    target = tmp_path / f"predictions.{ending}"
    write_predictions(target, arrays)
    stored = np.load(target) if ending == "npz" else json.loads(target.read_text())
    assert np.asarray(stored["forces"]).shape == (int(np.sum(stored["natoms"])), 3)
    assert list(stored["sid"]) == ["1981709"] * 20
    np.testing.assert_allclose(stored["energy"], arrays["energy"])


def test_predictions_that_are_not_numbers_are_no_json(tmp_path: Path) -> None:
    target = tmp_path / "predictions.json"
    arrays = {"energy": np.array([1.0, np.nan]), "natoms": np.array([2, 3])}
    arrays |= {"sid": np.array(["a", "b"]), "fid": np.array([0, 4])}
    with pytest.raises(InputError, match=r"predictions\.json was not written: the energy of structure b/4"):
        write_predictions(target, arrays)
    assert not target.exists()


def rewrite(source: Path, target: Path, change: Callable[[int, Data], None], count: int = 4) -> Path:
    """The first `count` records of an LMDB, changed."""
    records = OC20Lmdb(source)
    with LmdbWriter(target, "adsorption") as writer:
        for index in range(count):
            record = records[index]
            change(index, record)
            writer.write(record)
    return target


def test_data_without_free_atoms_have_no_force_metrics(
    first_run: Path, lmdb_path: Path, tmp_path: Path
) -> None:
    held = rewrite(lmdb_path, tmp_path / "held.lmdb", lambda _, record: record.fixed.fill_(True))
    predictor = Predictor(first_run / "checkpoints/last.pt")
    found = evaluate(predictor, open_dataset(held, predictor, None))
    assert set(found.metrics) == set(ENERGY_METRICS)
    assert set(found.baselines) == {"mean_energy", "data_mean_energy", "system_mean_energy"}
    assert "forces are not judged, because every atom of these data is fixed" in found.table()
    free = evaluate(predictor, open_dataset(lmdb_path, predictor, "adsorption"))
    assert "not judged" not in free.table()
    for pair in ([found, free], [free, found]):
        assert set(average(pair)["metrics"]) == set(ENERGY_METRICS)
    numbers = report(predictor, {"held": found, "free": free})
    assert numbers["datasets"]["held"]["free_atoms"] == 0


@pytest.mark.slow
def test_a_run_that_fails_at_its_first_step_names_the_structure_and_leaves_its_name_free(
    tiny_arguments: list[str], runs: Path, lmdb_path: Path, tmp_path: Path
) -> None:
    def spoil(index: int, record: Data) -> None:
        if index == 2:
            record.pos[7] = record.pos[4]

    wrong = rewrite(lmdb_path, tmp_path / "wrong.lmdb", spoil)
    name = f"1981709/{OC20Lmdb(lmdb_path)[2].fid}"
    arguments = [*tiny_arguments, f"--runs_dir={runs}", "--name=unlucky", "--trainer.max_epochs=1"]
    with pytest.raises(InputError, match=rf"structure {name} \(sid/fid\): atoms 4 and 7 of structure \d"):
        train(parse([*arguments, f"--data.train={wrong}"]))
    assert (runs / "unlucky" / "config.yaml").exists()
    folder = train(parse(arguments))
    assert str(wrong) not in (folder / "config.yaml").read_text() + (folder / "log.txt").read_text()
    with pytest.raises(InputError, match="holds a run already"):
        train(parse(arguments))


@pytest.mark.parametrize("setting", ["limit_train_batches=0.01"])
def test_limits_that_do_not_fit_the_data_are_one_sentence(
    setting: str, tiny_arguments: list[str], runs: Path
) -> None:
    with pytest.raises(InputError, match=f"trainer: .*{setting.split('=')[0]}"):
        train(parse([*tiny_arguments, f"--runs_dir={runs}", "--name=misfit", f"--trainer.{setting}"]))


def test_no_run_overwrites_another(first_run: Path, tiny_arguments: list[str], runs: Path) -> None:
    before = (first_run / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        train(parse([*tiny_arguments, f"--runs_dir={runs}", "--name=first"]))
    assert (first_run / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_fine_tuning_starts_from_the_weights_and_units(
    first_run: Path, tiny_arguments: list[str], runs: Path
) -> None:
    arguments = [*tiny_arguments, f"--runs_dir={runs}", f"--init_from={first_run / 'checkpoints/last.pt'}"]
    still = ["--optim.lr=1e-12", "--optim.weight_decay=0", "--trainer.max_epochs=1", "--model.alpha_drop=0"]
    tuned = train(parse([*arguments, *still, "--name=tuned"])) / "checkpoints/last.pt"
    start = load_checkpoint(first_run / "checkpoints/last.pt")
    after = load_checkpoint(tuned, weights="raw")
    assert after.normalizers == start.normalizers
    for name, value in start.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_stopped_fine_tuning_says_how_it_goes_on(
    first_run: Path, tiny_arguments: list[str], runs: Path
) -> None:
    def stopped(arguments: list[str]) -> RunConfig:
        stop = {"on_train_batch_start": lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        return with_hooks(parse(arguments), **stop)

    start = f"--init_from={first_run / 'checkpoints/last.pt'}"
    arguments = [*tiny_arguments, f"--runs_dir={runs}", "--name=stopped", "--trainer.max_epochs=1", start]
    folder = runs / "stopped"
    with pytest.raises(SystemExit):
        train(stopped(arguments))
    assert list(train_losses(folder)) == [0]
    hint = re.findall(r"step 1; (--\w+ \w+) goes on", (folder / "log.txt").read_text())[0]
    with pytest.raises(InputError, match=f"continue it with {hint}"):
        train(parse(arguments))
    # Stopped again at the next step, so that there is a checkpoint before the last one.
    with pytest.raises(SystemExit):
        train(stopped([*arguments, *hint.split()]))
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(InputError, match="give --ckpt_path ") as damaged:
        train(parse([*arguments, *hint.split()]))
    train(parse([*arguments, *str(damaged.value).partition("give ")[2].split()]))
    assert list(train_losses(folder)) == [0, 1, 2, 3]


def test_another_run_is_not_resumed_from_other_weights(
    first_run: Path, tiny_arguments: list[str], runs: Path
) -> None:
    both = [f"--init_from={first_run}/checkpoints/last.pt", f"--ckpt_path={first_run}/checkpoints/last.ckpt"]
    with pytest.raises(InputError, match="give one of them"):
        train(parse([*tiny_arguments, f"--runs_dir={runs}", "--name=both", *both]))
    assert not (runs / "both").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("smooth_cutoff=true", "model.smooth_cutoff was False and is now True"),
        ("max_radius=4.5", "model.max_radius was 3.5 and is now 4.5"),
    ],
)
def test_settings_that_show_in_no_tensor_do_not_change_on_resuming(
    setting: str, message: str, first_run: Path, tiny_arguments: list[str], runs: Path
) -> None:
    resumed = [f"--runs_dir={runs}", "--name=first", "--ckpt_path=last", "--trainer.max_epochs=3"]
    with pytest.raises(InputError, match=f"trains another model: {message}; .*config.yaml"):
        train(parse([*tiny_arguments, *resumed, f"--model.{setting}"]))


def test_fine_tuning_refuses_another_model(first_run: Path, tiny_arguments: list[str], runs: Path) -> None:
    arguments = [*tiny_arguments, f"--runs_dir={runs}", "--name=other", "--model.num_layers=1"]
    with pytest.raises(InputError, match=r"model\.num_layers is 2 there and 1 here"):
        train(parse([*arguments, f"--init_from={first_run / 'checkpoints/last.pt'}"]))


@pytest.mark.parametrize("without", ["forces of all", "forces of one"])
def test_records_without_forces_are_named(
    without: str, tiny_arguments: list[str], runs: Path, lmdb_path: Path, tmp_path: Path
) -> None:
    def strip(index: int, record: Data) -> None:
        if without == "forces of all" or index == 2:
            del record["forces"]

    path = rewrite(lmdb_path, tmp_path / "part.lmdb", strip)
    message = "has no forces to train on" if without == "forces of all" else "key 2: the record has no forces"
    with pytest.raises((InputError, DataError), match=message):
        train(parse([*tiny_arguments, f"--runs_dir={runs}", f"--name={without}", f"--data.train={path}"]))


def test_a_native_checkpoint_is_not_a_place_to_resume(
    first_run: Path, tiny_arguments: list[str], runs: Path
) -> None:
    arguments = [*tiny_arguments, f"--runs_dir={runs}", "--name=wrong"]
    with pytest.raises(InputError, match="use init_from"):
        train(parse([*arguments, f"--ckpt_path={first_run / 'checkpoints/last.pt'}"]))
    with pytest.raises(InputError, match="there is no checkpoint"):
        train(parse([*arguments, "--ckpt_path=last"]))


@pytest.mark.slow
def test_a_time_limit_ends_the_schedule_too(tiny_arguments: list[str], runs: Path) -> None:
    limit = ["--trainer.max_time=00:00:00:03", "--trainer.max_epochs=null", "--name=timed"]
    folder = train(parse([*tiny_arguments, f"--runs_dir={runs}", *limit]))
    with (folder / "metrics.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    assert rates[-1] < 0.5 * max(rates)
    assert (folder / "checkpoints/best.pt").exists()


@pytest.mark.slow
def test_a_run_that_ends_in_mid_epoch_is_validated(tiny_arguments: list[str], runs: Path) -> None:
    limit = ["--trainer.max_steps=2", "--trainer.max_epochs=-1", "--name=steps"]
    folder = train(parse([*tiny_arguments, f"--runs_dir={runs}", *limit]))
    native = load_checkpoint(folder / "checkpoints/last.pt")
    assert native.provenance["step"] == 2
    assert native.provenance["validation"]["forces_mae"] > 0
    assert (folder / "figures/parity_forces.png").exists()
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    longer = ["--trainer.max_steps=3", "--trainer.max_epochs=-1", "--name=steps", "--ckpt_path=last"]
    train(parse([*tiny_arguments, f"--runs_dir={runs}", *longer]))
    assert sorted(train_losses(folder)) == [0, 1, 2]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"global_step": 1}, target)
    with full_disk(100), pytest.raises(OSError, match=r"last\.ckpt"):
        WholeFiles().save_checkpoint({"global_step": 2}, target)
    assert torch.load(target, weights_only=True) == {"global_step": 1}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_weights_and_biases_offline(tiny_arguments: list[str], runs: Path) -> None:
    pytest.importorskip("wandb")
    arguments = ["--wandb.project=test", "--wandb.offline=true", "--trainer.max_epochs=1", "--name=wandb"]
    folder = train(parse([*tiny_arguments, f"--runs_dir={runs}", *arguments]))
    assert list(folder.glob("wandb/offline-run-*"))
    assert (folder / "metrics.csv").exists()


@pytest.mark.slow
def test_bf16_energy_only_with_checkpointing_and_accumulation(tiny_arguments: list[str], runs: Path) -> None:
    arguments = [
        "--trainer.precision=bf16-mixed",
        "--model.regress_forces=false",
        "--task.activation_checkpointing=true",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_epochs=1",
        "--name=energies",
    ]
    folder = train(parse([*tiny_arguments, f"--runs_dir={runs}", *arguments]))
    validation = load_checkpoint(folder / "checkpoints/best.pt").provenance["validation"]
    assert set(validation) == {"energy_mae", "energy_mse", "energy_within_threshold"}
    assert not (folder / "figures/parity_forces.png").exists()
