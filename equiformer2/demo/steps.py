"""Steps of the demo, each a function or a command that users call themselves."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from datasets_oc20.preprocess import PreprocessOptions, preprocess
from datasets_oc20.raw_release import read_references
from datasets_oc20.structure_files import read_structure
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.energy import AdsorptionResult, adsorption_energy
from equiformer2.demo.background import BackgroundCommand, wait_for
from equiformer2.demo.plan import (
    LARGE_SYSTEMS,
    RELAXED_SYSTEMS,
    SCRATCH_LEARNING_RATE,
    TEACHER_END,
    TEACHER_ENERGIES,
    TEACHER_SYSTEMS,
    UNSEEN_SYSTEMS,
    DemoPlan,
)
from equiformer2.files import read_json
from equiformer2.inference import EquiformerV2Calculator, Predictor, atoms_to_data
from equiformer2.model.parameters import count_parameters
from equiformer2.pruning import count_macs
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.training import evaluation
from equiformer2.training.evaluation import Evaluation

LABELS = "OC20 DFT (VASP, RPBE)"


@dataclass(frozen=True)
class DemoData:
    """LMDB files of the demo: DFT frames to train on, few of them to distill on, and of unseen systems."""

    train: Path
    distill: Path
    unseen: Path


@dataclass(frozen=True)
class Network:
    """A network of the demo and its errors on the unseen systems.

    Attributes:
        title: name in tables.
        checkpoint: its file.
        steps: optimizer steps of its last training.
        parameters: how many.
        result: metrics and baselines of `equiformer2.training.evaluation`.
        unseen_elements: elements of the unseen systems that it was not trained on, where it lists them.
        macs: multiply-accumulates of the structure that is timed.
        milliseconds: median time of a force call for that structure, ms.
    """

    title: str
    checkpoint: Path
    steps: int
    parameters: int
    result: Evaluation
    unseen_elements: tuple[str, ...] = ()
    macs: float = np.nan
    milliseconds: float = np.nan


@dataclass(frozen=True)
class Relaxed:
    """A relaxation by a network, beside what is known of it.

    Attributes:
        system: name of the system.
        network: title of the network.
        result: relaxation and energy, eV.
        dft: adsorption energy of the system relaxed by DFT, eV; None where it is not known.
        teacher: the same of SevenNet-0's own relaxation, eV; None where it is not known.
        imitates: whose labels the network has learned last, `dft` or `teacher`.
        start: adsorption energy of the start structure by whoever labelled it, eV.
    """

    system: str
    network: str
    result: AdsorptionResult
    dft: float | None
    teacher: float | None
    imitates: Literal["dft", "teacher"]
    start: float

    @property
    def known(self) -> float | None:
        """The energy to compare with, by the method whose labels the network has learned last, eV."""
        return self.dft if self.imitates == "dft" else self.teacher


def prepare(raw: AnyPath, folder: AnyPath, plan: DemoPlan) -> DemoData:
    """Convert raw relaxations to LMDB files.

    Args:
        raw: folder with `oc20_trajs`.
        folder: a folder that does not exist yet.
        plan: sizes.

    Returns:
        The files.
    """
    source, folder = Path(raw) / "oc20_trajs", Path(folder)
    data = DemoData(*(folder / f"{name}.lmdb" for name in ("train", "distill", "unseen")))
    folder.mkdir(parents=True)
    kept_back = (*UNSEEN_SYSTEMS, *LARGE_SYSTEMS)
    for target, frames, choice in (
        (data.train, plan.frames, {"exclude": kept_back}),
        (data.distill, plan.distillation_frames, {"exclude": kept_back}),
        (data.unseen, plan.unseen_frames, {"systems": UNSEEN_SYSTEMS}),
    ):
        options = PreprocessOptions(min_force=plan.min_force, frames=frames, labels=LABELS)
        preprocess(source, target, options, **choice)
    return data


def train_both(
    config: AnyPath, start: AnyPath, data: DemoData, folder: AnyPath, plan: DemoPlan
) -> tuple[Path, Path]:
    """Fine-tune a network and, at the same time, train one of the same size from random weights.

    Args:
        config: YAML file of the runs.
        start: checkpoint to fine-tune.
        data: LMDB files of `prepare`.
        folder: folder of the runs.
        plan: sizes; its training time is in seconds.

    Returns:
        Both run folders, the fine-tuned one first.
    """
    folder = Path(folder)
    limit = f"00:00:{plan.training_time // 60:02d}:{plan.training_time % 60:02d}"
    words: list[str | Path] = [
        "train",
        "--config",
        Path(config),
        "--runs_dir",
        folder,
        "--trainer.max_time",
        limit,
    ]
    words += ["--data.train", data.train, "--data.val", data.unseen, "--trainer.enable_progress_bar", "false"]
    # The labels are of another method: new references and scale, and heads that keep the forces in eV/Å.
    own: dict[str, list[str | Path]] = {"tuned": ["--init_from", Path(start), "--refit_normalizers", "true"]}
    own["scratch"] = ["--optim.lr", str(SCRATCH_LEARNING_RATE)]
    with contextlib.ExitStack() as stack:
        commands = [
            stack.enter_context(
                BackgroundCommand([*words, "--name", name, *more], folder / f"{name}.log", len(own))
            )
            for name, more in own.items()
        ]
        wait_for(commands, "training", plan.training_time + 30)
    return folder / "tuned", folder / "scratch"


def judge(title: str, checkpoint: AnyPath, data: DemoData) -> Network:
    """Compute the errors of a network on the systems that no training has seen."""
    checkpoint = Path(checkpoint)
    predictor = Predictor(checkpoint)
    dataset = evaluation.open_dataset(data.unseen, predictor, None)
    steps = predictor.checkpoint.provenance.get("step", 0)
    result = evaluation.evaluate(predictor, dataset)
    return Network(
        title,
        checkpoint,
        steps if isinstance(steps, int) else 0,
        count_parameters(predictor.checkpoint.config),
        result,
        tuple(predictor.unseen_elements),
    )


def relax_unseen(
    network: Network,
    raw: AnyPath,
    folder: AnyPath,
    plan: DemoPlan,
    systems: tuple[str, ...] = RELAXED_SYSTEMS,
    imitates: Literal["dft", "teacher"] = "dft",
) -> list[Relaxed]:
    """Relax the first frame of DFT relaxations of unseen systems with a network.

    Args:
        network: to relax with.
        raw: folder with `oc20_trajs`.
        folder: folder for one folder per system.
        plan: sizes.
        systems: names of the relaxations.
        imitates: whose labels the network has learned last.

    Returns:
        One relaxation per system, in that order.
    """
    source, folder = Path(raw) / "oc20_trajs", Path(folder)
    references = read_references(source)
    teacher = read_json(source / TEACHER_ENERGIES)["systems"]
    relaxed = []
    for system in systems:
        path = source / f"{system}.extxyz.xz"
        start, end = (
            read_structure(path, frame).get_potential_energy() - references[system] for frame in (0, -1)
        )
        result = _relax(network, path, folder / system, plan)
        theirs = teacher[system]["adsorption_energy_eV"] if system in teacher else None
        relaxed.append(Relaxed(system, network.title, result, end, theirs, imitates, start))
    return relaxed


def relax_teacher_systems(network: Network, raw: AnyPath, folder: AnyPath, plan: DemoPlan) -> list[Relaxed]:
    """Relax slabs that SevenNet-0 has relaxed with the network that was trained on its labels.

    Args:
        network: as shipped.
        raw: folder with `teacher_large/test`.
        folder: folder for one folder per system.
        plan: sizes.

    Returns:
        One relaxation per system of `TEACHER_SYSTEMS`.
    """
    source, folder = Path(raw) / "teacher_large" / "test", Path(folder)
    references = read_references(source)
    relaxed = []
    for system in TEACHER_SYSTEMS:
        path = source / f"{system}.extxyz.xz"
        start, end = (
            read_structure(path, frame).get_potential_energy() - references[system]
            for frame in (0, TEACHER_END)
        )
        result = _relax(network, path, folder / system, plan)
        relaxed.append(Relaxed(system, network.title, result, None, end, "teacher", start))
    return relaxed


def _relax(network: Network, path: Path, folder: Path, plan: DemoPlan) -> AdsorptionResult:
    """Relax the first frame of a file and return its adsorption energy."""
    folder.mkdir(parents=True)
    return adsorption_energy(
        read_structure(path, 0),
        EquiformerV2Calculator(network.checkpoint),
        steps=plan.relaxation_steps,
        folder=folder,
        progress=True,
    )


def distillation(
    student: AnyPath, teacher: AnyPath, config: AnyPath, data: DemoData, folder: AnyPath, plan: DemoPlan
) -> BackgroundCommand:
    """Start the distillation of a pruned network in a process of its own, beside this one."""
    folder = Path(folder)
    limit = f"--trainer.max_time=00:00:{plan.distillation_time // 60:02d}:{plan.distillation_time % 60:02d}"
    words: list[str | Path] = [
        "prune",
        "distill",
        "--student",
        Path(student),
        "--teacher",
        Path(teacher),
        "--out",
        folder,
    ]
    words += ["--data", data.distill, "--val", data.unseen, "--config", Path(config)]
    words += ["--", limit, "--trainer.max_epochs=-1", "--trainer.check_val_every_n_epoch=1000"]
    words += ["--trainer.enable_progress_bar=false"]
    return BackgroundCommand(words, folder.with_suffix(".log"), 2)


def timed(dense: Network, small: Network, raw: AnyPath, calls: int) -> tuple[Network, Network]:
    """Measure a force call of two networks in turns, and count its operations.

    Args:
        dense: the network before pruning.
        small: the network after it.
        raw: folder with `oc20_trajs`.
        calls: pairs of calls.

    Returns:
        Both, with the multiply-accumulates and milliseconds.
    """
    atoms = read_structure(Path(raw) / "oc20_trajs" / f"{UNSEEN_SYSTEMS[-1]}.extxyz.xz", 0)
    calculators = [EquiformerV2Calculator(network.checkpoint) for network in (dense, small)]

    def force_call(calculator: EquiformerV2Calculator) -> None:
        calculator.calculate(atoms, ["energy", "forces"])

    latency = compare_latency(lambda: force_call(calculators[1]), lambda: force_call(calculators[0]), calls)
    data, seconds = atoms_to_data(atoms), (latency.dense_seconds, latency.seconds)
    measured = []
    for network, calculator, time in zip((dense, small), calculators, seconds, strict=True):
        assert isinstance(calculator.predictor, Predictor)  # one checkpoint, no committee
        model = calculator.predictor.model
        macs = count_macs(model, len(atoms), len(model.build_graph(data).distances)).total
        measured.append(replace(network, macs=macs, milliseconds=1e3 * time))
    return measured[0], measured[1]
