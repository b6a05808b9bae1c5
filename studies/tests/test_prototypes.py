"""Bulk crystals from prototypes, with a potential that costs nothing."""

import numpy as np
import pytest
from ase.calculators.emt import EMT

from studies.prototypes import MAX_FORMATION, Crystal, Prototypes, UnsuitableError, build


def test_lattice_constants_are_those_of_the_lowest_energy() -> None:
    prototypes = Prototypes(EMT())
    copper = prototypes.relaxed("fcc", ("Cu",))
    assert copper.a == pytest.approx(3.59, abs=0.01)  # EMT's
    hexagonal = prototypes.relaxed("hcp", ("Cu",))
    assert hexagonal.a == pytest.approx(copper.a / np.sqrt(2), abs=0.01)
    assert hexagonal.ratio == pytest.approx(np.sqrt(8 / 3), abs=0.01)
    for crystal in (copper, hexagonal):
        for change in (0.995, 1.005):
            atoms = build(crystal.kind, crystal.symbols, crystal.a * change, crystal.ratio)
            atoms.calc = EMT()
            assert atoms.get_potential_energy() / len(atoms) > crystal.energy


@pytest.mark.parametrize(
    ("kind", "symbols", "formula"),
    [
        ("fcc", ("Cu",), "Cu4"),
        ("bcc", ("Cu",), "Cu2"),
        ("hcp", ("Cu",), "Cu2"),
        ("L12", ("Cu", "Au"), "AuCu3"),
        ("L10", ("Cu", "Au"), "Au2Cu2"),
        ("B2", ("Cu", "Au"), "AuCu"),
        ("rocksalt", ("Ti", "P"), "P4Ti4"),
        ("zincblende", ("Ga", "As"), "As4Ga4"),
    ],
)
def test_cells(kind: str, symbols: tuple[str, ...], formula: str) -> None:
    atoms = build(kind, symbols, 4.0)
    assert atoms.get_chemical_formula() == formula
    assert atoms.pbc.all()
    nearest = atoms.get_all_distances(mic=True)[~np.eye(len(atoms), dtype=bool)].min()
    neighbours = {"fcc": 0.707, "bcc": 0.866, "L12": 0.707, "L10": 0.707, "B2": 0.866}
    neighbours |= {"rocksalt": 0.5, "zincblende": 0.433}
    neighbours["hcp"] = 0.764  # of the next layer, half of c = a above
    assert nearest / 4.0 == pytest.approx(neighbours[kind], abs=1e-3)


def test_energy_of_formation_is_that_of_the_elements() -> None:
    prototypes = Prototypes(EMT())
    alloy = prototypes.relaxed("L12", ("Cu", "Au"))
    parts = [prototypes.element("Cu").energy] * 3 + [prototypes.element("Au").energy]
    assert prototypes.formation_energy(alloy) == pytest.approx(alloy.energy - np.mean(parts))
    assert prototypes.element("Au").energy <= prototypes.relaxed("bcc", ("Au",)).energy


def test_unstable_alloys_are_refused_and_relaxed_crystals_are_kept() -> None:
    """The energies are given: nothing is computed, since EMT does not know most elements."""

    class Given(Prototypes):
        def relaxed(self, kind: str, symbols: tuple[str, ...]) -> Crystal:
            energy = 0.0 if len(symbols) == 1 else MAX_FORMATION * (2 if "Al" in symbols else 0.5)
            self.found[f"{kind} {'-'.join(symbols)}"] = Crystal(kind, symbols, 4.0, 1.0, energy)
            return self.found[f"{kind} {'-'.join(symbols)}"]

    prototypes = Given(EMT())
    taken, refused = set(), []
    for seed in range(300):
        try:
            bulk = prototypes.draw(np.random.default_rng(seed))
        except UnsuitableError as error:
            refused.append(str(error))
        else:
            taken.add(bulk.origin)
            alloy = bulk.origin in ("L12", "L10", "B2")
            assert not (alloy and "Al" in bulk.atoms.get_chemical_symbols())
    assert taken == {"pure", "L12", "L10", "B2", "rocksalt", "zincblende"}
    assert refused
    assert all("Al" in told and "energy of formation 0.100 eV per atom" in told for told in refused)
    known = prototypes.state()
    again = Prototypes(EMT(), known)
    name = next(iter(known))
    assert again.found[name] == prototypes.found[name]
    assert again.draw(np.random.default_rng(0)).formula == prototypes.draw(np.random.default_rng(0)).formula


def test_a_crystal_without_a_lowest_energy_is_refused() -> None:
    class Growing(EMT):
        def calculate(self, *arguments: object, **options: object) -> None:
            self.results = {"energy": -float(self.atoms.get_volume())}

        def get_potential_energy(self, atoms: object = None, force_consistent: bool = False) -> float:
            return -float(atoms.get_volume())  # type: ignore[attr-defined]

    with pytest.raises(UnsuitableError, match="no lowest energy"):
        Prototypes(Growing()).relaxed("fcc", ("Cu",))
