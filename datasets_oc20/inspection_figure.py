"""An inspection as a figure: sizes, energies, forces, elements, tags, and suspicious frames."""

import io

import numpy as np
from ase.data import chemical_symbols
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from datasets_oc20.atomic import write_bytes
from datasets_oc20.inspection import MAX_ENERGY, MAX_FORCE, Inspection
from datasets_oc20.untrusted import AnyPath

_PERIOD_ENDS = (0, 2, 10, 18, 36, 54, 86, 118)


def draw_inspection(inspection: Inspection, name: str, path: AnyPath) -> None:
    """Write the figure of an inspection as PNG.

    Args:
        inspection: of the dataset.
        name: of the dataset, for the title.
        path: the file.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(13.5, 8.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(
        f"{name}: {inspection.inspected:,} of {inspection.frames:,} frames, "
        f"{len(inspection.systems):,} systems"
    )
    panels = _Panels(inspection)
    axes = figure.subplots(2, 3, width_ratios=(1, 1, 1.35))
    panels.draw_sizes(axes[0, 0])
    panels.draw_energies(axes[0, 1])
    panels.draw_elements(axes[0, 2])
    panels.draw_forces(axes[1, 0])
    panels.draw_tags(axes[1, 1])
    panels.draw_problems(axes[1, 2])
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_bytes(path, buffer.getvalue())


class _Panels:
    """The six panels of the figure of an inspection."""

    def __init__(self, inspection: Inspection) -> None:
        self._inspection = inspection

    def draw_sizes(self, axis: Axes) -> None:
        axis.set(title="size", xlabel="atoms per frame", ylabel="frames")
        if len(self._inspection.natoms):
            axis.hist(self._inspection.natoms, bins=40)

    def draw_energies(self, axis: Axes) -> None:
        kind = self._inspection.kind or "kind not declared"
        axis.set(title=f"energy ({kind})", xlabel="energy (eV)", ylabel="frames", yscale="log")
        energy = self._inspection.energy[~np.isnan(self._inspection.energy)]
        if not len(energy):
            self._write_note(axis, "no energies")
            return
        axis.hist(energy, bins=60)
        if self._inspection.kind == "adsorption":
            for limit in (-MAX_ENERGY, MAX_ENERGY):
                self._draw_limit(axis, limit)

    def draw_forces(self, axis: Axes) -> None:
        axis.set(title="largest force on a free atom", xlabel="force (eV/Å)", ylabel="frames")
        forces = self._inspection.max_force[self._inspection.max_force > 0]
        if not len(forces):
            self._write_note(axis, "no forces on free atoms")
            return
        low, high = np.log10(forces.min()), np.log10(forces.max())
        axis.hist(forces, bins=np.logspace(low - 0.05, high + 0.05, 50).tolist())
        axis.set_xscale("log")
        if forces.max() > MAX_FORCE / 5:
            self._draw_limit(axis, MAX_FORCE)

    def draw_tags(self, axis: Axes) -> None:
        axis.set(title="atoms", ylabel="share of all atoms", ylim=(0, 1))
        atoms = max(sum(self._inspection.tags.values()), 1)
        shares = [*(self._inspection.tags[tag] / atoms for tag in (0, 1, 2)), self._inspection.fixed_share]
        names = ["tag 0\nsubsurface", "tag 1\nsurface", "tag 2\nadsorbate", "fixed"]
        bars = axis.bar(names, shares, color=["tab:blue"] * 3 + ["tab:gray"])
        axis.bar_label(bars, [f"{share:.1%}" for share in shares])

    def draw_problems(self, axis: Axes) -> None:
        axis.set_title(f"suspicious frames: {self._inspection.num_suspicious:,}")
        if not self._inspection.problems:
            self._write_note(axis, "nothing found")
            return
        names = list(self._inspection.problems)[::-1]
        counts = [len(self._inspection.problems[name]) for name in names]
        bars = axis.barh(names, counts, color="tab:orange", height=0.6)
        axis.bar_label(bars, [f"{count:,}" for count in counts], padding=3)
        axis.set(
            xlabel="frames",
            xlim=(0, 1.15 * max(counts)),
            ylim=(len(names) - max(len(names), 6) - 0.6, len(names) - 0.4),
        )

    def draw_elements(self, axis: Axes) -> None:
        """Draw the periodic table, coloured by the number of atoms."""
        axis.set(
            title=f"{len(self._inspection.elements)} elements: number of atoms",
            xlim=(0.4, 18.6),
            ylim=(10.1, 0.4),
        )
        axis.set_aspect("equal")
        axis.axis("off")
        if not self._inspection.elements:
            return
        counts = self._inspection.elements.values()
        norm = LogNorm(min(counts), max(10 * min(counts), *counts))
        colours = colormaps["viridis_r"]
        for number in range(1, 104):
            row, column = element_position(number)
            count = self._inspection.elements.get(number, 0)
            face = colours(norm(count)) if count else "0.95"
            axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=face))
            bright = bool(count) and norm(count) > 0.6
            colour = ("white" if bright else "black") if count else "0.7"
            axis.text(
                column, row, chemical_symbols[number], ha="center", va="center", fontsize=7, color=colour
            )
        axis.figure.colorbar(ScalarMappable(norm, colours), ax=axis, location="bottom", shrink=0.6, aspect=35)

    @staticmethod
    def _draw_limit(axis: Axes, limit: float) -> None:
        """Draw a line at a limit of OC20; all lines share one entry in the legend."""
        label = "_" if axis.get_legend() else "OC20's limit"
        axis.axvline(limit, color="tab:red", linestyle="--", linewidth=1, label=label)
        axis.legend(fontsize="small")

    @staticmethod
    def _write_note(axis: Axes, text: str) -> None:
        axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="0.5")
        axis.set(xticks=[], yticks=[])


def element_position(number: int) -> tuple[float, int]:
    """Return row and column of an element in the periodic table; lanthanides and actinides are below it.

    Args:
        number: atomic number, from 1 to 118.
    """
    period = next(row for row, end in enumerate(_PERIOD_ENDS) if number <= end)
    position = number - _PERIOD_ENDS[period - 1]
    length = _PERIOD_ENDS[period] - _PERIOD_ENDS[period - 1]
    if length == 32 and 3 <= position <= 17:
        return period + 2.5, position
    return period, position if (position <= 2 and number > 2) or number == 1 else position + 18 - length
