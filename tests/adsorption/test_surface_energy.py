"""Surface energies against direct calculations with ASE, their order, and where there are none."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc100, fcc110, fcc111
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.optimize import LBFGS

from equiformer2.adsorption.slabs import CleanSlab, find_slab, slabs_of_bulk
from equiformer2.adsorption.surface_energy import J_M2, ranked_slabs, surface_energies
from equiformer2.errors import InputError
from equiformer2.inference.batched import RelaxationSettings

BUILDERS = {(1, 1, 1): fcc111, (1, 0, 0): fcc100, (1, 1, 0): fcc110}


class AdsorptionModel(EMT):
    """EMT that calls its energies adsorption energies."""

    energy_kind = "adsorption"


class Failing(Calculator):
    """Calculator that cannot compute anything, of total energies."""

    implemented_properties = ("energy", "forces")
    energy_kind = "total"

    def calculate(self, *_: object) -> None:
        raise RuntimeError("no licence")


def cut(miller: str = "all", **sizes: float) -> list[CleanSlab]:
    return slabs_of_bulk("Cu fcc a=3.6", miller, **{"width": 5.0, **sizes})


def expected(plane: tuple[int, int, int], relax: bool = False) -> float:
    """(E(slab) - N E(bulk)) / 2A of ASE's own slab, eV/Å²."""
    slab = BUILDERS[plane]("Cu", (1, 1, 5 if relax else 9), a=3.6, vacuum=10.0)
    slab.pbc = True
    crystal = bulk("Cu", "fcc", a=3.6)
    slab.calc, crystal.calc = EMT(), EMT()
    if relax:
        LBFGS(slab, logfile=None).run(fmax=0.005)
    area = np.linalg.norm(np.cross(*slab.cell[:2]))
    return float((slab.get_potential_energy() - len(slab) * crystal.get_potential_energy()) / (2 * area))


def test_planes_of_copper_against_ase() -> None:
    energies = surface_energies(cut(), EMT())
    assert [row.miller for row in energies.rows] == [(1, 1, 1), (1, 0, 0), (1, 1, 0)]
    for row in energies.rows:
        assert row.value == pytest.approx(expected(row.miller), abs=1e-6)
        assert not row.sides_differ
    lowest = energies.summary()["rows"][0]
    assert lowest["surface_energy_J_m2"] == pytest.approx(lowest["surface_energy_eV_A2"] * 16.0218, rel=1e-5)
    assert f"{energies.rows[0].value * J_M2:.4f}" in str(energies)
    assert "as they were cut" in str(energies)


def test_both_sides_are_relaxed() -> None:
    slabs = cut("100", thickness=7.0)
    settings = RelaxationSettings(fmax=0.005, steps=100, frames="ends")
    (row,) = surface_energies(slabs, EMT(), relaxed=settings).rows
    assert row.value == pytest.approx(expected((1, 0, 0), relax=True), abs=1e-5)
    assert row.value < expected((1, 0, 0))
    (short,) = surface_energies(slabs, EMT(), relaxed=replace(settings, steps=1)).rows
    assert not short.converged
    assert "NOT converged" in str(surface_energies(slabs, EMT(), relaxed=replace(settings, steps=1)))


def test_slabs_come_in_the_order_of_stability() -> None:
    slabs = cut()
    ranked, energies = ranked_slabs(slabs, EMT())
    assert [slab.report.miller for slab in ranked] == [(1, 1, 1), (1, 0, 0), (1, 1, 0)]
    assert [row.slab for row in energies.rows] == [slab.report.origin for slab in ranked]
    kept, none = ranked_slabs(slabs, AdsorptionModel())
    assert kept == slabs
    assert not none.rows
    assert "no surface or cleavage energies" in none.notices[0]
    assert ranked_slabs(slabs[:1], Failing())[1].rows == ()  # nothing is calculated for one slab


def test_what_has_no_surface_energy() -> None:
    with pytest.raises(InputError, match="no surface or cleavage energies"):
        surface_energies(cut("111"), AdsorptionModel())
    good = cut("111")[0]
    atoms = good.atoms.copy()
    atoms.numbers[0] = 78
    slabs = [
        CleanSlab(atoms, replace(good.report, origin="mixed"), good.bulk),
        find_slab(atoms),
        good,
    ]
    rows = surface_energies(slabs, EMT()).rows
    assert [row.value is None for row in rows] == [False, True, True]
    assert "chemical potential" in rows[1].reason
    assert "bulk of a slab from a file is not known" in rows[2].reason
    (row,) = surface_energies([good], Failing()).rows
    assert "Failing failed with RuntimeError: no licence" in row.reason


def test_a_slab_whose_sides_differ_is_told_of() -> None:
    report = replace(find_slab("Cu111").report, asymmetric=True)
    slab = find_slab("Cu111")
    energies = surface_energies([CleanSlab(slab.atoms, report, slab.bulk)], EMT())
    assert "ranks neither alone" in energies.notices[0]
    assert energies.rows[0].value == pytest.approx(
        (energy(slab.atoms) - len(slab.atoms) * energy(slab.bulk.atoms)) / (2 * energies.rows[0].area)
    )


def energy(atoms: Atoms) -> float:
    copy = atoms.copy()
    copy.calc = EMT()
    return float(copy.get_potential_energy())
