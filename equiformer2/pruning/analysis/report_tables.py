"""Tables of the redundancy report on a terminal."""

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from equiformer2.pruning.analysis.redundancy_report import RedundancyReport, units_holding

#: Characters that the widest table needs.
_WIDTH = 132


def print_report(report: RedundancyReport) -> None:
    """Print all tables of a report, as wide as they need."""
    console = Console(width=max(_WIDTH, Console().width))
    source, tables = report.source, _ReportTables(report)
    batch = source["timed_batch"]
    console.print(
        f"{source['structures']} structures of {source['systems']} systems, {source['atoms']} atoms, "
        f"{source['weights']} weights, {source['parameters']:,} parameters"
    )
    console.print(tables.blocks(), tables.units(), tables.parts(), tables.savings())
    console.print(
        f"timed: one batch of {batch['structures']} structures, {batch['atoms']} atoms, "
        f"{batch['edges']} edges; "
        f"{source['device']}, {source['threads']} threads, backend {source['backend']}, {source['precision']}"
    )


class _ReportTables:
    """Tables of one report."""

    def __init__(self, report: RedundancyReport) -> None:
        self.report = report

    def blocks(self) -> Table:
        """Change of the features and entropy of the attention."""
        degrees = max(len(row.cosine_by_degree) for row in self.report.statistics)
        table = self.table(
            "Change of the features (cosine before and after) and attention entropy (1: all edges alike)",
            ["block", "tag", "atoms", "cosine", "attention", "feed-fwd"],
            [*(f"l={l}" for l in range(degrees)), "entropy", "heads"],
        )
        for row in self.report.statistics:
            entropy = [value for value in row.entropy if value is not None]
            table.add_row(
                *(str(row.block), row.tag, str(row.atoms)),
                *(self.number(v) for v in (row.cosine, row.cosine_attention, row.cosine_feed_forward)),
                *(self.number(v) for v in row.cosine_by_degree),
                self.number(statistics.fmean(entropy) if entropy else None),
                f"{min(entropy):.2f} … {max(entropy):.2f}" if entropy else "-",
                end_section=row.tag == "all",
            )
        return table

    def units(self) -> Table:
        """Importance of heads and channels."""
        table = self.table(
            "Importance, E |dL/dξ|: units that hold 90 % of it / all units; the whole of each branch",
            ["block", "heads", "values", "attn hidden", "ffn hidden"],
            ["attention", "feed-forward"],
        )
        importance = self.report.importance["michel"]
        for block, branches in enumerate(importance.branches):
            units = [
                getattr(importance, unit)[block] for unit in ("heads", "values", "attn_hidden", "ffn_hidden")
            ]
            table.add_row(
                str(block),
                *(f"{units_holding(values)} / {len(values)}" for values in units),
                *(f"{float(value):.3g}" for value in branches),
            )
        return table

    def parts(self) -> Table:
        """Operations and time of every part."""
        table = self.table("Cost of a forward pass", ["part", "MMACs", "%", "ms", "%"])
        macs = max(1, sum(part.macs for part in self.report.parts))
        seconds = sum(part.seconds for part in self.report.parts)
        for part in self.report.parts:
            table.add_row(
                part.part,
                f"{part.macs / 1e6:.1f}",
                f"{100 * part.macs / macs:.1f}",
                f"{1e3 * part.seconds:.1f}",
                f"{100 * part.seconds / seconds:.1f}",
            )
        return table

    def savings(self) -> Table:
        """Savings of inference."""
        table = self.table(
            "Savings of inference without a change of the answers (a whole pass with / without the cut)",
            ["cut", "operations", "time", "quartiles", "max |ΔE| eV", "max |ΔF| eV/Å", "edges in force head"],
        )
        for saving in self.report.savings:
            latency = saving.latency
            edges = None if saving.edges is None else saving.edges["force head"]
            table.add_row(
                saving.name,
                f"{saving.macs / max(1, saving.macs_without_cut):.3f}",
                f"{latency.ratio:.3f}",
                f"{latency.low:.3f} … {latency.high:.3f}",
                "-" if saving.energy_deviation is None else f"{saving.energy_deviation:.1e}",
                "-" if saving.force_deviation is None else f"{saving.force_deviation:.1e}",
                "all" if edges is None else f"{100 * edges:.0f} %",
            )
        return table

    @staticmethod
    def table(title: str, *columns: Sequence[str]) -> Table:
        """An empty table; the first column is aligned left."""
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(name for group in columns for name in group):
            table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
        return table

    @staticmethod
    def number(value: float | None) -> str:
        """Four decimals, or a dash."""
        return "-" if value is None else f"{value:.4f}"
