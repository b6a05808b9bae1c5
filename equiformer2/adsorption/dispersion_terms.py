"""D3 dispersion of an adsorption energy: of slab and adsorbate, less the clean slab and the gases.

With total energies every term of the adsorption energy has its own D3. A model of adsorption energies has
the slab and the gases subtracted already, so D3 of both is subtracted from that of the whole: added alone, it
would count the dispersion within the slab, tens of eV, as adsorption.
"""

from collections.abc import Mapping
from typing import Any

import ase.build
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from equiformer2.adsorption.conventions import oc20_gases
from equiformer2.errors import InputError
from equiformer2.inference.dispersion import dispersion_of

#: Terms that a model of adsorption energies has subtracted because of D3.
SLAB, GAS = "d3_slab", "d3_gas"


def check_gas_source(calculator: BaseCalculator, source: str, given: Mapping[str, float] | None) -> None:
    """Raise `InputError` where D3 is added and the energies of gases have none."""
    if dispersion_of(calculator) is not None and (source == "oc20" or given):
        raise InputError(
            "with --d3 the energies of gases need D3, too, and energies per atom that are given have none: "
            "use --gas vacuum or --gas molecules"
        )


def refuse_dispersion(calculator: BaseCalculator, what: str) -> None:
    """Raise `InputError` where D3 is added and `what` does not subtract that of the slab and the gases."""
    if dispersion_of(calculator) is not None:
        raise InputError(
            f"{what} does not subtract the D3 dispersion within the slab, which would count as adsorption: "
            "leave D3 out"
        )


def dispersion_terms(calculator: BaseCalculator, clean_slab: Atoms, adsorbate: Atoms) -> dict[str, float]:
    """Compute what D3 makes a model of adsorption energies subtract, eV; nothing without D3.

    Args:
        calculator: of adsorption energies.
        clean_slab: relaxed with its forces.
        adsorbate: its atoms, which are referred to H2, H2O, CO and N2.

    Raises:
        InputError: an element without such a reference.
    """
    dispersion = dispersion_of(calculator)
    if dispersion is None:
        return {}
    gas = sum(
        number * dispersion.energy(ase.build.molecule(name))
        for name, number in oc20_gases(adsorbate.get_chemical_symbols()).items()
    )
    return {SLAB: dispersion.energy(clean_slab), GAS: float(gas)}


def dispersion_summary(
    calculator: BaseCalculator,
    system: Atoms,
    clean_slab: Atoms | None,
    terms: Mapping[str, float],
    gas: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Tell D3 of an adsorption energy apart, for records; None without D3.

    Args:
        calculator: with or without D3.
        system: relaxed slab with adsorbate.
        clean_slab: relaxed; None where only its energy is known.
        terms: of the adsorption energy, with `SLAB` and `GAS` of a model of adsorption energies.
        gas: summary of the gas reference, for total energies.

    Returns:
        `functional`, `damping`, and eV under `slab_and_adsorbate`, `slab`, `gas` and `difference`, which is
        part of the adsorption energy.
    """
    dispersion = dispersion_of(calculator)
    if dispersion is None:
        return None
    whole = dispersion.energy(system)
    slab = terms.get(SLAB)
    if slab is None and clean_slab is not None:
        slab = dispersion.energy(clean_slab)
    from_gas = terms.get(GAS, (gas or {}).get("d3_eV"))
    difference = None if slab is None or from_gas is None else whole - slab - float(from_gas)
    return {
        **dispersion.summary(),
        "slab_and_adsorbate": whole,
        "slab": slab,
        "gas": from_gas,
        "difference": difference,
    }


def dispersion_lines(d3: Mapping[str, Any] | None) -> list[str]:
    """Write D3 of `dispersion_summary` as lines for a terminal or a report; none without D3."""
    if d3 is None or d3["difference"] is None:
        return []
    parts = ", ".join(
        f"{name.replace('_', ' ')} {d3[name]:.4f}" for name in ("slab_and_adsorbate", "slab", "gas")
    )
    return [
        f"of which D3 dispersion ({d3['functional']}, {d3['damping']}): {d3['difference']:.4f} eV ({parts})"
    ]
