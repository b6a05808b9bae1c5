"""Measured times of the parts of a network, from which the time of every plan is added up.

    time(plan) / time(dense) = rest + sum of the parts that stay, each as it is cut

as the lookup tables of hardware-aware architecture search (FBNet, arXiv 1812.03443). A part is the attention
or the feed-forward branch of a block, or the force head; only its shapes matter, so each distinct one is
measured once, alone, beside the dense one; what the dense one takes of a whole call is what a call without it
saves. The rest (graph, frames, embedding, energy head) is the same for all plans, also for those that cut the
channels of the atoms' features. Measured networks have the shapes of the plan and weights of the dense
network or random ones: times do not depend on the weights.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch, Data

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.fingerprints import chosen_options
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.model import EquiformerV2
from equiformer2.model.block_config import GRID_MLP_WIDTHS, BlockConfig, ResolvedBlock
from equiformer2.model.config import ModelConfig
from equiformer2.model.output_request import OutputRequest
from equiformer2.pruning.cost.latency import compare_latency
from equiformer2.pruning.cost.operations import Plan
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
    """Unit of measurement: one branch of a block, with its norm and residual, or the force head.

    Attributes:
        kind: `attention`, `feed_forward` or `force_head`.
        channels: channels of the atoms' features.
        shape: widths and degrees that the kind has.
    """

    kind: str
    channels: int
    shape: tuple[int, ...]

    @classmethod
    def from_block(cls, config: ModelConfig, kind: str, block: ResolvedBlock) -> "Part":
        """Return the part `kind` of a block, or of the force head, in a network of `config`."""
        return cls(kind, config.sphere_channels, tuple(getattr(block, name) for name in _SHAPES[kind]))

    @property
    def name(self) -> str:
        """Kind, channels and shape, such as `attention 32: 3 2 4 32 8`."""
        return f"{self.kind} {self.channels}: {' '.join(map(str, self.shape))}"


#: Time of a part over that of another one, or (None) its share of the time of the whole network.
Measure = Callable[[Part, Part | None], float]


def parts_of(config: ModelConfig) -> list[Part]:
    """List the parts of a network of `config`, block by block and the force head last."""
    parts = [
        Part.from_block(config, kind, config.block(index))
        for index in range(config.num_layers)
        for kind in ("attention", "feed_forward")
        if getattr(config.block(index), kind)
    ]
    if config.regress_forces:
        parts.append(Part.from_block(config, "force_head", config.force_block))
    return parts


class TimeTable:
    """Times of parts as shares of the time of the whole dense network.

    Args:
        config: configuration of the dense network.
        measure: measurement of a part that is not in the table yet.
        path: file that the table is read from, if it exists, and written to; None keeps the table in memory.
        facts: conditions of the measurement beside the shapes; a table of other conditions is refused.

    Raises:
        InputError: `path` holds no table, or one that was measured under other conditions.
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

    def fraction_of(self, plan: Plan) -> float:
        """Return the time of `plan`'s network over that of the dense one.

        Parts that are not in the table are measured, and the file is written after each.
        """
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
    """Measurement of parts with random weights on the edges of a batch, in turns with their reference.

    Args:
        model: dense network, in evaluation mode; it is left as it is.
        batch: structures of the timed calls, on the device of `model`; forces on fixed atoms are left out.
        threads: number of torch's threads while measuring; None leaves it as it is.
        repeats: timed pairs of calls.
        warm_up: pairs of calls before them.

    Raises:
        InputError: fewer than one repeat, or a negative `warm_up`.
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
        """Measure `part`.

        Args:
            part: part to measure.
            reference: part to compare with, of the same kind; None for the whole dense network.

        Returns:
            Median ratio of the times of neighbouring calls; with the whole network, the share of its time
            that it saves to leave the part out.
        """
        if reference not in self._references:
            self._references[reference] = (
                self._whole(self._model.config) if reference is None else self._alone(reference)
            )
        other = self._references[reference]
        if reference is not None or part.kind == "force_head":
            return self._compare(self._alone(part), other)
        # All blocks that have it at once: a single one would be lost in the noise.
        config = self._model.config
        blocks, count = list(config.blocks or (BlockConfig(),) * config.num_layers), 0
        for index in range(config.num_layers):
            block = config.block(index)
            if getattr(block, part.kind) and Part.from_block(config, part.kind, block) == part:
                blocks[index] = dataclasses.replace(blocks[index], **{part.kind: False})
                count += 1
        without = dataclasses.replace(config, blocks=tuple(blocks))
        return (1 - self._compare(self._whole(without), other)) / count

    def whole_ratio(self, config: ModelConfig) -> float:
        """Time a network of `config` beside the dense one.

        Returns:
            Median ratio of the times of neighbouring calls, `config` / dense.
        """
        return self._compare(self._whole(config), self._whole(self._model.config))

    def _compare(self, one: Callable[[], object], other: Callable[[], object]) -> float:
        """Median of the ratios of neighbouring calls, with the number of threads of this timer."""
        with with_threads(self._threads):
            return compare_latency(one, other, self._repeats, self._warm_up).ratio

    @property
    def facts(self) -> dict[str, Any]:
        """Conditions that the times depend on, for `TimeTable`."""
        return {
            "structure": [len(self._batch.pos), len(self._model.build_graph(self._batch).distances)],
            "forces": None if self._request.force_atoms is None else int(self._request.force_atoms.sum()),
            "device": str(self._model.sphere_embedding.weight.device),
            "backend": self._model.resolve_backend().name,
            "threads": self._threads or torch.get_num_threads(),
        }

    def _whole(self, config: ModelConfig) -> Callable[[], object]:
        """Call of a whole network of `config`, the graph included."""
        network = self._network(config)
        known = self._model.state_dict()
        own = network.state_dict()
        same = {name: known[name] for name, value in own.items() if known[name].shape == value.shape}
        network.load_state_dict(own | same)
        network.fold_weights()
        return lambda: network(self._batch, request=self._request)

    def _alone(self, part: Part) -> Callable[[], object]:
        """Call of a part with the arguments that it has in a network of nothing else."""
        network = self._single_part(part)
        network.fold_weights()
        calls: list[tuple[Any, ...]] = []
        module: Any = network.force_block if part.kind == "force_head" else network.blocks[0]
        hook = module.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
        with torch.no_grad():
            network(self._batch, request=self._request)
        hook.remove()
        return lambda: module(*calls[0])

    def _single_part(self, part: Part) -> EquiformerV2:
        """Network of one block that has nothing but `part`, with random weights."""
        config = self._model.config
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
        return self._network(alone)

    def _network(self, config: ModelConfig) -> EquiformerV2:
        """Network of `config` with random weights, on the device and in the precision of the dense one."""
        like = self._model.sphere_embedding.weight
        with torch.random.fork_rng(devices=[]):
            network = EquiformerV2(config).to(device=like.device, dtype=like.dtype)
        network.backend = self._model.backend
        return network.eval().requires_grad_(False)


@contextmanager
def with_threads(threads: int | None) -> Iterator[None]:
    """Set the number of torch's threads for as long as the context lasts; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
