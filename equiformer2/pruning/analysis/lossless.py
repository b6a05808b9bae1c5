"""Savings of inference without a change of its answers: operations and time.

The first two cuts are part of the network's forward pass and have no switch. The other two depend on what the
caller reads (`model.output_request.OutputRequest`); a relaxation leaves out the forces on fixed atoms.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from equiformer2.checkpoint import Normalizers
from equiformer2.graph import RadiusGraph
from equiformer2.kernels.backend import Backend
from equiformer2.model import EquiformerV2
from equiformer2.model.attention import SO2EquivariantGraphAttention, VectorHead
from equiformer2.model.block_config import BlockConfig
from equiformer2.model.config import ModelConfig
from equiformer2.model.edge_context import EVERYTHING, BlockRouting, EdgeGraph
from equiformer2.model.feed_forward import EnergyHead, FeedForwardNetwork
from equiformer2.model.output_request import OutputRequest, receptive_fields
from equiformer2.pruning.cost.latency import Latency, compare_latency
from equiformer2.pruning.cost.operations import count_macs

Head = TypeVar("Head", bound=nn.Module)


@dataclass(frozen=True)
class Saving:
    """One cut, compared with the same pass without it; all other cuts are on.

    Attributes:
        name: parts that the cut leaves out.
        macs: operations of a whole pass.
        macs_without_cut: operations of a whole pass without this cut.
        latency: times of whole passes; `ratio` is with / without the cut.
        energy_deviation: largest difference of an energy, eV; None where energies are not computed.
        force_deviation: largest difference of a force component that is read, eV/Å.
        edges: share of the edges that are computed, in every block and in the force head; None for all.
    """

    name: str
    macs: int
    macs_without_cut: int
    latency: Latency
    energy_deviation: float | None
    force_deviation: float | None
    edges: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def with_whole_heads(model: EquiformerV2, energy: bool = True, force: bool = True) -> EquiformerV2:
    """Make a network on the same parameters whose heads compute all degrees, as the paper writes them.

    Args:
        model: the network; it is left as it is.
        energy: compute the feed-forward network of the energy head with all degrees, of which l = 0 is read.
        force: compute the attention of the force head with all degrees, of which l = 1 is read.

    Returns:
        The network, with the same answers.
    """
    whole = copy.copy(model)
    whole._modules = dict(model._modules)
    if energy:
        whole.energy_block = _on_same_state(_WholeEnergyHead, model.energy_block)
    if force and model.force_block is not None:
        whole.force_block = _on_same_state(_WholeForceHead, model.force_block)
    return whole


class _WholeEnergyHead(EnergyHead):
    """Energy head that computes all degrees of its feed-forward network."""

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        return FeedForwardNetwork.forward(self, x, backend)[:, 0, 0]


class _WholeForceHead(VectorHead):
    """Force head that computes all degrees of its attention."""

    def forward(  # type: ignore[override]
        self, x: Tensor, edges: EdgeGraph, backend: Backend, routing: BlockRouting = EVERYTHING
    ) -> Tensor:
        out = SO2EquivariantGraphAttention.forward(self, x, edges, backend, routing)
        return out.messages[:, 1:4, 0]


def _on_same_state(kind: type[Head], head: nn.Module) -> Head:
    """A module of another class with the parameters, buffers and folded weights of `head`."""
    other = kind.__new__(kind)
    other.__dict__ = dict(head.__dict__)
    return other


@torch.no_grad()
def measure_savings(
    model: EquiformerV2, batch: Batch, normalizers: Normalizers, repeats: int = 10
) -> list[Saving]:
    """Measure every cut on one batch.

    Args:
        model: the network, in evaluation mode.
        batch: structures with `fixed`, on the network's device.
        normalizers: units of the deviations.
        repeats: number of timed pairs of passes.

    Returns:
        All cuts; without a force head only the first.
    """
    graph = model.build_graph(batch)
    atoms, edges = len(batch.pos), len(graph.distances)
    free = ~batch.fixed.bool()
    executed = count_macs(model, atoms, edges).total
    extra = _unread_in_heads(model.config, atoms, edges)

    def run(
        request: OutputRequest | None = None, energy: bool = False, force: bool = False
    ) -> Callable[[], dict[str, Tensor]]:
        network = with_whole_heads(model, energy, force)
        return lambda: network(batch, graph=graph, request=request)

    compare = functools.partial(_compare, normalizers=normalizers, free=free, repeats=repeats)
    savings = [
        compare(
            "energy head: degrees l > 0 and their grid",
            (run(), executed),
            (run(energy=True), executed + extra["energy"]),
        )
    ]
    if model.force_block is None:
        return savings
    on_free, forces_alone = OutputRequest(True, free), OutputRequest(False, free)
    lean, share = _requested_macs(model.config, graph, free)
    savings += [
        compare(
            "force head: degrees l != 1 and orders |m| > 1",
            (run(), executed),
            (run(force=True), executed + extra["force"]),
        ),
        compare(
            "force head: edges into fixed atoms",
            (run(on_free), lean["energy"]),
            (run(), executed),
            edges={"force head": share["force head"]},
        ),
        compare(
            "step without energy: energy head, atoms outside the free atoms' receptive field",
            (run(forces_alone), lean["forces"]),
            (run(on_free), lean["energy"]),
            edges=share,
        ),
        compare(
            "all of these, without energy",
            (run(forces_alone), lean["forces"]),
            (run(energy=True, force=True), executed + extra["energy"] + extra["force"]),
            edges=share,
        ),
    ]
    return savings


def _compare(
    name: str,
    cut: tuple[Callable[[], dict[str, Tensor]], int],
    whole: tuple[Callable[[], dict[str, Tensor]], int],
    *,
    normalizers: Normalizers,
    free: Tensor,
    repeats: int,
    edges: dict[str, float] | None = None,
) -> Saving:
    answer, expected = cut[0](), whole[0]()
    energy = force = None
    if "energy" in answer:
        energy = float((answer["energy"] - expected["energy"]).abs().max()) * normalizers.energy.std
    if "forces" in answer:
        # Both answers hold all forces unless the cut is about those on fixed atoms.
        read = free if edges is not None else torch.ones_like(free)
        difference = (answer["forces"] - expected["forces"])[read].abs()
        force = float(difference.max()) * normalizers.forces.std if difference.numel() else 0.0
    latency = compare_latency(cut[0], whole[0], repeats)
    return Saving(name, cut[1], whole[1], latency, energy, force, edges)


def _unread_in_heads(config: ModelConfig, atoms: int, edges: int) -> dict[str, int]:
    """Operations of both heads beyond those that outputs depend on."""
    executed = count_macs(config, atoms, edges)
    coefficients, channels = (config.lmax + 1) ** 2, config.sphere_channels

    def as_block(head: BlockConfig | None, gated: bool) -> dict[str, int]:
        # A head is a block's branch with one output channel instead of `sphere_channels`.
        alone = dataclasses.replace(
            config,
            num_layers=1,
            blocks=(head or BlockConfig(),),
            use_swiglu_s2_act=False,
            use_gate_act=gated,
        )
        return dict(count_macs(alone, atoms, edges).blocks[0])

    hidden = config.energy_block.ffn_hidden_channels
    last = atoms * coefficients * hidden
    energy = as_block(config.energy_head, config.use_gate_act)["feed_forward"] - last * (channels - 1)
    unread = {"energy": energy - executed.energy_head, "force": 0}
    if config.regress_forces:
        parts = as_block(config.force_head, config.force_activation == "gate")
        parts.pop("feed_forward")
        parts["projection"] //= channels
        unread["force"] = sum(parts.values()) - sum(executed.force_head.values())
    return unread


def _requested_macs(
    config: ModelConfig, graph: RadiusGraph, free: Tensor
) -> tuple[dict[str, int], dict[str, float]]:
    """Operations of passes for the free atoms' forces, with energies and without, and shares of the edges."""
    target = graph.edge_index[1]
    atoms, edges = len(free), len(target)
    whole = count_macs(config, atoms, edges)
    on_free = count_macs(config, int(free.sum()), int(free[target].sum()))
    force_head = sum(on_free.force_head.values())
    with_energy = whole.total - sum(whole.force_head.values()) + force_head
    total = whole.edge_degree + force_head
    share = {}
    for number, field in enumerate(receptive_fields(graph.edge_index, free, config.num_layers)):
        inside = int(field[target].sum())
        total += sum(count_macs(config, int(field.sum()), inside).blocks[number].values())
        share[f"block {number}"] = inside / max(1, edges)
    share["force head"] = int(free[target].sum()) / max(1, edges)
    return {"energy": with_energy, "forces": total}, share
