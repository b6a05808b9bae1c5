"""Free-energy diagram of several adsorbates on one slab."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equiformer2.errors import InputError
from equiformer2.files import read_json
from equiformer2.inference.pictures import new_figure, png_bytes

SEARCH, FREE_ENERGY, SETTINGS = "search.json", "free_energy.json", "settings.json"


def read_states(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the states of a diagram from search folders, in their order.

    Returns:
        For each folder `adsorbate`, `free_energy_eV` and `electrons` at its potential and acidity, and
        `folder`.

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
        ):
            first, known = same.setdefault(key, (folder, value))
            if known != value:
                raise InputError(f"{first} and {folder} have another {key}: a diagram is of one")
        states.append(
            {
                "adsorbate": Path(name).stem if name else f"*{settings.get('adsorbate', '')}",
                "free_energy_eV": float(found["free_energy_eV"]),
                "electrons": float(found["electrons"]),
                "reaction": found["reaction"],
                "folder": str(folder),
            }
        )
    return states


def diagram(states: Sequence[Mapping[str, Any]], potential: float) -> dict[str, Any]:
    """Balance the steps between successive states.

    Every state is the slab with its adsorbate, and the gases, protons and electrons that it was not made of:
    so all states hold the same atoms, and start from the clean slab.

    Args:
        states: of `read_states`.
        potential: V against the reversible hydrogen electrode, at which their free energies are.

    Returns:
        `states` (the clean slab first), `steps` with `change_eV` and the `electrons` that they take, and
        `limiting_potential_V` against RHE: the potential at which no step that takes electrons goes uphill;
        None without such a step.
    """
    clean = {"adsorbate": "*", "free_energy_eV": 0.0, "electrons": 0.0, "reaction": "", "folder": ""}
    rows = [clean, *(dict(state) for state in states)]
    steps = []
    limits = []
    for before, after in itertools.pairwise(rows):
        change = after["free_energy_eV"] - before["free_energy_eV"]
        electrons = after["electrons"] - before["electrons"]
        steps.append(
            {
                "from": before["adsorbate"],
                "to": after["adsorbate"],
                "change_eV": change,
                "electrons": electrons,
            }
        )
        if electrons:
            # A step that takes n electrons changes by n eV per volt.
            limits.append((potential - change / electrons, electrons))
    taking = [limit for limit, electrons in limits if electrons > 0]
    giving = [limit for limit, electrons in limits if electrons < 0]
    limiting = min(taking) if taking and not giving else max(giving) if giving and not taking else None
    return {"states": rows, "steps": steps, "limiting_potential_V": limiting}


def diagram_picture(balanced: Mapping[str, Any], title: str) -> bytes:
    """Draw the states as levels and the steps as lines between them, as PNG."""
    states = balanced["states"]
    figure = new_figure(1.6 + 1.4 * len(states), 4.2)
    axis = figure.subplots()
    for number, state in enumerate(states):
        energy = state["free_energy_eV"]
        axis.plot([number - 0.3, number + 0.3], [energy, energy], color="#1f4e79", linewidth=3)
        axis.annotate(
            f"{energy:.2f}", (number, energy), xytext=(0, 6), textcoords="offset points", ha="center"
        )
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        energies = [before["free_energy_eV"], after["free_energy_eV"]]
        axis.plot([number + 0.3, number + 0.7], energies, ":", color="0.4")
    axis.set_xticks(range(len(states)), [state["adsorbate"] for state in states])
    axis.set(ylabel="free energy (eV)", title=title)
    axis.margins(y=0.15)
    axis.grid(axis="y", alpha=0.3)
    return png_bytes(figure)
