"""Measured times of the parts of a network, from which the time of every plan is added up.

    time(plan) / time(dense) = rest + sum of the parts that stay, each as it is cut

as the lookup tables of hardware-aware architecture search (FBNet, arXiv 1812.03443). A part is the attention
or the feed-forward branch of a block, or the force head; only its shapes matter, so each distinct one is
measured once, alone, beside the dense one; what the dense one takes of a whole call is what a call without it
saves. The rest (graph, frames, embedding, energy head) is the same for all plans, also for those that cut the
channels of the atoms' features.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch, Data

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.model import EquiformerV2
from equiformer2.model.block_config import GRID_MLP_WIDTHS, BlockConfig, ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.model.output_request import OutputRequest
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.fingerprints import chosen_options
from equiformer2.pruning.structured.apply import shrink
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.values import Number, mapping, shown

_FORMAT = "equiformer2.time_table"
_VERSION = 1
_MOST_SHARE = 1e3
"""No part takes that many times as long as the whole network; noise makes shares below 0."""
_MESSAGES = ("lmax", "mmax", "num_heads", "attn_hidden_channels", "attn_value_channels")
_SHAPES = {
    "attention": _MESSAGES,
    "feed_forward": ("ffn_hidden_channels", *GRID_MLP_WIDTHS),
    "force_head": _MESSAGES,
}


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured at once.

    Attributes:
        kind: `attention`, `feed_forward` (both with norm and residual) or `force_head`.
        channels: of the atoms' features.
        shape: widths and degrees that the kind has.
    """

    kind: str
    channels: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Such as `attention 32: 3 2 4 32 8`."""
        return f"{self.kind} {self.channels}: {' '.join(map(str, self.shape))}"


#: Time of a part over that of another one, or (None) what it takes of the time of the whole network.
Measure = Callable[[Part, Part | None], float]


def parts_of(config: ModelConfig) -> list[Part]:
    """All parts of a network of `config`, block by block."""
    parts = [part for index in range(config.num_layers) for part in _parts_of_block(config, index)]
    return [*parts, _part(config, "force_head", config.force_block)] if config.regress_forces else parts


def _parts_of_block(config: ModelConfig, index: int) -> list[Part]:
    block = config.block(index)
    return [_part(config, kind, block) for kind in ("attention", "feed_forward") if getattr(block, kind)]


def _part(config: ModelConfig, kind: str, block: ResolvedBlock) -> Part:
    return Part(kind, config.sphere_channels, tuple(getattr(block, name) for name in _SHAPES[kind]))


class TimeTable:
    """Times of parts as shares of the time of the whole dense network.

    Args:
        config: of the dense network.
        measure: see `Measure`.
        path: where the table is kept, and read from if it exists; None keeps it in memory.
        facts: what the times depend on beside the shapes; a table of other facts is refused.

    Raises:
        InputError: `path` holds no table, or one that was measured otherwise.
    """

    def __init__(
        self,
        config: ModelConfig,
        measure: Measure,
        path: AnyPath | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        path = None if path is None else Path(path)
        self._config, self._measure, self._path = config, measure, path
        self._facts = json.loads(json.dumps({"network": chosen_options(config), **(facts or {})}))
        self._dense = parts_of(config)
        self._shares: dict[str, float] = {}
        if path is not None and path.exists():
            self._shares = self._read(path)

    def fraction_of(self, plan: PruningPlan) -> float:
        """Time of `plan`'s network over that of the dense one; what is not known yet is measured."""
        left = sum(map(self._share, parts_of(plan.applied_to(self._config))))
        return 1.0 + left - sum(map(self._share, self._dense))

    def _share(self, part: Part) -> float:
        if part.name not in self._shares:
            first = next(dense for dense in self._dense if dense.kind == part.kind)
            if part == first:
                share = self._measure(part, None)
            else:
                share = self._share(first) * self._measure(part, first)
            self._shares[part.name] = share
            if self._path is not None:
                self._write(self._path)
        return self._shares[part.name]

    def _write(self, path: Path) -> None:
        known = {"format": _FORMAT, "version": _VERSION, "facts": self._facts, "shares": self._shares}
        write_json(path, known, make_folder=True)

    def _read(self, path: Path) -> dict[str, float]:
        try:
            known = read_json(path)
            if known.get("format") != _FORMAT or known.get("version") != _VERSION:
                raise InputError("its format is another one")
            facts = mapping(known.get("facts"), "facts")
            shares = {
                name: Number(-_MOST_SHARE, _MOST_SHARE).read(share, f"shares.{name}")
                for name, share in mapping(known.get("shares"), "shares").items()
            }
        except InputError as error:
            raise InputError(
                f"{path} is no table of times ({error}): give another file or remove it"
            ) from error
        for key in sorted({*facts, *self._facts}):
            if facts.get(key) != self._facts.get(key):
                was = (
                    ""
                    if key == "network"
                    else f" ({shown(facts.get(key))}, now {shown(self._facts.get(key))})"
                )
                raise InputError(
                    f"the times in {path} were measured with another {key}{was}: measure as before, or "
                    "remove the file and the state of the search"
                )
        return shares


class PartTimer:
    """Measures parts with random weights on the edges of a batch, in turns with what they are compared with.

    Args:
        model: the dense network, in evaluation mode.
        batch: what it runs on, on the device of the model; forces on its fixed atoms are not asked for.
        threads: of torch while measuring; None for those it has.
        repeats, warm_up: pairs of calls.
    """

    def __init__(
        self,
        model: EquiformerV2,
        batch: Batch | Data,
        threads: int | None = None,
        repeats: int = 15,
        warm_up: int = 2,
    ) -> None:
        if repeats < 1 or warm_up < 0:
            raise InputError("latency needs at least one repeat, and no negative warm_up")
        self._model, self._batch, self._threads = model, batch, threads
        self._repeats, self._warm_up = repeats, warm_up
        self._references: dict[Part | None, Callable[[], object]] = {}
        self._request = OutputRequest()
        if model.force_block is not None and "fixed" in batch and bool(batch.fixed.any()):
            self._request = OutputRequest(force_atoms=~batch.fixed.bool())

    def __call__(self, part: Part, reference: Part | None) -> float:
        """Median of the ratios of neighbouring calls; of a whole call, what it saves to leave a part out."""
        if reference not in self._references:
            self._references[reference] = (
                self.whole(deepcopy(self._model)) if reference is None else self._alone(reference)
            )
        other = self._references[reference]
        if reference is not None or part.kind == "force_head":
            return self.compare(self._alone(part), other)
        # All blocks that have it at once: a single one would be lost in the noise.
        config = self._model.config
        without, count = PruningPlan.keep_all(config), 0
        for index in range(config.num_layers):
            if part in _parts_of_block(config, index):
                without, count = without.with_block(index, **{part.kind: False}), count + 1
        return (1 - self.compare(self.whole(shrink(self._model, without)), other)) / count

    def compare(self, one: Callable[[], object], other: Callable[[], object]) -> float:
        """Median of the ratios of neighbouring calls, with the number of threads of this timer."""
        with with_threads(self._threads):
            return compare_latency(one, other, self._repeats, self._warm_up).ratio

    @property
    def facts(self) -> dict[str, Any]:
        """What the times depend on."""
        return {
            "structure": [len(self._batch.pos), len(self._model.build_graph(self._batch).distances)],
            "forces": None if self._request.force_atoms is None else int(self._request.force_atoms.sum()),
            "device": str(self._model.sphere_embedding.weight.device),
            "backend": self._model.resolve_backend().name,
            "threads": self._threads or torch.get_num_threads(),
        }

    def whole(self, network: EquiformerV2) -> Callable[[], object]:
        """All of `network`, the graph included; it is prepared for inference, so give a copy."""
        network.fold_weights()
        return lambda: network(self._batch, request=self._request)

    def _alone(self, part: Part) -> Callable[[], object]:
        """A part with the arguments that it has in a network of nothing else."""
        network = self._network(part)
        run = self.whole(network)
        calls: list[tuple[Any, ...]] = []
        module: Any = network.force_block if part.kind == "force_head" else network.blocks[0]
        hook = module.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
        with torch.no_grad():
            run()
        hook.remove()
        return lambda: module(*calls[0])

    def _network(self, part: Part) -> EquiformerV2:
        config, like = self._model.config, self._model.sphere_embedding.weight
        shape: dict[str, Any] = dict(zip(_SHAPES[part.kind], part.shape, strict=True))
        for name in () if config.use_grid_mlp else GRID_MLP_WIDTHS:
            shape.pop(name, None)
        block, head = BlockConfig(False, False), config.force_head
        if part.kind == "force_head":
            head = BlockConfig(**shape)
        else:
            block = BlockConfig(part.kind == "attention", part.kind == "feed_forward", **shape)
        alone = dataclasses.replace(
            config, num_layers=1, sphere_channels=part.channels, blocks=(block,), force_head=head
        )
        with torch.random.fork_rng(devices=[]):
            network = EquiformerV2(alone).to(device=like.device, dtype=like.dtype)
        network.backend = self._model.backend
        return network.requires_grad_(False)


@contextmanager
def with_threads(threads: int | None) -> Iterator[None]:
    """Context in which torch has this many threads; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
