"""Adsorbates: OC20's 86, ASE's molecules, files, and names that nobody knows."""

from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.data import covalent_radii
from ase.io import write

from equiformer2.adsorption.adsorbates import adsorbate_list, find_adsorbate, oc20_adsorbates
from equiformer2.adsorption.named_structures import build_adsorbate
from equiformer2.adsorption.periodic_images import whole_molecule
from equiformer2.errors import InputError


def test_all_of_oc20_are_there() -> None:
    adsorbates = oc20_adsorbates()
    assert len(adsorbates) == 86
    for name, adsorbate in adsorbates.items():
        atoms, binding = find_adsorbate(name)
        whole_molecule(atoms, name)
        assert binding
        assert max(binding) < len(atoms)
        near = atoms.get_all_distances() / (
            covalent_radii[atoms.numbers][:, None] + covalent_radii[atoms.numbers]
        )
        assert near[~np.eye(len(atoms), dtype=bool)].min(initial=1) > 0.7
        assert adsorbate.summary()["formula"] == atoms.get_chemical_formula()
        built, atom = build_adsorbate(name)
        assert sorted(built.get_chemical_symbols()) == sorted(atoms.get_chemical_symbols())
        assert 0 <= atom < len(built)


@pytest.mark.parametrize(
    ("name", "formula", "binding"),
    [
        ("*CO", "CO", ["C"]),
        ("CO", "CO", ["C"]),
        ("*CH2*O", "CH2O", ["C", "O"]),
        ("*N*NO", "N2O", ["N", "N"]),
        ("CH2*CO", "C2H2O", ["C"]),
        ("*NH2N(CH3)2", "C2H8N2", ["N"]),
        ("COOH", "CHO2", ["C"]),
        ("OOH", "HO2", ["O"]),
        ("CH3OH", "CH4O", ["C"]),
        ("OCH3", "CH3O", ["O"]),
        ("Pt", "Pt", ["Pt"]),
        ("*S", "S", ["S"]),
    ],
)
def test_names(name: str, formula: str, binding: list[str]) -> None:
    atoms, indices = find_adsorbate(name)
    assert atoms.get_chemical_formula() == formula
    assert [atoms.get_chemical_symbols()[index] for index in indices] == binding


def test_a_copy_is_returned() -> None:
    first, _ = find_adsorbate("*CO")
    first.positions += 1
    assert not np.allclose(first.positions, find_adsorbate("*CO")[0].positions)


@pytest.mark.parametrize(
    ("name", "near"), [("*CHOO", r"\*CHO"), ("*co", ""), ("", ""), ("CH3OHH", "CH3OH"), ("*COOHH", r"\*COOH")]
)
def test_unknown_names(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"is no molecule ASE knows.*{near}.*adsorbate of OC20"):
        find_adsorbate(name)


def test_file(tmp_path: Path) -> None:
    water = molecule("H2O")
    water.rotate(180, "x")
    write(tmp_path / "water.xyz", water)
    atoms, binding = find_adsorbate(str(tmp_path / "water.xyz"))
    assert np.allclose(atoms.positions, water.positions, atol=1e-6)
    assert binding == [int(water.positions[:, 2].argmin())]
    (tmp_path / "text.xyz").write_text("no structure\n")
    with pytest.raises(InputError, match=r"text\.xyz"):
        find_adsorbate(str(tmp_path / "text.xyz"))


def test_list_has_every_name() -> None:
    text = adsorbate_list()
    assert len(text.splitlines()) == 87
    assert "*CH2*O         CH2O         4  C (0), O (3)" in text
