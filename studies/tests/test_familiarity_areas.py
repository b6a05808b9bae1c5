"""Areas under the curve of scores that are known."""

import numpy as np
import pytest

from studies.familiarity import area, distance_kinds, farthest, measure


def test_area_under_the_curve() -> None:
    assert area(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert area(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert area(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert area(np.array([1.0, 3.0]), np.array([2.0, 0.0])) == pytest.approx(0.75)


def test_a_foreign_element_is_told_apart() -> None:
    generator = np.random.default_rng(0)

    def atoms(numbers: tuple[int, ...], structures: int) -> dict[str, np.ndarray]:
        every = np.tile(numbers, structures)
        return {
            "features": generator.normal(size=(len(every), 4)).astype(np.float32) + 20.0 * every[:, None],
            "numbers": every,
            "structure": np.repeat(np.arange(structures), len(numbers)),
        }

    parts = {name: atoms((1, 3), 40) for name in ("train", "val", "test", "shift_adsorbates")}
    parts["shift_elements"] = atoms((1, 5), 40)
    kinds = {name: measure(parts, distances) for name, distances in distance_kinds(parts["train"]).items()}
    used = kinds["mean of the element"]
    assert used["familiar_structures"] == 40
    assert used["groups"]["Se or Te"]["area"] == 1.0
    assert used["groups"]["Se or Te"]["over_limit"] == 1.0
    assert 0.2 < used["groups"]["Se or Te, its seen atoms alone"]["area"] < 0.6
    assert 0.3 < used["groups"]["adsorbate with N-N, seen elements"]["area"] < 0.7
    assert "test bulks with an unseen element" not in used["groups"]


def test_the_farthest_atom_counts() -> None:
    atoms = {"structure": np.array([0, 0, 1])}
    assert farthest(np.array([1.0, 5.0, 2.0]), atoms).tolist() == [5.0, 2.0]
    assert farthest(np.array([1.0, 5.0, 2.0]), atoms, np.array([True, False, False])).tolist() == [
        1.0,
        -np.inf,
    ]
