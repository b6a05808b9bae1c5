"""The whole study: its settings, and what its report concludes from results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from equiformer2.errors import InputError
from equiformer2.files import write_json
from studies.campaign import read_campaign
from studies.study_report import PUBLISHED, write_study
from studies.verdicts import cuts_verdicts, distilled_verdicts, routers_verdicts, speed_verdicts

FILE = Path(__file__).parents[2] / "configs" / "pruning" / "study.yaml"


def test_the_settings_are_read() -> None:
    campaign = read_campaign(FILE)
    assert campaign.studies["small_distilled"].distill.scratch
    assert campaign.router["protected"] == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modells": {}}, "the key 'modells' is not known"),
        ({"studies": {"a": {"model": "x", "methods": [], "keep": [0.5]}}}, "the model 'x' is not among"),
        ({"studies": {"a": {"model": "oc20_small", "keep": [0.5]}}}, "studies.a: methods is missing"),
        (
            {"studies": {"a": {"model": "oc20_small", "keep": [0.5], "methods": [], "distill": {}}}},
            "studies.a.distill: steps is missing",
        ),
        ({"studies": None}, "studies is None: give names"),
        ({"held_out": 3}, "held_out is 3: give names"),
        ({"seeds": []}, r"seeds is \[\]: give a list"),
        ({"calibration": "x.lmdb"}, "calibration is 'x.lmdb': give a list"),
        ({"other_methods": ["adapter"]}, "other_methods has 'adapter': known are precision, adapters"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(FILE.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_campaign(path)


@pytest.mark.parametrize("key", ["studies", "speed", "router", "seeds", "calibration", "models"])
def test_missing_settings_are_named(key: str, tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text())
    del content[key]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=f"has no {key}"):
        read_campaign(path)


def row(method: str, trained: str, keep: float, error: float) -> dict[str, Any]:
    mae = {"force_mae": {"mean": error, "std": 0.01}, "energy_per_atom": {"mean": error, "std": 0.0}}
    errors = {name: {"to_dense": mae, "to_labels": mae} for name in ("teacher", "dft")}
    shares = dict.fromkeys(errors, keep)
    known = {"method": method, "trained": trained, "keep": keep, "macs": keep, "macs_on": shares}
    return known | {"errors": errors}


@pytest.mark.parametrize(("error", "holds"), [(0.104, [True, True]), (0.106, [False, False])])
def test_verdicts(error: float, holds: list[bool]) -> None:
    campaign, dense = read_campaign(FILE), row("dense", "cut", 1.0, 0.1)
    others = [("route_random", 0.2), ("route_uniform", 0.105), ("route_distance", 0.2)]
    routers = [dense, row("route_ftp", "cut", 0.7, error), *(row(name, "cut", 0.7, e) for name, e in others)]
    assert [v.holds for v in routers_verdicts(campaign, "small_routers", routers)] == holds * 2
    # Nothing is said of what has not been computed.
    assert [v.holds for v in routers_verdicts(campaign, "small_routers", routers[:-1])] == holds[:1] * 2
    trained = [dense, row("multi", "distilled", 0.5, error), row("scratch", "distilled", 0.5, 0.105)]
    assert [v.holds for v in distilled_verdicts(campaign, "small_distilled", trained)] == holds * 2


@pytest.mark.parametrize(("error", "holds"), [(0.1, True), (0.3, False)])
def test_searched_cuts_beat_the_baselines_or_not(error: float, holds: bool) -> None:
    campaign = read_campaign(FILE)
    others = [("block", 0.25), ("magnitude", 0.2), ("random", 0.4), ("uniform", 0.3)]
    rows = [row("multi", "cut", 0.5, error), *(row(name, "cut", 0.5, value) for name, value in others)]
    found = cuts_verdicts(campaign, "small_cuts", rows)
    assert [verdict.holds for verdict in found] == [holds] * 4
    assert f"multi {error:.4f} ± 0.0100 (50.0%) against block 0.2500" in found[0].measured
    assert cuts_verdicts(campaign, "small_cuts", rows[:-1]) == []


def test_speed_counts_all_seeds() -> None:
    record = {"macs": 0.5, "latency": {"ratio": 0.5}}
    slow = {"macs": 0.4, "latency": {"ratio": 0.8}}
    speed = {"a_multi_time": record, "a_multi_time_seed1": record, "a_multi_time_seed2": slow}
    (verdict,) = speed_verdicts(read_campaign(FILE), speed | {"a_uniform": slow})
    assert verdict.holds
    assert verdict.measured == "1.75 times (2.00, 2.00, 1.25), MACs 50.0%, 50.0%, 40.0%"
    (verdict,) = speed_verdicts(read_campaign(FILE), speed | {"a_multi_time_seed1": slow})
    assert not verdict.holds


def result(method: str, keep: float, seed: int, error: float) -> dict[str, Any]:
    value = {"force_mae": error, "energy_per_atom": error}
    errors = {name: {"to_dense": value, "to_labels": value} for name in ("teacher", "dft")}
    known = {"method": method, "keep": keep, "seed": seed, "macs": keep, "parameters": keep}
    return known | {"latency": {"ratio": keep}, "cut": errors, "distilled": None}


def test_the_report_of_what_is_there(tmp_path: Path) -> None:
    campaign, out = read_campaign(FILE), tmp_path / "study"
    campaign = replace(campaign, other_methods=("precision", "adapters"))
    kept = [result("dense", 1.0, 0, 0.1)] + [result("multi", 0.5, seed, 0.11) for seed in (0, 1)]
    for record in kept:
        name = "dense" if record["method"] == "dense" else f"multi_0.5_{record['seed']}"
        write_json(out / "small_cuts" / "results" / f"{name}.json", record, make_folder=True)
    latency = {"seconds": 0.1, "dense_seconds": 0.2, "ratio": 0.5, "low": 0.4, "high": 0.6}
    call = {"atoms": 67, "threads": 2, "macs": 0.5, "latency": latency}
    peaks = {"peak_bytes": 2**20, "dense_peak_bytes": 2**21}
    write_json(out / "speed" / "oc20_small_multi.json", call | peaks, make_folder=True)
    write_json(tmp_path / "results" / "adapters.json", {"command": "a b", "commit": "123"}, make_folder=True)
    (tmp_path / "results" / "adapters.md").write_text("# Small adapters\n\nTheir table.\n\n## One\n")
    names = {path.name for path in write_study(campaign, out, tmp_path / "results")}
    assert names == {f"pruning_study{ending}" for ending in (".md", ".json", ".png", "_time.png")}
    text = (tmp_path / "results" / "pruning_study.md").read_text()
    assert "| multi | as cut | 50.0% | 50.0% | 0.1100 ± 0.0000 | 0.1100 ± 0.0000 | 2 |" in text
    assert "multi at 50%, seed 2" in text  # not computed
    assert "# Small adapters\n\nFrom `a b`, commit 123.\n\nTheir table.\n\n## One\n" in text
    assert "Not computed: `python -m studies.precision`." in text
    assert "| 2.00 (1.67 to 2.50) | 1.0 / 2.0 MiB |" in text
    ours = (
        "multi (oc20_small): 50% of the MACs, force MAE +10.0% teacher / +10.0% dft, a force call 2.00 times"
    )
    (line,) = [line for line in text.split("\n") if line.startswith("| MultiPruner")]
    assert ours in line
    (line,) = [line for line in text.split("\n") if line.startswith("| Zero-TPrune")]
    assert line.endswith("| not computed |")


def test_every_published_method_is_one_of_ours() -> None:
    campaigns = [read_campaign(FILE), read_campaign(FILE.with_name("study_teacher.yaml"))]
    studied = {method for each in campaigns for part in each.studies.values() for method in part.methods}
    assert {method for published in PUBLISHED for method, _ in published.ours} <= studied
