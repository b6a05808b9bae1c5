"""An inspection as a figure: sizes, energies, forces, elements, tags, and what looks wrong."""

import io
from pathlib import Path

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
from datasets_oc20.inspection_report import suspicious
from datasets_oc20.untrusted import AnyPath

_PERIOD_ENDS = (0, 2, 10, 18, 36, 54, 86, 118)


def draw_inspection(found: Inspection, name: str, path: AnyPath) -> None:
    """Write the figure as PNG to `path`; `name` stands in its title."""
    path = Path(path)
    figure = Figure(figsize=(13.5, 8.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(f"{name}: {found.inspected:,} of {found.frames:,} frames, {len(found.systems):,} systems")
    axes = figure.subplots(2, 3, width_ratios=(1, 1, 1.35))
    _draw_sizes(axes[0, 0], found)
    _draw_energies(axes[0, 1], found)
    _draw_elements(axes[0, 2], found)
    _draw_forces(axes[1, 0], found)
    _draw_tags(axes[1, 1], found)
    _draw_problems(axes[1, 2], found)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_bytes(path, buffer.getvalue())


def _draw_sizes(axis: Axes, found: Inspection) -> None:
    axis.set(title="size", xlabel="atoms per frame", ylabel="frames")
    if len(found.natoms):
        axis.hist(found.natoms, bins=40)


def _draw_energies(axis: Axes, found: Inspection) -> None:
    kind = found.kind or "kind not declared"
    axis.set(title=f"energy ({kind})", xlabel="energy (eV)", ylabel="frames", yscale="log")
    energy = found.energy[~np.isnan(found.energy)]
    if not len(energy):
        _say_nothing(axis, "no energies")
        return
    axis.hist(energy, bins=60)
    if found.kind == "adsorption":
        for limit in (-MAX_ENERGY, MAX_ENERGY):
            _draw_limit(axis, limit)


def _draw_forces(axis: Axes, found: Inspection) -> None:
    axis.set(title="largest force on a free atom", xlabel="force (eV/Å)", ylabel="frames")
    forces = found.max_force[found.max_force > 0]
    if not len(forces):
        _say_nothing(axis, "no forces on free atoms")
        return
    low, high = np.log10(forces.min()), np.log10(forces.max())
    axis.hist(forces, bins=np.logspace(low - 0.05, high + 0.05, 50).tolist())
    axis.set_xscale("log")
    if forces.max() > MAX_FORCE / 5:
        _draw_limit(axis, MAX_FORCE)


def _draw_tags(axis: Axes, found: Inspection) -> None:
    axis.set(title="atoms", ylabel="share of all atoms", ylim=(0, 1))
    atoms = max(sum(found.tags.values()), 1)
    shares = [*(found.tags[tag] / atoms for tag in (0, 1, 2)), found.fixed_share]
    names = ["tag 0\nsubsurface", "tag 1\nsurface", "tag 2\nadsorbate", "fixed"]
    bars = axis.bar(names, shares, color=["tab:blue"] * 3 + ["tab:gray"])
    axis.bar_label(bars, [f"{share:.1%}" for share in shares])


def _draw_problems(axis: Axes, found: Inspection) -> None:
    axis.set_title(f"suspicious frames: {suspicious(found):,}")
    if not found.problems:
        _say_nothing(axis, "nothing found")
        return
    names = list(found.problems)[::-1]
    counts = [len(found.problems[name]) for name in names]
    bars = axis.barh(names, counts, color="tab:orange", height=0.6)
    axis.bar_label(bars, [f"{count:,}" for count in counts], padding=3)
    axis.set(
        xlabel="frames",
        xlim=(0, 1.15 * max(counts)),
        ylim=(len(names) - max(len(names), 6) - 0.6, len(names) - 0.4),
    )


def _draw_elements(axis: Axes, found: Inspection) -> None:
    """The periodic table, coloured by the number of atoms."""
    axis.set(title=f"{len(found.elements)} elements: number of atoms", xlim=(0.4, 18.6), ylim=(10.1, 0.4))
    axis.set_aspect("equal")
    axis.axis("off")
    if not found.elements:
        return
    counts = found.elements.values()
    norm = LogNorm(min(counts), max(10 * min(counts), *counts))
    colours = colormaps["viridis_r"]
    for number in range(1, 104):
        row, column = _place(number)
        count = found.elements.get(number, 0)
        face = colours(norm(count)) if count else "0.95"
        axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=face))
        bright = bool(count) and norm(count) > 0.6
        colour = ("white" if bright else "black") if count else "0.7"
        axis.text(column, row, chemical_symbols[number], ha="center", va="center", fontsize=7, color=colour)
    axis.figure.colorbar(ScalarMappable(norm, colours), ax=axis, location="bottom", shrink=0.6, aspect=35)


def _place(number: int) -> tuple[float, int]:
    """Row and column of an element; lanthanides and actinides stand below the table."""
    period = next(row for row, end in enumerate(_PERIOD_ENDS) if number <= end)
    position = number - _PERIOD_ENDS[period - 1]
    length = _PERIOD_ENDS[period] - _PERIOD_ENDS[period - 1]
    if length == 32 and 3 <= position <= 17:
        return period + 2.5, position
    return period, position if (position <= 2 and number > 2) or number == 1 else position + 18 - length


def _draw_limit(axis: Axes, limit: float) -> None:
    """A line where OC20 cuts off; one entry in the legend for all of them."""
    label = "_" if axis.get_legend() else "OC20's limit"
    axis.axvline(limit, color="tab:red", linestyle="--", linewidth=1, label=label)
    axis.legend(fontsize="small")


def _say_nothing(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="0.5")
    axis.set(xticks=[], yticks=[])
