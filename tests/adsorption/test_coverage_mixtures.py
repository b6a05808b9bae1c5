"""Coverage of mixtures: compositions, energies against ASE one by one, differences, going on, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT

from equiformer2.adsorption.cards import verify_card
from equiformer2.adsorption.coverage_rows import CoverageRow, CoverageSeries, Species, attraction_notices
from equiformer2.adsorption.coverage_series import CoverageSettings, coverage_series
from equiformer2.adsorption.placements import coverage_placements, separate_adsorbates
from equiformer2.errors import InputError
from tests.adsorption.emt_coverage import relaxed_energy, slab
from tests.observed import observed

QUICK = CoverageSettings(placements=2, fmax=0.1, steps=80, check_minima=0)

PAIR = ["*O", "*H"]
COMPOSITIONS = [(1, 0), (0, 1), (1, 1), (1, 2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CoverageSeries]:
    folder = tmp_path_factory.mktemp("mixture") / "oh"
    return folder, coverage_series(slab(), PAIR, EMT(), COMPOSITIONS, QUICK, out=folder)


def test_energies_are_those_of_ase_one_by_one(finished: tuple[Path, CoverageSeries]) -> None:
    series = finished[1]
    gas = [Atoms(name, cell=[20.0] * 3, calculator=EMT()).get_potential_energy() for name in ("O", "H")]
    clean = relaxed_energy(slab(), QUICK)
    totals = {}
    for composition in COMPOSITIONS:
        names = [name for name, count in zip(PAIR, composition, strict=True) for _ in range(count)]
        starts = coverage_placements(slab(), names, QUICK.placements, QUICK.seed)
        molecules = sum(count * energy for count, energy in zip(composition, gas, strict=True))
        totals[composition] = min(relaxed_energy(start.atoms, QUICK) for start in starts) - clean - molecules
    rows = {row.composition: row for row in series.rows}
    assert list(rows) == COMPOSITIONS
    for composition, row in rows.items():
        assert row.total == pytest.approx(totals[composition], abs=1e-4)
        assert row.average == pytest.approx(totals[composition] / sum(composition), abs=1e-4)
        assert row.coverage == sum(composition) / 4
    single, mixed, most = rows[0, 1], rows[1, 1], rows[1, 2]
    assert single.differentials == (None, pytest.approx(totals[0, 1], abs=1e-4))
    added = (totals[1, 1] - totals[0, 1], totals[1, 1] - totals[1, 0])
    assert mixed.differentials == pytest.approx(added, abs=2e-4)
    assert mixed.interaction == pytest.approx(totals[1, 1] - totals[1, 0] - totals[0, 1], abs=3e-4)
    assert most.differentials_from == (None, (1, 1))  # there is no (0, 2)
    assert (most.differential, most.interaction) == (None, None)


def test_files(finished: tuple[Path, CoverageSeries]) -> None:
    folder, series = finished
    record = json.loads((folder / "coverage.json").read_text())
    assert record == json.loads(json.dumps(series.record))
    assert (record["adsorbate"], record["species"]) == ("*O + *H", PAIR)
    assert all((folder / name).exists() for name in record["files"])
    assert (folder / "coverage.png").read_bytes().startswith(b"\x89PNG")
    row = record["coverages"][-1]
    assert (row["composition"], row["molecules"], row["file"]) == ({"*O": 1, "*H": 2}, 3, "n01_02.extxyz")
    assert row["differential_from"] == {"*O": None, "*H": {"*O": 1, "*H": 1}}
    assert "differential_adsorption_energy_eV" not in row
    assert set(record["terms_eV"]) == {"slab", "gas_per_molecule *O", "gas_per_molecule *H"}
    assert {name: one["energy_eV"] for name, one in record["gas"].items()} == pytest.approx(
        {name: record["terms_eV"][f"gas_per_molecule {name}"] for name in PAIR}
    )
    table = str(series)
    assert "1 *O + 2 *H" in table
    assert "add *H" in table
    assert f"{series.rows[2].interaction:.4f}" in table


def test_the_card_is_recomputed(finished: tuple[Path, CoverageSeries], tmp_path: Path) -> None:
    folder = finished[0]
    rows = verify_card(folder / "card.json", EMT())
    assert {"n01_02.total_adsorption_energy_eV", "n01_01.average_adsorption_energy_eV"} <= set(rows)
    assert all(one["ok"] for one in rows.values())
    copy = shutil.copytree(folder, tmp_path / "copy")
    card = json.loads((copy / "card.json").read_text())
    card["terms_eV"]["gas_per_molecule *H"] += 0.1
    (copy / "card.json").write_text(json.dumps(card))
    wrong = {name for name, one in verify_card(copy / "card.json", EMT()).items() if not one["ok"]}
    assert "n01_02.total_adsorption_energy_eV" in wrong
    assert "n01_00.total_adsorption_energy_eV" not in wrong


def test_a_finished_series_is_given_again_and_grows(
    finished: tuple[Path, CoverageSeries], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    stored, lines = (folder / "coverage.json").read_bytes(), (folder / "relaxed.jsonl").read_bytes()
    with observed(EMT.calculate) as calls:
        again = coverage_series(slab(), PAIR, EMT(), reversed(COMPOSITIONS), QUICK, out=folder)
    assert not calls
    assert again.record == json.loads(stored)
    assert (folder / "coverage.json").read_bytes() == stored
    with pytest.raises(InputError, match=r"other settings \(counts\)"):
        coverage_series(slab(), PAIR, EMT(), [1], QUICK, out=folder)
    more = coverage_series(slab(), PAIR, EMT(), [*COMPOSITIONS, (0, 2)], QUICK, out=folder, overwrite=True)
    assert (folder / "relaxed.jsonl").read_bytes().startswith(lines)
    assert more.rows[-1].interaction is not None  # with (0, 2) its species by themselves are known
    with pytest.raises(InputError, match="holds relaxations with adsorbate"):
        coverage_series(slab(), PAIR[::-1], EMT(), [1], QUICK, out=folder, overwrite=True)


def test_isomers_in_one_folder_have_gas_energies_of_their_own(tmp_path: Path) -> None:
    """A series that was stopped once the molecule was known goes on with another of the same formula."""
    settings = replace(QUICK, placements=1, steps=1)
    expected = coverage_series(slab(), "*CHO", EMT(), [1], settings).record["terms_eV"]["gas_per_molecule"]
    coverage_series(slab(), "*COH", EMT(), [1], settings, out=tmp_path / "s")
    lines = (tmp_path / "s" / "relaxed.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "s" / "relaxed.jsonl").write_text(lines[0])
    (tmp_path / "s" / "coverage.json").unlink()
    found = coverage_series(slab(), "*CHO", EMT(), [1], settings, out=tmp_path / "s")
    assert found.record["terms_eV"]["gas_per_molecule"] == pytest.approx(expected, abs=1e-6)


def test_a_number_stands_for_all_compositions() -> None:
    two, three = Species(("*O", "*H")), Species(("A", "B", "C"))
    assert two.compositions(None) == [(1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    assert two.compositions([2, (1, 1), (0, 1)]) == [(0, 1), (2, 0), (1, 1), (0, 2)]
    assert len(three.compositions([3])) == 10
    assert Species(("*O",)).compositions([3, 1, (2,)]) == [(1,), (2,), (3,)]
    with pytest.raises(InputError, match="200 at most"):
        three.compositions([20])


@pytest.mark.parametrize(
    ("adsorbates", "counts", "message"),
    [
        (PAIR, [(0, 0)], "must be whole, from 1 to 100"),
        (PAIR, [(1, -1)], "must be whole"),
        (PAIR, [(1, 0.5)], "must be whole"),
        (PAIR, [(60, 60)], "must be whole"),
        (PAIR, [(1, 1, 1)], "1,1,1 has numbers for 3 adsorbates, and there are 2"),
        (["*O"], [(1, 1)], "1,1 has numbers for 2 adsorbates, and there are 1"),
        (["*O", "O"], [1], "is given twice"),
        ([], [1], "no adsorbate is given"),
        (PAIR, [(1, 1)], r"1 \*O \+ 1 \*H: adsorbate .* has no site 9 Å from the others"),
        (["*O", "*Xy"], [1], "no adsorbate of OC20"),
    ],
)
def test_mixtures_that_cannot_be(adsorbates: list, counts: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        coverage_series(
            slab(), adsorbates, EMT(), counts, replace(QUICK, min_distance=9.0), out=tmp_path / "x"
        )


def test_a_gas_reference_is_needed_for_every_species() -> None:
    settings = replace(QUICK, gas_per_atom={"O": 4.6})
    with pytest.raises(InputError, match="no gas reference for H"):
        coverage_series(slab(), PAIR, EMT(), [1], settings)


def test_one_adsorbate_may_come_with_its_binding_atoms() -> None:
    carbon_monoxide = molecule("CO")
    settings = replace(QUICK, placements=1, steps=0, gas_per_atom={"C": 0.0, "O": 0.0, "H": 0.0})
    for given in ((carbon_monoxide, [1]), [carbon_monoxide, [1]]):
        assert coverage_series(slab(), given, EMT(), [1], settings).species.names == ("CO",)
    mixed = coverage_series(slab(), ((carbon_monoxide, [1]), "*H"), EMT(), [(1, 1)], settings)
    assert mixed.species.names == ("CO", "*H")
    assert len(separate_adsorbates(["*H", (carbon_monoxide, [1])])) == 2
    assert len(separate_adsorbates([carbon_monoxide, molecule("H2O")])) == 2


def test_defaults_leave_out_what_does_not_fit() -> None:
    settings = CoverageSettings(
        placements=1, fmax=0.3, steps=0, min_distance=4.0, gas_per_atom={"H": 3.2, "O": 4.6}, check_minima=0
    )
    series = coverage_series(slab(), PAIR, EMT(), None, settings)
    assert [row.composition for row in series.rows] == [(1, 0), (0, 1)]
    assert sum("do not fit" in notice for notice in series.notices) == 3


def test_a_model_of_adsorption_energies_knows_single_molecules_only() -> None:
    class AdsorptionModel(EMT):
        energy_kind = "adsorption"

    series = coverage_series(
        slab(), PAIR, AdsorptionModel(), [1, (1, 1)], replace(QUICK, placements=1, steps=5)
    )
    first, second, mixed = series.rows
    assert first.total == first.differentials[0] is not None
    assert second.total == second.differentials[1] is not None
    assert (mixed.total, mixed.interaction, mixed.differentials) == (None, None, (None, None))


def test_species_that_seem_to_attract_each_other_are_told() -> None:
    def row(composition: tuple[int, int], average: float, interaction: float | None) -> CoverageRow:
        total = average * sum(composition)
        nothing = (None, None)
        return CoverageRow(composition, 0.5, total, average, nothing, nothing, interaction, None, {})

    species = Species(("*O", "*H"))
    rows = [row((1, 0), -1.0, None), row((0, 1), -0.2, None), row((0, 2), -0.5, None)]
    (sentence,) = attraction_notices([*rows, row((1, 1), -0.6, 0.1)], species)
    assert "average adsorption energy of *H falls" in sentence
    (_, sentence) = attraction_notices([*rows, row((1, 1), -0.8, -0.4)], species)
    assert "1 *O + 1 *H lies 0.400 eV below its species by themselves" in sentence
