"""Paths in the report of a search."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from test_basins import slab, with_adsorbate

from equiformer2.adsorption.neb import EnergyPath, path_picture
from equiformer2.adsorption.path_section import path_section, update_report
from equiformer2.errors import InputError
from equiformer2.report import page


def path(*values: float) -> EnergyPath:
    energies = np.array(values or [0.0, 0.4, 0.1])
    images = []
    for shift, energy in zip(np.arange(len(energies)) * 0.7, energies, strict=True):
        atoms: Atoms = with_adsorbate(slab(size=(2, 2, 3)), "O", "fcc")
        atoms.positions[-1, 0] += shift
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
        images.append(atoms)
    return EnergyPath(images, energies, False, 0.2, 5, 20)


def write_path(folder: Path, name: str, *energies: float) -> None:
    place = folder / "neb" / name
    place.mkdir(parents=True)
    found = path(*energies)
    write(place / "neb.traj", found.images)
    (place / "neb.png").write_bytes(path_picture(found))
    (place / "neb.json").write_text(json.dumps({**found.summary(), "start": "a", "end": "<b>"}))


def test_the_report_has_every_path_once(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    update_report(tmp_path)
    assert not report.exists()
    report.write_text(page("O on Cu", ["<p>energies</p>", path_section(tmp_path)]), encoding="utf-8")
    assert "Paths between minima" not in report.read_text()
    for number, name in enumerate(("a-b", "b-c"), 1):
        write_path(tmp_path, name)
        update_report(tmp_path)
        update_report(tmp_path)
        text = report.read_text(encoding="utf-8")
        assert text.count("<h2>Paths between minima</h2>") == 1
        assert text.count("showStructures('path-") == number
    assert "a to &lt;b&gt;" in text
    assert "barrier 0.400 eV, back 0.300 eV" in text
    assert "NOT converged" in text
    assert "1: 0.40 eV" in text
    assert text.count("play / stop") == 2
    assert "<p>energies</p>" in text
    assert text.rstrip().endswith("</html>")


def test_the_report_names_minima_between_the_ends(tmp_path: Path) -> None:
    write_path(tmp_path, "a-b", 0.0, -0.5, -0.2)
    text = path_section(tmp_path)
    assert "the path crosses another minimum (image 1 at -0.500 eV)" in text
    assert "barrier 0.300 eV, back 0.500 eV" in text
    assert "no barrier" not in text
    write_path(tmp_path, "b-c", 0.0, -0.1, -0.2)
    assert "between the ends there is no barrier" in path_section(tmp_path)


def test_reports_of_earlier_versions_get_the_section(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page("O on Cu", ["<p>energies</p>"]), encoding="utf-8")
    write_path(tmp_path, "a-b")
    update_report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("showStructures('path-0'") == 1
    assert text.rstrip().endswith("</html>")


def test_a_broken_path_is_named(tmp_path: Path) -> None:
    write_path(tmp_path, "a-b")
    (tmp_path / "neb" / "a-b" / "neb.json").write_text("{}")
    with pytest.raises(InputError, match=r"a-b/neb.json is broken"):
        path_section(tmp_path)
