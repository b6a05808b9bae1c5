"""Steps of the demo, each a call of a function that users call themselves."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets_oc20 import OC20Lmdb
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from datasets_oc20.raw_release import read_references
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.energy import AdsorptionResult, adsorption_energy
from equiformer2.demo.plan import LARGE_SYSTEMS, UNSEEN_SYSTEMS, UNSEEN_TEACHER_SYSTEMS, DemoPlan
from equiformer2.inference import EquiformerV2Calculator, Predictor
from equiformer2.inference.structure_files import read_structure
from equiformer2.training import configuration as cli
from equiformer2.training import evaluation
from equiformer2.training.evaluation import Evaluation
from equiformer2.training.run import train


@dataclass(frozen=True)
class DemoData:
    """LMDB files of the demo, all with adsorption energies; the teacher's labels are not DFT."""

    teacher: Path
    teacher_unseen: Path
    train: Path
    later: Path
    unseen: Path


@dataclass(frozen=True)
class Judged:
    """Errors of a model on one dataset, beside those of answers that ignore the structure.

    Attributes:
        result: metrics and baselines of `equiformer2.training.evaluation`.
        mean_energy: energy MAE of the mean energy of the training frames, eV.
        system_mean: energy MAE of every system's own mean over its training frames, eV; None for
            unseen systems.
    """

    result: Evaluation
    mean_energy: float
    system_mean: float | None


@dataclass(frozen=True)
class Relaxed:
    """A relaxation by the model beside DFT's; energies in eV; `seen`: frames of DFT's were trained on."""

    system: str
    seen: bool
    result: AdsorptionResult
    dft_start: float
    dft_relaxed: float


def prepare(raw: AnyPath, folder: AnyPath, plan: DemoPlan) -> DemoData:
    """Convert raw relaxations to LMDB files.

    Args:
        raw: folder with `teacher` and `oc20_trajs`.
        folder: a folder that does not exist yet.
        plan: sizes.

    Returns:
        The files.
    """
    raw, folder = Path(raw), Path(folder)
    data = DemoData(
        *(folder / f"{name}.lmdb" for name in ("teacher", "teacher_unseen", "train", "later", "unseen"))
    )
    folder.mkdir(parents=True)
    preprocess(raw / "teacher", data.teacher, exclude=UNSEEN_TEACHER_SYSTEMS)
    preprocess(raw / "teacher", data.teacher_unseen, systems=UNSEEN_TEACHER_SYSTEMS)
    options = PreprocessOptions(
        min_force=plan.min_force,
        frames=plan.frames,
        later_fraction=0.2,
        later_gap=0.04,
        later_tail=0.25,
        later_frames=plan.later_frames,
    )
    preprocess(
        raw / "oc20_trajs",
        data.train,
        options,
        later_out=data.later,
        exclude=(*UNSEEN_SYSTEMS, *LARGE_SYSTEMS),
    )
    options = PreprocessOptions(min_force=plan.min_force, frames=plan.unseen_frames)
    preprocess(raw / "oc20_trajs", data.unseen, options, systems=UNSEEN_SYSTEMS)
    return data


def train_model(config: AnyPath, data: DemoData, folder: AnyPath, plan: DemoPlan) -> tuple[Path, Path]:
    """Train on the teacher's labels, then on DFT frames.

    Args:
        config: YAML file of the run.
        data: LMDB files of `prepare`.
        folder: folder of the runs.
        plan: sizes; its training times are in seconds.

    Returns:
        Both run folders.
    """
    config, folder = Path(config), Path(folder)

    def run(name: str, train_data: Path, val_data: Path, seconds: int, *options: str) -> Path:
        arguments = ["--config", str(config), "--runs_dir", str(folder), "--name", name]
        arguments += ["--data.train", str(train_data), "--data.val", str(val_data)]
        arguments += ["--trainer.max_time", f"00:00:{seconds // 60:02d}:{seconds % 60:02d}"]
        return train(cli.parse([*arguments, *options]))

    first = run("teacher", data.teacher, data.teacher_unseen, plan.teacher_time)
    start = "--init_from", str(first / "checkpoints" / "last.pt")
    # The energies of a handful of slabs differ by much more than the energies along one relaxation.
    coefficient = "--task.energy_coefficient", "60"
    return first, run("dft", data.train, data.later, plan.dft_time, *start, *coefficient)


def judge(predictor: Predictor, data: DemoData) -> dict[str, Judged]:
    """Compute errors on later frames of the training systems and on systems never seen, by dataset."""

    def energies_of(dataset: OC20Lmdb) -> dict[str, list[float]]:
        energies: dict[str, list[float]] = {}
        for index in range(len(dataset)):
            record = dataset[index]
            energies.setdefault(str(record.sid), []).append(float(record.energy))
        return energies

    def mae(energies: dict[str, list[float]], guess: dict[str, float]) -> float:
        errors = [abs(value - guess[sid]) for sid, values in energies.items() for value in values]
        return float(np.mean(errors))

    train_energies = energies_of(OC20Lmdb(data.train))
    overall = float(np.mean([energy for energies in train_energies.values() for energy in energies]))
    judged = {}
    for name, path in (
        ("later frames of the trained systems", data.later),
        ("systems never seen", data.unseen),
    ):
        dataset = evaluation.open_dataset(path, predictor, None)
        energies = energies_of(dataset)
        known = {sid: float(np.mean(train_energies[sid])) for sid in energies if sid in train_energies}
        judged[name] = Judged(
            evaluation.evaluate(predictor, dataset),
            mae(energies, dict.fromkeys(energies, overall)),
            mae(energies, known) if len(known) == len(energies) else None,
        )
    return judged


def relax_with_model(
    predictor: Predictor, raw: AnyPath, folder: AnyPath, plan: DemoPlan, systems: tuple[str, ...]
) -> list[Relaxed]:
    """Relax the first frame of DFT relaxations with the model.

    Args:
        predictor: the trained model.
        raw: folder with `oc20_trajs`.
        folder: folder for one folder per system.
        plan: sizes.
        systems: names of the relaxations.

    Returns:
        One relaxation per system, in that order.
    """
    raw, folder = Path(raw), Path(folder)
    references = read_references(raw / "oc20_trajs")
    relaxed = []
    for system in systems:
        path = raw / "oc20_trajs" / f"{system}.extxyz.xz"
        start, end = read_structure(path, 0), read_structure(path, -1)
        target = folder / system
        target.mkdir(parents=True)
        result = adsorption_energy(
            start,
            EquiformerV2Calculator(predictor.checkpoint),
            optimizer="FIRE",
            steps=plan.relaxation_steps,
            folder=target,
            progress=True,
        )
        dft = [atoms.get_potential_energy() - references[system] for atoms in (start, end)]
        relaxed.append(Relaxed(system, system not in UNSEEN_SYSTEMS, result, *dft))
    return relaxed
