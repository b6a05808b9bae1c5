"""Free-energy diagram of several adsorbates on one slab."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equiformer2.adsorption.gases import co2_reduction, water_formation
from equiformer2.errors import InputError
from equiformer2.files import read_json
from equiformer2.inference.pictures import new_figure, png_bytes

SEARCH, FREE_ENERGY, SETTINGS = "search.json", "free_energy.json", "settings.json"
DIAGRAM = "diagram.json"
CLEAN = "*"
#: Gas -> (CO, H2O, N2 that it is made of; pairs of proton and electron): where a reaction may start or end.
GAS_STATES: dict[str, tuple[dict[str, float], float]] = {
    "H2": ({}, 2.0),
    "H2O": ({"H2O": 1.0}, 0.0),
    "CO": ({"CO": 1.0}, 0.0),
    "N2": ({"N2": 1.0}, 0.0),
    "O2": ({"H2O": 2.0}, -4.0),
    "CO2": ({"CO": 1.0, "H2O": 1.0}, -2.0),
}
#: V against RHE; the colours of a diagram at several.
_COLOURS = ("#1f4e79", "#c55a11", "#548235", "#7f3f98", "#7f7f7f")


def read_states(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the states of a diagram from search folders, in their order.

    Returns:
        For each folder `adsorbate`, `free_energy_eV` and `electrons` at its potential and acidity, `gases`
        that it was made of, `temperature_K`, `pressures_bar`, and `folder`.

    Raises:
        InputError: a folder without a free energy, other slabs, models or temperatures.
    """
    states: list[dict[str, Any]] = []
    same: dict[str, tuple[Path, Any]] = {}
    for folder in folders:
        for name in (SEARCH, FREE_ENERGY, SETTINGS):
            if not (folder / name).is_file():
                remedy = (
                    f"run `equiformer2 adsorption free-energy {folder}` first"
                    if name == FREE_ENERGY
                    else "give folders of finished searches"
                )
                raise InputError(f"{folder} has no {name}: {remedy}")
        found, settings = read_json(folder / FREE_ENERGY), read_json(folder / SETTINGS)
        name = read_json(folder / SEARCH).get("settings", {}).get("adsorbate")
        for key, value in (
            ("slab", settings.get("slab")),
            ("model", settings.get("model")),
            ("temperature", found.get("temperature_K")),
            ("potential", found.get("potential_against_rhe_V")),
            ("pressures", found.get("pressures_bar") or {}),
        ):
            first, known = same.setdefault(key, (folder, value))
            if known != value:
                raise InputError(f"{first} and {folder} have another {key}: a diagram is of one")
        states.append(
            {
                "adsorbate": Path(name).stem if name else f"*{settings.get('adsorbate', '')}",
                "free_energy_eV": float(found["free_energy_eV"]),
                "electrons": float(found["electrons"]),
                "gases": found.get("gases") or {},
                "reaction": found["reaction"],
                "temperature_K": found["temperature_K"],
                "pressures_bar": found.get("pressures_bar") or {},
                "folder": str(folder),
            }
        )
    return states


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
        `states` (the clean slab first), `steps` with `change_eV`, the `electrons` and the `gases` that they
        take (negative: set free), `at_potentials` (`potential_against_rhe_V`, `free_energies_eV`),
        `limiting_potential_V` against RHE (the potential at which no step that takes electrons goes uphill)
        and `limiting_step`; None without such a step.

    Raises:
        InputError: a potential that is no number.
    """
    if not all(math.isfinite(one) for one in potentials):
        raise InputError(f"a potential is no finite number ({', '.join(map(str, potentials))}): give V")
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
        if electrons:
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


def diagram_picture(balanced: Mapping[str, Any], title: str) -> bytes:
    """Draw the states as levels and the steps as lines between them, one line per potential, as PNG.

    Each line starts at 0 eV; numbers are at the levels, unless more than two potentials would overlap them.
    """
    names = [state["adsorbate"] for state in balanced["states"]]
    lines = balanced["at_potentials"]
    figure = new_figure(1.6 + 1.4 * len(names), 4.2)
    axis = figure.subplots()
    for place, line in enumerate(lines):
        colour = _COLOURS[place % len(_COLOURS)]
        energies = [energy - line["free_energies_eV"][0] for energy in line["free_energies_eV"]]
        for number, energy in enumerate(energies):
            label = f"{line['potential_against_rhe_V']:g} V against RHE" if number == 0 else None
            axis.plot([number - 0.3, number + 0.3], [energy] * 2, color=colour, linewidth=3, label=label)
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
    axis.set(ylabel="free energy (eV)", title=title)
    axis.margins(y=0.15)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    return png_bytes(figure)
