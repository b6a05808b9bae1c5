"""What blocks see and do: features, attention weights and seconds, taken by hooks from a forward pass."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        features: L + 1 of `[N, K, C]`: what enters each block, and what leaves the last.
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
    """Run `model` in evaluation mode on `batch` (on its device) and keep what passes between its parts.

    The answers are those of an unobserved pass, bit by bit.

    Raises:
        InputError: what the network raises.
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
                handles.append(block.register_forward_hook(lambda m, a, out: left.append(out)))
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
    """Seconds of every part of a forward pass in evaluation mode, the least of `repeats` passes.

    Parts: `graph`, `edges` (frames, distance basis, embeddings of atoms and edges), `blocks.0.attention`,
    `blocks.0.feed_forward`, … (each with its norm), `energy_head`, `force_head`, and `other`, which is what
    the others leave of the whole; `total` is the least whole.
    """
    device = model.sphere_embedding.weight.device
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            start = _now(device)
            result = function(*arguments, **keywords)
            seconds[name] = seconds.get(name, 0.0) + _now(device) - start
            return result

        return wrapped

    parts: list[tuple[nn.Module, str, str]] = [
        (model, "build_graph", "graph"),
        (model, "_rotations", "edges"),
        (model.edge_degree_embedding, "forward", "edges"),
        (model.energy_block, "scalars", "energy_head"),
    ]
    if model.force_block is not None:
        parts.append((model.force_block, "vectors", "force_head"))
    for number, block in enumerate(model.blocks):
        for name, part in (
            *(("norm_1", "attention"), ("ga", "attention")),
            *(("norm_2", "feed_forward"), ("ffn", "feed_forward")),
        ):
            module = getattr(block, name, None)
            if isinstance(module, nn.Module):
                parts.append((module, "forward", f"blocks.{number}.{part}"))
    passes = []
    with torch.no_grad(), _hookable(model), _replaced(parts, timed):
        for turn in range(repeats + 1):
            seconds.clear()
            start = _now(device)
            model(batch)
            total = _now(device) - start
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
    model.backend = "torch" if backend == "compile" else backend
    try:
        yield
    finally:
        model.backend = backend
        model.train(training)


@contextmanager
def _replaced(
    parts: list[tuple[nn.Module, str, str]], wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Methods of module instances wrapped for as long as it lasts."""
    try:
        for module, method, name in parts:
            module.__dict__[method] = wrap(name, getattr(module, method))
        yield
    finally:
        for module, method, _ in parts:
            module.__dict__.pop(method, None)
