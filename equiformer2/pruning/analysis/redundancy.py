"""Change of the features by every block, and entropy of its attention, by tag of the atoms."""

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
    """Statistics of one block over the atoms of one tag.

    Attributes:
        block: number of the block, from 0.
        tag: `0`, `1`, `2` or `all`.
        atoms: number of atoms.
        cosine: mean of cos(x_l, x_{l+1}) of an atom's features in front of and behind the block. Near 1: the
            block does little (Gromov et al., The unreasonable ineffectiveness of the deeper layers, 2024).
        cosine_by_degree: mean cosine of the features of each degree; None where no atom has any.
        cosine_attention: mean cosine across the attention branch alone.
        cosine_feed_forward: mean cosine across the feed-forward branch alone.
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
    """Measure every block for every tag that occurs, as means over atoms.

    Args:
        model: network with any backend and in any mode; both are kept.
        batches: at least one, with `tags`; on any device.

    Returns:
        Statistics block by block, tag by tag and `all` last.

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
    statistics, lmax = [], model.config.lmax
    for number, rows in enumerate(collected):
        table = torch.cat(rows)
        for group in GROUPS:
            chosen = table if group == "all" else table[tag == int(group)]
            if not len(chosen):
                continue
            means = [None if math.isnan(value) else value for value in chosen.nanmean(dim=0).tolist()]
            whole, attention, feed_forward = (1.0 if mean is None else mean for mean in means[:3])
            statistics.append(
                BlockStatistics(
                    block=number,
                    tag=group,
                    atoms=len(chosen),
                    cosine=whole,
                    cosine_by_degree=means[3 : lmax + 4],
                    cosine_attention=attention,
                    cosine_feed_forward=feed_forward,
                    entropy=means[lmax + 4 :],
                )
            )
    return statistics


def attention_entropy(alpha: Tensor, target: Tensor, num_atoms: int) -> Tensor:
    """Compute the normalised entropy of the attention weights over the edges into each atom.

    Args:
        alpha: `[E, H]` attention weights, which sum to 1 per target and head.
        target: `[E]` target of each edge.
        num_atoms: N.

    Returns:
        `[N, H]` entropy over the logarithm of the number of edges, from 0 to 1; NaN for an atom with fewer
        than two edges.
    """
    edges = torch.bincount(target, minlength=num_atoms).to(alpha.dtype)
    total = alpha.new_zeros(num_atoms, alpha.shape[1]).index_add(0, target, torch.special.entr(alpha))
    normalised = total / torch.log(edges)[:, None]
    return torch.where(edges[:, None] >= 2, normalised, math.nan)


def _columns(seen: Observation, block: int) -> Tensor:
    """`[N, 3 + L + 1 + H]` of one block: cosines (whole, attention, feed-forward, degrees), entropies."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        """`[N]`, NaN where one of both has no direction."""
        a, b = a.flatten(1).double(), b.flatten(1).double()
        lengths = a.norm(dim=1), b.norm(dim=1)
        values = (a * b).sum(1) / (lengths[0] * lengths[1])
        return torch.where((lengths[0] > shortest) & (lengths[1] > shortest), values, math.nan)

    before, after, between = seen.features[block], seen.features[block + 1], seen.between[block]
    lmax = math.isqrt(before.shape[1]) - 1
    degrees = [slice(l * l, (l + 1) ** 2) for l in range(lmax + 1)]
    shortest = _SHORT * before.flatten(1).double().norm(dim=1)
    cosines = [cosine(a, b) for a, b in ((before, after), (before, between), (between, after))]
    cosines += [cosine(before[:, rows], after[:, rows]) for rows in degrees]
    entropy = attention_entropy(seen.attention[block], seen.graph.edge_index[1], len(before))
    return torch.cat((torch.stack(cosines, dim=1).double(), entropy.double()), dim=1)
