"""Work and quality of the searches for plans and for routers, with their savings and without.

    python -m studies.search_cost --checkpoint models/oc20_small.pt --data TRAIN.lmdb --held-out TEST.lmdb

Both kinds of a search get the same calibration structures and the same target: `exhaustive` tries every
candidate on all structures, `default` is what the command runs. Work is counted in passes of the dense
network over a structure of mean size (`equiformer2.pruning.cost.work`); what the exhaustive search would take
without reused features stands beside it. One file per search in --out: a killed program continues where it
was, and more seeds add to what is there. `studies.search_time` times the searches of a large network.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizers, load_checkpoint
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.calibration_data import mixed_systems, read_structures
from equiformer2.pruning.cost.targets import MacTarget
from equiformer2.pruning.cost.work import GRADIENT
from equiformer2.pruning.fingerprints import fingerprint_of_structures
from equiformer2.pruning.routing import (
    BaseRouter,
    RoutedModel,
    Schedule,
    ScheduleObjective,
    StaticRouter,
    find_router,
)
from equiformer2.pruning.structured.apply import masked
from equiformer2.pruning.structured.plan_methods import search_settings
from equiformer2.pruning.structured.search import GreedySearch
from equiformer2.script import origin, run_script
from studies.exhaustive_schedules import ExhaustiveSearch

KINDS = ("exhaustive", "default")
BATCH_SIZE = 2

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One network with what its searches get.

    Attributes:
        model: dense network.
        normalizers: units of its outputs.
        calibration: structures to search on.
        keep: share of the MACs that is to stay.
        seed: random seed of the search.
        state: file of the search's state.
    """

    model: EquiformerV2
    normalizers: Normalizers
    calibration: Calibration
    keep: float
    seed: int
    state: Path


def search_plan(setting: Setting, kind: str, held_out: Calibration | None) -> Row:
    """Search a structured plan with the method `multi`.

    Args:
        setting: network, structures and target.
        kind: one of `KINDS`.
        held_out: structures that the plan is tested on; None for none.

    Returns:
        Work, share of the MACs, and errors against the dense network.
    """
    model, calibration = setting.model, setting.calibration
    settings = search_settings("multi", seed=setting.seed)
    if kind == "exhaustive":
        settings = settings.exhaustive()
    target = MacTarget(model.config, setting.keep, *calibration.size)
    search = GreedySearch(
        model,
        setting.normalizers,
        calibration,
        target.fraction_of,
        setting.keep,
        settings,
        setting.state,
        shares={"macs": setting.keep},
    )
    state = search.run()
    tried = sum(step.tried for step in state.steps)
    row: Row = {
        "macs": target.fraction_of(state.plan),
        "candidates": tried,
        "cuts": len(state.steps),
        "passes": state.passes,
        # As many structures for every cut, from the first block on, and gradients in every step.
        "passes_without_savings": len(calibration.structures) * tried
        + GRADIENT * len(state.steps) * min(settings.importance_structures, len(calibration.structures)),
    }
    with masked(model, state.plan):
        row["calibration"] = calibration.discrepancy(model).averages()
        row["held_out"] = None if held_out is None else held_out.discrepancy(model).averages()
    return row | {"plan": state.plan.to_dict()}


def search_router(setting: Setting, kind: str, held_out: Calibration | None) -> Row:
    """Search the schedule of a static router.

    Args:
        setting: network, structures and target.
        kind: one of `KINDS`.
        held_out: structures that the router is tested on; None for none.

    Returns:
        Work, share of the MACs, and errors against the dense network.
    """
    model, calibration = setting.model, setting.calibration
    router: BaseRouter
    if kind == "exhaustive":
        objective = ScheduleObjective(model, calibration, static_router)
        found = ExhaustiveSearch(objective, len(model.blocks), setting.keep, seed=setting.seed).run()
        router = static_router(found.levels)
    else:
        router, record = find_router(
            "static", model, calibration, setting.keep, seed=setting.seed, state_path=setting.state
        )
        found = Schedule(**record["schedule"])
    routed = RoutedModel(model, router)
    row: Row = {
        "calibration": calibration.discrepancy(routed).averages(),
        "macs": routed.computed_shares().macs,
        "candidates": found.evaluations,
        "passes": found.passes,
        "passes_without_savings": found.passes,
    }
    row["held_out"] = None if held_out is None else held_out.discrepancy(routed).averages()
    return row | {"levels": list(found.levels)}


def static_router(levels: Sequence[float]) -> StaticRouter:
    """Make a static router; blocks at level 0 compute everything."""
    return StaticRouter([level if level > 0 else None for level in levels])


#: Name of a search -> its function.
SEARCHES: dict[str, Callable[[Setting, str, Calibration | None], Row]] = {
    "plan": search_plan,
    "route": search_router,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint of the dense network")
    parser.add_argument("--data", nargs="+", required=True, help="files of structures to calibrate on")
    parser.add_argument("--held-out", nargs="+", required=True, help="files of other systems to test on")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", type=float, default=0.7, help="share of the MACs (default: %(default)s)")
    parser.add_argument("--structures", type=int, default=32, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--held-out-structures", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/search_cost"), help="folder of all searches")
    parser.add_argument("--results", type=Path, default=Path("docs/results/search_cost"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    _compare(options)
    _report(options.out, options.results)


def _compare(options: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(options.checkpoint)
    model, normalizers = checkpoint.model.eval(), checkpoint.normalizers
    tested = read_structures(options.held_out, options.held_out_structures)
    held_out = Calibration(model, normalizers, tested, 8)
    calibrations: dict[int, Calibration] = {}
    # Seeds outermost: whenever the program is stopped, all searches have as many of them.
    planned = [(s, name, kind) for s in options.seeds for name in options.searches for kind in options.kinds]
    for seed, name, kind in tqdm(planned, desc="searches", unit="search"):
        if seed not in calibrations:
            found = read_structures(options.data, options.structures, seed)
            both = {data.sid for data in found} & set(held_out.systems)
            if both:
                raise InputError(f"the system {min(both)} is in --data and in --held-out: hold out others")
            calibrations[seed] = Calibration(model, normalizers, mixed_systems(found, seed), BATCH_SIZE)
        stem = options.out / f"{name}-{kind}-{seed}"
        setting = Setting(
            model, normalizers, calibrations[seed], options.keep, seed, stem.with_suffix(".state")
        )
        _row(name, kind, setting, held_out, stem.with_suffix(".json"))


def _row(name: str, kind: str, setting: Setting, held_out: Calibration | None, path: Path) -> None:
    """Run one search unless its file is there; a file of other structures or another network is refused."""
    about = {
        "model": fingerprint_of_weights(setting.model),
        "structures": fingerprint_of_structures(setting.calibration.structures),
        "keep": setting.keep,
        "held_out": None if held_out is None else fingerprint_of_structures(held_out.structures),
    }
    if path.exists():
        if read_json(path)["about"] != about:
            raise InputError(f"{path} is of another network, target or data: use another --out or remove it")
        return
    start = time.process_time()
    row = SEARCHES[name](setting, kind, held_out)
    row |= {"search": name, "kind": kind, "seed": setting.seed, "about": about}
    row |= {"keep": setting.keep, "structures": len(setting.calibration.structures)}
    row |= {"held_out_structures": 0 if held_out is None else len(held_out.structures)}
    row |= {"parameters": sum(weights.numel() for weights in setting.model.parameters())}
    # Of a search that was interrupted, the time of its last part: take the passes.
    row |= {"cpu_seconds": round(time.process_time() - start, 1), **origin()}
    write_json(path, row, make_folder=True)
    tqdm.write(f"{path.name}: {row['passes']:,.0f} passes, loss {row['calibration']['loss']:.4f} eV")


def _report(folder: Path, stem: Path) -> None:
    rows = [read_json(path) for name in SEARCHES for path in sorted(folder.glob(f"{name}-*.json"))]
    stem.parent.mkdir(parents=True, exist_ok=True)
    found = summary(rows)
    write_json(stem.with_suffix(".json"), {**origin(), "rows": rows, "summary": found})
    text = markdown(found)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the kinds of every search over the seeds that both have.

    Args:
        rows: results of single searches.

    Returns:
        By search: `setting` as a sentence, `kinds` with means over seeds; how many times less work
        (`measured_less_work`) and processor time (`measured_less_time`) the default search took than the
        exhaustive one, and than that would take without reused features (`times_less_work`);
        `calibration_difference` and `held_out_difference` (loss of default minus exhaustive, eV,
        with its standard error). Seeds that only one of them has count for nothing.
    """
    found: dict[str, Any] = {}
    for name in sorted({row["search"] for row in rows}):
        own = {(row["kind"], row["seed"]): row for row in rows if row["search"] == name}
        seeds = [seed for kind, seed in sorted(own) if kind == "default" and ("exhaustive", seed) in own]
        found[name] = {"seeds": seeds}
        if not seeds:
            continue
        pairs = {kind: [own[kind, seed] for seed in seeds] for kind in KINDS}
        one = pairs["default"][0]
        found[name]["setting"] = (
            f"{one['structures']} calibration structures and {one['held_out_structures']} of other systems, "
            f"a network of {one['parameters']:,} parameters, {one['keep']:.0%} of its MACs, seeds "
            f"{', '.join(map(str, seeds))}."
        )
        found[name]["kinds"] = {
            kind: {
                "passes": statistics.fmean(row["passes"] for row in of_kind),
                "candidates": statistics.fmean(row["candidates"] for row in of_kind),
                "macs": statistics.fmean(row["macs"] for row in of_kind),
                "cpu_seconds": statistics.fmean(row["cpu_seconds"] for row in of_kind),
                "calibration_loss": [row["calibration"]["loss"] for row in of_kind],
                "held_out_loss": [row["held_out"]["loss"] for row in of_kind],
                "held_out_force_mae": [row["held_out"]["force_mae"] for row in of_kind],
            }
            for kind, of_kind in pairs.items()
        }
        before = statistics.fmean(row["passes_without_savings"] for row in pairs["exhaustive"])
        found[name]["passes_without_savings"] = before
        old_kind, new_kind = (found[name]["kinds"][kind] for kind in KINDS)
        found[name]["times_less_work"] = before / new_kind["passes"]
        found[name]["measured_less_work"] = old_kind["passes"] / new_kind["passes"]
        found[name]["measured_less_time"] = old_kind["cpu_seconds"] / new_kind["cpu_seconds"]
        for part in ("calibration", "held_out"):
            changes = [
                new[part]["loss"] - old[part]["loss"]
                for old, new in zip(pairs["exhaustive"], pairs["default"], strict=True)
            ]
            error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None
            found[name][f"{part}_difference"] = {"mean": statistics.fmean(changes), "standard_error": error}
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Write the summary as a page."""
    lines = [
        "# Work of the searches",
        "",
        "Written by `python -m studies.search_cost`, which says what is compared. Work is counted in passes",
        "of the dense network over a structure of mean size. Losses are those of the finished plans or",
        "routers against the dense network ([defined here](../pruning_structured.md#calibration-error)),",
        "in eV, seed by seed.",
    ]
    for name, part in found.items():
        lines += ["", f"## {name}", ""]
        if "kinds" in part:
            lines += [
                part["setting"],
                "",
                "| search | passes | candidates | CPU s | MACs left | loss, calibration | loss, held out |",
                "|---|---|---|---|---|---|---|",
            ]
            for kind, row in part["kinds"].items():
                losses = [
                    ", ".join(f"{loss:.4f}" for loss in row[key])
                    for key in ("calibration_loss", "held_out_loss")
                ]
                macs = f"{row['macs']:.1%}"
                numbers = [f"{row[key]:,.0f}" for key in ("passes", "candidates", "cpu_seconds")]
                lines.append(f"| {' | '.join([kind, *numbers, macs, *losses])} |")
            lines += [
                "",
                f"The exhaustive search took {part['measured_less_work']:.1f} times the work of the default "
                f"one and {part['measured_less_time']:.1f} times its processor time.",
            ]
            if part["passes_without_savings"] > part["kinds"]["exhaustive"]["passes"]:
                lines.append(
                    f"Without reused features it would take {part['passes_without_savings']:,.0f} passes "
                    f"(counted, not run), {part['times_less_work']:.1f} times the work."
                )
            for key, where in (("calibration", "calibration"), ("held_out", "held-out")):
                change = part[f"{key}_difference"]
                error = change["standard_error"]
                about = "one seed" if error is None else f"± {error:.4f}, standard error"
                lines.append(
                    f"Loss on {where} structures, default minus exhaustive: {change['mean']:+.4f} eV "
                    f"({about})."
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
