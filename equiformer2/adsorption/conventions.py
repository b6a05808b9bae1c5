"""One adsorption energy in three conventions: OC20's references, the calculator's own, those of literature.

All three are the energy of a reaction that forms the adsorbate on the clean slab; only what it is formed from
differs. No energy is converted with a number of another method: where one would be needed, there is none.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ase import Atoms

from equiformer2.adsorption.corrections import Corrections, correction_text
from equiformer2.adsorption.gases import water_formation_energy
from equiformer2.adsorption.references import OC20_GAS_REFERENCES
from equiformer2.checkpoint.training_data import TrainingData
from equiformer2.errors import InputError

#: Molecules that OC20's references per atom are made of: 1/2 H2, H2O - H2, CO - H2O + H2, 1/2 N2.
_OC20_ATOMS: dict[str, dict[str, float]] = {
    "H": {"H2": 0.5},
    "C": {"CO": 1.0, "H2O": -1.0, "H2": 1.0},
    "N": {"N2": 0.5},
    "O": {"H2O": 1.0, "H2": -1.0},
}
#: The same with oxygen from O2, by way of water: O2's energy in DFT is wrong by tenths of an eV.
_LITERATURE_ATOMS: dict[str, dict[str, float]] = {
    "H": {"H2": 0.5},
    "C": {"CO": 1.0, "O2": -0.5},
    "N": {"N2": 0.5},
    "O": {"O2": 0.5},
}
_BY_WATER = (
    "O2 by way of water: 2 (E(H2O) - E(H2)) + 5.46 eV, where the formation of water is that of experiment "
    "without zero-point energies (NIST-JANAF; Nørskov et al., J. Phys. Chem. B 2004, 108, 17886)"
)
_OF_RPBE = (
    "RPBE's H2, H2O and CO take no correction in the scheme of Peterson et al., Energy Environ. Sci. 2010, "
    "3, 1311, which corrects CO2 (+0.45 eV) and other molecules with O-C=O: none of them is used here"
)
_OF_OTHERS = (
    "no correction of this method's H2, H2O and CO is known here (PBE's CO, for one, needs tenths of an eV)"
)


@dataclass(frozen=True)
class Convention:
    """Adsorption energy in one convention.

    Attributes:
        energy: eV; None where it cannot be known.
        gases: what is used up, by formula; negative for what is set free.
        product: formula of the adsorbate.
        reason: sentence about why there is no energy.
        corrections: eV, by name, that are part of `energy` and not of the energy that it was made from.
        notes: sentences about the references, with sources.
    """

    energy: float | None
    gases: dict[str, float]
    product: str
    reason: str | None = None
    corrections: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def reaction(self) -> str:
        """Balanced reaction, as `* + CO + 1/2 H2 -> *CHO`."""
        used = ["*", *(_term(number, name) for name, number in self.gases.items() if number > 0)]
        made = [f"*{self.product}"]
        made += [_term(-number, name) for name, number in self.gases.items() if number < 0]
        return f"{' + '.join(used)} -> {' + '.join(made)}"

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        known = self.energy is not None
        return {
            "energy_eV": self.energy,
            "reaction": self.reaction if known else None,
            "gases": self.gases if known else None,
            "reason": self.reason,
            "corrections_eV": self.corrections,
            "notes": self.notes,
        }


def conventions(
    energy: float,
    energy_kind: str,
    adsorbate: Atoms | Sequence[str],
    gas: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    corrections: Corrections | None = None,
    name: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Give an adsorption energy in three conventions.

    Args:
        energy: adsorption energy, eV, as it was computed.
        energy_kind: of the model, `"adsorption"` or `"total"`.
        adsorbate: its atoms, or their symbols.
        gas: summary of the gas reference (`GasReference.summary`), for total energies.
        provenance: of the checkpoint; None for a calculator that is no network of ours.
        corrections: of the functional's gases and of adsorbates, for the convention of the literature.
        name: of the adsorbate, by which it is corrected; None for its formula.

    Returns:
        `oc20` (from H2, H2O, CO and N2 as OC20's references per atom), `calculator` (from what the user
        chose, `--gas`, with the calculator's own energies) and `literature` (from H2, CO, N2 and O2, which
        comes by way of water), each with `energy_eV`, `reaction`, `gases`, `corrections_eV`, `notes` and,
        where the energy is null, `reason`.
    """
    symbols = list(adsorbate.get_chemical_symbols() if isinstance(adsorbate, Atoms) else adsorbate)
    product = str(Atoms(symbols).get_chemical_formula(mode="reduce"))
    own = _own(energy, energy_kind, symbols, product, gas)
    found = {"calculator": own}
    reason = _why_not_oc20(energy_kind, symbols, own, gas, provenance)
    if reason is not None:
        found |= {name: Convention(None, {}, product, reason) for name in ("oc20", "literature")}
        return {name: found[name].summary() for name in ("oc20", "calculator", "literature")}
    notes = [
        "1/2 H2, H2O - H2, CO - H2O + H2 and 1/2 N2 per atom (Chanussot et al., ACS Catal. 2021, 11, 6059)"
    ]
    if energy_kind == "adsorption" and not _labels(provenance):
        notes.append("the checkpoint does not state its labels; they are taken for those of OC20")
    base = _summed(_OC20_ATOMS, symbols)
    found["oc20"] = Convention(energy, base, product, notes=notes)
    literature = _summed(_LITERATURE_ATOMS, symbols)
    added = {}
    told = []
    if literature.get("O2"):
        # 1/2 O2 lies above H2O - H2 by what the formation of water sets free.
        added["O2 by way of water"] = 2.0 * literature["O2"] * water_formation_energy()
        told.append(_BY_WATER)
    given = {} if corrections is None else corrections.of(name or product, base, 0.0)
    if given and corrections is not None:
        # O2 is made of H2O and H2, so these are corrected with their numbers in OC20's convention.
        added |= given
        told.append(f"corrections of {corrections.file or 'the user'}")
    elif "C" in symbols or "O" in symbols or "H" in symbols:
        rpbe = energy_kind == "adsorption" or "oc20" in str((gas or {}).get("source"))
        told.append(_OF_RPBE if rpbe else _OF_OTHERS)
    found["literature"] = Convention(energy + sum(added.values()), literature, product, None, added, told)
    return {name: found[name].summary() for name in ("oc20", "calculator", "literature")}


def convention_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write the conventions as lines for a terminal or a report."""
    names = {"oc20": "OC20's references", "calculator": "own references", "literature": "literature (O2)"}
    lines = []
    for name, one in found.items():
        energy = f"not known: {one['reason']}" if one["energy_eV"] is None else f"{one['energy_eV']:.4f} eV"
        lines.append(f"{names[name]}: {energy}" + (f"  {one['reaction']}" if one["reaction"] else ""))
        corrections = one.get("corrections_eV") or {}
        given = correction_text({name: value for name, value in corrections.items() if " " not in name})
        lines[-1] += f"  ({given})" if given else ""
    return lines


def oc20_gases(symbols: Sequence[str]) -> dict[str, float]:
    """Molecules that OC20's references of these atoms are made of, by formula; negative: set free.

    Raises:
        InputError: an element without a reference.
    """
    others = sorted(set(symbols) - set(_OC20_ATOMS))
    if others:
        raise InputError(f"there is no reference for {', '.join(others)} (H, C, N and O have one)")
    return _summed(_OC20_ATOMS, symbols)


def _own(
    energy: float, energy_kind: str, symbols: Sequence[str], product: str, gas: Mapping[str, Any] | None
) -> Convention:
    """Adsorption energy as it was computed, with the gases that were chosen for it."""
    if energy_kind == "adsorption" or gas is None:
        reason = (
            "the model predicts adsorption energies, so it has no energies of molecules; compute them with a "
            "calculator of total energies"
        )
        return Convention(None, {}, product, reason)
    source = str(gas.get("source"))
    notes = [str(gas.get("label", ""))]
    if source == "vacuum":
        pieces = Counter(name.split(" #")[0] for name in gas.get("molecules") or {})
        return Convention(
            energy, {name: float(count) for name, count in pieces.items()}, product, notes=notes
        )
    per_atom = gas.get("per_atom_eV") or {}
    notes += [f"{symbol} {value:.4f} eV per atom" for symbol, value in per_atom.items()]
    if source in ("molecules", "oc20"):
        return Convention(energy, _summed(_OC20_ATOMS, symbols), product, notes=notes)
    # Energies that the user gave are of atoms in a state that only the user knows.
    return Convention(energy, {name: float(n) for name, n in Counter(symbols).items()}, product, notes=notes)


def _why_not_oc20(
    energy_kind: str,
    symbols: Sequence[str],
    own: Convention,
    gas: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
) -> str | None:
    """Say why an energy is not, or cannot be made, one that is referred to H2, H2O, CO and N2."""
    others = sorted(set(symbols) - set(_OC20_ATOMS))
    if others:
        return f"there is no reference for {', '.join(others)} (H, C, N and O have one)"
    if energy_kind == "adsorption":
        labels = _labels(provenance)
        if not all("oc20" in label.lower() for label in labels):
            return (
                f"the labels of the checkpoint are {', '.join(labels)}, and what they are referred to is not "
                "stated"
            )
        return None
    source = "" if gas is None else str(gas.get("source"))
    if source in ("molecules", "oc20"):
        return None
    if source == "vacuum" and own.gases == _summed(_OC20_ATOMS, symbols):
        return None  # of CO, H2O, N2 or H2 both are the same reaction
    if source == "vacuum":
        return (
            f"the energy is referred to {' + '.join(own.gases)} in vacuum: --gas molecules refers it to H2, "
            "H2O, CO and N2"
        )
    per_atom = (gas or {}).get("per_atom_eV") or {}
    given = all(abs(per_atom.get(one, 1e9) - OC20_GAS_REFERENCES[one]) < 5e-4 for one in set(symbols))
    return None if given else (
        f"the energies per atom are {source}, and of which molecules they are is not stated: --gas molecules "
        "refers to H2, H2O, CO and N2"
    )  # fmt: skip


def _labels(provenance: Mapping[str, Any] | None) -> list[str]:
    """Statements of a checkpoint about the labels that it was trained on last."""
    stages = None if provenance is None else TrainingData(provenance).stages
    return [str(label) for label in (stages[-1].get("labels") or ())] if stages else []


def _summed(table: Mapping[str, Mapping[str, float]], symbols: Sequence[str]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for symbol in symbols:
        for name, number in table[symbol].items():
            total[name] += number  # type: ignore[assignment]
    return {name: float(number) for name, number in total.items() if number}


def _term(number: float, name: str) -> str:
    if number == int(number):
        return name if number == 1 else f"{int(number)} {name}"
    return f"{int(2 * number)}/2 {name}"
