"""Compute the energy of the adsorbate by itself, which an adsorption energy of total energies subtracts.

OC20's references are numbers of OC20's DFT; of another calculator's energies they make nonsense. So they are
used only where they are asked for by name, and the default is the calculator's own energy in vacuum.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.anomalies import SKIN
from equiformer2.adsorption.dft_ledger import structure_digest
from equiformer2.adsorption.periodic_images import whole_molecule
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.inference.dispersion import Dispersion, dispersion_of
from equiformer2.inference.named_calculators import calculator_errors
from equiformer2.inference.relaxation import RelaxationResult, relax

logger = logging.getLogger(__name__)

OC20_GAS_REFERENCES = {"H": -3.477, "O": -7.204, "C": -7.282, "N": -8.083}
"""eV per atom, from H2, H2O, CO and N2 with OC20's own DFT settings (VASP, RPBE); Chanussot et al. 2021."""

GAS_SOURCES = ("vacuum", "molecules", "oc20")
"""Sources of gas references, beside a table of energies per atom."""

_MOLECULES = {"H": ("H2",), "O": ("H2O", "H2"), "C": ("CO", "H2O", "H2"), "N": ("N2",)}
"""Element -> molecules whose energies its reference needs."""

_VACUUM = 10.0
"""Å around a molecule in its box; no network here looks farther than 12 Å, and images are twice as far."""


@dataclass(frozen=True)
class GasReference:
    """Gas references that are subtracted for the adsorbate.

    Attributes:
        energy: sum, eV.
        source: "vacuum", "molecules", "oc20", "given", or two of them joined by " and ".
        label: the source in words.
        per_atom: eV per atom of the elements used; empty with "vacuum".
        relaxations: of the molecules in vacuum, by formula.
        d3: part of `energy` that is D3 dispersion, eV; None without.
    """

    energy: float
    source: str
    label: str
    per_atom: dict[str, float] = field(default_factory=dict)
    relaxations: dict[str, RelaxationResult] = field(default_factory=dict)
    d3: float | None = None

    @property
    def converged(self) -> bool:
        """Tell whether every molecule in vacuum reached the threshold."""
        return all(relaxation.converged for relaxation in self.relaxations.values())

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "source": self.source,
            "label": self.label,
            "energy_eV": self.energy,
            "per_atom_eV": self.per_atom,
            "d3_eV": self.d3,
            "molecules": {name: relaxation.summary() for name, relaxation in self.relaxations.items()},
        }


def check_gas_references(adsorbate: Atoms, given: Mapping[str, float] | None, source: str) -> None:
    """Raise `InputError` where `gas_reference` would, before anything is calculated."""
    if source not in GAS_SOURCES:
        raise InputError(
            f"the gas references {source!r} are unknown: give one of {', '.join(GAS_SOURCES)}, or eV per atom"
        )
    table = _table(given, source)
    if source == "vacuum" and not table:
        _fragments(adsorbate)
        return
    known = set(table) | (set(_MOLECULES) if source == "molecules" else set())
    symbols = set(adsorbate.get_chemical_symbols())
    missing = sorted(symbols - known)
    if missing:
        raise InputError(
            f"there is no gas reference for {', '.join(missing)} of the adsorbate: "
            f"give the energy per atom in eV, as in {missing[0]}=-1.23, or no reference at all for the "
            'energy of the adsorbate in vacuum (OC20\'s H, O, C and N are used with "oc20" only)'
        )
    wrong = [symbol for symbol in sorted(symbols & set(table)) if not math.isfinite(float(table[symbol]))]
    if wrong:
        raise InputError(f"the gas reference of {wrong[0]} is not a finite energy: give eV per atom")


def refuse_gas_references(given: Mapping[str, float] | None, source: str) -> None:
    """Raise `InputError` where a model of adsorption energies is given gas references: it needs none."""
    if given or source != "vacuum":
        raise InputError(
            "the model predicts adsorption energies, which are referred to gases already: leave the gas "
            "references out"
        )


def gas_reference(
    adsorbate: Atoms,
    calculator: BaseCalculator,
    given: Mapping[str, float] | None,
    source: str,
    settings: dict[str, Any],
) -> GasReference:
    """Compute the energy to subtract for the adsorbate's atoms, by the rules of `adsorption_energy`.

    Args:
        adsorbate: its atoms, in the cell of the slab.
        calculator: of total energies.
        given: eV per atom by element; before those of `source`.
        source: one of `GAS_SOURCES` for the elements that are not given.
        settings: of `relax`, for molecules in vacuum.

    Raises:
        InputError: see `check_gas_references`, and what `relax` raises.
    """
    check_gas_references(adsorbate, given, source)
    table = _table(given, source)
    if source == "vacuum" and not table:
        return _in_vacuum(adsorbate, calculator, settings)
    counts = Counter(adsorbate.get_chemical_symbols())
    dispersion, table_given = dispersion_of(calculator), bool(table)
    relaxations: dict[str, RelaxationResult] = {}
    needed = sorted(set(counts) - set(table))
    if needed:
        names = sorted({name for symbol in needed for name in _MOLECULES[symbol]})
        for name in names:
            relaxations[name] = _relax_in_box(ase.build.molecule(name), name, calculator, settings)
        own = energies_per_atom({name: relaxation.energy for name, relaxation in relaxations.items()})
        table = {**{symbol: own[symbol] for symbol in needed}, **table}
    used = {symbol: float(table[symbol]) for symbol in sorted(counts)}
    parts = {
        "molecules": bool(needed),
        "oc20": source == "oc20" and any(symbol not in (given or {}) for symbol in counts),
        "given": any(symbol in (given or {}) for symbol in counts),
    }
    words = {
        "molecules": f"this calculator's {', '.join(relaxations)}",
        "oc20": "OC20's H2, H2O, CO and N2 (VASP, RPBE; only for energies of that method)",
        "given": "as given",
    }
    chosen = [name for name, there in parts.items() if there]
    return GasReference(
        energy=sum(used[symbol] * count for symbol, count in counts.items()),
        source=" and ".join(chosen),
        label=" and ".join(words[name] for name in chosen),
        per_atom=used,
        relaxations=relaxations,
        d3=None if dispersion is None or table_given else _dispersion(relaxations, dispersion, counts),
    )


def kept_gas_reference(
    file: AnyPath,
    adsorbate: Atoms,
    calculator: BaseCalculator,
    given: Mapping[str, float] | None,
    source: str,
    settings: dict[str, Any],
    name: str | None = None,
) -> dict[str, Any]:
    """Find the energy to subtract in the file of an earlier call, or compute it and write it there.

    An energy of other atoms, such as those of an isomer, is not taken.

    Args:
        file: JSON file of the folder whose model and references are those of this call.
        adsorbate, calculator, given, source, settings: of `gas_reference`.
        name: of the molecule, in a file for several.

    Returns:
        `GasReference.summary` and `converged`.

    Raises:
        InputError: as `gas_reference`; the energy is not finite, or the file is broken.
    """
    file = Path(file)
    content = read_json(file) if file.exists() else {}
    known = content if name is None else content.get(name)
    digest = structure_digest(adsorbate)
    if isinstance(known, dict) and known.get("structure_sha256", digest) == digest:
        energy = known.get("energy_eV")
        if isinstance(energy, int | float) and math.isfinite(energy) and "converged" in known:
            return known
    gas = gas_reference(adsorbate, calculator, given, source, settings)
    if not math.isfinite(gas.energy):
        raise InputError(
            f"the energy of the adsorbate by itself ({gas.label}) is not finite: give gas references"
        )
    known = {**gas.summary(), "converged": gas.converged, "structure_sha256": digest}
    write_json(file, known if name is None else {**content, name: known})
    return known


def energies_per_atom(molecules: Mapping[str, float]) -> dict[str, float]:
    """Energies per atom of H, O, C and N from those of molecules, eV (OC20's scheme; Chanussot et al. 2021).

    Args:
        molecules: energies of H2, H2O, CO and N2; what they do not suffice for is left out.
    """
    found = {}
    if "H2" in molecules:
        found["H"] = molecules["H2"] / 2
    if "H2" in molecules and "H2O" in molecules:
        found["O"] = molecules["H2O"] - molecules["H2"]
    if "CO" in molecules and "O" in found:
        found["C"] = molecules["CO"] - found["O"]
    if "N2" in molecules:
        found["N"] = molecules["N2"] / 2
    return found


def _dispersion(
    relaxations: Mapping[str, RelaxationResult], dispersion: Dispersion, counts: Mapping[str, int]
) -> float:
    """D3 of the gas references of these atoms, eV."""
    own = energies_per_atom({name: dispersion.energy(one.atoms) for name, one in relaxations.items()})
    return sum(own[symbol] * count for symbol, count in counts.items())


def _table(given: Mapping[str, float] | None, source: str) -> dict[str, float]:
    own = dict(given or {})
    return {**OC20_GAS_REFERENCES, **own} if source == "oc20" else own


def _in_vacuum(adsorbate: Atoms, calculator: BaseCalculator, settings: dict[str, Any]) -> GasReference:
    relaxations: dict[str, RelaxationResult] = {}
    dispersion = dispersion_of(calculator)
    total = 0.0
    for piece in _fragments(adsorbate):
        name = str(piece.get_chemical_formula())
        same = sum(key.split(" #")[0] == name for key in relaxations)
        key = name if not same else f"{name} #{same + 1}"
        relaxations[key] = _relax_in_box(piece, name, calculator, settings)
        total += relaxations[key].energy
    return GasReference(
        energy=total,
        source="vacuum",
        label=f"this calculator's energy of {' + '.join(relaxations)} in vacuum",
        relaxations=relaxations,
        d3=None if dispersion is None else sum(dispersion.energy(one.atoms) for one in relaxations.values()),
    )


def _fragments(adsorbate: Atoms) -> list[Atoms]:
    """Split the adsorbate's atoms into molecules, each whole."""
    radii = covalent_radii[adsorbate.numbers]
    i, j, distance = neighbor_list("ijd", adsorbate, 2 * float(radii.max()) + SKIN)
    bound = distance < radii[i] + radii[j] + SKIN
    count = len(adsorbate)
    graph = coo_array((np.ones(bound.sum()), (i[bound], j[bound])), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    pieces = [adsorbate[np.flatnonzero(label == number)] for number in np.unique(label)]
    return [whole_molecule(piece, f"the adsorbate {piece.get_chemical_formula()}") for piece in pieces]


def _relax_in_box(
    molecule: Atoms, name: str, calculator: BaseCalculator, settings: dict[str, Any]
) -> RelaxationResult:
    box = Atoms(molecule.numbers, molecule.positions, tags=np.full(len(molecule), 2))
    box.center(vacuum=_VACUUM)
    box.pbc = True
    where = f"{name} in vacuum"
    with calculator_errors(calculator, where, "give gas references (eV per atom) instead"):
        return relax(box, calculator, label=where, **settings)
