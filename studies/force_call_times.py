"""Times of a pruning study: what inference leaves out, and force calls through the ASE calculator.

Both are ratios of neighbouring calls in one process. What was measured is not measured again, unless its file
is broken or tells of other settings or another network (by `fingerprint_of_weights`).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import Checkpoint, load_checkpoint
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.files import read_json, write_json
from equiformer2.inference import EquiformerV2Calculator, Predictor
from equiformer2.model import EquiformerV2
from equiformer2.pruning.analysis.lossless import measure_savings
from equiformer2.pruning.calibration_data import read_structures
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.cost.targets import MacTarget
from equiformer2.pruning.cost.time_table import with_threads
from equiformer2.pruning.routing import FrozenPlan
from equiformer2.pruning.routing.router_files import router_from_dict
from equiformer2.pruning.structured.apply import shrink
from equiformer2.pruning.structured.baselines import uniform_plan
from equiformer2.pruning.structured.plan import PruningPlan
from studies.campaign import Campaign, Speed
from studies.peak_memory import peak_allocated
from studies.random_networks import random_checkpoint
from studies.timed_study import TIMED

_STRUCTURES = 3
_NO_ENERGY = 10**9  # calls between energies
_STEP = 1e-3  # Å: every call is for a new structure, as in a relaxation
_NEAR = 0.03  # of the dense cost: blocks are large steps
_ALSO_LARGE = ("multi", TIMED, "route_static", "route_ftp", "route_context_only")
OF_ALL_SEEDS = ("multi", TIMED)
"""Methods whose plans of every seed are timed: a goal is in what they say."""


def measure_lossless(campaign: Campaign, out: Path) -> None:
    """Write one file per network: `measure_savings` on the first held-out structures."""
    for name, checkpoint in campaign.models.items():
        path = out / f"{name}.json"
        threads, repeats = campaign.speed.threads or torch.get_num_threads(), campaign.speed.repeats
        loaded = load_checkpoint(checkpoint)
        same = {"model": fingerprint_of_weights(loaded.model), "threads": threads}
        if _measured(path, same | {"repeats": {repeats}}, _settings_of_savings):
            continue
        predictor = Predictor(loaded)
        batch = Batch.from_data_list(_held_out(campaign)[:_STRUCTURES])
        normalizers = predictor.checkpoint.normalizers
        with with_threads(threads):
            savings = measure_savings(predictor.model, batch, normalizers, repeats)
        record = same | {"savings": [saving.to_dict() for saving in savings]}
        write_json(path, record, make_folder=True)
        print(f"wrote {path}")


def measure_calls(campaign: Campaign, studies: Path, out: Path) -> None:
    """Write one file per network and way to make it cheaper: force calls beside the dense network's."""
    atoms = _as_atoms(_held_out(campaign)[0])
    large = atoms.repeat((2, 2, 1))
    for name, checkpoint in campaign.models.items():
        dense = _Dense.of(load_checkpoint(checkpoint))
        for method, cheaper in _ways(campaign, studies, name, dense.checkpoint).items():
            _measure(out / f"{name}_{method}.json", atoms, dense, cheaper, campaign.speed)
            if method.partition("_seed")[0] in _ALSO_LARGE:
                _measure(out / f"{name}_2x2_{method}.json", large, dense, cheaper, campaign.speed)
    for name, preset in campaign.speed.random_weights.items():
        dense = _Dense.of(random_checkpoint(preset))
        model = dense.checkpoint.model
        cost = _cost(model, atoms)
        plans = {
            "uniform": uniform_plan(model, cost, campaign.speed.keep),
            "blocks": _without_blocks(model, cost, campaign.speed.keep),
        }
        for kind, plan in plans.items():
            path = out / f"{name}_random_weights_{kind}.json"
            _measure(path, atoms, dense, _pruned(dense.checkpoint, plan, cost(plan)), campaign.speed)


@dataclasses.dataclass(frozen=True)
class _Dense:
    """A network beside which cheaper ones are timed, and its fingerprint."""

    checkpoint: Checkpoint
    fingerprint: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_Dense":
        return cls(checkpoint, fingerprint_of_weights(checkpoint.model))


@dataclasses.dataclass(frozen=True)
class _Cheaper:
    """A checkpoint, perhaps with a router, and its share of the MACs where it is known."""

    checkpoint: Checkpoint
    macs: float | None
    router: Callable[..., dict[str, torch.Tensor]] | None = None


def _ways(campaign: Campaign, studies: Path, model: str, dense: Checkpoint) -> dict[str, _Cheaper]:
    """Plans at the timed budget and routers, of the first seed; those of `OF_ALL_SEEDS` of every seed."""
    found: dict[str, _Cheaper] = {}
    for name, part in campaign.studies.items():
        if part.model != model:
            continue
        for path in sorted((studies / name / "results").glob("*.json")):
            record = read_json(path)
            method, seed = record["method"], record["seed"]
            if seed != campaign.seeds[0] and method not in OF_ALL_SEEDS:
                continue
            way = way_of(campaign, method, seed)
            if "plan" in record and method in part.methods and record["keep"] == campaign.speed.keep:
                plan = PruningPlan.from_dict(record["plan"], str(path))
                found[way] = _pruned(dense, plan, record["macs"])
            elif "router" in record:
                router = FrozenPlan(router_from_dict(record["router"]))
                found[way] = _Cheaper(dense, record["macs"], router)
    return found


def way_of(campaign: Campaign, method: str, seed: int) -> str:
    """The name of a method's plan of one seed among the timed ones."""
    return method if seed == campaign.seeds[0] else f"{method}_seed{seed}"


def _pruned(dense: Checkpoint, plan: PruningPlan, macs: float | None = None) -> _Cheaper:
    small = shrink(dense.model, plan).eval()
    return _Cheaper(dataclasses.replace(dense, config=small.config, model=small), macs)


def _measure(path: Path, atoms: Atoms, dense: _Dense, cheaper: _Cheaper, speed: Speed) -> None:
    settings = {
        "model": dense.fingerprint,
        "atoms": len(atoms),
        "threads": speed.threads or torch.get_num_threads(),
        "macs": cheaper.macs,
    }
    if _measured(path, settings | {"repeats": speed.repeats}, _settings_of_calls):
        return
    calls = []
    # With a router an energy takes a pass of its own, so forces are compared.
    every = 1 if cheaper.router is None else _NO_ENERGY
    for checkpoint, router in ((cheaper.checkpoint, cheaper.router), (dense.checkpoint, None)):
        own = atoms.copy()
        own.calc = EquiformerV2Calculator(
            checkpoint, forces_on_fixed=False, router=router, energy_every=every
        )
        calls.append(_call(own))
    with with_threads(speed.threads):
        latency = compare_latency(calls[0], calls[1], speed.repeats)
        peaks = [peak_allocated(call) for call in calls]
    record = settings | {"latency": latency.to_dict(), "peak_bytes": peaks[0], "dense_peak_bytes": peaks[1]}
    write_json(path, record, make_folder=True)
    print(f"{path.stem}: {1 / latency.ratio:.2f} times as fast")


def _measured(path: Path, wanted: dict[str, Any], settings: Callable[[Any], dict[str, Any]]) -> bool:
    """Whether `path` has what was measured with the `wanted` settings; says why not."""
    if not path.exists():
        return False
    try:
        found = settings(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError):
        print(f"{path} is broken: measuring again")
        return False
    if found != wanted:
        other = "settings" if found["model"] == wanted["model"] else "weights"
        print(f"{path} was measured with other {other}: measuring again")
    return found == wanted


def _settings_of_calls(record: Any) -> dict[str, Any]:
    latency = record["latency"]
    # What the report reads has to be there, too.
    for key in ("seconds", "dense_seconds", "ratio", "low", "high"):
        float(latency[key])
    for key in ("peak_bytes", "dense_peak_bytes"):
        int(record[key])
    same = {key: record[key] for key in ("atoms", "threads", "macs")}
    # Files of an earlier version do not say of which weights they are.
    return same | {"model": record.get("model"), "repeats": latency["repeats"]}


def _settings_of_savings(record: Any) -> dict[str, Any]:
    repeats = {saving["latency"]["repeats"] for saving in record["savings"]}
    return {"model": record.get("model"), "threads": record["threads"], "repeats": repeats}


def _call(atoms: Atoms) -> Callable[[], object]:
    random = np.random.default_rng(0)
    start = atoms.positions.copy()

    def call() -> object:
        atoms.positions[:] = start + _STEP * random.standard_normal(start.shape)
        return atoms.get_forces()

    return call


def _cost(model: EquiformerV2, atoms: Atoms) -> Callable[[PruningPlan], float]:
    edges = len(atoms) * model.config.max_neighbors
    return MacTarget(model.config, 0.5, len(atoms), edges).fraction_of


def _without_blocks(model: EquiformerV2, cost: Callable[[PruningPlan], float], target: float) -> PruningPlan:
    """Whole blocks go from the last but one towards the first, as long as the cost stays above the target."""
    plan = PruningPlan.keep_all(model.config)
    for index in reversed(range(model.config.num_layers - 1)):
        smaller = plan.with_block(index, attention=False, feed_forward=False)
        if cost(smaller) < target - _NEAR:
            break
        plan = smaller
    return plan


def _held_out(campaign: Campaign) -> list[Data]:
    return read_structures(next(iter(campaign.held_out.values())), campaign.held_out_structures)


def _as_atoms(data: Data) -> Atoms:
    fixed = np.flatnonzero(data.fixed.numpy() > 0)
    return Atoms(
        numbers=data.atomic_numbers.long().numpy(),
        positions=data.pos.numpy(),
        cell=data.cell.view(3, 3).numpy(),
        pbc=data.pbc.view(3).numpy(),
        tags=data.tags.long().numpy(),
        constraint=FixAtoms(fixed),
    )
