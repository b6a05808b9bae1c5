"""Make a compact checkpoint from a checkpoint and data: by a search, or with given precisions."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Checkpoint, load_checkpoint
from equiformer2.checkpoint.compact import check_not_stored
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.errors import InputError
from equiformer2.files import check_target
from equiformer2.inference import Predictor
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.branches import branch_names
from equiformer2.model.parametrizations import BITS, attach
from equiformer2.pruning.calibration import FORCE_WEIGHT, Calibration
from equiformer2.pruning.calibration_data import mixed_systems, read_structures
from equiformer2.pruning.cost.targets import MacTarget, ParameterTarget, parse_targets
from equiformer2.pruning.fingerprints import fingerprint_of_structures
from equiformer2.pruning.precision.allocation import PartSizes
from equiformer2.pruning.precision.compact import FileSize, compact_network, write_compact
from equiformer2.pruning.precision.measure import compare, errors
from equiformer2.pruning.precision.plan import PrecisionPlan, matrices, parts_of, skeleton
from equiformer2.pruning.precision.products import (
    ProductTrials,
    Timing,
    can_save_time,
    folded,
    time_network,
)
from equiformer2.pruning.precision.recovery import (
    Recovery,
    adapter_bytes,
    is_recoverable,
    recover,
    write_start,
)
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
"""Largest error under rotations that a result may have, relative to that of the float32 network, or with
products in bfloat16 to that of the network with all products so."""
_FOR_SENSITIVITY = 8
_FOR_IMPORTANCE = 8
_MOST_TRIALS, _FEWEST_PROPOSED = 64, 4
_ANY = 0.5
_NO_LIMIT = 1 << 62
_QUICKER = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
"""Shares of the operations at which networks are timed for a limit of time."""
_NETWORKS_IN_TIME = 2
_AIM = 0.98
"""Share of a limit of time at which a search aims, because measured times scatter."""


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
        max_minutes: time after which a search ends with the best trial so far, whatever is left of it.
        recover: rank of an adapter beside the checkpoint that takes back a part of what rounding changes;
            None for none. Its bytes count towards a limit.
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
    max_minutes: float = 25.0
    recover: int | None = None
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
        if self.recover is not None and self.recover < 1:
            raise InputError(f"--recover is {self.recover}: give the rank of the adapter, at least 1")
        if not all(0 < share < 1 for share in self.keep):
            raise InputError(
                "the shares of the parameters that pruned networks keep must be above 0 and below 1"
            )
        if self.trials is not None and self.trials < 1:
            raise InputError(f"{self.trials} trials were asked for: give at least 1")
        for minutes in (self.minutes, self.max_minutes):
            if not minutes > 0:
                raise InputError(f"a search of {minutes} minutes was asked for: give more than 0")
        for name in ("structures", "held_out"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{getattr(self, name)} {name.replace('_', ' ')} were asked for: give at least 1"
                )


def quantize(
    request: QuantizeRequest,
    out: AnyPath,
    state_path: AnyPath | None = None,
    progress: bool = True,
    adapter_path: AnyPath | None = None,
) -> dict[str, Any]:
    """Write a compact checkpoint and measure it.

    Args:
        request: network, data, and the limit or the precisions.
        out: checkpoint to write.
        state_path: file of a search's state, from which it continues; None keeps none.
        progress: show progress bars.
        adapter_path: adapter to write with `request.recover`; None for `NAME.adapter.pt` beside `out`.

    Returns:
        Content of the JSON file beside `out`: `bytes`, `bytes_float32`, `resident_bytes`, `modules` (bits by
        name), the figures of `measure.compare`, `plan`, `limits` and, after a search, `search`; with
        `request.recover` also `recovery` (`adapter`, `bytes`, and see `_recovered`).

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
    check_not_stored(checkpoint.model, request.checkpoint)
    plan = _given_plan(request, checkpoint.config)  # checked before the data are read
    structures = mixed_systems(
        read_structures(request.data, request.structures + request.held_out, request.seed), request.seed
    )
    used, others = structures[: request.structures], structures[request.structures :]
    _check_free(used, checkpoint, request.data)
    search: dict[str, Any] | None = None
    if plan is None:
        path = None if state_path is None else Path(state_path)
        plan, search = _Quantization(request, checkpoint, used, shares, path, progress).run()
    found = None
    if request.recover is not None and is_recoverable(plan):
        found = recover(checkpoint.model, plan, request.recover)
    network = compact_network(checkpoint.model, plan) if found is None else found.network
    dense, judged = Predictor(checkpoint, request.device), others or used
    compact = _predictor(checkpoint, network, request.device)
    figures = compare(compact, dense, judged, request.batch_size, seed=request.seed)
    recovery = None if found is None else _recovered(found, plan, request, dense, judged)
    whole = FileSize(checkpoint, checkpoint.model)
    # Last: a call that is killed while it measures leaves no file, and the same command goes on.
    out.parent.mkdir(parents=True, exist_ok=True)
    size = write_compact(out, checkpoint, network, plan)
    if found is not None and recovery is not None:
        path = default_adapter_path(out) if adapter_path is None else Path(adapter_path)
        write_start(path, found, checkpoint, out, recovery["rank"])
        recovery = {"adapter": path.name, "bytes": path.stat().st_size, **recovery}
    precisions = dict(plan.modules)
    names = matrices(skeleton(network.config))
    record = {
        "bytes": size,
        "bytes_float32": whole.float32,
        "bytes_ratio": size / whole.float32,
        "modules": {name: BITS[precisions.get(name, "float32")] for name in names},
        **figures,
        "measured_on": {"structures": len(judged), "calibration": not others},
        "limits": shares,
        "plan": plan.to_dict(),
        "search": search,
        "recovery": recovery,
    }
    return {**record, "missed": missed(record)}


def _given_plan(request: QuantizeRequest, config: ModelConfig) -> PrecisionPlan | None:
    """Return the plan that is used in place of a search, if there is one.

    Raises:
        InputError: it does not fit the network; there is nothing to recover from.
    """
    plan = request.plan
    if request.uniform is not None:
        plan = PrecisionPlan.uniform(config, request.uniform)
    plan = None if plan is None else plan.checked(config)
    if request.recover is not None:
        if plan is None:
            possible = any(target.startswith("bytes") for target in request.targets)
        else:
            possible = is_recoverable(plan)
        if not possible:
            raise InputError(
                "nothing is to be stored as int8 or int4, so that there is nothing to recover from: leave "
                "--recover out"
            )
    return plan


def default_adapter_path(out: AnyPath) -> Path:
    """Name the adapter of a compact checkpoint, in the same folder."""
    out = Path(out)
    return out.with_name(f"{out.stem}.adapter.pt")


def _predictor(checkpoint: Checkpoint, network: EquiformerV2, device: str) -> Predictor:
    """Predictor of a network that was made from a checkpoint."""
    return Predictor(replace(checkpoint, model=network, config=network.config), device)


def _recovered(
    found: Recovery,
    plan: PrecisionPlan,
    request: QuantizeRequest,
    dense: Predictor,
    structures: Sequence[Data],
) -> dict[str, Any]:
    """Measure a compact network together with its maps.

    Returns:
        `rank`, the figures of `measure.errors` for the network with the maps and, under `plain`, for the
        plan's network without maps, and `weight_error` with `weight_error_plain`: what rounding changes of
        the matrices with a map, relative to them.
    """
    checkpoint = dense.checkpoint
    adapted = copy.deepcopy(found.network)
    attach(adapted, copy.deepcopy(dict(found.maps)))
    with_maps = _predictor(checkpoint, adapted, request.device)
    plain = _predictor(checkpoint, compact_network(checkpoint.model, plan), request.device)
    return {
        "rank": request.recover,
        "weight_error": found.error,
        "weight_error_plain": found.plain_error,
        **errors(with_maps, dense, structures, request.batch_size),
        "plain": errors(plain, dense, structures, request.batch_size),
    }


def missed(record: Mapping[str, Any]) -> list[str]:
    """List, in sentences, the limits that a result of `quantize` misses."""
    found = []
    limits, error, other = record["limits"], record["equivariance_error"], "float32"
    if record["plan"].get("products") and record["equivariance_error_bf16"] is not None:
        other = "bf16"  # rounded features turn less exactly with the structure
    than = record["equivariance_error_dense" if other == "float32" else "equivariance_error_bf16"]
    if error is not None and than and error > EQUIVARIANCE_LIMIT * than:
        found.append(f"the error under rotations is {error / than:.2f} times that of the {other} network")
    adapter = 0 if record["recovery"] is None else record["recovery"]["bytes"]
    shares = {"bytes": (record["bytes"] + adapter) / record["bytes_float32"], "latency": record["ms_ratio"]}
    for name, share in shares.items():
        if name in limits and share > limits[name]:
            found.append(f"{name}: {share:.3f} of the float32 network, the limit is {limits[name]:g}")
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
        self.seconds = 60 * request.max_minutes
        self.in_time = "latency" in shares
        self.by_branches = self.in_time and "bytes" not in shares
        self.dense = checkpoint.model.eval()
        self.parts = _parts(self.dense, self.by_branches)
        size = FileSize(checkpoint, self.dense)
        self.limit = math.floor(shares["bytes"] * size.float32) if "bytes" in shares else _NO_LIMIT
        self.adapter_bytes = 0 if request.recover is None else adapter_bytes(size.matrices, request.recover)
        self.limit -= self.adapter_bytes
        self._check_limit(size)
        names = ("targets", "keep", "force_weight", "seed")
        fingerprint = {
            "weights": fingerprint_of_weights(self.dense),
            "structures": fingerprint_of_structures(structures),
            **{name: asdict(request)[name] for name in names},
            **({} if request.recover is None else {"recover": request.recover}),
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
        network = folded(self.dense)
        bases = self._bases(network)
        losses, estimated = self._measure(network, bases)
        bits = mutual_information(self.calibration, network, self.parts)
        kind = ProductTrials if self.by_branches else RoundedTrials
        runners = {id(base): kind(self.calibration, base.model) for base in bases}

        def evaluate(base: Base, choice: Mapping[str, str]) -> float:
            return runners[id(base)].loss(base.modules(choice))

        search = PrecisionSearch(bases, losses, bits, evaluate, state, self.request.seed, self.progress)
        if state.count is None or self.request.trials is not None:
            state.count = self.request.trials or self._count(search, evaluate)
            state.save()
        best = search.run(state.count, self.begin + self.seconds)
        base = bases[best.base]
        if self.by_branches:
            products = tuple(name for name, precision in best.precisions.items() if precision == "bf16")
            plan = PrecisionPlan((), base.pruning, products)
        else:
            plan = PrecisionPlan(tuple(base.modules(best.precisions).items()), base.pruning)
        wanted = max(state.count, len(search.starts()))
        if len(state.trials) < wanted:
            log.info(
                f"the search ends after {self.request.max_minutes:g} minutes with {len(state.trials)} of "
                f"{wanted} trials"
            )
        table = {
            "best": state.trials.index(best),
            "trials_planned": wanted,
            "sensitivities_estimated": estimated,
            "trials": [asdict(trial) for trial in state.trials],
            "prunings": [None if base.pruning is None else base.pruning.to_dict() for base in bases],
            "ms_ratios": [None if base.timing is None else base.timing.ratio for base in bases],
            "ms_savings": [None if base.timing is None else dict(base.timing.savings) for base in bases],
            "sensitivity": losses,
            "information_bits": bits,
        }
        return plan.checked(self.dense.config), table

    def _measure(
        self, network: EquiformerV2, bases: Sequence[Base]
    ) -> tuple[dict[str, dict[str, float]], int]:
        """Measure the sensitivity of every part, each kept as soon as it is known.

        Returns:
            Part -> precision -> loss, and the number of those that are estimated for lack of time.
        """
        lower: tuple[str, ...] = LOWER
        if self.by_branches:
            lower = LOWER[:1] if any(base.timing and base.timing.savings for base in bases) else ()
        known = self.state.sensitivity
        total = len(lower) * len(self.parts)
        done = sum(precision in row for row in known.values() for precision in lower)
        with tqdm(
            desc="sensitivity", unit="runs", total=total, initial=done, disable=not self.progress
        ) as bar:

            def keep(part: str, precision: str, loss: float) -> None:
                known.setdefault(part, {})[precision] = min(loss, 1e30)
                self.state.save()
                bar.update()

            kind = ProductTrials if self.by_branches else RoundedTrials
            trials = kind(self.calibration, network, _FOR_SENSITIVITY)
            # The other half of the time is for trials.
            end = self.begin + self.seconds / 2
            full = measure_sensitivity(trials, self.parts, known, keep, lower, end)
        left = total - sum(precision in row for row in known.values() for precision in lower)
        if left:
            log.info(f"{left} of {total} sensitivities are estimated, for lack of time")
        return full, left

    def _count(self, search: PrecisionSearch, evaluate: Any) -> int:
        """Decide the number of trials from the time of one."""
        starts = search.starts()
        if all(len(costs) == 1 for base in search.bases for costs in base.sizes.costs.values()):
            return len(starts)  # there is nothing to propose
        base, choice, _ = starts[0]
        begin = time.monotonic()
        evaluate(search.bases[base], choice)
        each = time.monotonic() - begin
        left = 60 * self.request.minutes - (time.monotonic() - self.begin)
        count = max(len(starts) + _FEWEST_PROPOSED, min(_MOST_TRIALS, int(left / each)))
        log.info(f"{count} trials of {each:.1f} s each")
        return count

    def _bases(self, dense: EquiformerV2) -> list[Base]:
        """Make the networks to choose from; their pruning is decided once and then read from the state."""
        if self.state.prunings is None:
            self.state.prunings, self.state.timings = self._prunings(dense)
            self.state.save()
        bases = []
        for pruning, timing in zip(self.state.prunings, self.state.timings, strict=True):
            model = self.dense if pruning is None else shrink(self.dense, pruning)
            parts = _parts(model, self.by_branches)
            if self.by_branches and timing is not None:
                sizes = timing.sizes(list(parts), _AIM * self.shares["latency"])
            else:
                shapes = matrices(model)
                room = self.limit - FileSize(self.checkpoint, model, pruning).islands
                sizes = PartSizes.of_matrices(parts, shapes, room)
            if sizes.total(sizes.smallest()) <= sizes.room:
                bases.append(Base(pruning, folded(model), parts, sizes, timing))
        if not bases:
            raise InputError(
                "the networks that are quick enough exceed the limit of bytes: raise one of the limits"
            )
        return bases

    def _prunings(self, dense: EquiformerV2) -> tuple[list[PruningPlan | None], list[Timing | None]]:
        """Choose what is pruned: shares of the parameters, or of the operations down to a limit of time."""
        if self.in_time:
            return self._in_time(dense)
        try:
            check_prunable(self.dense.config)
        except InputError as error:
            log.info(f"nothing is pruned: {error}")
            return [None], [None]
        if not self.request.keep:
            return [None], [None]
        scores, cost = self._scores(), ParameterTarget(self.dense.config, _ANY).fraction_of
        plans: list[PruningPlan | None] = [None]
        for share in sorted(self.request.keep, reverse=True):
            plans.append(importance_plan(self.dense, cost, share, scores, plans[-1]))
        return plans, [None] * len(plans)

    def _scores(self) -> Any:
        """Score all units by what their removal changes."""
        some = self.calibration.structures[:_FOR_IMPORTANCE]
        objective = probe(self.checkpoint.normalizers, self.request.force_weight, self.request.seed)
        return gradient_scores(self.dense, gradient_importance(self.dense, some, objective, "taylor"))

    def _in_time(self, dense: EquiformerV2) -> tuple[list[PruningPlan | None], list[Timing | None]]:
        """Prune further and further, until two networks are quick enough."""
        limit = _AIM * self.shares["latency"]
        batch = Batch.from_data_list(self.calibration.structures[:1]).to(self.request.device)
        found: list[tuple[PruningPlan | None, Timing]] = []
        least, ended = 1.0, ""
        for plan in self._quicker(dense):
            if isinstance(plan, InputError):
                ended = f" ({plan})"
                break
            small = self.dense if plan is None else shrink(self.dense, plan)
            if self.by_branches:
                timing = time_network(dense if plan is None else folded(small), dense, batch)
            elif plan is None:
                continue  # stored matrices are computed in every call: it is slower than the dense network
            else:
                compact = folded(compact_network(small, self._int8(plan)))
                timing = time_network(compact, dense, batch, products=False)
            reached = timing.least(branch_names(small))
            log.info(f"{'pruned' if plan else 'all units'}: at least {reached:.1%} of the time")
            least = min(least, reached)
            if reached <= limit:
                found.append((plan, timing))
            if len(found) == _NETWORKS_IN_TIME:
                break
        if not found:
            raise InputError(
                f"the limit latency={self.shares['latency']:g} cannot be met: no choice takes less than "
                f"{least:.1%} of the time{ended}{self._products_told()}; raise the limit"
            )
        return [plan for plan, _ in found], [timing for _, timing in found]

    def _products_told(self) -> str:
        """Say why products in bfloat16 do not help; empty where they were tried."""
        if not self.by_branches:
            return ", with matrices in fewer bits, which are computed in every call"
        if can_save_time(self.dense):
            return ""
        if self.dense.config.forces == "gradient":
            return ", and forces that are gradients of the energy are computed in float32"
        return ", and this device has no instructions for products in bfloat16"

    def _quicker(self, dense: EquiformerV2) -> Iterator[PruningPlan | InputError | None]:
        """Go through the dense network and ever smaller ones; what ends it comes last."""
        if can_save_time(dense):
            yield None
        try:
            check_prunable(self.dense.config)
            scores = self._scores()
            macs = MacTarget(self.dense.config, _ANY, *self.calibration.size)
            plan = None
            for share in _QUICKER:
                plan = importance_plan(self.dense, macs.fraction_of, share, scores, plan)
                yield plan
        except InputError as error:
            yield error

    def _int8(self, plan: PruningPlan) -> PrecisionPlan:
        config = plan.applied_to(self.dense.config)
        return PrecisionPlan.uniform(config, "int8")

    def _check_limit(self, size: FileSize) -> None:
        """Refuse a limit that no choice meets, before anything is measured."""
        if "bytes" not in self.shares:
            return
        least = size.of(dict.fromkeys(size.matrices, "int4"))
        if self.limit >= least:
            return
        share, beside = self.shares["bytes"], self.adapter_bytes
        needed = math.ceil(1000 * (least + beside) / size.float32) / 1000
        told = f"the limit bytes={share:g} is {self.limit + beside:,} bytes"
        if beside:
            told += f", the adapter of --recover may take {beside:,}"
        told += f", and what stays float32 takes {size.islands:,}"
        if self.limit >= size.islands:
            told += f", with int4 for all other matrices {least:,}"
        if needed >= 1:
            raise InputError(f"{told}: give a lower rank to --recover, or leave it out")
        raise InputError(
            f"{told}: give at least bytes={needed:g}, or prune first (`equiformer2 prune plan` and `apply`)"
        )


def _parts(model: EquiformerV2, by_branches: bool) -> dict[str, list[str]]:
    """Group what gets one precision: matrices, or for products in bfloat16 each branch by itself."""
    if by_branches:
        return {name: [name] for name in branch_names(model)}
    return parts_of(matrices(model))


def _check_free(structures: Sequence[Data], checkpoint: Checkpoint, data: Sequence[str]) -> None:
    """Refuse structures without a free atom, on which changes of the forces cannot be seen."""
    if checkpoint.config.forces == "none":
        return
    if not any(bool((~structure.fixed.bool()).any()) for structure in structures):
        raise InputError(
            f"none of the {len(structures)} calibration structures has a free atom, and precision is judged "
            f"by the forces of free atoms: give others than {', '.join(map(str, data))}"
        )
