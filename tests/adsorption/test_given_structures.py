"""Slabs, bulks and adsorbates given as paths and as objects of ASE and pymatgen."""

from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.io import write

from equiformer2 import find_adsorption_energy
from equiformer2.adsorption.bulks import find_bulk
from equiformer2.adsorption.given_structures import given_atoms
from equiformer2.adsorption.placements import placements
from equiformer2.adsorption.slabs import find_slab
from equiformer2.errors import InputError
from equiformer2.inference.atoms import fixed_mask


def slab():
    return fcc111("Cu", (3, 3, 4), vacuum=10, periodic=True)


def test_paths_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("cu.cif", bulk("Cu", cubic=True))
    write("POSCAR", slab(), format="vasp")
    write("co.xyz", molecule("CO"))
    assert find_bulk(Path("cu.cif")).name == "cu.cif"
    assert find_slab(Path("POSCAR")).report.held == 27  # a name without dot or slash is a file as a path
    (placed,) = placements(find_slab(Path("POSCAR")).atoms, Path("co.xyz"), number=1)
    assert placed.atoms.get_chemical_formula("metal") == "Cu36CO"


@pytest.mark.parametrize("given", [None, 3, [1, 2], {"a": 1}, object()])
def test_other_objects_are_refused(given: object) -> None:
    with pytest.raises(InputError, match="the slab cannot be made of"):
        find_slab(given)
    with pytest.raises(InputError, match="the bulk cannot be made of"):
        find_bulk(given)
    with pytest.raises(InputError, match="the adsorbate cannot be made of"):
        placements(find_slab(slab()).atoms, given, number=1)


def test_binding_atoms_are_indices() -> None:
    with pytest.raises(InputError, match="no list of indices"):
        placements(find_slab(slab()).atoms, (molecule("CO"), "C"), number=1)


def test_a_slab_without_a_held_atom_gets_oc20s_in_a_search() -> None:
    small = fcc111("Cu", (2, 2, 3), vacuum=10, periodic=True)
    options = {"placements": 1, "steps": 1, "gas_per_atom": {"O": 4.6}}
    found = find_adsorption_energy(small, "*O", EMT(), **options)
    report = found.record["settings"]["slab"]
    assert report["constraints_from"] == "OC20's rule"
    assert report["held"] == 8
    clean = found.search.clean_slab.atoms
    assert np.allclose(clean.positions[:8], small.positions[:8])
    assert fixed_mask(clean).sum() == 8


def test_objects_of_pymatgen() -> None:
    core = pytest.importorskip("pymatgen.core")
    cubic = core.Lattice.cubic(3.6)
    copper = core.Structure.from_spacegroup("Fm-3m", cubic, ["Cu"], [[0, 0, 0]])
    assert find_bulk(copper).name == "Cu"
    oxide = core.Structure.from_spacegroup("Fm-3m", cubic, ["Ni2+", "O2-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert find_bulk(oxide).name == "NiO"
    with pytest.raises(InputError, match="partly occupied"):
        find_bulk(core.Structure(cubic, [{"Cu": 0.5, "Pt": 0.5}], [[0, 0, 0]]))
    atoms = slab()
    held = atoms.positions[:, 2] < 14
    made = core.Structure(
        core.Lattice(atoms.cell.array),
        atoms.get_chemical_symbols(),
        atoms.positions,
        coords_are_cartesian=True,
        site_properties={"selective_dynamics": [[not one] * 3 for one in held]},
    )
    report = find_slab(made).report
    assert (report.held, report.constraints_from) == (held.sum(), "file")
    assert np.allclose(given_atoms(made, "it").positions, atoms.positions)
    carbon_monoxide = core.Molecule(["C", "O"], [[0, 0, 0], [0, 0, 1.15]])
    (placed,) = placements(find_slab(made).atoms, carbon_monoxide, number=1)
    assert placed.atoms.get_chemical_formula("metal") == "Cu36CO"


def test_planes_that_would_take_hours_are_refused() -> None:
    pytest.importorskip("pymatgen.core")
    from equiformer2.adsorption.slabs import slabs_of_bulk

    with pytest.raises(InputError, match="give smaller Miller indices"):
        slabs_of_bulk("Cu3Pt L1_2 a=3.7", "10,9,7")
