"""Precision and pruning chosen together against what a user would do without a search, at equal bytes.

    python -m studies.precision --checkpoint models/study_teacher.pt --data runs/data/study/train.lmdb \
        --held-out teacher=runs/data/study/test.lmdb dft=data/oc20_trajs --part search --hours 2.5

Parts, each resumable and runnable alone:

- `uniform`: float32, and all matrices in bf16, int8 or int4.
- `search`: `prune quantize` at every limit of bytes and seed, and its first two choices, by sensitivity and
  by information.
- `pruned`: the network that the search has pruned, alone, in int8 and int4, and mixed at every limit, by
  information and searched.
- `memory`: peak memory of a training step on float32 and on stored bases, of all weights or of low-rank maps
  on top of frozen ones.
- `recovery`: all matrices in int4 with a low-rank adapter beside them, which begins with the rounding error
  (LoftQ) or with zero: before and after --recovery-steps on --data, which needs labels.
- `time`: `prune quantize` at limits of time, and a force call with all products in bfloat16.

Every row is a file in --out: a killed program continues where it was, and --hours ends it before the next
row. The LMDB files are those of `python -m studies.study_data`. Rows that the page holds are not computed
again. All errors are measured on the held-out structures, against labels and against the float32 network.
"""

import argparse
import copy
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from equiformer2.checkpoint import Checkpoint, load_checkpoint
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.kernels.linear import multiplies_bfloat16
from equiformer2.model import EquiformerV2
from equiformer2.pruning.calibration_data import mixed_systems, read_structures
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.precision.compact import FileSize, compact_network, write_compact
from equiformer2.pruning.precision.measure import compare
from equiformer2.pruning.precision.plan import PrecisionPlan, matrices, parts_of
from equiformer2.pruning.precision.quantize_request import QuantizeRequest, quantize
from equiformer2.pruning.precision.recovery import Recovery, recover, write_start
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_request import apply_plan
from equiformer2.script import origin, run_script
from equiformer2.training.configuration import parse
from equiformer2.training.run import train
from studies.peak_memory import training_memory
from studies.results import Results, Row, write_page
from studies.verdicts import Verdict

PARTS = ("uniform", "search", "pruned", "memory", "recovery", "time")
UNIFORM = ("float32", "bf16", "int8", "int4")
SEED = 0
_RANK = 4
_RATE = 2e-3
#: Ways, worst first, to patterns of the names of their rows.
_RECOVERED = {
    "int4": "int4",
    "untrained": "recovery-int4-loftq-untrained",
    "begun with zero": r"recovery-int4-zero-\d+-\d+",
    "begun with the rounding error": r"recovery-int4-loftq-\d+-\d+",
}
_MOST_BYTES, _MOST_WORSE = 0.2, 1.02
_MOST_TURNED = 1.1
_MOST_MINUTES = 30.0
_TIMES = (0.8, 0.5)
_TIMED_CALLS = 15
#: Prefix of rows that a search makes, which no uniform row is to dominate.
SEARCHED = "search"


@dataclass
class Study:
    """Network, data and settings that all rows share.

    Attributes:
        options: of the command line.
        checkpoint: the float32 network.
        held_out: name -> structures.
        results: rows that are there.
        stop: time after which no row is begun, s of `time.monotonic`.
    """

    options: argparse.Namespace
    checkpoint: Checkpoint
    held_out: dict[str, list[Data]]
    results: Results
    stop: float

    def row(self, name: str, make: Callable[[], Row]) -> Row | None:
        """Read the row `name`, or make it if there is time; None if there is none."""
        row = self.results.get(name)
        if row is not None or time.monotonic() > self.stop:
            return row
        start = time.monotonic()
        made = make()
        minutes = (time.monotonic() - start) / 60
        tqdm.write(f"{name}: {minutes:.1f} min")
        return self.results.keep(name, {**made, "minutes": minutes, **origin()})

    def judged(self, plan: PrecisionPlan) -> Row:
        """Measure the network of a plan on all held-out structures."""
        network = compact_network(self.checkpoint.model, plan)
        self.options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.options.out) as folder:  # other parts may run beside it
            path = Path(folder) / "present.pt"
            write_compact(path, self.checkpoint, network, plan)
            return self.judged_file(path, plan)

    def judged_file(self, path: Path, plan: PrecisionPlan, adapter: Path | None = None) -> Row:
        """Measure the file of a plan's network, with an adapter or without."""
        size = path.stat().st_size + (0 if adapter is None else adapter.stat().st_size)
        whole = FileSize(self.checkpoint, self.checkpoint.model).float32
        errors = {}
        for name, structures in self.held_out.items():
            dense, compact = Predictor(self.checkpoint), Predictor(str(path), adapter=adapter)
            errors[name] = compare(compact, dense, structures, self.options.batch_size)
        return {"bytes": size, "bytes_ratio": size / whole, "plan": plan.to_dict(), "errors": errors}


def uniform_rows(study: Study) -> Iterator[Row | None]:
    for kind in UNIFORM:
        plan = PrecisionPlan.uniform(study.checkpoint.config, kind)
        yield study.row(kind, lambda plan=plan: study.judged(plan))  # type: ignore[misc]


def search_rows(study: Study) -> Iterator[Row | None]:
    # Seeds outermost: whenever the program is stopped, all limits have as many of them.
    for seed in study.options.seeds:
        for limit in study.options.limits:
            name = f"{SEARCHED}-{limit:g}-{seed}"
            found = study.row(f"{name}-trials", lambda: _searched(study, name, limit, seed))  # noqa: B023
            if found is None:
                yield None
                return
            plans = {
                name: PrecisionPlan.from_dict(found["plan"]),
                **_first_choices(study, found, limit, seed),
            }
            for each, plan in plans.items():
                yield study.row(each, lambda plan=plan: study.judged(plan))  # type: ignore[misc]


def _searched(study: Study, name: str, limit: float, seed: int, checkpoint: Path | None = None) -> Row:
    """Run `prune quantize`; on a pruned checkpoint without further pruning."""
    options = study.options
    request = QuantizeRequest(
        checkpoint=str(checkpoint or options.checkpoint),
        data=tuple(options.data),
        targets=(f"bytes={limit!r}",),
        keep=() if checkpoint else tuple(options.keep),
        trials=options.trials,
        structures=options.structures,
        held_out=1,
        batch_size=options.batch_size,
        seed=seed,
    )
    state = options.out / f"{name}.state"
    continued, begin = state.exists(), time.monotonic()
    found = quantize(request, options.out / f"{name}.pt", state)
    # A search that was stopped has taken longer than its last call.
    return {"seconds_of_command": None if continued else time.monotonic() - begin, **found}


def _first_choices(study: Study, found: Row, limit: float, seed: int) -> dict[str, PrecisionPlan]:
    """Plans by sensitivity and by information, which a search has tried first."""
    plans: dict[str, PrecisionPlan] = {}
    for trial in found["search"]["trials"][:2]:
        parts = parts_of(matrices(study.checkpoint.model))
        modules = [(m, trial["precisions"][part]) for part, names in parts.items() for m in names]
        plan = PrecisionPlan(tuple(modules)).checked(study.checkpoint.config)
        plans[f"{trial['source']}-{limit:g}-{seed}"] = plan
    return plans


def pruned_rows(study: Study) -> Iterator[Row | None]:
    for seed in study.options.seeds:
        limit = study.options.limits[0]
        trials = f"{SEARCHED}-{limit:g}-{seed}-trials"
        searched = study.results.get(trials)
        if searched is None:
            if time.monotonic() > study.stop:
                yield None
                return
            raise InputError(f"{trials} is not there: run --part search first, which decides what is pruned")
        pruning = PruningPlan.from_dict(searched["search"]["prunings"][-1])
        for kind in ("float32", "int8", "int4"):
            plan = PrecisionPlan.uniform(study.checkpoint.config, kind, pruning)
            yield study.row(f"pruned-{kind}-{seed}", lambda plan=plan: study.judged(plan))  # type: ignore[misc]
        small = study.options.out / f"pruned-{seed}.pt"
        if not small.exists():
            apply_plan(study.options.checkpoint, pruning, small)
        whole = FileSize(study.checkpoint, study.checkpoint.model).float32
        pruned = load_checkpoint(small)
        share = whole / FileSize(pruned, pruned.model).float32
        for limit in study.options.limits:
            name = f"pruned-{SEARCHED}-{limit:g}-{seed}"
            make = lambda: _searched(study, name, min(0.999, limit * share), seed, small)  # noqa: B023, E731
            found = study.row(f"{name}-trials", make)
            if found is None:
                yield None
                return
            plans = {name: PrecisionPlan.from_dict(found["plan"]).after(pruning)}
            information = found["search"]["trials"][1]["precisions"]
            parts = parts_of(matrices(pruned.model))
            modules = tuple((m, information[part]) for part, names in parts.items() for m in names)
            plans[f"pruned-information-{limit:g}-{seed}"] = PrecisionPlan(modules, pruning)
            for each, plan in plans.items():
                yield study.row(each, lambda plan=plan: study.judged(plan))  # type: ignore[misc]


class _LowRank(nn.Module):
    """Low-rank map on top of a weight, which is zero at first."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        *rows, columns = shape
        self.left = nn.Parameter(torch.zeros(*rows, _RANK))
        self.right = nn.Parameter(torch.randn(*rows[:-1], _RANK, columns) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def memory_rows(study: Study) -> Iterator[Row | None]:
    for base in ("float32", "int8", "int4"):
        for trained in ("all", "low rank") if base == "float32" else ("low rank",):
            for recomputed in (False, True):
                name = f"memory-{base}-{trained.replace(' ', '_')}-{'recomputed' if recomputed else 'stored'}"
                make = lambda: _memory(study, base, trained, recomputed)  # noqa: B023, E731
                yield study.row(name, make)


def _memory(study: Study, base: str, trained: str, recomputed: bool) -> Row:
    """Peak of the second step of AdamW, with what stays between steps counted beside it."""
    torch.manual_seed(SEED)
    plan = PrecisionPlan.uniform(study.checkpoint.config, base)
    model: EquiformerV2 = compact_network(copy.deepcopy(study.checkpoint.model), plan)
    if trained != "all":
        model.requires_grad_(False)
        for name in matrices(study.checkpoint.model):
            module = model.get_submodule(name)
            shape = module.weight.shape  # type: ignore[union-attr]
            parametrize.register_parametrization(module, "weight", _LowRank(shape), unsafe=True)  # type: ignore[arg-type]
    model.activation_checkpointing = recomputed
    structures = next(iter(study.held_out.values()))[: study.options.batch_size]
    return training_memory(model, Batch.from_data_list(structures))


def recovery_rows(study: Study) -> Iterator[Row | None]:
    plan, options = PrecisionPlan.uniform(study.checkpoint.config, "int4"), study.options
    base, maps = options.out / "recovery.pt", options.out / "recovery.adapter.pt"

    def write_files() -> Recovery:
        options.out.mkdir(parents=True, exist_ok=True)
        found = recover(study.checkpoint.model, plan, _RANK)
        write_compact(base, study.checkpoint, found.network, plan)
        write_start(maps, found, study.checkpoint, base, _RANK)
        return found

    def start() -> Row:
        found = write_files()
        told = {"weight_error": found.error, "weight_error_plain": found.plain_error}
        return {**told, **study.judged_file(base, plan, maps)}

    yield study.row("recovery-int4-loftq-untrained", start)
    for seed in options.seeds:
        for way in ("loftq", "zero"):
            name = f"recovery-int4-{way}-{options.recovery_steps}-{seed}"

            def make(way: str = way, seed: int = seed, name: str = name) -> Row:
                if not maps.exists():  # the first row may come from the page
                    write_files()
                file = base if way == "loftq" else options.out / "recovery-plain.pt"
                if not file.exists():
                    network = compact_network(study.checkpoint.model, plan)
                    write_compact(file, study.checkpoint, network, plan)
                adapter = _trained(study, name, file, maps if way == "loftq" else None, seed)
                return study.judged_file(file, plan, adapter)

            yield study.row(name, make)


def _trained(study: Study, name: str, base: Path, start: Path | None, seed: int) -> Path:
    """Train an adapter of a compact checkpoint on the labels of --data, or continue to."""
    options = study.options
    words = [
        *(f"--runs_dir={options.out / 'runs'}", f"--name={name}", f"--init_from={base}", f"--seed={seed}"),
        *(f"--data.train={path}" for path in options.data[:1]),
        *(f"--trainer.max_steps={options.recovery_steps}", "--trainer.max_epochs=-1", "--ckpt_path=auto"),
        *(f"--optim.lr={_RATE}", f"--adapter.rank={_RANK}", "--adapter.keep=1.0", "--adapter.method=random"),
        *(f"--data.batch_size={options.batch_size}", "--checkpoint_every_n_steps=50"),
        *("--trainer.accelerator=cpu", "--task.ema_decay=0.99"),
        *([] if start is None else [f"--adapter.start={start}"]),
    ]
    return train(parse(words)) / "checkpoints" / "last_adapter.pt"


def time_rows(study: Study) -> Iterator[Row | None]:
    def everywhere() -> Row:
        one = Batch.from_data_list(next(iter(study.held_out.values()))[:1])
        dense, bf16 = Predictor(study.checkpoint), Predictor(study.checkpoint, precision="bf16")
        found = compare_latency(lambda: bf16.predict(one), lambda: dense.predict(one), _TIMED_CALLS)
        able = multiplies_bfloat16(torch.device("cpu"))
        return {"time": {**found.to_dict(), "instructions_for_bf16": able}}

    yield study.row("time-bf16-everywhere", everywhere)
    for limit in _TIMES:

        def make(limit: float = limit) -> Row:
            name = f"time-{limit:g}"
            options = study.options
            request = QuantizeRequest(
                checkpoint=str(options.checkpoint),
                data=tuple(options.data),
                targets=(f"latency={limit!r}",),
                trials=options.trials,
                structures=options.structures,
                held_out=options.held_out_structures,
                batch_size=options.batch_size,
            )
            try:
                found = quantize(request, options.out / f"{name}.pt", options.out / f"{name}.state")
            except InputError as error:
                return {"refused": str(error)}
            return {"timed": found}

        yield study.row(f"time-{limit:g}", make)


MAKERS: dict[str, Callable[[Study], Iterator[Row | None]]] = {
    "uniform": uniform_rows,
    "search": search_rows,
    "pruned": pruned_rows,
    "memory": memory_rows,
    "recovery": recovery_rows,
    "time": time_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True, help="structures to calibrate on")
    parser.add_argument("--held-out", nargs="+", required=True, metavar="NAME=PATH", help="to test on")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--limits", nargs="+", type=float, default=[0.3, 0.2, 0.17])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", nargs="*", type=float, default=[0.9, 0.8])
    parser.add_argument(
        "--trials", type=int, default=40, help="number of trials of every search (default: %(default)s)"
    )
    parser.add_argument("--structures", type=int, default=32, help="to calibrate on (default: %(default)s)")
    parser.add_argument(
        "--held-out-structures",
        type=int,
        default=64,
        help="number of structures from each held-out file (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--recovery-steps",
        type=int,
        default=300,
        help="steps of an adapter's training (default: %(default)s)",
    )
    parser.add_argument("--hours", type=float, default=2.5, help="no row is begun after them")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/precision"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(options)


def run(options: argparse.Namespace) -> None:
    """Make the rows of the parts that are asked for, and write the page of all rows that there are."""
    held_out = {}
    for text in options.held_out:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise InputError(f"--held-out {text}: give NAME=PATH, such as teacher=test.lmdb")
        held_out[name] = mixed_systems(read_structures(path, options.held_out_structures))
    stop = time.monotonic() + 3600 * options.hours
    # Names of rows tell limits and seeds.
    names = ("structures", "held_out_structures", "trials", "keep")
    about = {name: getattr(options, name) for name in names}
    about |= {"data": list(map(str, options.data)), "held_out": list(options.held_out)}
    about["batch_size"], about["recovery_steps"] = options.batch_size, options.recovery_steps
    about["checkpoint_sha256"] = sha256(options.checkpoint)
    results = Results(options.out, lambda _: about, options.results)
    study = Study(options, load_checkpoint(options.checkpoint), held_out, results, stop)
    left = False
    for part in options.part:
        left |= any([row is None for row in MAKERS[part](study)])
    report(study)
    if left:
        print(f"after {options.hours:g} hours rows are left: the same command continues")


def report(study: Study) -> None:
    """Write `RESULTS.json` and `RESULTS.md` of all rows that there are."""
    rows = study.results.all()
    found = verdicts(rows, next(iter(study.held_out)))
    told = [vars(verdict) for verdict in found]
    write_page(study.options.results, rows, markdown(rows, found), verdicts=told)


def points(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Select the rows of networks, without those of searches' trials and of memory."""
    return [row for row in rows if "errors" in row]


@dataclass(frozen=True)
class _Point:
    """Rows of one name but for the seed.

    Attributes:
        bytes_ratio: of the file, over float32, mean over seeds.
        ratios: force MAE over that of float32, by seed.
    """

    bytes_ratio: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.fmean(self.ratios)

    def __str__(self) -> str:
        return f"{self.ratio:.4f} of the force MAE at {self.bytes_ratio:.1%} of the bytes"


def _over_seeds(
    rows: Sequence[Mapping[str, Any]], ratio: Callable[[Mapping[str, Any]], float]
) -> dict[str, _Point]:
    """Collect rows by their name without the seed at its end."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(re.sub(r"-\d+$", "", row["run"]), []).append(row)
    return {
        name: _Point(statistics.fmean(row["bytes_ratio"] for row in own), tuple(map(ratio, own)))
        for name, own in by_name.items()
    }


def verdicts(rows: Sequence[Mapping[str, Any]], gate: str) -> list[Verdict]:
    """Judge what the study is to show.

    Args:
        rows: of the folder.
        gate: name of the held-out structures that decide.
    """

    def ratio(row: Mapping[str, Any]) -> float:
        value = row["errors"][gate]["force_mae_ratio"]
        return float("inf") if value is None else float(value)

    searched = _over_seeds([row for row in points(rows) if row["run"].startswith(f"{SEARCHED}-")], ratio)
    found = []
    for name, point in searched.items():
        if point.bytes_ratio <= _MOST_BYTES:
            told = ", ".join(f"{value - 1:+.2%}" for value in point.ratios)
            question = f"{name}: at most {_MOST_BYTES:.0%} of the bytes at most 2 % worse ({gate}, labels)"
            found.append(Verdict(question, told, point.ratio <= _MOST_WORSE))
    fixed = [row for row in points(rows) if re.fullmatch(r"bf16|int8|int4|pruned-int8-\d+", row["run"])]
    for name, point in _over_seeds(fixed, ratio).items():
        if not searched:
            continue
        # It dominates the front where it is no larger than a searched point and no worse.
        larger = {key: one for key, one in searched.items() if one.bytes_ratio >= point.bytes_ratio}
        beaten = [key for key, one in larger.items() if one.ratio >= point.ratio]
        told = f"{point}; searched with as many bytes: "
        told += ", ".join(f"{key} {one}" for key, one in larger.items()) or "none"
        found.append(Verdict(f"{name} does not dominate the front", told, not beaten))
    turned = [row["errors"][gate]["equivariance_ratio"] for row in points(rows)]
    turned = [value for value in turned if value is not None]
    if turned:
        question = f"error under rotations at most {_MOST_TURNED} times that of float32"
        found.append(Verdict(question, f"at most {max(turned):.3f}", max(turned) <= _MOST_TURNED))
    recovered = {
        way: [ratio(row) for row in points(rows) if re.fullmatch(pattern, row["run"])]
        for way, pattern in _RECOVERED.items()
    }
    if all(recovered.values()):
        means = {way: statistics.fmean(values) for way, values in recovered.items()}
        told = "of the force MAE: " + ", ".join(f"{way} {mean:.4f}" for way, mean in means.items())
        question = "an adapter recovers from int4, more so if it begins with the rounding error"
        found.append(Verdict(question, told, list(means.values())[-1] == min(means.values())))
    seconds = [row["seconds_of_command"] for row in rows if row.get("seconds_of_command") is not None]
    if seconds:
        minutes = max(seconds) / 60
        question = f"`prune quantize` ends within {_MOST_MINUTES:.0f} minutes"
        told = f"at most {minutes:.1f} min in {len(seconds)} searches that were not interrupted"
        found.append(Verdict(question, told, minutes <= _MOST_MINUTES))
    return found


def markdown(rows: Sequence[Mapping[str, Any]], found: Sequence[Verdict]) -> str:
    """Write the page of the results."""
    lines = ["# Precision and pruning chosen together", "", "Written by `python -m studies.precision`.", ""]
    lines += ["| to show | measured | |", "|---|---|---|"]
    lines += [f"| {v.question} | {v.measured} | {'yes' if v.holds else 'no'} |" for v in found]
    names = sorted({name for row in points(rows) for name in row["errors"]})
    for name in names:
        lines += ["", f"## {name}", ""]
        lines += [
            "| network | bytes | force MAE, eV/Å (against float32) | change of forces, eV/Å | in memory | ms "
            "| rotations |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in sorted(points(rows), key=lambda row: -row["bytes"]):
            part = row["errors"][name]
            cells = [
                row["run"],
                f"{row['bytes_ratio']:.1%}",
                f"{_shown(part['force_mae_eV_A'])} ({_shown(part['force_mae_ratio'])})",
                _shown(part["force_change_eV_A"]),
                f"{part['resident_bytes']:,}",
                f"{part['ms']:.0f}",
                _shown(part["equivariance_ratio"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += _times(rows)
    memory = [row for row in rows if "peak_bytes" in row]
    if memory:
        lines += ["", "## Memory of a training step", ""]
        lines += [
            "| base, trained, activations | weights, MB | optimizer, MB | peak, MB |",
            "|---|---|---|---|",
        ]
        for row in memory:
            sizes = (f"{row[f'{key}_bytes'] / 1e6:.1f}" for key in ("weights", "optimizer", "peak"))
            lines.append(f"| {row['run'].removeprefix('memory-')} | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n"


def _times(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Table of the times of a force call."""
    lines = []
    for row in rows:
        if "time" in row:
            time = row["time"]
            able = "with" if time["instructions_for_bf16"] else "without"
            lines.append(
                f"| all products in bfloat16, on a processor {able} instructions for them | "
                f"{1e3 * time['seconds']:.0f} | {time['ratio']:.3f} | – |"
            )
        elif "timed" in row:
            found = row["timed"]
            cells = (f"{found['ms']:.0f}", f"{found['ms_ratio']:.3f}", _shown(found["force_mae_ratio"]))
            lines.append(f"| limit {row['run'].removeprefix('time-')} | {' | '.join(cells)} |")
        elif "refused" in row:
            lines.append(f"| limit {row['run'].removeprefix('time-')}: {row['refused']} | – | – | – |")
    if not lines:
        return []
    head = ["| network | ms | over float32 | force MAE over float32's |", "|---|---|---|---|"]
    return ["", "## Time of a force call", "", *head, *lines]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    run_script(main)
