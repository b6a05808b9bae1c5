"""Draw structures and relaxations, as PNG bytes."""

from io import BytesIO

import numpy as np
from ase import Atoms
from ase.data.colors import jmol_colors
from ase.geometry import get_distances
from ase.visualize.plot import plot_atoms
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from equiformer2.inference.atoms import ADSORBATE, fixed_mask, oc20_tags
from equiformer2.inference.relaxation import RelaxationResult


def structure_picture(structures: dict[str, Atoms], title: str) -> bytes:
    """Draw top view (row 1) and side view (row 2) of each structure, one column each; fixed atoms are darker.

    Args:
        structures: caption -> structure.
        title: headline of the picture.
    """
    figure = new_figure(4.2 * len(structures), 8.0)
    axes = figure.subplots(2, len(structures), squeeze=False, height_ratios=(1.0, 0.8))
    for column, (caption, given) in enumerate(structures.items()):
        atoms = upright(given)
        for row, (view, rotation) in enumerate((("top", ""), ("side", "-90x"))):
            axis = axes[row, column]
            # The cell is drawn in the top view only: the vacuum would shrink the side view to a line.
            plot_atoms(
                atoms,
                ax=axis,
                rotation=rotation,
                show_unit_cell=2 if row == 0 else 0,
                colors=jmol_colors[atoms.numbers] * np.where(fixed_mask(atoms), 0.6, 1.0)[:, None],
            )
            axis.set_title(f"{caption}, {view} view", fontsize=10)
            axis.set_axis_off()
    figure.suptitle(title, fontsize=12)
    return png_bytes(figure)


def upright(atoms: Atoms) -> Atoms:
    """Copy a structure, rotated so that its first two lattice vectors span the xy plane, its surface up.

    The surface is where the adsorbate (tag 2) is, else where the third lattice vector points to.
    """
    turned = atoms.copy()
    turned.set_constraint()
    normal = np.cross(*turned.cell.array[:2])
    area = float(np.linalg.norm(normal))
    if area > 1e-6:
        tags, notice = oc20_tags(atoms)
        adsorbate = (tags == ADSORBATE) & (notice is None)  # not where they may be layers of ASE's builders
        slab = ~adsorbate
        across = float(normal @ atoms.cell.array[2]) or float(normal[2])
        if adsorbate.any() and slab.any():
            vectors, lengths = get_distances(
                atoms.positions[slab], atoms.positions[adsorbate], cell=atoms.cell, pbc=atoms.pbc
            )  # of the nearest images, however the atoms are wrapped into the cell
            across = float((vectors[lengths.argmin(axis=0), np.arange(int(adsorbate.sum()))] @ normal).sum())
        normal = normal / area * (-1.0 if across < 0 else 1.0)
        if normal[2] < -1.0 + 1e-9:
            turned.rotate(180.0, "x", rotate_cell=True)
        elif np.linalg.norm(normal[:2]) > 1e-6:
            turned.rotate(normal, "z", rotate_cell=True)
    turned.set_constraint(atoms.constraints)
    return turned


def relaxation_picture(result: RelaxationResult, energy_label: str) -> bytes:
    """Draw energy and largest force against the optimiser step.

    Args:
        result: the relaxation.
        energy_label: what the energy is, e.g. "adsorption energy (eV)".
    """
    figure = new_figure(6.4, 5.6)
    energy_axis, force_axis = figure.subplots(2, 1, sharex=True)
    steps = np.arange(result.steps + 1)
    known = [step for step in steps if result.energies[step] is not None]
    energies = [result.energies[step] for step in known]
    energy_axis.plot(known, energies, marker="o", markersize=3, color="#1f4e79")
    energy_axis.set_ylabel(energy_label)
    energy_axis.ticklabel_format(axis="y", useOffset=False)
    force_axis.plot(steps, result.max_forces, marker="o", markersize=3, color="#a33c1f")
    force_axis.axhline(
        result.fmax, linestyle="--", linewidth=1, color="grey", label=f"fmax = {result.fmax:g}"
    )
    if min(result.max_forces) > 0:
        force_axis.set_yscale("log")
    force_axis.set_ylabel("largest force (eV/Å)")
    force_axis.set_xlabel(f"{result.optimizer} step")
    force_axis.set_xlim(-0.5, max(result.steps, 1) + 0.5)
    force_axis.xaxis.get_major_locator().set_params(integer=True)
    force_axis.legend(frameon=False, fontsize=9)
    return png_bytes(figure)


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of this size in inches, without a window system and outside any list of figures."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """Draw a figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
