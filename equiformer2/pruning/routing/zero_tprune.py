"""Zero-TPrune (arXiv 2305.17328) for atoms and for edges: attention weights and features, no training.

The attention graph has an edge j -> i for every edge of the network, with the weight α of head h; the weights
that enter one atom sum to one. Edges to several images of an atom add up.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing.batch_geometry import BatchGeometry
from equiformer2.pruning.routing.router import Levels, ScoreRouter
from equiformer2.pruning.routing.score_selection import select, smoothstep
from equiformer2.values import Items, Number, Optional, Switch, Whole

DAMPING = 0.85
ITERATIONS = 5
_TIE = 1e-4
"""Relative difference up to which two importances are the same."""
_SOFTNESS = 0.02
"""Softness of the maximum over neighbours of their cosine similarity."""


class AtomPruner(ScoreRouter):
    """Router that skips atoms which others hardly attend to, or which resemble a more important neighbour.

    1. Similarity stage: the keys are the l = 0 channels and the norms of every degree l > 0 and channel,
       which are invariant. An atom is redundant as far as a neighbour of higher importance has nearly the
       same key. (The original splits the sorted tokens in two halves and drops one of each of the most
       similar pairs, which would split equivalent atoms.) Similar atoms are skipped, never copied: symmetry
       may relate two atoms whose features l > 0 differ by a rotation.
    2. Importance stage: PageRank on the attention graph of the block before, combined over heads.

    Args:
        levels: fraction to skip in both stages together (`topk`), or importance to pass (`threshold`,
            `smooth`; the mean importance is 1).
        similar: of the skipped atoms, the fraction that the similarity stage skips (`topk`).
        max_similarity: redundancy above which an atom is skipped (`threshold`, `smooth`); None for no
            similarity stage.
        similarity_width: width of the gate of the redundancy (`smooth`).
        heads: heads that count, bool `[L, H]` as lists; None for all. See `with_head_filter`.
        damping: damping of the PageRank.
        iterations: number of its iterations.
        **options: options of `ScoreRouter`.

    Raises:
        InputError: an argument out of its range.
    """

    observes_attention = True

    def __init__(
        self,
        levels: Levels,
        similar: float = 0.3,
        max_similarity: float | None = None,
        similarity_width: float = 0.01,
        heads: Sequence[Sequence[bool]] | None = None,
        damping: float = DAMPING,
        iterations: int = ITERATIONS,
        **options: Any,
    ) -> None:
        super().__init__(levels, **options)
        self.similar = Number(0.0, 1.0).read(similar, "similar")
        self.max_similarity = Optional(Number()).read(max_similarity, "max_similarity")
        self.similarity_width = Number(0.0, above=True).read(similarity_width, "similarity_width")
        self.heads = Optional(Items(Items(Switch()), 256)).read(heads, "heads")
        self.damping = Number(0.0, 1.0, below=True).read(damping, "damping")
        self.iterations = Whole(1, 1000).read(iterations, "iterations")

    def head_scores(self, geometry: BatchGeometry, state: BlockState) -> Tensor:
        """Return the PageRank per head of the block before, `[N, H]`."""
        assert state.attention is not None
        source, target = geometry.graph.edge_index
        return weighted_pagerank(
            state.attention, source, target, len(geometry.pos), self.damping, self.iterations
        )

    def scores(self, geometry: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """Return the importance of the atoms, `[N]`; 1 on average."""
        kept = None
        if self.heads is not None and state.block > 0:
            if state.block > len(self.heads):
                raise InputError(
                    f"the router has the heads of {len(self.heads)} blocks: make it for this network again"
                )
            kept = torch.tensor(self.heads[state.block - 1], device=geometry.pos.device)
        return combine_heads(self.head_scores(geometry, state), kept)

    def decide(
        self, geometry: BatchGeometry, state: BlockState, level: float, before: Tensor | None
    ) -> Decision:
        """Select in both stages; all atoms in the first block, before which there is no attention."""
        if state.block == 0:
            return Decision()
        importance = self.scores(geometry, state, level)
        if self.mode == "topk":
            if self.similar > 0:
                options = geometry.structure, geometry.natoms, "topk", self.similar * level, self.width
                likeness = redundancy(geometry, state.x, importance)
                distinct = select(-likeness, *options, before, self.hysteresis)
                # Behind all others, in the same order and with the same ties.
                importance = torch.where(distinct, importance, -1 / importance)
            return Decision(self.choose(importance, geometry, level, before))
        chosen = self.choose(importance, geometry, level, before)
        if self.max_similarity is None:
            return Decision(chosen)
        likeness = redundancy(geometry, state.x, importance)
        if self.mode == "smooth":
            return Decision(chosen * smoothstep((self.max_similarity - likeness) / self.similarity_width))
        options = geometry.structure, geometry.natoms, "threshold", -self.max_similarity, self.width
        return Decision(chosen & select(-likeness, *options, before, self.hysteresis))

    def with_head_filter(
        self, model: EquiformerV2, batches: Sequence[Batch], low: float = 0.1, high: float = 0.9
    ) -> "AtomPruner":
        """Make the same router with the heads that `heads_between_quantiles` keeps.

        Args:
            model: the network.
            batches: calibration structures, without labels; the network runs densely.
            low: lower quantile of the variances of all heads.
            high: upper quantile.

        Returns:
            The router with `heads`.

        Raises:
            InputError: blocks have different numbers of heads.
        """
        collector = _HeadVariances(self, model)
        variances = collector.measure(batches)
        settings = self.settings() | {"heads": heads_between_quantiles(variances, low, high).tolist()}
        return AtomPruner(**settings)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this router again."""
        return super().settings() | {
            "similar": self.similar,
            "max_similarity": self.max_similarity,
            "similarity_width": self.similarity_width,
            "heads": self.heads,
            "damping": self.damping,
            "iterations": self.iterations,
        }


class EdgePruner(ScoreRouter):
    """Router that drops incoming edges with little attention in the block before.

    The softmax of the attention runs over the others.

    The score of an edge is its mean attention weight over heads times the number of incoming edges of its
    target: 1 on average, whatever that number. The edge with the highest score always stays.

    Args:
        levels: fraction of the edges to drop (`topk`), or the score τ below which edges are dropped.
        **options: options of `ScoreRouter`; `hysteresis` and `keep_free` are about atoms and refused.

    Raises:
        InputError: an option about atoms, or gates that could close the strongest edges of an atom.
    """

    observes_attention = True

    def __init__(self, levels: Levels, **options: Any) -> None:
        super().__init__(levels, **options)
        for name in ("hysteresis", "keep_free"):
            if getattr(self, name):
                raise InputError(f"{name} is about atoms, and edges are dropped here: leave it out")
        given = (self.levels,) if isinstance(self.levels, float) else self.levels
        highest = max((level for level in given if level is not None), default=0.0)
        if self.mode == "smooth" and highest + self.width > 1:
            raise InputError(
                f"level {highest} plus width {self.width} is above 1: "
                "the strongest edges of an atom would close"
            )

    def scores(self, geometry: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """Return the scores of the edges, `[E]`; 1 on average."""
        assert state.attention is not None
        target = geometry.graph.edge_index[1]
        alpha = state.attention.mean(dim=1)
        degree = torch.bincount(target, minlength=len(geometry.pos))
        return alpha * degree[target]

    def decide(
        self, geometry: BatchGeometry, state: BlockState, level: float, before: Tensor | None
    ) -> Decision:
        """Select edges; all of them in the first block, before which there is no attention."""
        if state.block == 0:
            return Decision()
        target = geometry.graph.edge_index[1]
        scores = self.scores(geometry, state, level)
        structure = geometry.structure[target]
        count = torch.bincount(structure, minlength=len(geometry.natoms))
        chosen = select(scores, structure, count, self.mode, level, self.width)
        if self.mode == "smooth":
            return Decision(edges=chosen)
        # Edges with the highest score of their target stay, ties included.
        best = scores.new_full((len(geometry.pos),), float("-inf"))
        best = best.scatter_reduce(0, target, scores.detach(), "amax")
        return Decision(edges=chosen | (scores >= best[target] * (1 - 1e-4)))


def weighted_pagerank(
    attention: Tensor,
    source: Tensor,
    target: Tensor,
    num_atoms: int,
    damping: float = DAMPING,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Compute PageRank on the attention graph times the number of atoms (Zero-TPrune's WPR).

        n s_j <- (1 - d) + d * sum over i of α_{j->i} n s_i

    from n s = 1. The number of iterations is fixed, so that a score depends on that many shells of
    neighbours and on nothing farther. An atom without incoming edges keeps its score.

    Args:
        attention: `[E, H]`; rescaled to sum to 1 per atom and head: weights of several blocks may be mixed.
        source: `[E]` atom j.
        target: `[E]` atom i.
        num_atoms: N.
        damping: d; below 1, because the graph lacks self-loops and may fall apart.
        iterations: number of iterations.

    Returns:
        `[N, H]`.
    """
    heads = attention.shape[1]
    total = attention.new_zeros(num_atoms, heads).index_add(0, target, attention)
    alone = (total <= 0).to(attention.dtype)
    alpha = attention / (total + alone)[target]
    scores = attention.new_ones(num_atoms, heads)
    for _ in range(iterations):
        passed = (alone * scores).index_add(0, source, alpha * scores[target])
        scores = (1 - damping) + damping * passed
    return scores


def combine_heads(scores: Tensor, kept: Tensor | None = None) -> Tensor:
    """Combine the scores of heads by their root mean square (Zero-TPrune's EIR).

    Args:
        scores: `[N, H]`.
        kept: bool `[H]`, heads to use; None for all.

    Returns:
        `[N]`.
    """
    if kept is not None and len(kept) == scores.shape[1]:
        scores = scores[:, kept]
    return scores.square().mean(dim=1).clamp(min=1e-12).sqrt()


def heads_between_quantiles(variances: Tensor, low: float, high: float) -> Tensor:
    """Select the heads whose variance is within quantiles of all of them (Zero-TPrune's VHF).

    Heads with little variance tell no atoms apart, those with much look at few atoms only. The bounds
    of the original (0.01 and 0.7) belong to the scores of images, so they are quantiles here. A block always
    keeps at least one head, the one nearest to the median.

    Args:
        variances: `[L, H]` of the scores, averaged over calibration structures.
        low: lower quantile, from 0 to 1.
        high: upper quantile.

    Returns:
        Bool `[L, H]`.
    """
    bounds = torch.quantile(variances.flatten(), torch.tensor([low, high]).to(variances))
    kept = (variances >= bounds[0]) & (variances <= bounds[1])
    nearest = (variances - variances.median()).abs().argmin(dim=1, keepdim=True)
    empty = ~kept.any(dim=1, keepdim=True)
    return kept | torch.zeros_like(kept).scatter(1, nearest, empty)


def redundancy(geometry: BatchGeometry, x: Tensor, importance: Tensor) -> Tensor:
    """Measure how closely an atom resembles a more important neighbour.

    A neighbour counts in full from 1 % more importance on, not at all if it is tied.

    Args:
        geometry: geometry of the batch.
        x: `[N, K, C]` features.
        importance: `[N]`.

    Returns:
        `[N]` smooth maximum, over neighbours of higher importance, of the cosine of both keys.
    """
    key = torch.nn.functional.normalize(invariant_key(x), dim=1)
    source, target = geometry.graph.edge_index
    likeness = (key[source] * key[target]).sum(dim=1)
    more = (importance[source] - importance[target]) / importance[target].clamp(min=1e-6)
    weight = smoothstep((more - _TIE) / 0.01)
    # exp(c / w) with c from -1 to 1 stays finite in float32 for w = 0.02 after the shift by 1.
    terms = weight * torch.exp((likeness - 1) / _SOFTNESS)
    total = terms.new_zeros(len(key)).index_add(0, target, terms)
    return 1 + _SOFTNESS * torch.log(total + torch.exp(total.new_tensor(-2 / _SOFTNESS).clamp(min=-80)))


def invariant_key(x: Tensor) -> Tensor:
    """Return the scalars and the norms of each degree l > 0 per channel.

    Args:
        x: `[N, (L + 1)², C]` features.

    Returns:
        `[N, (L + 1) C]`, invariant under rotations.
    """
    lmax = int(x.shape[1] ** 0.5) - 1
    parts = [x[:, 0]]
    for l in range(1, lmax + 1):
        # Safe square root: norms of zero vectors have no derivative.
        parts.append((x[:, l * l : (l + 1) ** 2].square().sum(dim=1) + 1e-12).sqrt())
    return torch.cat(parts, dim=1)


class _HeadVariances:
    """Variance over the atoms of a structure of every head's score, averaged over structures."""

    def __init__(self, router: AtomPruner, model: EquiformerV2) -> None:
        self.router, self.model = router, model
        heads = {int(block.ga.num_heads) for block in model.blocks if block.ga is not None}  # type: ignore[union-attr,arg-type]
        if len(heads) > 1:
            raise InputError(
                f"blocks have {sorted(heads)} heads: the head filter needs the same number in all"
            )
        self.sums = torch.zeros(len(model.blocks), max(heads, default=1), dtype=torch.float64)
        self.structures = 0
        self.geometry: BatchGeometry | None = None
        self.observes_attention = True

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> Tensor:
        """Average over structures, `[L, H]`."""
        if not batches:
            raise InputError("the head filter needs at least one calibration batch")
        for batch in batches:
            self.model(batch, active=self)
            self.structures += len(batch.natoms)
        # The last block's weights are seen by nobody; it is given the mean of the others.
        self.sums[-1] = self.sums[:-1].mean(dim=0) if len(self.sums) > 1 else self.sums[-1]
        return self.sums / self.structures

    def start(self, batch: Batch, graph: RadiusGraph, num_blocks: int) -> "_HeadVariances":
        self.geometry = BatchGeometry.from_batch(batch, graph)
        return self

    def decide(self, state: BlockState) -> Decision:
        assert self.geometry is not None
        if state.block > 0:
            scores = self.router.head_scores(self.geometry, state).double().cpu()
            for part in scores.split(self.geometry.natoms.tolist()):
                self.sums[state.block - 1] += part.var(dim=0, unbiased=False)
        return Decision()
