"""Tables of energies over the size of a slab, with EMT, whose energies are known."""

import numpy as np
import pytest
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT

from equiformer2.adsorption.convergence import ADSORPTION_ENERGY, SURFACE_ENERGY, convergence_table
from equiformer2.errors import InputError


class AdsorptionEnergies(EMT):
    """EMT that claims to predict adsorption energies."""

    energy_kind = "adsorption"


def test_surface_energy() -> None:
    table = convergence_table(
        "Cu fcc a=3.6", "111", EMT(), thicknesses=(4, 9), vacuums=(8, 20), widths=(2, 5)
    )
    assert table.quantity == SURFACE_ENERGY
    atoms = fcc111("Cu", (1, 1, 6), a=3.6, vacuum=10)
    atoms.calc = EMT()
    perfect = bulk("Cu", a=3.6)
    perfect.calc = EMT()
    area = np.linalg.norm(np.cross(*atoms.cell.array[:2]))
    expected = (atoms.get_potential_energy() - 6 * perfect.get_potential_energy()) / (2 * area)
    for row in table.rows:
        assert row.value == pytest.approx(expected, abs=2e-4)
    assert [row.varied for row in table.rows] == ["thickness"] * 2 + ["vacuum"] * 2 + ["width"] * 2
    for varied in ("thickness", "vacuum", "width"):
        rows = [row for row in table.rows if row.varied == varied]
        assert rows[-1].change == 0
        assert rows[0].change == pytest.approx(rows[0].value - rows[-1].value)
    lines = str(table).splitlines()
    assert len(lines) == 2 + 6 + 1
    assert "16.02 J/m²" in lines[-1]
    assert not table.notices


def test_adsorption_energy() -> None:
    settings = {"thicknesses": (4,), "vacuums": (), "widths": (2, 5)}
    table = convergence_table("Cu", "100", EMT(), adsorbate="*O", **settings)
    assert table.quantity == ADSORPTION_ENERGY
    values = [row.value for row in table.rows]
    assert values[1] is not None
    assert values[0] == pytest.approx(values[2], abs=0.05)
    referenced = convergence_table("Cu", "100", AdsorptionEnergies(), adsorbate="*O", **settings)
    assert referenced.rows[2].value != pytest.approx(values[2])  # its own energy, nothing subtracted
    wide = convergence_table(
        "Cu", "111", EMT(), adsorbate="*OCH2CH3", thicknesses=(), vacuums=(), widths=(2,)
    )
    assert wide.rows[0].value is None
    assert "own periodic image" in wide.rows[0].reason
    assert wide.rows[0].reason in str(wide)


def test_all_slabs_have_the_adsorbate_on_the_same_site() -> None:
    """The first site of a stepped surface is at the edge of one slab and on the terrace of another."""
    settings = {"thicknesses": (4, 7), "vacuums": (), "widths": ()}
    table = convergence_table("Cu fcc a=3.6", "211", EMT(), adsorbate="*O", **settings)
    assert abs(table.rows[0].change) < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calculator": AdsorptionEnergies()}, "no surface or cleavage energies"),
        ({"miller": "all"}, "one plane and one termination"),
        ({"thicknesses": (), "vacuums": (), "widths": ()}, "no thickness, vacuum or width"),
        ({"widths": (-1,)}, "the width of the slab is -1"),
        ({"bulk": "foo"}, "there is no bulk"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    settings = {"bulk": "Cu", "miller": "111", "calculator": EMT(), **changes}
    with pytest.raises(InputError, match=message):
        convergence_table(
            settings.pop("bulk"), settings.pop("miller"), settings.pop("calculator"), **settings
        )


def test_polar_slabs_warn() -> None:
    pytest.importorskip("pymatgen.core")
    table = convergence_table(
        "CuAu L1_0 a=4.0 c=3.7", "001", EMT(), termination=0, thicknesses=(6,), vacuums=(), widths=()
    )
    assert any("dipole" in notice for notice in table.notices)
    assert "WARNING" in str(table)
