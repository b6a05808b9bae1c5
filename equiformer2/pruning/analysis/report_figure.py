"""Figure of the redundancy report."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from equiformer2.pruning.analysis.redundancy import BlockStatistics
from equiformer2.pruning.structured.importance import Importance

_TAGS = {"0": "subsurface (0)", "1": "surface (1)", "2": "adsorbate (2)"}
_COLORS = {"0": "#7a7a7a", "1": "#3b75af", "2": "#c8553d"}
_BRANCHES = {"cosine_attention": "attention", "cosine_feed_forward": "feed-forward"}


@dataclass(frozen=True)
class PartCost:
    """Cost of one part of a forward pass over the timed batch.

    Attributes:
        part: name of the part, such as `blocks.0.attention`.
        macs: multiply-accumulate operations.
        seconds: least time of all passes, s.
    """

    part: str
    macs: int
    seconds: float


def draw_report(
    statistics: Sequence[BlockStatistics],
    importance: Mapping[str, Importance],
    parts: Sequence[PartCost],
) -> bytes:
    """Draw six panels: change and entropy by block and tag, importance of heads and channels, costs.

    Args:
        statistics: statistics of the blocks.
        importance: importance by method; `michel` is drawn.
        parts: costs of the parts of a forward pass.

    Returns:
        PNG file.
    """
    figure = Figure(figsize=(14, 8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    michel = importance["michel"]
    _Panel(axes[0, 0]).change(statistics)
    _Panel(axes[0, 1]).entropy(statistics)
    _Panel(axes[0, 2]).costs(parts)
    _Panel(axes[1, 0]).heads(michel)
    _Panel(axes[1, 1]).channels(michel.attn_hidden, "attention hidden channels")
    _Panel(axes[1, 2]).channels(michel.ffn_hidden, "feed-forward channels")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


class _Panel:
    """One panel of the figure."""

    def __init__(self, axis: Axes) -> None:
        self.axis = axis

    def change(self, statistics: Sequence[BlockStatistics]) -> None:
        """Change of the features by block, one line per tag and one per branch."""
        axis = self.axis
        for tag, label in _TAGS.items():
            rows = [row for row in statistics if row.tag == tag]
            if rows:
                blocks = [row.block for row in rows]
                axis.plot(
                    blocks,
                    [1 - row.cosine for row in rows],
                    "o-",
                    color=_COLORS[tag],
                    label=label,
                    markersize=4,
                )
        rows = [row for row in statistics if row.tag == "all"]
        for field, style in (("cosine_attention", ":"), ("cosine_feed_forward", "--")):
            values = [1 - getattr(row, field) for row in rows]
            axis.plot(
                [row.block for row in rows], values, style, color="black", label=f"{_BRANCHES[field]} alone"
            )
        axis.set(title="change of an atom's features", xlabel="block", ylabel="1 - cosine", yscale="log")
        self.block_ticks(len(rows))
        axis.legend(fontsize="small", frameon=False)
        axis.grid(alpha=0.3)

    def entropy(self, statistics: Sequence[BlockStatistics]) -> None:
        """Entropy of the attention by block, one point per head."""
        axis = self.axis
        blocks = 1 + max(row.block for row in statistics)
        shifts = dict(zip(_TAGS, (-0.2, 0.0, 0.2), strict=True))
        for tag, label in _TAGS.items():
            points = [
                (row.block + shifts[tag], value)
                for row in statistics
                if row.tag == tag
                for value in row.entropy
                if value is not None
            ]
            if points:
                axis.plot(*np.array(points).T, "o", color=_COLORS[tag], label=label, markersize=4, alpha=0.7)
        axis.set(
            title="attention entropy, one point per head",
            xlabel="block",
            ylabel="entropy / log(number of edges)",
            ylim=(0, 1.02),
        )
        self.block_ticks(blocks)
        axis.legend(fontsize="small", frameon=False)
        axis.grid(alpha=0.3)

    def costs(self, parts: Sequence[PartCost]) -> None:
        """Operations and time of every part, as shares of the whole pass."""
        axis = self.axis
        names = [
            part.part.replace("_", " ").replace("blocks.", "block ").replace(".", ", ") for part in parts
        ]
        rows = np.arange(len(parts))
        for shift, color, label, values in (
            (-0.2, "#3b75af", "operations", [part.macs for part in parts]),
            (0.2, "#c8553d", "measured time", [part.seconds for part in parts]),
        ):
            axis.barh(
                rows + shift, 100 * np.array(values) / max(sum(values), 1e-30), 0.4, color=color, label=label
            )
        axis.set_yticks(rows, names, fontsize="small")
        axis.invert_yaxis()
        axis.set(title="cost of a forward pass", xlabel="share (%)")
        axis.legend(fontsize="small", frameon=False)
        axis.grid(axis="x", alpha=0.3)

    def heads(self, importance: Importance) -> None:
        """Importance of the heads as a map of blocks and heads."""
        axis = self.axis
        heads = max(len(values) for values in importance.heads)
        table = np.full((len(importance.heads), max(heads, 1)), np.nan)
        for row, values in zip(table, importance.heads, strict=True):
            row[: len(values)] = values.cpu().numpy()
        image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0)
        axis.figure.colorbar(image, ax=axis, label="E |dL/dξ|")
        axis.set(title="importance of heads", xlabel="head", ylabel="block")
        axis.set_xticks(range(table.shape[1]))
        axis.set_yticks(range(table.shape[0]))

    def channels(self, importance: Sequence[object], name: str) -> None:
        """Share of the importance that the most important channels hold."""
        axis = self.axis
        for block, values in enumerate(importance):
            ranked = np.sort(values.cpu().double().numpy())[::-1]  # type: ignore[attr-defined]
            if len(ranked) and ranked[0] > 0:
                share = (np.arange(len(ranked)) + 1) / len(ranked)
                cover = np.cumsum(ranked) / ranked.sum()
                color = f"C{block}" if len(importance) <= 10 else None
                axis.plot(100 * share, 100 * cover, label=f"block {block}", linewidth=1.2, color=color)
        axis.plot([0, 100], [0, 100], color="0.6", linewidth=1, linestyle=":", label="all alike")
        axis.set(
            title=f"importance held by {name}",
            xlabel="channels, the most important first (%)",
            ylabel="share of the importance (%)",
            xlim=(0, 100),
            ylim=(0, 101),
        )
        axis.legend(fontsize="x-small", frameon=False, ncols=2, loc="lower right")
        axis.grid(alpha=0.3)

    def block_ticks(self, blocks: int) -> None:
        """Whole numbers at the axis of the blocks, ten at most."""
        axis = self.axis
        step = max(1, blocks // 10)
        axis.set_xticks(range(0, blocks, step))
