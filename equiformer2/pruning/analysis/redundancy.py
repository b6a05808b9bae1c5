"""How much every block changes, and how sharply it attends, by tag of the atoms."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError, naming_structures
from equiformer2.model import EquiformerV2
from equiformer2.pruning.analysis.observe import Observation, observe

#: Tags of OC20, and all atoms together.
GROUPS = ("0", "1", "2", "all")
# Features of a degree that are shorter than this part of all features are rounding: they have no direction.
_SHORT = 1e-4


@dataclass(frozen=True)
class BlockStatistics:
    """One block, over the atoms of one tag.

    Attributes:
        block: its number, from 0.
        tag: `0`, `1`, `2` or `all`.
        atoms: how many were looked at.
        cosine: mean of cos(x_l, x_{l+1}) of an atom's features in front of and behind the block. Near 1: the
            block does little (Gromov et al., The unreasonable ineffectiveness of the deeper layers, 2024).
        cosine_by_degree: the same for the features of each degree; None where no atom has any.
        cosine_attention, cosine_feed_forward: the same for each branch alone.
        entropy: per head, mean entropy of the attention weights of an atom's incoming edges, divided by the
            logarithm of their number: 1 is a plain average, 0 one edge. None if no atom has two edges. Atoms
            with fewer edges are left out.
    """

    block: int
    tag: str
    atoms: int
    cosine: float
    cosine_by_degree: list[float | None]
    cosine_attention: float
    cosine_feed_forward: float
    entropy: list[float | None]


def block_statistics(model: EquiformerV2, batches: Iterable[Batch]) -> list[BlockStatistics]:
    """Statistics of every block and tag that occurs, as means over atoms.

    Args:
        model: any backend and mode; both are kept.
        batches: at least one, with `tags`; on any device.

    Raises:
        InputError: no structures, or one that the network cannot take.
    """
    device = model.sphere_embedding.weight.device
    collected: list[list[Tensor]] = [[] for _ in model.blocks]
    tags: list[Tensor] = []
    for batch in batches:
        batch = batch.clone().to(device)
        with naming_structures(batch):
            seen = observe(model, batch)
        tags.append(batch.tags.cpu())
        for number, rows in enumerate(collected):
            rows.append(_columns(seen, number).cpu())
    if not tags:
        raise InputError("there are no structures to look at: give at least one")
    tag = torch.cat(tags)
    found = []
    for number, rows in enumerate(collected):
        table = torch.cat(rows)
        for group in GROUPS:
            chosen = table if group == "all" else table[tag == int(group)]
            if len(chosen):
                found.append(_summary(number, group, chosen, model.config.lmax))
    return found


def attention_entropy(alpha: Tensor, target: Tensor, num_atoms: int) -> Tensor:
    """Normalised entropy of the attention weights `[E, H]` over the edges into each atom, `[N, H]` in [0, 1].

    NaN for an atom with fewer than two edges.
    """
    edges = torch.bincount(target, minlength=num_atoms).to(alpha.dtype)
    total = alpha.new_zeros(num_atoms, alpha.shape[1]).index_add(0, target, torch.special.entr(alpha))
    normalised = total / torch.log(edges)[:, None]
    return torch.where(edges[:, None] >= 2, normalised, math.nan)


def _columns(seen: Observation, block: int) -> Tensor:
    """`[N, 3 + L + 1 + H]` of one block: cosines (whole, attention, feed-forward, degrees), entropies."""
    before, after, between = seen.features[block], seen.features[block + 1], seen.between[block]
    lmax = math.isqrt(before.shape[1]) - 1
    degrees = [slice(l * l, (l + 1) ** 2) for l in range(lmax + 1)]
    shortest = _SHORT * before.flatten(1).double().norm(dim=1)
    cosines = [_cosine(a, b, shortest) for a, b in ((before, after), (before, between), (between, after))]
    cosines += [_cosine(before[:, rows], after[:, rows], shortest) for rows in degrees]
    entropy = attention_entropy(seen.attention[block], seen.graph.edge_index[1], len(before))
    return torch.cat((torch.stack(cosines, dim=1).double(), entropy.double()), dim=1)


def _cosine(a: Tensor, b: Tensor, shortest: Tensor) -> Tensor:
    """`[N]`, NaN where one of both has no direction."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    lengths = a.norm(dim=1), b.norm(dim=1)
    cosine = (a * b).sum(1) / (lengths[0] * lengths[1])
    return torch.where((lengths[0] > shortest) & (lengths[1] > shortest), cosine, math.nan)


def _summary(block: int, tag: str, table: Tensor, lmax: int) -> BlockStatistics:
    means = [None if math.isnan(value) else value for value in table.nanmean(dim=0).tolist()]
    whole, attention, feed_forward = (1.0 if mean is None else mean for mean in means[:3])
    return BlockStatistics(
        block=block,
        tag=tag,
        atoms=len(table),
        cosine=whole,
        cosine_by_degree=means[3 : lmax + 4],
        cosine_attention=attention,
        cosine_feed_forward=feed_forward,
        entropy=means[lmax + 4 :],
    )
