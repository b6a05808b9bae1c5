"""Zero-TPrune (arXiv 2305.17328) for atoms and for edges: attention weights and features, no training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.model import EquiformerV2
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning.routing.attention import (
    DAMPING,
    ITERATIONS,
    combine_heads,
    heads_between_quantiles,
    weighted_pagerank,
)
from equiformer2.pruning.routing.batch_geometry import BatchGeometry
from equiformer2.pruning.routing.router import Levels, ScoreRouter
from equiformer2.pruning.routing.score_selection import select, smoothstep
from equiformer2.values import Items, Number, Optional, Switch, Whole

#: Softness of the maximum over neighbours of their cosine similarity.
_SOFTNESS = 0.02


class AtomPruner(ScoreRouter):
    """Skip atoms that others hardly attend to, and first those that resemble a more important neighbour.

    1. Similarity stage: the keys are the l = 0 channels and the norms of every degree l > 0 and channel,
       which are invariant. An atom is redundant as far as a neighbour of higher importance has nearly the
       same key. (The original splits the sorted tokens in two halves and drops one of each of the most
       similar pairs, which would split equivalent atoms.) What is similar is skipped, never copied: symmetry
       may relate two atoms whose features l > 0 differ by a rotation.
    2. Importance stage: PageRank on the attention graph of the block before, combined over heads.

    Args:
        levels: fraction to skip in both stages together (`topk`), or importance to pass (`threshold`,
            `smooth`; the mean importance is 1).
        similar: of the skipped atoms, the fraction that the similarity stage skips (`topk`).
        max_similarity: redundancy above which an atom is skipped (`threshold`, `smooth`); None for no
            similarity stage.
        similarity_width: of its gate (`smooth`).
        heads: which heads count, bool `[L, H]` as lists; None for all. See `with_head_filter`.
        damping, iterations: of the PageRank.
        options: see `ScoreRouter`.
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

    def head_scores(self, system: BatchGeometry, state: BlockState) -> Tensor:
        """`[N, H]` PageRank per head of the block before."""
        assert state.attention is not None
        source, target = system.graph.edge_index
        return weighted_pagerank(
            state.attention, source, target, len(system.pos), self.damping, self.iterations
        )

    def scores(self, system: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """`[N]` importance; 1 on average."""
        kept = None
        if self.heads is not None and state.block > 0:
            if state.block > len(self.heads):
                raise InputError(
                    f"the router has the heads of {len(self.heads)} blocks: make it for this network again"
                )
            kept = torch.tensor(self.heads[state.block - 1], device=system.pos.device)
        return combine_heads(self.head_scores(system, state), kept)

    def decide(
        self, system: BatchGeometry, state: BlockState, level: float, before: Tensor | None
    ) -> Decision:
        """Both stages; all atoms in the first block, before which there is no attention."""
        if state.block == 0:
            return Decision()
        importance = self.scores(system, state, level)
        if self.mode == "topk":
            if self.similar > 0:
                options = system.structure, system.natoms, "topk", self.similar * level, self.width
                likeness = redundancy(system, state.x, importance)
                distinct = select(-likeness, *options, before, self.hysteresis)
                # Behind all others, in the same order and with the same ties.
                importance = torch.where(distinct, importance, -1 / importance)
            return Decision(self.choose(importance, system, level, before))
        chosen = self.choose(importance, system, level, before)
        if self.max_similarity is None:
            return Decision(chosen)
        likeness = redundancy(system, state.x, importance)
        if self.mode == "smooth":
            return Decision(chosen * smoothstep((self.max_similarity - likeness) / self.similarity_width))
        options = system.structure, system.natoms, "threshold", -self.max_similarity, self.width
        return Decision(chosen & select(-likeness, *options, before, self.hysteresis))

    def with_head_filter(
        self, model: EquiformerV2, batches: Sequence[Batch], low: float = 0.1, high: float = 0.9
    ) -> "AtomPruner":
        """The same with the heads that `heads_between_quantiles` keeps.

        Args:
            model: the network.
            batches: calibration structures, without labels; the network runs densely.
            low, high: quantiles of the variances of all heads.

        Raises:
            InputError: blocks have different numbers of heads.
        """
        collector = _HeadVariances(self, model)
        variances = collector.measure(batches)
        settings = self.settings() | {"heads": heads_between_quantiles(variances, low, high).tolist()}
        return AtomPruner(**settings)

    def settings(self) -> dict[str, Any]:
        """See `BaseRouter`."""
        return super().settings() | {
            "similar": self.similar,
            "max_similarity": self.max_similarity,
            "similarity_width": self.similarity_width,
            "heads": self.heads,
            "damping": self.damping,
            "iterations": self.iterations,
        }


class EdgePruner(ScoreRouter):
    """Drop incoming edges that got little attention in the block before; the softmax runs over the others.

    The score of an edge is its mean attention weight over heads times the number of incoming edges of its
    target: 1 on average, whatever that number. The edge with the highest score always stays.

    Args:
        levels: fraction of the edges to drop (`topk`), or the score τ below which edges are dropped.
        options: see `ScoreRouter`; `hysteresis` and `keep_free` are about atoms and refused.
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

    def scores(self, system: BatchGeometry, state: BlockState, level: float) -> Tensor:
        """`[E]`, see the class."""
        assert state.attention is not None
        target = system.graph.edge_index[1]
        alpha = state.attention.mean(dim=1)
        degree = torch.bincount(target, minlength=len(system.pos))
        return alpha * degree[target]

    def decide(
        self, system: BatchGeometry, state: BlockState, level: float, before: Tensor | None
    ) -> Decision:
        """All edges in the first block, before which there is no attention."""
        if state.block == 0:
            return Decision()
        target = system.graph.edge_index[1]
        scores = self.scores(system, state, level)
        structure = system.structure[target]
        count = torch.bincount(structure, minlength=len(system.natoms))
        chosen = select(scores, structure, count, self.mode, level, self.width)
        if self.mode == "smooth":
            return Decision(edges=chosen)
        return Decision(edges=chosen | _best(scores, target, len(system.pos)))


def redundancy(system: BatchGeometry, x: Tensor, importance: Tensor, tie: float = 1e-4) -> Tensor:
    """`[N]` smooth maximum, over neighbours of higher importance, of the cosine of their keys and the atom's.

    A neighbour counts in full from 1 % more importance on, not at all if it is tied.

    Args:
        system: of the batch.
        x: `[N, K, C]` features.
        importance: `[N]`.
        tie: relative difference up to which two importances are the same.
    """
    key = torch.nn.functional.normalize(invariant_key(x), dim=1)
    source, target = system.graph.edge_index
    likeness = (key[source] * key[target]).sum(dim=1)
    more = (importance[source] - importance[target]) / importance[target].clamp(min=1e-6)
    weight = smoothstep((more - tie) / 0.01)
    # exp(c / w) with c from -1 to 1 stays finite in float32 for w = 0.02 after the shift by 1.
    terms = weight * torch.exp((likeness - 1) / _SOFTNESS)
    total = terms.new_zeros(len(key)).index_add(0, target, terms)
    return 1 + _SOFTNESS * torch.log(total + torch.exp(total.new_tensor(-2 / _SOFTNESS).clamp(min=-80)))


def invariant_key(x: Tensor) -> Tensor:
    """`[N, (L + 1) C]` scalars and the norms of each degree l > 0 per channel."""
    lmax = int(x.shape[1] ** 0.5) - 1
    parts = [x[:, 0]]
    for l in range(1, lmax + 1):
        # Safe square root: norms of zero vectors have no derivative.
        parts.append((x[:, l * l : (l + 1) ** 2].square().sum(dim=1) + 1e-12).sqrt())
    return torch.cat(parts, dim=1)


def _best(scores: Tensor, target: Tensor, num_atoms: int) -> Tensor:
    """Bool `[E]`: edges with the highest score of their target, ties included."""
    top = scores.new_full((num_atoms,), float("-inf")).scatter_reduce(0, target, scores.detach(), "amax")
    return scores >= top[target] * (1 - 1e-4)


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
        self.system: BatchGeometry | None = None
        self.observes_attention = True

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> Tensor:
        """`[L, H]`."""
        if not batches:
            raise InputError("the head filter needs at least one calibration batch")
        for batch in batches:
            self.model(batch, active=self)
            self.structures += len(batch.natoms)
        # The last block's weights are seen by nobody; it is given the mean of the others.
        self.sums[-1] = self.sums[:-1].mean(dim=0) if len(self.sums) > 1 else self.sums[-1]
        return self.sums / self.structures

    def start(self, batch: Batch, graph: RadiusGraph, num_blocks: int) -> "_HeadVariances":
        self.system = BatchGeometry.from_batch(batch, graph)
        return self

    def decide(self, state: BlockState) -> Decision:
        assert self.system is not None
        if state.block > 0:
            scores = self.router.head_scores(self.system, state).double().cpu()
            for part in scores.split(self.system.natoms.tolist()):
                self.sums[state.block - 1] += part.var(dim=0, unbiased=False)
        return Decision()
