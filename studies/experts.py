"""One network of experts for ten tasks against other ways to spend its time; its pruning and retrieval.

    python -m studies.experts                          # all rows that are not there yet, then the page
    python -m studies.experts --part joint --hours 2.5
    python -m studies.experts --collect                # only write the page of the rows that there are

Tasks are two kinds of labels (DFT frames of the bundled relaxations, teacher labels) times five groups of
elements (`studies.expert_tasks`). Parts, each resumable and runnable alone:

- `joint`: one network of experts for all tasks, --minutes of processor time.
- `single`: a plain network for every task; together they have the minutes of the joint run.
- `two_stage`: a plain network on all teacher frames for half of the minutes, then on all DFT frames.
- `prune`: experts of the joint networks kept by TCESS, usage frequency, REAP and at random, on frames of the
  task that were not learned; and frames of other tasks, which are to be flagged.
- `retrieve`: sets of experts for structures that were not learned, by the gate and by nearest composition;
  bytes read and memory.

Minutes become a number of optimizer steps by the time of the first steps, so a run that is continued takes
no longer. Every row is a file in --runs; rows that the page holds are not computed again. Averaged weights
are judged. Words after -- are keys of `equiformer2 train` for all runs.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20 import OC20Lmdb
from equiformer2.checkpoint.expert_files import ExpertContents, read_experts, write_experts
from equiformer2.errors import InputError
from equiformer2.experts import ExpertNetwork
from equiformer2.experts.prune import (
    PruneSettings,
    foreign_structures,
    measure,
    prune_experts,
    task_structures,
)
from equiformer2.experts.retrieve import ExpertStore
from equiformer2.experts.scores import METHODS
from equiformer2.experts.sets import PER
from equiformer2.files import read_json, write_json
from equiformer2.inference import Predictor
from equiformer2.script import run_script
from equiformer2.training.configuration import parse
from equiformer2.training.run import train
from studies.adapters import StepTimes
from studies.expert_page import report
from studies.expert_tasks import KINDS, TASKS, Sources, kind_of, prepare, task_file
from studies.results import Results, Row

PARTS = ("joint", "single", "two_stage", "prune", "retrieve")
MODEL = (
    *("--model.num_layers=2", "--model.sphere_channels=32", "--model.attn_hidden_channels=32"),
    *("--model.num_heads=4", "--model.attn_alpha_channels=8", "--model.attn_value_channels=8"),
    *("--model.ffn_hidden_channels=64", "--model.lmax=3", "--model.mmax=2", "--model.grid_resolution=8"),
    *("--model.edge_channels=32", "--model.num_distance_basis=128", "--model.max_neighbors=12"),
    *("--model.max_radius=8", "--model.alpha_drop=0", "--model.drop_path_rate=0"),
)
_TRAINING = (
    *("--optim.lr=1e-3", "--optim.warmup_epochs=0.3", "--task.ema_decay=0.99", "--data.batch_size=8"),
    *("--task.energy_coefficient=20", "--task.force_coefficient=100", "--trainer.limit_val_batches=0"),
    *("--trainer.max_epochs=-1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
)
_TIMED_STEPS, _UNTIMED_STEPS = 12, 2
_RANDOM_SEEDS = 3
_CACHED_NETWORKS = 4

Answer = Callable[[Batch], dict[str, Tensor]]


@dataclass
class Study:
    """Settings that all rows share.

    Attributes:
        options: of the command line.
        results: rows that are there.
        stop: time after which no row is begun, s of `time.monotonic`.
    """

    options: argparse.Namespace
    results: Results
    stop: float

    @property
    def data(self) -> Path:
        """Folder of the frames."""
        return Path(self.options.runs) / "data"

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.options.tasks)

    def row(self, name: str, make: Callable[[], Row]) -> Row | None:
        """Read the row `name`, or make it if there is time; None if there is none."""
        row = self.results.get(name)
        if row is not None or time.monotonic() > self.stop:
            return row
        return self.results.keep(name, {"part": name.partition("-")[0], **make()})

    def joint_file(self, seed: int) -> Path:
        """Path of the joint network of a seed.

        Raises:
            InputError: it is not there.
        """
        name = f"joint-{seed}"
        path = Path(self.options.runs) / name / "checkpoints" / "last_experts.safetensors"
        if self.results.get(name) is None:
            raise InputError(f"{path} is not finished: run --part joint first")
        if not path.exists():
            raise InputError(
                f"{path} was trained elsewhere: train it again with --part joint and another --results"
            )
        return path

    def train(self, name: str, words: Sequence[str], minutes: float, seed: int) -> tuple[Path, Row]:
        """Train for so many minutes of processor time; continue a run that was stopped.

        Returns:
            Folder of the checkpoints, and steps with their time.
        """
        runs = Path(self.options.runs)
        common = [*MODEL, *_TRAINING, *words, *self.options.settings, f"--seed={seed}"]
        made_of = {"minutes": minutes, "words": common}
        common = [*common, f"--runs_dir={runs}"]
        timing, path = runs / f"{name}-timing", runs / f"{name}.steps.json"
        if not path.exists():
            shutil.rmtree(timing, ignore_errors=True)
            times = StepTimes()
            config = parse([*common, f"--name={timing.name}", f"--trainer.max_steps={_TIMED_STEPS}"])
            train(replace(config, trainer=config.trainer | {"callbacks": [times]}))
            seconds = statistics.median(times.seconds[_UNTIMED_STEPS:])
            steps = max(1, round(60 * minutes / seconds))
            write_json(path, {"step_seconds": seconds, "steps": steps, "of": made_of})
            shutil.rmtree(timing, ignore_errors=True)
        plan = read_json(path)
        if plan.pop("of") != made_of:
            raise InputError(f"{path} is of a run with other settings: give another --runs")
        more = ["--ckpt_path=auto", "--checkpoint_every_n_steps=50", f"--trainer.max_steps={plan['steps']}"]
        return train(parse([*common, f"--name={name}", *more])) / "checkpoints", plan

    def judge(self, answers: dict[str, Answer]) -> dict[str, Row]:
        """Measure errors on the held-out frames of tasks."""
        return {task: errors(answer, self.frames(task)) for task, answer in answers.items()}

    def frames(self, task: str, part: str = "test") -> list[Data]:
        """Read the frames of a task."""
        dataset = OC20Lmdb(task_file(self.data, task, part))
        return [dataset[row] for row in range(len(dataset))]


def errors(answer: Answer, frames: Sequence[Data], batch_size: int = 8) -> Row:
    """Mean absolute errors against labels; forces of free atoms.

    Args:
        answer: gives eV and eV/Å of a batch.
        frames: with labels.
        batch_size: frames per batch.
    """
    energy, force, zero = [], [], []
    for start in range(0, len(frames), batch_size):
        batch = Batch.from_data_list(list(frames[start : start + batch_size]))
        with torch.no_grad():
            out = answer(batch)
        free = ~batch.fixed.bool()
        energy.append((out["energy"] - batch.energy.double()).abs())
        force.append((out["forces"][free] - batch.forces[free]).abs().double().flatten())
        zero.append(batch.forces[free].abs().double().flatten())
    return {
        "frames": len(frames),
        "energy_mae_eV": float(torch.cat(energy).mean()),
        "force_mae_eV_A": float(torch.cat(force).mean()),
        "zero_force_mae_eV_A": float(torch.cat(zero).mean()),
    }


def answer_of(network: ExpertNetwork, contents: ExpertContents, task: str) -> Answer:
    """Make a function that answers for a task in eV and eV/Å."""
    units = contents.task(task).normalizers
    return lambda batch: units.denormalize(network(batch, task), batch)


def joint_rows(study: Study) -> Iterator[Row | None]:
    """Train all tasks together."""
    for seed in study.options.seeds:
        yield study.row(f"joint-{seed}", lambda: _joint(study, seed))  # noqa: B023


def _joint(study: Study, seed: int) -> Row:
    tasks = {
        task: {
            part: str(task_file(study.data, task, name))
            for part, name in (("train", "train"), ("val", "test"))
        }
        for task in study.tasks
    }
    words = [f"--experts.num_experts={study.options.experts}", f"--data.tasks={json.dumps(tasks)}"]
    folder, plan = study.train(f"joint-{seed}", words, study.options.minutes, seed)
    contents = read_experts(folder / "last_experts.safetensors")
    network = ExpertNetwork.from_contents(contents)
    judged = study.judge({task: answer_of(network, contents, task) for task in study.tasks})
    return {"seed": seed, **plan, "parameters": _count(network), "errors": judged}


def single_rows(study: Study) -> Iterator[Row | None]:
    """Train every task for itself."""
    for seed in study.options.seeds:
        for task in study.tasks:
            yield study.row(f"single-{seed}-{task}", lambda: _single(study, task, seed))  # noqa: B023


def _single(study: Study, task: str, seed: int) -> Row:
    minutes = study.options.minutes / len(study.tasks)
    folder, plan = study.train(f"single-{seed}-{task}", _data_words(study, [task]), minutes, seed)
    predictor = Predictor(folder / "last.pt")
    judged = study.judge({task: predictor.predict})
    return {"seed": seed, **plan, "parameters": _count(predictor.model), "errors": judged}


def two_stage_rows(study: Study) -> Iterator[Row | None]:
    """Train on one kind of labels, then on the other."""
    for seed in study.options.seeds:
        yield study.row(f"two_stage-{seed}", lambda: _two_stage(study, seed))  # noqa: B023


def _two_stage(study: Study, seed: int) -> Row:
    words: list[str] = []
    judged: dict[str, Row] = {}
    plans: dict[str, Row] = {}
    for kind in reversed(KINDS):  # the cheap labels first
        own = [task for task in study.tasks if kind_of(task) == kind]
        if not own:
            raise InputError(
                f"two stages need tasks of both kinds, and there are none of {kind}: see --tasks"
            )
        name, half = f"two_stage-{seed}-{kind}", study.options.minutes / len(KINDS)
        folder, plans[kind] = study.train(name, [*_data_words(study, own), *words], half, seed)
        predictor = Predictor(folder / "last.pt")
        judged |= study.judge(dict.fromkeys(own, predictor.predict))
        words = [f"--init_from={folder / 'last.pt'}", "--refit_normalizers=true", "--optim.lr=5e-4"]
    return {"seed": seed, "stages": plans, "parameters": _count(predictor.model), "errors": judged}


def _data_words(study: Study, tasks: Sequence[str]) -> list[str]:
    files = [[str(task_file(study.data, task, part)) for task in tasks] for part in ("train", "test")]
    return [f"--data.train={json.dumps(files[0])}", f"--data.val={json.dumps(files[1])}"]


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def prune_rows(study: Study) -> Iterator[Row | None]:
    """Keep a part of the experts for every task."""
    for seed in study.options.seeds:
        for task in study.tasks:
            yield study.row(f"prune-{seed}-{task}", lambda: _prune(study, task, seed))  # noqa: B023


def _prune(study: Study, task: str, seed: int) -> Row:
    file = study.joint_file(seed)
    contents = read_experts(file, weights="averaged")
    frames = study.frames(task)
    entries = []
    for keep in study.options.keep:
        for method in METHODS:
            for draw in range(_RANDOM_SEEDS if method == "random" else 1):
                settings = PruneSettings(keep, method, seed=draw)  # type: ignore[arg-type]
                pruned, record = prune_experts(contents, task, settings)
                entry = {"keep": keep, "draw": draw, **record, **measure(contents, pruned, task, frames)}
                if method == "tcess":
                    entry |= {"bytes": _bytes(file, pruned), "flagged": _flagged(study, pruned, task)}
                entries.append(entry)
    return {"seed": seed, "task": task, "bytes_before": _bytes(file, contents), "entries": entries}


def _bytes(file: Path, contents: ExpertContents) -> int:
    """Size of contents as a file."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        path = Path(folder) / "present.safetensors"
        write_experts(path, contents)
        return path.stat().st_size


def _flagged(study: Study, pruned: ExpertContents, task: str) -> dict[str, dict[str, float]]:
    """Shares of held-out systems of the task and of others that are flagged, at all and by the bound."""
    shares = {}
    for name, tasks in (("own", [task]), ("others", [each for each in study.tasks if each != task])):
        systems = [system for each in tasks for system in _distinct(study.frames(each))]
        found = foreign_structures(pruned, task, systems)
        of_bound = sum("bound" in each for each in found)
        count = max(1, len(systems))
        shares[name] = {"any": len(found) / count, "bound": of_bound / count}
    return shares


def _distinct(frames: Sequence[Data]) -> list[Data]:
    """One frame of every composition."""
    known = {tuple(sorted(frame.atomic_numbers.tolist())): frame for frame in frames}
    return list(known.values())


def retrieve_rows(study: Study) -> Iterator[Row | None]:
    """Retrieve sets of experts for held-out structures."""
    for seed in study.options.seeds:
        yield study.row(f"retrieve-{seed}", lambda: _retrieve(study, seed))  # noqa: B023


def _retrieve(study: Study, seed: int) -> Row:
    file = study.joint_file(seed)
    systems = [(task, system) for task in study.tasks for system in _distinct(study.frames(task))]
    keep = study.options.keep[0]
    row: Row = {"seed": seed, "systems": len(systems), "keep": keep, "top1": []}
    for per in PER:
        store = ExpertStore(file, keep, per)  # type: ignore[arg-type]
        for labels_given in (True, False):
            for by_composition in (False, True):
                hits = [
                    _is_retrieved(store, system, task, labels_given, by_composition)
                    for task, system in systems
                ]
                entry = {"per": per, "labels_given": labels_given, "by_composition": by_composition}
                row["top1"].append({**entry, "share": statistics.fmean(hits)})
    return row | _memory(file, keep, systems)


def _is_retrieved(
    store: ExpertStore, system: Data, task: str, labels_given: bool, by_composition: bool
) -> bool:
    """Tell whether the nearest set is of the task; a structure that is refused is not retrieved."""
    among = [f"{kind_of(task)}-*"] if labels_given else None
    try:
        return store.find(system, among, by_composition).task == task
    except InputError:
        return False


def _memory(file: Path, keep: float, systems: Sequence[tuple[str, Data]]) -> Row:
    """Bytes read for one structure, bytes of weights in memory, and uses of a small cache."""
    whole = read_experts(file, weights="averaged")
    full = ExpertNetwork.from_contents(whole)
    store = ExpertStore(file, keep)
    # A training structure of the file itself: its elements are known.
    merged = store.network(store.find(task_structures(next(iter(whole.tasks.values())))[0]))
    bytes_of = {
        name: sum(parameter.nbytes for parameter in network.parameters())
        for name, network in (("full", full), ("merged", merged))
    }
    cached = ExpertStore(file, keep, cache_bytes=_CACHED_NETWORKS * bytes_of["merged"])
    for task, system in systems:
        if _is_retrieved(cached, system, task, True, False):
            cached.network(cached.find(system, [f"{kind_of(task)}-*"]))
    return {
        "file_bytes": file.stat().st_size,
        "bytes_of_all_experts": whole.bytes_read,
        "bytes_read": store.bytes_read,
        "parameter_bytes_full": bytes_of["full"],
        # While experts are merged, the read ones and the result are in memory.
        "parameter_bytes_peak": store.loaded_bytes + bytes_of["merged"],
        "parameter_bytes_merged": bytes_of["merged"],
        "composition_changes": cached.cache.misses,
        "cache_hits": cached.cache.hits,
    }


MAKERS: dict[str, Callable[[Study], Iterator[Row | None]]] = {
    "joint": joint_rows,
    "single": single_rows,
    "two_stage": two_stage_rows,
    "prune": prune_rows,
    "retrieve": retrieve_rows,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="processor time of a run (default: %(default)s)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--experts", type=int, default=8, help="number of experts (default: %(default)s)")
    parser.add_argument(
        "--keep", nargs="+", type=float, default=[0.5, 0.25], help="shares of the experts (default: 0.5 0.25)"
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=200,
        help="maximum number of training frames per task (default: %(default)s)",
    )
    parser.add_argument(
        "--test-frames",
        type=int,
        default=40,
        help="maximum number of test frames per task (default: %(default)s)",
    )
    parser.add_argument("--hours", type=float, help="begin no row after this time (default: no limit)")
    parser.add_argument("--dft", type=Path, default=Path("data/oc20_trajs"), help="folder of DFT frames")
    parser.add_argument(
        "--teacher", type=Path, default=Path("data/teacher_large/train"), help="folder of teacher frames"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/experts"), help="folder of the rows")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/experts"), help="page, without ending"
    )
    parser.add_argument("--collect", action="store_true", help="compute nothing: write the page")
    parser.add_argument("settings", nargs="*", help="keys of `equiformer2 train`, after --")
    options = parser.parse_args(words)
    if options.minutes <= 0 or options.frames < 1 or options.test_frames < 1:
        raise InputError("--minutes, --frames and --test-frames must be above 0")
    torch.set_num_threads(1)
    names = ("minutes", "experts", "frames", "test_frames", "tasks", "keep", "settings")
    about = {name: getattr(options, name) for name in names}
    results = Results(options.runs, lambda _: about, options.results)
    left = False if options.collect else run(options, results)
    report(results.all(), options.results)
    if left:
        print("rows are left: the same command goes on", file=sys.stderr)


def run(options: argparse.Namespace, results: Results) -> bool:
    """Make the rows of the parts that are asked for; True if time was over before the last."""
    stop = float("inf") if options.hours is None else time.monotonic() + 3600 * options.hours
    study = Study(options, results, stop)
    sources = Sources(options.dft, options.teacher, options.frames, options.test_frames, tuple(options.tasks))
    prepare(study.data, sources)
    for part in options.part:
        for row in tqdm(MAKERS[part](study), desc=part, unit="row"):
            if row is None:
                return True
    return False


if __name__ == "__main__":
    run_script(main)
