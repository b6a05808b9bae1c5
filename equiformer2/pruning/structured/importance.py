"""Importance of each head, channel and branch of the blocks for the outputs.

A gate ξ multiplies one unit's contribution (1 in the network as it is, 0 when the unit is cut). What a unit
contributes enters one linear map, its consumer, so the derivative with respect to its gate is a sum over
the consumer's weights that read the unit: dL/dξ = Σ w dL/dw. No gate has to be put into the network.

- `michel`: E |dL/dξ| over structures (Michel et al., Are sixteen heads really better than one?, 2019, eq. 2).
- `taylor`: E |Σ w dL/dw| over all weights of the unit, those that make it included (group Taylor importance,
  Molchanov et al. 2019 and LLM-Pruner).
- `magnitude_importance`: the Euclidean norm of all weights of the unit, without data.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import Normalizers
from equiformer2.errors import InputError, naming_structures
from equiformer2.model import EquiformerV2
from equiformer2.model.attention import SO2EquivariantGraphAttention
from equiformer2.model.feed_forward import FeedForwardNetwork, SwiGLUFeedForwardNetwork
from equiformer2.model.folding import check_plain

#: Weights of the mean absolute error of the energy and of the mean L2 error of the forces on free atoms.
_ENERGY_WEIGHT, _FORCE_WEIGHT = 4.0, 100.0
#: A scalar from the outputs (normalised units) for a batch.
Objective = Callable[[dict[str, Tensor], Batch], Tensor]
#: From a parameter to the tensor of its shape that is summed over a unit's weights.
_Product = Callable[[Tensor], Tensor]
_Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Importance:
    """Importance of the units of every block: one tensor per block, empty where it lacks the branch.

    Attributes:
        heads: `[H]` attention heads.
        values: `[H V]` value channels, head by head.
        attn_hidden: `[attn_hidden_channels]` hidden channels of the attention's convolutions.
        ffn_hidden: `[ffn_hidden_channels]` channels in front of the feed-forward network's last linear map.
        branches: `[2]` the attention and the feed-forward branch as a whole.
    """

    heads: list[Tensor]
    values: list[Tensor]
    attn_hidden: list[Tensor]
    ffn_hidden: list[Tensor]
    branches: list[Tensor]

    def to_dict(self) -> dict[str, list[list[float]]]:
        """Return plain numbers, `{unit: [block][index]}`."""
        return {
            field.name: [t.tolist() for t in getattr(self, field.name)] for field in dataclasses.fields(self)
        }


UNITS = tuple(field.name for field in dataclasses.fields(Importance))


def gradient_importance(
    model: EquiformerV2,
    structures: Iterable[Data],
    objective: Objective,
    method: Literal["michel", "taylor"] = "michel",
) -> Importance:
    """Average the absolute derivative of `objective` with respect to every gate over structures.

    The network is evaluated without dropout, structure by structure; its weights, their gradients and its
    mode are as before afterwards.

    Args:
        model: network on the device to compute on; any backend (`torch` is used).
        structures: at least one; wrap them in a progress bar if they are many.
        objective: `probe(...)` without labels or `labelled(...)` with them.
        method: `michel` or `taylor`.

    Returns:
        Importance in the unit of the objective.

    Raises:
        InputError: no structures, or one that the network cannot take.
    """
    return gradient_importances(model, structures, objective)[method]


def gradient_importances(
    model: EquiformerV2, structures: Iterable[Data], objective: Objective
) -> dict[str, Importance]:
    """Measure importance with both methods in the same passes.

    Args:
        model: network on the device to compute on; any backend (`torch` is used).
        structures: at least one; wrap them in a progress bar if they are many.
        objective: `probe(...)` without labels or `labelled(...)` with them.

    Returns:
        `{"michel": …, "taylor": …}`, see `gradient_importance`.

    Raises:
        InputError: no structures, or one that the network cannot take.
    """
    check_plain(model, "importance")
    device = model.sphere_embedding.weight.device
    total: list[dict[str, Tensor]] = []
    count = 0
    with _differentiable(model):
        for structure in structures:
            batch = Batch.from_data_list([structure]).to(device)
            with naming_structures(batch):
                out = model(batch)
            parameters = [p for block in model.blocks for p in block.parameters()]
            grads = torch.autograd.grad(objective(out, batch), parameters, allow_unused=True)
            products = {
                id(p): torch.zeros_like(p) if g is None else p.detach() * g
                for p, g in zip(parameters, grads, strict=True)
            }
            sums = _UnitSums(lambda p, table=products: table[id(p)])  # type: ignore[misc]
            count += 1
            scores = [
                {
                    unit: torch.stack((read.abs(), (read + written).abs()))
                    for unit, (read, written) in sums.block(block).items()
                }
                for block in model.blocks
            ]
            total = total or [{unit: torch.zeros_like(v) for unit, v in block.items()} for block in scores]
            for known, new in zip(total, scores, strict=True):
                for unit, value in new.items():
                    known[unit] += value
    if not count:
        raise InputError("there are no structures to measure importance on: give at least one")
    return {
        method: Importance(**{unit: [block[unit][row] / count for block in total] for unit in UNITS})
        for row, method in enumerate(("michel", "taylor"))
    }


def magnitude_importance(model: EquiformerV2) -> Importance:
    """Measure every unit by the Euclidean norm of all its weights; a baseline that looks at no data."""
    check_plain(model, "importance")
    with torch.no_grad():
        sums = _UnitSums(lambda p: p.detach().square())
        blocks = [sums.block(block) for block in model.blocks]
        return Importance(**{unit: [sum(block[unit]).sqrt() for block in blocks] for unit in UNITS})  # type: ignore[union-attr]


def probe(normalizers: Normalizers, force_weight: float = 1.0, seed: int = 0) -> Objective:
    """Make an objective without labels: outputs along a random direction.

    |dL/dξ| is then the change of a random combination of energy per atom and free atoms' forces when the
    gate moves, in expectation over directions its Gauss-Newton sensitivity (the distance to the network's own
    answers itself has no gradient at the network).

    Args:
        normalizers: units of the outputs.
        force_weight: weight of the mean force against the energy per atom, Å.
        seed: random seed of the signs, which are drawn anew for every structure.

    Returns:
        The objective, eV.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(count: int) -> Tensor:
        return torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0

    def objective(out: dict[str, Tensor], batch: Batch) -> Tensor:
        total = (out["energy"] / batch.natoms.view(-1)).sum() * normalizers.energy.std * signs(1)
        if "forces" in out:
            free = ~batch.fixed.bool()
            direction = signs(int(3 * free.sum())).view(-1, 3)
            scale = force_weight * normalizers.forces.std / max(1, len(direction)) ** 0.5
            total = (
                total.to(out["forces"]) + scale * (out["forces"][free] * direction.to(out["forces"])).sum()
            )
        return total.sum()

    return objective


def labelled(normalizers: Normalizers) -> Objective:
    """Make an objective with labels: the training loss (EquiformerV2, appendix D).

    Args:
        normalizers: units of the outputs.

    Returns:
        The objective, in normalised units.
    """

    def objective(out: dict[str, Tensor], batch: Batch) -> Tensor:
        target = normalizers.normalize_energy(batch.energy, batch)
        total = _ENERGY_WEIGHT * (out["energy"] - target.to(out["energy"])).abs().mean()
        if "forces" in out:
            free = ~batch.fixed.bool()
            error = out["forces"] - normalizers.normalize_forces(batch.forces).to(out["forces"])
            total = total + _FORCE_WEIGHT * error[free].norm(dim=1).sum() / max(1, int(free.sum()))
        return total

    return objective


@contextmanager
def _differentiable(model: EquiformerV2) -> Iterator[None]:
    """Evaluation mode, the torch backend, and the blocks' weights with gradients, for as long as it lasts."""
    training, backend = model.training, model.backend
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    model.backend = "torch"
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        model.blocks.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in parameters:
            parameter.requires_grad_(before)
        model.backend = backend
        model.train(training)


class _UnitSums:
    """Sums over the weights of every unit of a block.

    Args:
        product: from a parameter to the tensor of its shape that is summed.
    """

    def __init__(self, product: _Product) -> None:
        self.product = product

    def block(self, block: nn.Module) -> dict[str, _Pair]:
        """Per unit, the sums over the weights of its consumer and over its other weights."""
        some = next(block.parameters(), None)
        empty = torch.zeros(0) if some is None else some.detach().new_zeros(0)
        sums: dict[str, _Pair] = {unit: (empty, empty) for unit in UNITS}
        branches = empty.new_zeros(2)
        attention, feed_forward = getattr(block, "ga", None), getattr(block, "ffn", None)
        if isinstance(attention, SO2EquivariantGraphAttention):
            sums |= self.attention(attention)
            branches[0] = sums["values"][0].sum() + self.product(attention.proj.bias).sum()
        if isinstance(feed_forward, FeedForwardNetwork | SwiGLUFeedForwardNetwork):
            sums["ffn_hidden"] = self.feed_forward(feed_forward)
            branches[1] = sums["ffn_hidden"][0].sum() + self.product(feed_forward.so3_linear_2.bias).sum()
        return sums | {"branches": (branches, torch.zeros_like(branches))}

    def attention(self, attention: SO2EquivariantGraphAttention) -> dict[str, _Pair]:
        """Sums of the heads, value channels and hidden channels of an attention layer."""
        product, first, second = self.product, attention.so2_conv_1, attention.so2_conv_2
        heads, hidden, values = attention.num_heads, second.in_channels, second.out_channels
        consumer = product(attention.proj.weight).sum((0, 1))
        maker = self.by_output(product(second.fc_m0.weight).sum(1), values)
        maker = maker + self.by_output(product(second.fc_m0.bias), values)
        for order in second.so2_m_conv:
            maker = maker + self.by_output(product(order.fc.weight).sum(1), values)  # type: ignore[union-attr,arg-type]

        # The scalars of the attention weights come first, then gates, then coefficients.
        alpha = attention.alpha_dot.numel()
        rows = product(first.fc_m0.weight).sum(1) + product(first.fc_m0.bias)
        logits = rows[:alpha].view(heads, -1).sum(1) + product(attention.alpha_dot).sum(1)
        written = self.by_output(rows[alpha:], hidden)
        for order in first.so2_m_conv:
            written = written + self.by_output(product(order.fc.weight).sum(1), hidden)  # type: ignore[union-attr,arg-type]
        read = product(second.fc_m0.weight).unflatten(1, (-1, hidden)).sum((0, 1))
        for order in second.so2_m_conv:
            read = read + product(order.fc.weight).unflatten(1, (-1, hidden)).sum((0, 1))  # type: ignore[union-attr,arg-type]
        by_head = maker.view(heads, -1).sum(1) + logits
        return {
            "heads": (consumer.view(heads, -1).sum(1), by_head),
            "values": (consumer, maker),
            "attn_hidden": (read, written),
        }

    def feed_forward(self, network: FeedForwardNetwork | SwiGLUFeedForwardNetwork) -> _Pair:
        """Sums of the channels in front of the last linear map."""
        product = self.product
        consumer = product(network.so3_linear_2.weight).sum((0, 1))
        scalars: nn.Module | None
        if isinstance(network, SwiGLUFeedForwardNetwork):
            maker = product(network.grid_linear_2.weight).sum(1)
            scalars = network.scalar_linear
        elif network.use_grid_mlp:
            maker = product(network.grid_mlp[4].weight).sum(1)  # type: ignore[arg-type]
            scalars = None if network.scalar_mlp is None else network.scalar_mlp[0]
        else:
            maker = product(network.so3_linear_1.weight).sum((0, 2)) + product(network.so3_linear_1.bias)
            scalars = network.gating_linear
        if scalars is not None:
            rows = product(scalars.weight).sum(1) + product(scalars.bias)  # type: ignore[arg-type]
            maker = maker + self.by_output(rows, len(consumer))
        return consumer, maker

    @staticmethod
    def by_output(rows: Tensor, width: int) -> Tensor:
        """`[n width]` sums of rows to `[width]`: every degree (and part) has its own block of channels."""
        return rows.view(-1, width).sum(0)
