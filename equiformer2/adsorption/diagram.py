"""Free-energy diagram of several adsorbates on one slab."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.corrections import Corrections, correction_text
from equiformer2.adsorption.gases import co2_reduction, water_formation
from equiformer2.errors import InputError
from equiformer2.files import read_json
from equiformer2.inference.pictures import new_figure, png_bytes

SEARCH, FREE_ENERGY, SETTINGS = "search.json", "free_energy.json", "settings.json"
DIAGRAM = "diagram.json"
CLEAN = "*"
#: eV per atom; relaxations of the same molecule end in structures that differ a little.
_SAME_GAS = 1e-3
#: Gas -> (CO, H2O, N2 that it is made of; pairs of proton and electron): where a reaction may start or end.
GAS_STATES: dict[str, tuple[dict[str, float], float]] = {
    "H2": ({}, 2.0),
    "H2O": ({"H2O": 1.0}, 0.0),
    "CO": ({"CO": 1.0}, 0.0),
    "N2": ({"N2": 1.0}, 0.0),
    "O2": ({"H2O": 2.0}, -4.0),
    "CO2": ({"CO": 1.0, "H2O": 1.0}, -2.0),
}
#: The colours of a diagram at several potentials; further ones have the next kind of line.
_COLOURS = ("#1f4e79", "#c55a11", "#548235", "#7f3f98", "#7f7f7f")
_LINES = ("-", "--", "-.")


def read_states(folders: Sequence[Path], corrections: Corrections | None = None) -> list[dict[str, Any]]:
    """Read the states of a diagram from search folders, in their order.

    Args:
        folders: of searches with free energies.
        corrections: for free energies that have none.

    Returns:
        For each folder `adsorbate`, `free_energy_eV` and `electrons` at its potential and acidity, `gases`
        that it was made of, `gas_references` of its adsorption energy, `temperature_K`, `pressures_bar`,
        `corrections_eV` and `folder`. `converged` is False where the structure, its clean slab or its gases
        are not, and `warnings` are the sentences about it.

    Raises:
        InputError: a folder without a free energy, other slabs, models, gas references, temperatures or
            corrections, a state twice, and corrections of free energies that have some already.
    """
    states: list[dict[str, Any]] = []
    same: dict[str, tuple[Path, Any]] = {}
    gases: list[tuple[Path, Mapping[str, Any] | None]] = []
    for folder in folders:
        for name in (SEARCH, FREE_ENERGY, SETTINGS):
            if not (folder / name).is_file():
                remedy = (
                    f"run `equiformer2 adsorption free-energy {folder}` first"
                    if name == FREE_ENERGY
                    else "give folders of finished searches"
                )
                raise InputError(f"{folder} has no {name}: {remedy}")
        found, settings = _read_free_energy(folder), read_json(folder / SETTINGS)
        search = read_json(folder / SEARCH)
        name = search.get("settings", {}).get("adsorbate")
        if found.get("model", settings.get("model")) != settings.get("model"):
            raise InputError(
                f"the free energy in {folder} is of another model than its search: run "
                f"`equiformer2 adsorption free-energy {folder} --overwrite`"
            )
        for key, value in (
            ("slab", settings.get("slab")),
            ("model", settings.get("model")),
            ("temperature", found.get("temperature_K")),
            ("potential", found.get("potential_against_rhe_V")),
            ("pressures", found.get("pressures_bar") or {}),
            ("set of corrections", (found.get("corrections") or {}).get("species_eV") or {}),
        ):
            first, known = same.setdefault(key, (folder, value))
            if known != value:
                raise InputError(f"{first} and {folder} have another {key}: a diagram is of one")
        for first, other in gases:
            check_same_gas(first, other, folder, search.get("gas"))
        gases.append((folder, search.get("gas")))
        converged, warnings = _doubts(search, found)
        adsorbate = Path(name).stem if name else f"*{settings.get('adsorbate', '')}"
        added = dict(found.get("corrections_eV") or {})
        energy = float(found["free_energy_eV"])
        if corrections is not None:
            if (found.get("corrections") or {}).get("species_eV"):
                raise InputError(f"the free energy in {folder} is corrected already: leave --corrections out")
            corrections.check_model(settings.get("model"), search.get("gas"))
            added = corrections.of(adsorbate, found.get("gases") or {}, float(found["electrons"]))
            energy += sum(added.values())
        known_states = {(one["adsorbate"], one["free_energy_eV"]): one["folder"] for one in states}
        if (adsorbate, energy) in known_states:
            raise InputError(
                f"{known_states[adsorbate, energy]} and {folder} are the same state ({adsorbate} at "
                f"{energy:.3f} eV): leave one out"
            )
        states.append(
            {
                "adsorbate": adsorbate,
                "free_energy_eV": energy,
                "corrections_eV": added,
                "electrons": float(found["electrons"]),
                "gases": found.get("gases") or {},
                "gas_references": _references(search.get("gas")),
                "reaction": found["reaction"],
                "temperature_K": found["temperature_K"],
                "pressures_bar": found.get("pressures_bar") or {},
                "converged": converged,
                "warnings": warnings,
                "folder": str(folder),
            }
        )
    return states


def _read_free_energy(folder: Path) -> dict[str, Any]:
    """Content of `free_energy.json`; raises `InputError` for one that lacks what a diagram needs."""
    found = read_json(folder / FREE_ENERGY)
    numbers = ("free_energy_eV", "electrons", "temperature_K", "potential_against_rhe_V")
    kinds = {**dict.fromkeys(numbers, int | float), "reaction": str, "gases": dict}
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise InputError(
            f"{folder / FREE_ENERGY} is broken, or no free energy: run `equiformer2 adsorption free-energy "
            f"{folder} --overwrite`"
        )
    return found


def _references(gas: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Select what tells gas references from others, of their summary in the record of a search."""
    return None if gas is None else {key: gas.get(key) for key in ("source", "per_atom_eV")}


def check_same_gas(
    first: AnyPath, known: Mapping[str, Any] | None, folder: AnyPath, gas: Mapping[str, Any] | None
) -> None:
    """Raise `InputError` where two searches have other gas references.

    Adsorbates are of other elements, so only the energies of those in both are compared; and one search may
    have a source the less.
    """
    both = [one or {} for one in (known, gas)]
    sources = [set(filter(None, str(one.get("source") or "").split(" and "))) for one in both]
    energies = [one.get("per_atom_eV") or {} for one in both]
    same = (known is None) == (gas is None) and (sources[0] <= sources[1] or sources[1] <= sources[0])
    shared = sorted(energies[0].keys() & energies[1].keys())
    if same and all(abs(energies[0][one] - energies[1][one]) <= _SAME_GAS for one in shared):
        return

    def told(one: Mapping[str, Any]) -> str:
        values = ", ".join(f"{name} {one['per_atom_eV'][name]:.4f} eV" for name in shared)
        return f"{one.get('source') or 'those of the model'}{f': {values}' if values else ''}"

    raise InputError(
        f"{first} and {folder} have other gas references ({told(both[0])}; {told(both[1])}): a diagram is of "
        "one, so search again with the same --gas"
    )


def _doubts(search: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Tell whether a state has converged, and the sentences that its free energy carries."""
    warnings = [str(one) for one in found.get("warnings") or []]
    parts = {
        "the structure": found.get("converged") is not False and search.get("converged") is not False,
        "the clean slab": (search.get("clean_slab") or {}).get("converged") is not False,
        "the gas reference": (search.get("gas") or {}).get("converged") is not False,
    }
    for name, converged in parts.items():
        if not converged and not any(f"{name} has not converged" in one for one in warnings):
            warnings.append(f"{name} has not converged")
    imaginary = found.get("imaginary")
    if imaginary and not any("imaginary" in one for one in warnings):
        warnings.append(f"imaginary modes: {imaginary}, so that the structure may be no minimum")
    return all(parts.values()), warnings


def gas_state(
    molecule: str, temperature: float, potential: float = 0.0, pressures: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Make a state of the clean slab and a gas, where a reaction starts or ends.

    O2 comes by way of water and CO2 by way of CO, with the reaction energies of experiment.

    Args:
        molecule: formula, of `GAS_STATES`.
        temperature: K.
        potential: V against the reversible hydrogen electrode.
        pressures: bar, see `gases.thermal_correction`.

    Raises:
        InputError: another molecule.
    """
    if molecule not in GAS_STATES:
        raise InputError(f"there is no gas {molecule} here: give one of {', '.join(GAS_STATES)}")
    gases, electrons = GAS_STATES[molecule]
    energy = 0.0
    if molecule == "O2":
        energy = -2.0 * water_formation(temperature, pressures)
    elif molecule == "CO2":
        energy = -co2_reduction(temperature, pressures)
    return {
        "adsorbate": f"{molecule}(g)",
        "free_energy_eV": energy + electrons * potential,
        "electrons": electrons,
        "gases": gases,
        "reaction": "",
        "temperature_K": temperature,
        "pressures_bar": dict(pressures or {}),
        "corrections_eV": {},
        "converged": True,
        "warnings": [],
        "folder": "",
    }


def diagram(
    states: Sequence[Mapping[str, Any]], potential: float, potentials: Sequence[float] = ()
) -> dict[str, Any]:
    """Balance the steps between successive states.

    Every state is the slab with its adsorbate, and the gases, protons and electrons that it was not made of:
    so all states hold the same atoms. They begin with the clean slab, unless the first one is a gas.

    Args:
        states: of `read_states` and `gas_state`.
        potential: V against the reversible hydrogen electrode, at which their free energies are.
        potentials: V against it, at which they are wanted, too.

    Returns:
        `states` (the clean slab first), their `warnings`, `converged` (of all of them), `steps` with
        `change_eV`, the `electrons` and the `gases` that they take (negative: set free), `at_potentials`
        (`potential_against_rhe_V`, `free_energies_eV`), `limiting_potential_V` against RHE (the potential at
        which no step that takes electrons goes uphill) and `limiting_step`; None without such a step, and
        with H2 of another pressure than the electrode's 1 bar.

    Raises:
        InputError: a potential that is no number, or another one than `potential` beside a pressure of H2.
    """
    if not all(math.isfinite(one) for one in potentials):
        raise InputError(f"a potential is no finite number ({', '.join(map(str, potentials))}): give V")
    hydrogen = {float((state.get("pressures_bar") or {}).get("H2", 1.0)) for state in states} - {1.0}
    if hydrogen and any(one != potential for one in potentials):
        raise InputError(
            f"an electrode's potential is against H2 of 1 bar, and the free energies are with H2 of "
            f"{min(hydrogen):g} bar: leave the potentials out, or compute these without a pressure of H2"
        )
    clean = {"adsorbate": CLEAN, "free_energy_eV": 0.0, "electrons": 0.0, "gases": {}, "reaction": ""}
    rows = [dict(state) for state in states]
    if not rows or not rows[0]["adsorbate"].endswith("(g)"):
        rows.insert(0, clean | {"folder": ""})
    steps = []
    limits = []
    for before, after in itertools.pairwise(rows):
        change = after["free_energy_eV"] - before["free_energy_eV"]
        electrons = after["electrons"] - before["electrons"]
        taken: Counter[str] = Counter(after["gases"])
        taken.subtract(before["gases"])
        steps.append(
            {
                "from": before["adsorbate"],
                "to": after["adsorbate"],
                "change_eV": change,
                "electrons": electrons,
                "gases": {name: float(number) for name, number in taken.items() if number},
            }
        )
        if electrons and not hydrogen:
            # A step that takes n electrons changes by n eV per volt.
            name = f"{before['adsorbate']} -> {after['adsorbate']}"
            limits.append((potential - change / electrons, electrons, name))
    taking = [(limit, name) for limit, electrons, name in limits if electrons > 0]
    giving = [(limit, name) for limit, electrons, name in limits if electrons < 0]
    limiting: tuple[float | None, str | None] = None, None
    if taking and not giving:
        limiting = min(taking)
    elif giving and not taking:
        limiting = max(giving)
    return {
        "states": rows,
        "warnings": [f"{row['adsorbate']}: {one}" for row in rows for one in row.get("warnings") or []],
        "converged": all(row.get("converged", True) for row in rows),
        "steps": steps,
        "at_potentials": [
            {
                "potential_against_rhe_V": one,
                "free_energies_eV": [
                    row["free_energy_eV"] + row["electrons"] * (one - potential) for row in rows
                ],
            }
            for one in dict.fromkeys(potentials or [potential])
        ],
        "limiting_potential_V": limiting[0],
        "limiting_step": limiting[1],
    }


def used_corrections(states: Sequence[Mapping[str, Any]], species: Mapping[str, float]) -> dict[str, float]:
    """Corrections, eV by species, that have changed the energy of a state."""
    used = {name for state in states for name in state.get("corrections_eV") or {}}
    return {name: value for name, value in species.items() if name in used}


def diagram_picture(
    balanced: Mapping[str, Any], title: str, corrections: Mapping[str, float] | None = None
) -> bytes:
    """Draw the states as levels and the steps as lines between them, one line per potential, as PNG.

    Corrections are named below. Each line starts at 0 eV; numbers are at the levels, unless more than two
    potentials would overlap them.
    """
    names = [state["adsorbate"] for state in balanced["states"]]
    lines = balanced["at_potentials"]
    figure = new_figure(1.6 + 1.4 * len(names), 4.2)
    axis = figure.subplots()
    for place, line in enumerate(lines):
        colour = _COLOURS[place % len(_COLOURS)]
        kind = _LINES[place // len(_COLOURS) % len(_LINES)]
        energies = [energy - line["free_energies_eV"][0] for energy in line["free_energies_eV"]]
        for number, energy in enumerate(energies):
            label = f"{line['potential_against_rhe_V']:g} V against RHE" if number == 0 else None
            level = ([number - 0.3, number + 0.3], [energy] * 2)
            axis.plot(*level, kind, color=colour, linewidth=3, label=label)
            if len(lines) <= 2:
                below = place == 1
                axis.annotate(
                    f"{energy:.2f}",
                    (number, energy),
                    xytext=(0, -13 if below else 6),
                    textcoords="offset points",
                    ha="center",
                    color=colour,
                )
        for number, pair in enumerate(itertools.pairwise(energies)):
            axis.plot([number + 0.3, number + 0.7], pair, ":", color=colour, alpha=0.7)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel(correction_text(corrections), fontsize=7, wrap=True)
    axis.set_ylabel("free energy (eV)")
    axis.set_title(title, wrap=True)
    axis.margins(y=0.15)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    return png_bytes(figure)
