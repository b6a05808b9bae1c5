"""Comparison of EquiformerV2 and EquiformerV3's switches: its conclusions from given numbers."""

from typing import Any

from studies.compare_v3 import markdown, summary

METRICS = ("forces_mae", "forces_cosine_similarity", "energy_mae")


def run(setting: str, seed: int, forces: float, cosine: float, energy: float) -> dict[str, Any]:
    return {
        "data": "dft",
        "setting": setting,
        "seed": seed,
        "steps": 10,
        "parameters": 1000,
        "macs_per_structure": 2_000_000,
        "cpu_seconds": 1.0,
        "metrics": dict(zip(METRICS, (forces, cosine, energy), strict=True)),
        "baselines": {"forces_mae": 0.3, "energy_mae": 2.0},
        "structures": 4,
        "systems": 2,
    }


def verdict(runs: list[dict[str, Any]]) -> str:
    page = markdown(summary(runs, ["v2", "v3"], METRICS), runs, "figure.png")
    return next(line for line in page.splitlines() if line.startswith("- v3"))


def test_differences_are_judged_by_their_errors_and_by_the_baselines() -> None:
    runs = [run("v2", seed, 0.20 + 0.01 * seed, 0.50 + 0.01 * seed, 3.0 + 0.01 * seed) for seed in range(3)]
    runs += [run("v3", seed, 0.21 + 0.01 * seed, 0.70 + 0.01 * seed, 2.5 + 0.01 * seed) for seed in range(3)]
    forces, cosine, energy = verdict(runs).split(": ")[1].split("; ")
    assert "+0.0100 ± 0.0082 (no clear difference)" in forces
    assert "+0.2000 ± 0.0082 (better)" in cosine
    assert "-0.5000 ± 0.0082 (better, not both beat the baseline)" in energy


def test_one_seed_has_no_error() -> None:
    runs = [run("v2", 0, 0.2, 0.5, 1.0), run("v3", 0, 0.1, 0.4, 1.5)]
    assert verdict(runs).count("(one seed)") == 3
