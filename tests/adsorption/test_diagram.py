"""Free-energy diagrams: balanced steps, limiting potentials, folders that do not belong together."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from equiformer2.adsorption.diagram import GAS_STATES, diagram, diagram_picture, gas_state, read_states
from equiformer2.adsorption.free_energy import Reaction
from equiformer2.adsorption.gases import co2_reduction
from equiformer2.errors import InputError


def folder(path: Path, adsorbate: str, energy: float, electrons: float, **changes: object) -> Path:
    path.mkdir()
    settings = {"slab": "a", "model": "emt", "adsorbate": adsorbate}
    found = {"free_energy_eV": energy, "electrons": electrons, "reaction": "", "temperature_K": 300.0}
    found |= {"potential_against_rhe_V": 0.0, "gases": {}, "pressures_bar": {}}
    found |= {"converged": True, "warnings": [], "imaginary": 0}
    search = {"gas": changes.get("gas")}
    (path / "search.json").write_text(json.dumps(search))
    (path / "settings.json").write_text(
        json.dumps(settings | {k: v for k, v in changes.items() if k in settings})
    )
    (path / "free_energy.json").write_text(
        json.dumps(found | {k: v for k, v in changes.items() if k in found})
    )
    return path


def test_oxidation_of_water_is_limited_by_its_largest_step(tmp_path: Path) -> None:
    folders = [folder(tmp_path / "oh", "HO", 1.0, -1.0), folder(tmp_path / "o", "O", 2.5, -2.0)]
    balanced = diagram(read_states(folders), 0.0)
    assert [step["change_eV"] for step in balanced["steps"]] == [1.0, 1.5]
    assert [step["electrons"] for step in balanced["steps"]] == [-1.0, -1.0]
    assert balanced["limiting_potential_V"] == pytest.approx(1.5)
    assert [state["adsorbate"] for state in balanced["states"]] == ["*", "*HO", "*O"]
    (folders[0] / "search.json").write_text('{"settings": {"adsorbate": "*OH"}}')
    assert read_states(folders)[0]["adsorbate"] == "*OH"
    assert diagram_picture(balanced, "OER")[:4] == b"\x89PNG"


def test_a_reduction_is_limited_by_the_lowest_potential(tmp_path: Path) -> None:
    folders = [folder(tmp_path / "h", "H", 0.2, 1.0), folder(tmp_path / "n", "H2", 0.9, 2.0)]
    assert diagram(read_states(folders), 0.0)["limiting_potential_V"] == pytest.approx(-0.7)
    assert diagram(read_states(folders)[:1], -0.5)["limiting_potential_V"] == pytest.approx(-0.7)


def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", "O", 1.0, -2.0)
    for name, changes, message in (
        ("b", {"slab": "b"}, "another slab"),
        ("c", {"model": "x"}, "another model"),
        ("d", {"temperature_K": 400.0}, "another temperature"),
        ("e", {"pressures_bar": {"CO": 0.1}}, "another pressures"),
    ):
        with pytest.raises(InputError, match=message):
            read_states([first, folder(tmp_path / name, "OH", 1.0, -1.0, **changes)])
    with pytest.raises(InputError, match="are the same state"):
        read_states([first, folder(tmp_path / "f", "HO", 1.0, -1.0), first])
    (first / "free_energy.json").write_text('{"free_energy_eV": "low"}')
    with pytest.raises(InputError, match="is broken, or no free energy"):
        read_states([first])
    (first / "free_energy.json").unlink()
    with pytest.raises(InputError, match="adsorption free-energy"):
        read_states([first])


def gas(source: str, **energies: float) -> dict[str, Any]:
    return {"source": source, "per_atom_eV": energies}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (gas("molecules", O=-7.0), gas("molecules", O=-7.0, H=-3.5), True),
        (gas("given", O=-7.0), gas("given and molecules", O=-7.0, H=-3.5), True),
        (gas("molecules", O=-7.0), gas("oc20", O=-7.0), False),
        (gas("given", O=-7.0), gas("given", O=-7.2), False),
        (gas("molecules", H=-3.5), gas("oc20", O=-7.2), False),
        (None, gas("given", O=-7.2), False),
    ],
)
def test_states_of_other_gas_references_are_refused(
    tmp_path: Path, first: Any, second: Any, same: bool
) -> None:
    folders = [
        folder(tmp_path / "a", "O", 1.0, -2.0, gas=first),
        folder(tmp_path / "b", "HO", 1.0, -1.0, gas=second),
    ]
    if same:
        assert len(read_states(folders)) == 2
    else:
        with pytest.raises(InputError, match="other gas references"):
            read_states(folders)


def test_doubts_of_a_state_are_in_the_diagram(tmp_path: Path) -> None:
    sentence = "imaginary modes: 1 (90 cm^-1), counted as 50: the structure may be no minimum"
    folders = [folder(tmp_path / "a", "O", 1.0, -2.0, imaginary=1, warnings=[sentence])]
    balanced = diagram(read_states(folders), 0.0)
    assert balanced["warnings"] == [f"*O: {sentence}"]
    assert balanced["converged"]
    folders.append(folder(tmp_path / "b", "HO", 1.0, -1.0, converged=False))
    balanced = diagram(read_states(folders), 0.0)
    assert balanced["warnings"][1] == "*HO: the structure has not converged"
    assert not balanced["converged"]


def test_a_free_energy_of_another_model_than_its_search_is_refused(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", "O", 1.0, -2.0)
    found = json.loads((one / "free_energy.json").read_text())
    (one / "free_energy.json").write_text(json.dumps({**found, "model": "emt"}))
    assert read_states([one])[0]["converged"]
    (one / "free_energy.json").write_text(json.dumps({**found, "model": "lj"}))
    with pytest.raises(InputError, match="another model than its search"):
        read_states([one])


def atoms_of(gases: dict[str, float], electrons: float) -> Counter[str]:
    """Atoms of gases and of pairs of proton and electron."""
    total: Counter[str] = Counter({"H": electrons})  # type: ignore[dict-item]
    for name, number in gases.items():
        for symbol, count in Counter(Atoms(name).get_chemical_symbols()).items():
            total[symbol] += number * count  # type: ignore[assignment]
    return Counter({symbol: count for symbol, count in total.items() if count})


def state(adsorbate: str, energy: float = 0.0) -> dict[str, Any]:
    reaction = Reaction.of(Atoms(adsorbate))
    return {
        "adsorbate": f"*{adsorbate}",
        "free_energy_eV": energy,
        "electrons": reaction.electrons,
        "gases": reaction.gases,
        "reaction": reaction.text(),
    }


def test_steps_between_carbon_and_nitrogen_are_balanced() -> None:
    names = ["CO", "CHO", "N", "NH2", "CN", "CONH2", "OOH", "C2H5OH", "NO3"]
    balanced = diagram([state(name, 0.1 * n) for n, name in enumerate(names)], 0.0)
    for step in balanced["steps"]:
        before, after = (Atoms(step[end].strip("*")).get_chemical_symbols() for end in ("from", "to"))
        taken = Counter(after)
        taken.subtract(Counter(before))
        assert atoms_of(step["gases"], step["electrons"]) == Counter({s: n for s, n in taken.items() if n})


@pytest.mark.parametrize("molecule", sorted(GAS_STATES))
def test_gases_are_made_of_the_same_references(molecule: str) -> None:
    found = gas_state(molecule, 298.15)
    assert atoms_of(found["gases"], found["electrons"]) == Counter(Atoms(molecule).get_chemical_symbols())


def test_oxygen_ends_at_four_times_the_potential_of_equilibrium() -> None:
    ideal = [state("OH", 1.23), state("O", 2.46), state("OOH", 3.69), gas_state("O2", 298.15)]
    balanced = diagram(ideal, 0.0, [0.0, 1.229])
    assert balanced["states"][-1]["free_energy_eV"] == pytest.approx(4.916, abs=1e-3)
    assert balanced["limiting_potential_V"] == pytest.approx(1.23, abs=2e-3)
    assert balanced["at_potentials"][1]["free_energies_eV"] == pytest.approx([0.0] * 5, abs=5e-3)
    reverse = diagram([*ideal[::-1], gas_state("H2O", 298.15)], 0.0, [1.229])
    assert [one["adsorbate"] for one in reverse["states"]] == ["O2(g)", "*OOH", "*O", "*OH", "H2O(g)"]
    assert {step["electrons"] for step in reverse["steps"]} == {1.0}
    assert reverse["limiting_potential_V"] == pytest.approx(1.226, abs=2e-3)
    assert reverse["limiting_step"] == "O2(g) -> *OOH"
    assert diagram_picture(balanced, "OER")[:4] == b"\x89PNG"


def test_carbon_dioxide_is_reduced_by_two_electrons() -> None:
    ends = gas_state("CO2", 298.15, -0.5), gas_state("CO", 298.15, -0.5)
    balanced = diagram([ends[0], state("COOH", 0.3), ends[1]], -0.5)
    assert [step["electrons"] for step in balanced["steps"]] == [1.0, 1.0]
    total = np.diff([row["free_energy_eV"] for row in balanced["states"]]).sum()
    assert total == pytest.approx(co2_reduction(298.15) + 2 * -0.5)
    with pytest.raises(InputError, match="no gas CH4"):
        gas_state("CH4", 298.15)
    with pytest.raises(InputError, match="no finite number"):
        diagram([state("COOH")], 0.0, [float("nan")])


def test_a_pressure_of_hydrogen_leaves_no_potential() -> None:
    """An electrode's potential is against H2 of 1 bar."""
    warm = state("H", 0.1) | {"pressures_bar": {"H2": 10.0}}
    balanced = diagram([warm], 0.0, [0.0])
    assert balanced["steps"][0]["change_eV"] == 0.1
    assert (balanced["limiting_potential_V"], balanced["limiting_step"]) == (None, None)
    with pytest.raises(InputError, match="against H2 of 1 bar, and the free energies are with H2 of 10 bar"):
        diagram([warm], 0.0, [0.0, -0.2])
    assert diagram([warm | {"pressures_bar": {"CO": 10.0}}], 0.0, [-0.2])["limiting_potential_V"] == -0.1
