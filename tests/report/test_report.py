"""Pages that need nothing but their own file, and text that cannot become markup."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.constraints import FixAtoms

from equiformer2.inference.pictures import upright
from equiformer2.report import bullets, page, picture, structure_viewer, table, viewer_script


def slab() -> Atoms:
    atoms = fcc111("Pt", (2, 2, 3), vacuum=8.0, periodic=True)
    atoms.set_constraint(FixAtoms(range(4)))
    add_adsorbate(atoms, "O", 1.3, "fcc")
    return atoms


def test_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    text = page(evil, [table([evil], [[evil]]), bullets([evil]), picture(evil, b"png")])
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") == 7
    assert bullets([]) == ""


def test_a_viewer_holds_its_structures() -> None:
    text = structure_viewer("best", {"start": slab(), "relaxed <1>": slab()}, fallback="no 3D")
    models = json.loads(re.search(r"showStructures\('best', (.*)\);</script>", text).group(1))  # type: ignore[union-attr]
    assert len(models) == 2
    assert [atom[0] for atom in models[0]["atoms"]] == ["Pt"] * 12 + ["O"]
    assert models[0]["atoms"][12][1:4] == [round(x, 4) for x in slab().positions[12].tolist()]
    fixed, free = models[0]["atoms"][0][4], models[0]["atoms"][11][4]
    assert fixed < free  # the same colour, darker
    assert len(models[0]["edges"]) == 4
    assert "relaxed &lt;1&gt;" in text
    for name in ("a b", "x'", ""):
        with pytest.raises(ValueError, match="a plain name"):
            structure_viewer(name, {"a": slab()})


def test_a_tilted_slab_is_shown_upright() -> None:
    tilted = slab()
    tilted.rotate(40, "x", rotate_cell=True)
    shown, straight = (
        json.loads(
            structure_viewer("v", {"a": atoms}).split("showStructures('v', ")[1].split(");</script>")[0]
        )[0]
        for atoms in (tilted, slab())
    )
    heights, expected = ([atom[3] for atom in model["atoms"]] for model in (shown, straight))
    assert [height - heights[0] for height in heights] == pytest.approx(
        [height - expected[0] for height in expected], abs=1e-3
    )


def test_the_adsorbate_is_on_top_however_the_slab_lies() -> None:
    standing = slab()
    standing.set_tags([0] * 12 + [2])
    standing.rotate(90, "x", rotate_cell=True)
    swapped = standing.copy()  # its first two vectors make a left-handed cell
    swapped.set_cell(standing.cell.array[[1, 0, 2]])
    hanging = slab()
    hanging.set_tags([0] * 12 + [2])
    hanging.positions[12, 2] = hanging.positions[:12, 2].min() - 1.3
    wrapped = slab()
    wrapped.set_tags([0] * 12 + [2])
    wrapped.positions[:, 2] -= wrapped.positions[7, 2]  # the layers below the second are at the cell's end
    wrapped.wrap()
    for atoms in (standing, swapped, hanging):
        shown = upright(atoms)
        assert shown.positions[12, 2] == pytest.approx(shown.positions[:12, 2].max() + 1.3, abs=1e-3)
    assert upright(wrapped).positions == pytest.approx(wrapped.positions)


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = page("t", [viewer_script(), structure_viewer("v", {"a": slab()})])
    assert text.count("</script>") == 3
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=['\"]https?:", text)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_runs_the_page(tmp_path: Path) -> None:
    """It draws, or shows the picture in its place where it has no WebGL, without an error."""
    file = tmp_path / "page.html"
    probe = "<script>window.onerror = text => { document.title = 'failed: ' + text; }</script>"
    file.write_text(
        page("t", [probe, viewer_script(), structure_viewer("v", {"a": slab()}, fallback="instead")]),
        encoding="utf-8",
    )
    options = ["--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--dump-dom"]
    shown = subprocess.run(
        ["chromium", *options, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<title>t</title>" in shown
    assert ("<canvas" in shown) != ('id="v" hidden' in shown or 'hidden="" id="v"' in shown)
