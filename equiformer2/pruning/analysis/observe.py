"""Features, attention weights and seconds of every block, taken by hooks from a forward pass."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2


@dataclass(frozen=True)
class Observation:
    """One forward pass of L blocks over N atoms and E edges.

    Attributes:
        out: the outputs, as the network gives them.
        graph: the edges, sorted by target.
        features: L + 1 of `[N, K, C]`: inputs of each block, and outputs of the last.
        between: L of `[N, K, C]`: after a block's attention branch, in front of its feed-forward branch.
        attention: L of `[E, H]`: attention weights; `[E, 0]` for a block without attention.
    """

    out: Mapping[str, Tensor]
    graph: RadiusGraph
    features: list[Tensor]
    between: list[Tensor]
    attention: list[Tensor]


@torch.no_grad()
def observe(model: EquiformerV2, batch: Batch) -> Observation:
    """Run a network in evaluation mode and keep the features and attention weights of its blocks.

    The answers are those of an unobserved pass, bit by bit.

    Args:
        model: the network; its mode and backend are kept.
        batch: structures on its device.

    Returns:
        Outputs, edges, features and attention weights.

    Raises:
        InputError: the network cannot take a structure.
    """
    entered: list[Tensor] = []
    left: list[Tensor] = []
    between: dict[int, Tensor] = {}
    alphas: dict[int, list[Tensor]] = {}

    def keep(where: dict[int, Tensor], number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            where[number] = inputs[0]

        return hook

    def keep_weights(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            alphas.setdefault(number, []).append(output)  # once per part of the edges, in their order

        return hook

    with _hookable(model):
        handles = []
        try:
            for number, block in enumerate(model.blocks):
                handles.append(block.register_forward_pre_hook(lambda m, a: entered.append(a[0])))
                handles.append(block.register_forward_hook(lambda m, a, out: left.append(out.x)))
                for name, module in block.named_modules():
                    if name == "norm_2":
                        handles.append(module.register_forward_pre_hook(keep(between, number)))
                    elif name == "ga.alpha_dropout":
                        handles.append(module.register_forward_hook(keep_weights(number)))
            graph = model.build_graph(batch)
            out = model(batch, graph=graph)
        finally:
            for handle in handles:
                handle.remove()
    empty = graph.distances.new_zeros(len(graph.distances), 0)
    return Observation(
        out=out,
        graph=graph,
        features=[*entered, left[-1]],
        between=[between.get(number, x) for number, x in enumerate(left)],
        attention=[
            torch.cat(alphas[number]) if number in alphas else empty for number in range(len(model.blocks))
        ],
    )


def time_parts(model: EquiformerV2, batch: Batch, repeats: int = 5) -> dict[str, float]:
    """Time every part of a forward pass in evaluation mode.

    Parts: `graph`, `edges` (checks, frames, distance basis, embedding of the edges), `blocks.0.attention`,
    `blocks.0.feed_forward`, … (each with its norm), `energy_head`, `force_head`, and `other`, which is what
    the others leave of the whole; `total` is the least whole.

    Args:
        model: the network; its mode and backend are kept.
        batch: structures on its device.
        repeats: number of timed passes.

    Returns:
        Part -> seconds, the least of all passes.
    """
    device = model.sphere_embedding.weight.device
    seconds: dict[str, float] = {}
    started: list[float] = []

    def start(module: nn.Module, inputs: Any) -> None:
        started.append(_now(device))

    def stop(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seconds[name] = seconds.get(name, 0.0) + _now(device) - started.pop()

        return hook

    modules: list[tuple[Any, str]] = [(model.energy_block, "energy_head"), (model.force_block, "force_head")]
    for number, block in enumerate(model.blocks):
        for name, part in (
            *(("norm_1", "attention"), ("ga", "attention")),
            *(("norm_2", "feed_forward"), ("ffn", "feed_forward")),
        ):
            modules.append((getattr(block, name, None), f"blocks.{number}.{part}"))
    passes = []
    with torch.no_grad(), _hookable(model), ExitStack() as hooks:
        for module, name in modules:
            if module is not None:
                hooks.callback(module.register_forward_pre_hook(start).remove)
                hooks.callback(module.register_forward_hook(stop(name)).remove)
        # From the call of the network on.
        hooks.callback(model.edge_degree_embedding.register_forward_hook(stop("edges")).remove)
        for turn in range(repeats + 1):
            seconds.clear()
            begin = _now(device)
            graph = model.build_graph(batch)
            seconds["graph"] = _now(device) - begin
            started.append(_now(device))
            model(batch, graph=graph)
            total = _now(device) - begin
            if turn:  # the first pass warms up
                passes.append(seconds | {"other": total - sum(seconds.values()), "total": total})
    return {name: min(one[name] for one in passes) for name in passes[0]}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _hookable(model: EquiformerV2) -> Iterator[None]:
    """Evaluation mode; a backend in which every module is called."""
    training, backend = model.training, model.backend
    model.eval()
    model.backend = backend if model.resolve_backend().observing else "torch"
    try:
        yield
    finally:
        model.backend = backend
        model.train(training)
