"""Make a compact checkpoint from a checkpoint and data: by a search, or with given precisions."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Checkpoint, load_checkpoint
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.errors import InputError
from equiformer2.files import check_target
from equiformer2.inference import Predictor
from equiformer2.model import EquiformerV2
from equiformer2.model.parametrizations import BITS, stored_kinds
from equiformer2.pruning.calibration import FORCE_WEIGHT, Calibration
from equiformer2.pruning.calibration_data import mixed_systems, read_structures
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.cost.targets import MacTarget, ParameterTarget, parse_targets
from equiformer2.pruning.fingerprints import fingerprint_of_structures
from equiformer2.pruning.precision.allocation import PartSizes
from equiformer2.pruning.precision.compact import FileSize, compact_network, write_compact
from equiformer2.pruning.precision.measure import compare
from equiformer2.pruning.precision.plan import PrecisionPlan, matrices, parts_of, skeleton
from equiformer2.pruning.precision.search import Base, PrecisionSearch, PrecisionState, import_optuna
from equiformer2.pruning.precision.sensitivity import (
    LOWER,
    RoundedTrials,
    measure_sensitivity,
    mutual_information,
)
from equiformer2.pruning.structured.apply import shrink
from equiformer2.pruning.structured.baselines import importance_plan
from equiformer2.pruning.structured.importance import gradient_importance, probe
from equiformer2.pruning.structured.plan import PruningPlan, check_prunable
from equiformer2.pruning.structured.unit_scores import gradient_scores

log = logging.getLogger("equiformer2")

EQUIVARIANCE_LIMIT = 1.1
"""Largest error under rotations, relative to that of the float32 network, that a result may have."""
_FOR_SENSITIVITY = 8
_FOR_IMPORTANCE = 8
_MOST_TRIALS, _FEWEST_PROPOSED = 64, 4
_ANY = 0.5
_NO_LIMIT = 1 << 62
_QUICKER = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
"""Shares of the operations at which networks are timed for a limit of time."""
_NETWORKS_IN_TIME = 2


@dataclass(frozen=True)
class QuantizeRequest:
    """Order of a compact checkpoint.

    Attributes:
        checkpoint: file of the float32 network.
        data: files of structures, as in `read_structures`.
        targets: `bytes=F` and `latency=F` with the share F that stays, for a search.
        plan: plan to use in place of a search.
        uniform: precision of all matrices in place of a search.
        keep: shares of the parameters at which pruned networks are made, for a limit of bytes; () for none.
        minutes: time after which a search makes no more proposals; its number of trials is decided by it when
            the first ones have been timed.
        trials: number of trials in place of `minutes`.
        weights: `raw` or `averaged`; None for the averaged ones where there are any.
        structures: number of calibration structures.
        held_out: number of other structures on which the figures are measured.
        force_weight: weight of the forces in the loss, Å.
        batch_size: structures per forward pass.
        device: device to compute on.
        seed: random seed, also of the choice of structures.
    """

    checkpoint: str
    data: tuple[str, ...]
    targets: tuple[str, ...] = ()
    plan: PrecisionPlan | None = None
    uniform: str | None = None
    keep: tuple[float, ...] = (0.9, 0.8)
    minutes: float = 15.0
    trials: int | None = None
    weights: str | None = None
    structures: int = 32
    held_out: int = 64
    force_weight: float = FORCE_WEIGHT
    batch_size: int = 2
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        given = [bool(self.targets), self.plan is not None, self.uniform is not None]
        if sum(given) != 1:
            raise InputError("give one of a target (bytes=0.4, latency=0.5), a plan and a uniform precision")
        if self.uniform is not None and self.uniform not in BITS:
            raise InputError(f"{self.uniform!r} is no precision: use one of {', '.join(BITS)}")
        if not all(0 < share < 1 for share in self.keep):
            raise InputError(
                "the shares of the parameters that pruned networks keep must be above 0 and below 1"
            )
        if self.trials is not None and self.trials < 1:
            raise InputError(f"{self.trials} trials were asked for: give at least 1")
        if not self.minutes > 0:
            raise InputError(f"a search of {self.minutes} minutes was asked for: give more than 0")
        for name in ("structures", "held_out"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{getattr(self, name)} {name.replace('_', ' ')} were asked for: give at least 1"
                )


def quantize(
    request: QuantizeRequest, out: AnyPath, state_path: AnyPath | None = None, progress: bool = True
) -> dict[str, Any]:
    """Write a compact checkpoint and measure it.

    Args:
        request: network, data, and the limit or the precisions.
        out: checkpoint to write.
        state_path: file of a search's state, from which it continues; None keeps none.
        progress: show progress bars.

    Returns:
        Content of the JSON file beside `out`: `bytes`, `bytes_float32`, `resident_bytes`, `modules` (bits by
        name), the figures of `measure.compare`, `plan`, `limits` and, after a search, `search`.

    Raises:
        InputError: a target that is not understood or cannot be met, a plan that does not fit, structures
            without free atoms, a network that is compact already, or optuna is missing.
        datasets_oc20.DataError: data that cannot be read.
    """
    out = Path(out)
    check_target(out, inputs=[request.checkpoint, *request.data])
    shares = parse_targets(request.targets, {"bytes": 0.4, "latency": 0.5})
    if shares:
        import_optuna()  # before the work
    checkpoint = load_checkpoint(request.checkpoint, request.weights, device=request.device)
    stored = stored_kinds(checkpoint.model)
    if stored:
        raise InputError(
            f"{request.checkpoint} holds {len(stored)} matrices in fewer bytes already: give the float32 "
            "checkpoint that it was made of"
        )
    plan = request.plan
    if request.uniform is not None:
        plan = PrecisionPlan.uniform(checkpoint.config, request.uniform)
    if plan is not None:
        plan = plan.checked(checkpoint.config)  # before the data are read
    structures = mixed_systems(
        read_structures(request.data, request.structures + request.held_out, request.seed), request.seed
    )
    used, others = structures[: request.structures], structures[request.structures :]
    _check_free(used, checkpoint, request.data)
    search: dict[str, Any] | None = None
    if plan is None:
        path = None if state_path is None else Path(state_path)
        plan, search = _Quantization(request, checkpoint, used, shares, path, progress).run()
    network = compact_network(checkpoint.model, plan)
    size = write_compact(out, checkpoint, network, plan)
    del network
    whole = FileSize(checkpoint, checkpoint.model)
    dense = Predictor(checkpoint, request.device)
    compact = Predictor(str(out), request.device)
    figures = compare(compact, dense, others or used, request.batch_size, seed=request.seed)
    precisions = dict(plan.modules)
    names = matrices(skeleton(compact.checkpoint.config))
    record = {
        "bytes": size,
        "bytes_float32": whole.float32,
        "bytes_ratio": size / whole.float32,
        "modules": {name: BITS[precisions.get(name, "float32")] for name in names},
        **figures,
        "measured_on": {"structures": len(others or used), "calibration": not others},
        "limits": shares,
        "plan": plan.to_dict(),
        "search": search,
    }
    return {**record, "missed": missed(record)}


def missed(record: Mapping[str, Any]) -> list[str]:
    """List, in sentences, the limits that a result of `quantize` misses."""
    found = []
    ratio, limits = record["equivariance_ratio"], record["limits"]
    if ratio is not None and ratio > EQUIVARIANCE_LIMIT:
        found.append(f"the error under rotations is {ratio:.2f} times that of the float32 network")
    for name, key in (("bytes", "bytes_ratio"), ("latency", "ms_ratio")):
        if name in limits and record[key] > limits[name]:
            found.append(f"{name}: {record[key]:.3f} of the float32 network, the limit is {limits[name]:g}")
    return found


class _Quantization:
    """Search of one request.

    Args:
        request: the order.
        checkpoint: the float32 network.
        structures: to calibrate on.
        shares: limits, quantity -> share that stays.
        state_path: file of the state; None keeps none.
        progress: show progress bars.
    """

    def __init__(
        self,
        request: QuantizeRequest,
        checkpoint: Checkpoint,
        structures: Sequence[Data],
        shares: Mapping[str, float],
        state_path: Path | None,
        progress: bool,
    ) -> None:
        self.request, self.checkpoint, self.shares, self.progress = request, checkpoint, shares, progress
        self.begin = time.monotonic()
        self.dense = checkpoint.model.eval()
        self.parts = parts_of(matrices(self.dense))
        size = FileSize(checkpoint, self.dense)
        self.limit = math.floor(shares["bytes"] * size.float32) if "bytes" in shares else _NO_LIMIT
        self._check_limit(size)
        names = ("targets", "keep", "force_weight", "seed")
        fingerprint = {
            "weights": fingerprint_of_weights(self.dense),
            "structures": fingerprint_of_structures(structures),
            **{name: asdict(request)[name] for name in names},
        }
        self.state = PrecisionState.open(state_path, fingerprint)
        self.calibration = Calibration(
            self.dense, checkpoint.normalizers, structures, request.batch_size, request.force_weight
        )

    def run(self) -> tuple[PrecisionPlan, dict[str, Any]]:
        """Measure, search, and return the best plan with the table of all trials."""
        state = self.state
        if state.sensitivity or state.trials:
            log.info(f"continuing the search in {state.path} after {len(state.trials)} trials")
        # Folded, because it is faster; rounded weights are noticed and folded again.
        network = self._folded(self.dense)
        self._measure(network)
        bits = mutual_information(self.calibration, network, self.parts)
        bases = self._bases()
        runners = {id(base): RoundedTrials(self.calibration, base.model) for base in bases}

        def evaluate(base: Base, choice: Mapping[str, str]) -> float:
            return runners[id(base)].loss(base.modules(choice))

        search = PrecisionSearch(bases, bits, evaluate, state, self.request.seed, self.progress)
        if state.count is None or self.request.trials is not None:
            state.count = self.request.trials or self._count(search, evaluate)
            state.save()
        best = search.run(state.count)
        base = bases[best.base]
        plan = PrecisionPlan(tuple(base.modules(best.precisions).items()), base.pruning)
        table = {
            "best": state.trials.index(best),
            "trials": [asdict(trial) for trial in state.trials],
            "prunings": [None if base.pruning is None else base.pruning.to_dict() for base in bases],
            "ms_ratios": [base.ratio for base in bases],
            "sensitivity": state.sensitivity,
            "information_bits": bits,
        }
        return plan.checked(self.dense.config), table

    def _measure(self, network: EquiformerV2) -> None:
        """Measure the sensitivity of every part, each kept as soon as it is known."""
        known = self.state.sensitivity
        total = len(LOWER) * len(self.parts)
        done = sum(len(row) for row in known.values())
        with tqdm(
            desc="sensitivity", unit="runs", total=total, initial=done, disable=not self.progress
        ) as bar:

            def keep(part: str, precision: str, loss: float) -> None:
                known.setdefault(part, {})[precision] = min(loss, 1e30)
                self.state.save()
                bar.update()

            trials = RoundedTrials(self.calibration, network, _FOR_SENSITIVITY)
            full = measure_sensitivity(trials, self.parts, known, keep)
        for part, row in full.items():
            known.setdefault(part, {}).update(row)

    def _count(self, search: PrecisionSearch, evaluate: Any) -> int:
        """Decide the number of trials from the time of one."""
        base, choice, _ = search.starts()[0]
        begin = time.monotonic()
        evaluate(search.bases[base], choice)
        each = time.monotonic() - begin
        left = 60 * self.request.minutes - (time.monotonic() - self.begin)
        fewest = len(search.starts()) + _FEWEST_PROPOSED
        count = max(fewest, min(_MOST_TRIALS, int(left / each)))
        log.info(f"{count} trials of {each:.1f} s each")
        return count

    def _bases(self) -> list[Base]:
        """Make the networks to choose from; their pruning is decided once and then read from the state."""
        if self.state.prunings is None:
            self.state.prunings, self.state.ratios = self._prunings()
            self.state.save()
        bases = []
        for pruning, ratio in zip(self.state.prunings, self.state.ratios, strict=True):
            model = self.dense if pruning is None else shrink(self.dense, pruning)
            shapes = matrices(model)
            room = self.limit - FileSize(self.checkpoint, model, pruning).islands
            parts = parts_of(shapes)
            sizes = PartSizes(parts, shapes, room)
            if sizes.total(sizes.smallest()) <= room:
                bases.append(Base(pruning, self._folded(model), parts, sizes, ratio))
        if not bases:
            raise InputError(
                "the networks that are quick enough exceed the limit of bytes: raise one of the limits"
            )
        return bases

    def _prunings(self) -> tuple[list[PruningPlan | None], list[float | None]]:
        """Choose what is pruned: shares of the parameters, or of the operations down to a limit of time."""
        latency = self.shares.get("latency")
        try:
            check_prunable(self.dense.config)
        except InputError as error:
            if latency is not None:
                raise
            log.info(f"nothing is pruned: {error}")
            return [None], [None]
        if latency is None and not self.request.keep:
            return [None], [None]
        some = self.calibration.structures[:_FOR_IMPORTANCE]
        objective = probe(self.checkpoint.normalizers, self.request.force_weight, self.request.seed)
        importance = gradient_importance(self.dense, some, objective, "taylor")
        scores = gradient_scores(self.dense, importance)
        if latency is None:
            cost = ParameterTarget(self.dense.config, _ANY).fraction_of
            plans: list[PruningPlan | None] = [None]
            for share in sorted(self.request.keep, reverse=True):
                plans.append(importance_plan(self.dense, cost, share, scores, plans[-1]))
            return plans, [None] * len(plans)
        return self._in_time(latency, MacTarget(self.dense.config, _ANY, *self.calibration.size), scores)

    def _in_time(
        self, latency: float, macs: MacTarget, scores: Any
    ) -> tuple[list[PruningPlan | None], list[float | None]]:
        """Prune further and further, until two networks are quick enough."""
        batch = Batch.from_data_list(self.calibration.structures[:1]).to(self.request.device)
        dense = self._folded(self.dense)
        plans: list[PruningPlan | None] = []
        ratios: list[float | None] = []
        plan, ratio = None, 1.0
        for share in _QUICKER:
            try:
                plan = importance_plan(self.dense, macs.fraction_of, share, scores, plan)
            except InputError:
                break
            small = self._folded(shrink(self.dense, plan))
            if "bytes" in self.shares:  # whose matrices are computed in every call
                small = compact_network(shrink(self.dense, plan), self._int8(plan))
                small.fold_weights()
            ratio = compare_latency(lambda net=small: net(batch), lambda: dense(batch)).ratio  # type: ignore[misc]
            log.info(f"{share:.0%} of the operations take {ratio:.1%} of the time")
            if ratio <= latency:
                plans.append(plan)
                ratios.append(ratio)
            if len(plans) == _NETWORKS_IN_TIME:
                break
        if not plans:
            raise InputError(
                f"the limit latency={latency:g} cannot be met: pruning ends at {ratio:.1%} of the time; "
                "raise the limit"
            )
        return plans, ratios

    def _int8(self, plan: PruningPlan) -> PrecisionPlan:
        config = plan.applied_to(self.dense.config)
        return PrecisionPlan.uniform(config, "int8")

    def _check_limit(self, size: FileSize) -> None:
        """Refuse a limit that no choice meets, before anything is measured."""
        if "bytes" not in self.shares:
            return
        least = size.of(dict.fromkeys(size.matrices, "int4"))
        share = self.shares["bytes"]
        if self.limit < size.islands:
            raise InputError(
                f"the limit bytes={share:g} is {self.limit:,} bytes, and what stays float32 takes "
                f"{size.islands:,}: give at least bytes={math.ceil(1000 * least / size.float32) / 1000:g}"
            )
        if self.limit < least:
            raise InputError(
                f"the limit bytes={share:g} is {self.limit:,} bytes, and int4 everywhere takes {least:,}: "
                f"give at least bytes={math.ceil(1000 * least / size.float32) / 1000:g}, or prune first "
                "(`equiformer2 prune plan` and `apply`)"
            )

    def _folded(self, model: EquiformerV2) -> EquiformerV2:
        network = copy.deepcopy(model).requires_grad_(False)
        network.fold_weights()
        return network


def _check_free(structures: Sequence[Data], checkpoint: Checkpoint, data: Sequence[str]) -> None:
    """Refuse structures without a free atom, on which changes of the forces cannot be seen."""
    if checkpoint.config.forces == "none":
        return
    if not any(bool((~structure.fixed.bool()).any()) for structure in structures):
        raise InputError(
            f"none of the {len(structures)} calibration structures has a free atom, and precision is judged "
            f"by the forces of free atoms: give others than {', '.join(map(str, data))}"
        )
