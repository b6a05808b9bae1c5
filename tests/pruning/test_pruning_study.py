"""The whole study: its settings, and what its report concludes from results."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from equiformer2.errors import InputError
from study_parts.report import _distilled_verdicts, _router_verdicts
from study_parts.settings import read_campaign

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
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(FILE.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_campaign(path)


def row(method: str, trained: str, keep: float, error: float) -> dict[str, Any]:
    mae = {"force_mae": {"mean": error, "std": 0.0}}
    errors = {name: {"to_dense": mae, "to_labels": mae} for name in ("teacher", "dft")}
    shares = dict.fromkeys(errors, keep)
    known = {"method": method, "trained": trained, "keep": keep, "macs": keep, "macs_on": shares}
    return known | {"errors": errors}


@pytest.mark.parametrize(("error", "holds"), [(0.104, [True, True]), (0.106, [False, False])])
def test_verdicts(error: float, holds: list[bool]) -> None:
    campaign, dense = read_campaign(FILE), row("dense", "cut", 1.0, 0.1)
    others = [("route_random", 0.2), ("route_uniform", 0.105), ("route_distance", 0.2)]
    routers = [dense, row("route_ftp", "cut", 0.7, error), *(row(name, "cut", 0.7, e) for name, e in others)]
    assert [v.holds for v in _router_verdicts(campaign, "small_routers", routers)] == holds * 2
    # Nothing is said of what has not been computed.
    assert [v.holds for v in _router_verdicts(campaign, "small_routers", routers[:-1])] == holds[:1] * 2
    trained = [dense, row("multi", "distilled", 0.5, error), row("scratch", "distilled", 0.5, 0.105)]
    assert [v.holds for v in _distilled_verdicts(campaign, "small_distilled", trained)] == holds * 2
