"""Linear references fitted to whole datasets, by the functions and by the script."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oc20_files import structure

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from datasets_oc20.datamodule import load_linear_references
from datasets_oc20.reference_fit import fit_references, to_text, write_references
from datasets_oc20.target_sums import TargetSums, sum_targets
from datasets_oc20.targets import fit_normalizers

ENERGIES = {1: -3.5, 8: -7.2, 29: -3.7, 78: -6.1}


def write(path: Path, compositions: list[list[int]], kind: str | None = "total", noise: float = 0.0) -> Path:
    random = np.random.default_rng(3)
    with LmdbWriter(path, kind) as writer:
        for seed, numbers in enumerate(compositions):
            energy = sum(ENERGIES[number] for number in numbers) + noise * random.standard_normal()
            fields = {"atomic_numbers": torch.tensor(numbers)}
            writer.write(structure(natoms=len(numbers), energy=energy, seed=seed, **fields))
    return path


def mixed(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.choice(list(ENERGIES), size=random.integers(8, 20)).tolist() for _ in range(count)]


def test_all_shards_are_summed_whatever_the_chunks(tmp_path: Path) -> None:
    write(tmp_path / "data.0000.lmdb", mixed(23), noise=0.5)
    write(tmp_path / "data.0001.lmdb", mixed(11, seed=1), noise=0.5)
    dataset = OC20Lmdb(tmp_path)
    whole = fit_references(dataset)
    composition = np.array([np.bincount(data.atomic_numbers, minlength=100) for data in dataset])
    energy = np.array([data.energy.item() for data in dataset])
    expected = np.linalg.lstsq(composition[:, list(ENERGIES)], energy, rcond=None)[0]
    assert whole.coefficients[list(ENERGIES)] == pytest.approx(expected, abs=1e-3)
    residual = energy - composition @ whole.coefficients
    assert whole.residual_mean == pytest.approx(residual.mean(), abs=1e-7)
    assert whole.residual_std == pytest.approx(residual.std(), rel=1e-6)
    assert (whole.mean, whole.std) == pytest.approx((energy.mean(), energy.std()))
    assert whole.sums.forces_rms == pytest.approx(fit_normalizers(dataset)["forces"][1])
    assert whole.elements == sorted(ENERGIES)
    assert whole.undetermined == []

    in_parts, by_two = (sum_targets(dataset, workers, chunk_frames=5) for workers in (1, 2))
    assert in_parts.frames == 34
    assert in_parts.references() == pytest.approx(whole.coefficients, abs=1e-10)
    assert np.array_equal(in_parts.references(), by_two.references())


def test_elements_that_never_vary_alone_share_their_sum(tmp_path: Path) -> None:
    """Water only: of H2O the sum is known, not what H and O have of it; Cu is known."""
    compositions = [[1, 1, 8] * waters + [29] * copper for waters in (1, 2, 3) for copper in (4, 7, 9)]
    fit = fit_references(OC20Lmdb(write(tmp_path / "water.lmdb", compositions)))
    assert fit.undetermined == [1, 8]
    assert 2 * fit.coefficients[1] + fit.coefficients[8] == pytest.approx(-14.2, abs=1e-2)
    assert fit.coefficients[29] == pytest.approx(-3.7, abs=1e-3)
    assert fit.residual_std < 1e-2
    assert np.abs(fit.coefficients).max() < 20.0  # least squares alone may return anything here
    text = to_text(fit, "out.npz")
    assert [line.endswith("*") for line in text.splitlines()[3:6]] == [True, True, False]
    per_atom = fit.mean * fit.sums.frames / fit.sums.atoms.sum()
    assert f"not in the data: {per_atom:.4f}" in text


def test_energies_with_core_electrons_are_fitted_as_well_as_any() -> None:
    """Codes that count them give tens of thousands of eV per atom, and some eV for H."""
    random = np.random.default_rng(0)
    composition = np.zeros((10, 100))
    composition[:, 29], composition[:, 1] = random.choice([36, 48], 10), random.choice([1, 2, 3], 10)
    noise = random.normal(scale=0.3, size=10)
    energy = composition[:, 29] * -45_000.0 + composition[:, 1] * -15.0 + noise
    best = np.linalg.lstsq(composition, energy, rcond=None)[0]
    sums = TargetSums()
    sums.add(composition, energy)
    found = sums.references()
    assert found[[1, 29]] == pytest.approx(best[[1, 29]], abs=1e-4)
    assert found[79] == pytest.approx(energy.sum() / composition.sum())


def test_what_is_no_total_energy_is_refused(tmp_path: Path) -> None:
    adsorption = write(tmp_path / "adsorption.lmdb", mixed(5), "adsorption")
    with pytest.raises(DataError, match=r"adsorption\.lmdb: .* adsorption energies.* total energies"):
        fit_references(OC20Lmdb(adsorption))
    undeclared = write(tmp_path / "undeclared.lmdb", mixed(5), None)
    with pytest.raises(DataError, match=r"undeclared\.lmdb: .*--energy-kind total"):
        fit_references(OC20Lmdb(undeclared))
    with LmdbWriter(tmp_path / "wrong.lmdb", "total") as writer:
        writer.write(structure(natoms=30, energy=-0.4))
    with pytest.warns(UserWarning, match=r"wrong\.lmdb: taken as total energies"):
        fit_references(OC20Lmdb(tmp_path / "wrong.lmdb"))


@pytest.mark.parametrize("workers", [0, -1])
def test_fewer_than_one_process(workers: int, tmp_path: Path) -> None:
    dataset = OC20Lmdb(write(tmp_path / "a.lmdb", mixed(5)))
    with pytest.raises(DataError, match=f"num_workers is {workers};.* 1"):
        fit_references(dataset, workers)


def test_the_file_holds_coefficients_and_where_they_come_from(tmp_path: Path) -> None:
    fit = fit_references(OC20Lmdb(write(tmp_path / "data.lmdb", mixed(20), noise=0.1)))
    write_references(fit, tmp_path / "references.npz")
    read = load_linear_references(str(tmp_path / "references.npz"))
    assert read is not None
    assert np.array_equal(read.numpy(), fit.coefficients)
    with np.load(tmp_path / "references.npz") as file:
        provenance = json.loads(str(file["provenance"]))
        assert file["atoms"].sum() == fit.sums.atoms.sum()
    assert provenance["data"] == str(tmp_path / "data.lmdb")
    assert (provenance["frames"], provenance["energy_kind"]) == (20, "total")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.lmdb", "references.npz"]


def test_reference_files_that_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "references.npz"
    np.savez(path, coeff=np.zeros(100))
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"not a whole \.npz file with an array 'coeff'"):
            load_linear_references(str(path))
    np.save(tmp_path / "references.npy", np.zeros(100))
    with pytest.raises(DataError, match=r"not a whole \.npz file"):
        load_linear_references(str(tmp_path / "references.npy"))
    for wrong in (np.zeros(3), np.full(100, np.nan), np.array(["a"] * 100)):
        np.savez(path, coeff=wrong)
        with pytest.raises(DataError, match="'coeff' must hold 100 finite numbers"):
            load_linear_references(str(path))
