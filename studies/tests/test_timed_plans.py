"""Plans of a study that are searched for operations and time."""

from pathlib import Path
from typing import ClassVar

import pytest

from equiformer2.errors import InputError
from equiformer2.pruning.cost.targets import LatencyTarget, MacTarget
from equiformer2.pruning.structured.plan import PruningPlan
from studies import branch_plans
from studies.timed_study import TIMED, TimedSettings, TimedStudy
from tests.pruning.search_helpers import save_tiny, slab, slabs, tiny_model, write_lmdb


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "dense": save_tiny(folder / "dense.pt"),
        "calibration": write_lmdb(folder / "calibration.lmdb", slabs(), labels=False),
        "dft": write_lmdb(
            folder / "dft.lmdb", [slab("x", "Pd"), slab("x", "Pd", height=1.5), slab("y", "Ag")]
        ),
        "bare": write_lmdb(folder / "bare.lmdb", [slab("z", "Au")], labels=False),
    }


class ByHeads(LatencyTarget):
    """Half a call is the attention of block 0, in proportion to its heads; nothing else takes time."""

    def fraction_of(self, plan: PruningPlan) -> float:
        return 0.5 + 0.25 * plan.applied_to(tiny_model().config).block(0).num_heads


class ByMacs(LatencyTarget):
    """Time is in proportion to the MACs; notes every plan that it is asked for."""

    asked: ClassVar[list[PruningPlan]] = []

    def fraction_of(self, plan: PruningPlan) -> float:
        self.asked.append(plan)
        return MacTarget(tiny_model().config, 0.5, 8, 48).fraction_of(plan)


class HeadsStudy(TimedStudy):
    latency_target = ByHeads


class MacsStudy(TimedStudy):
    latency_target = ByMacs


def make_study(files, out: Path, kind: type[TimedStudy] = HeadsStudy, **changes: object) -> TimedStudy:
    settings = {
        "methods": ("random", "magnitude"),
        "keep": (0.7,),
        "seeds": (0, 1),
        "structures": 3,
        "tries": 1,
    }
    recovery = changes.pop("recovery", None)
    held_out = changes.pop("held_out", {"dft": files["dft"], "bare": files["bare"]})
    settings |= {"repeats": 2} | changes
    return kind(files["dense"], files["calibration"], held_out, TimedSettings(**settings), out, recovery)


def test_plans_for_time_join_a_study_that_had_none(files, tmp_path) -> None:
    make_study(files, tmp_path, methods=("random",)).run(progress=False)
    options = {"methods": ("random", TIMED), "seeds": (0,), "latency": 0.8}
    made = make_study(files, tmp_path, **options).run(progress=False)
    assert [result["method"] for result in made] == ["dense", "random", "multi_time"]
    assert len(made[2]["plan"]["blocks"][0]["heads"]) == 1
    assert made[2]["macs"] <= 0.7
    with pytest.raises(InputError, match="other timing"):
        make_study(files, tmp_path, **options | {"latency": 0.7})
    make_study(files, tmp_path, methods=("random",))


def test_plans_for_time_can_be_searched_before(files, tmp_path) -> None:
    asked = ByMacs.asked
    options = {"methods": ("uniform", TIMED), "seeds": (0,), "latency": 0.8}
    study = make_study(files, tmp_path, MacsStudy, **options)
    study.search_for_time(progress=False)
    assert not (tmp_path / "results").exists()
    searched = len(asked)
    assert searched > 5
    result = study.run(progress=False)[-1]
    assert result["method"] == "multi_time"
    assert result["macs"] <= 0.7
    assert len(asked) - searched < searched / 2  # the search is not made again
    asked.clear()
    study.search_for_time(progress=False)
    assert asked == []


def test_plans_of_whole_branches_have_the_operations_asked_for(files, tmp_path) -> None:
    study = make_study(files, tmp_path, methods=("block", *branch_plans.METHODS), seeds=(0,), keep=(0.55,))
    rows = {result["method"]: result for result in study.run(progress=False)}
    assert rows["block"]["macs"] < 0.53
    for method in branch_plans.METHODS:
        assert 0.53 <= rows[method]["macs"] <= 0.55
        blocks = rows[method]["plan"]["blocks"]
        assert any(block.get(name) is False for block in blocks for name in ("attention", "feed_forward"))
    removed = rows["cosine_filled"]["search"]["removed"]
    assert [each["influence"] for each in removed] == sorted(each["influence"] for each in removed)
