"""Structures that can be turned in the browser, drawn by 3Dmol.js (Rego and Koes 2015, BSD-3-Clause).

`3Dmol-min.js` lies beside this file as its authors publish it (npm package 3dmol 2.5.5), with its licence.
"""

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from itertools import pairwise

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from ase.geometry import complete_cell

from equiformer2.inference.atoms import fixed_mask
from equiformer2.inference.pictures import upright

#: Radius of a sphere: this share of the covalent radius, and 0.2 Å.
_SHARE = 0.7


def viewer_script() -> str:
    """Return the scripts that viewers need; once per page, before the first viewer."""
    folder = files("equiformer2.report")
    texts = [folder.joinpath(name).read_text(encoding="utf-8") for name in ("3Dmol-min.js", "viewer.js")]
    # An end tag is the only text that a script element may not hold.
    return "".join(
        f"<script>{text}</script>" for text in (each.replace("</script", r"<\/script") for each in texts)
    )


def structure_viewer(
    name: str, structures: Mapping[str, Atoms], fallback: str = "", play: bool = False
) -> str:
    """Make an element that shows structures, with a button for each.

    Args:
        name: of the element, unique in the page; letters, digits and `-`.
        structures: caption -> structure; the first is shown at the start. Fixed atoms are darker.
        fallback: HTML that is shown where the browser cannot draw in three dimensions, such as a picture.
        play: add a button that shows the structures one after the other, there and back.

    Raises:
        ValueError: `name` has other characters, or there is no structure.
    """
    if not name.replace("-", "").isalnum() or not structures:
        raise ValueError(f"a viewer needs a plain name and a structure, not {name!r}")
    buttons = "".join(
        f"<button type='button' data-model='{number}'>{html.escape(caption)}</button> "
        for number, caption in enumerate(structures)
    )
    if play and len(structures) > 1:
        buttons += "<button type='button'>play / stop</button>"
    data = json.dumps([_model(atoms) for atoms in structures.values()]).replace("<", r"\u003c")
    return (
        f"<div class='buttons' id='{name}-buttons'>{buttons}</div><div class='viewer' id='{name}'></div>"
        f"<div id='{name}-fallback' hidden>{fallback}</div>"
        f"<script>showStructures('{name}', {data});</script>"
    )


def _model(atoms: Atoms) -> dict[str, list[list[object]]]:
    """Atoms as `[symbol, x, y, z, colour, radius]`, and edges of the surface cell as pairs of points, Å."""

    def rounded(values: np.ndarray) -> list[object]:
        return [round(float(value), 4) for value in values]

    atoms = upright(atoms)
    colours = jmol_colors[atoms.numbers] * np.where(fixed_mask(atoms), 0.6, 1.0)[:, None]
    rows: list[list[object]] = []
    for atom, colour in zip(atoms, colours, strict=True):
        shade = "#" + "".join(f"{round(255 * float(part)):02x}" for part in colour)
        radius = round(_SHARE * float(covalent_radii[atom.number]) + 0.2, 3)
        rows.append([atom.symbol, *rounded(atom.position), shade, radius])
    # At the height of the lowest atom: the vacuum of the whole cell would make everything small.
    first, second = complete_cell(atoms.cell.array)[:2]
    origin = np.array([0.0, 0.0, float(atoms.positions[:, 2].min())])
    corners = [origin, origin + first, origin + first + second, origin + second, origin]
    edges = [rounded(np.concatenate(ends)) for ends in pairwise(corners)]
    return {"atoms": rows, "edges": edges}
