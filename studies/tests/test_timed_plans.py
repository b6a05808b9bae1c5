"""Plans of a study that are searched for operations and time."""

from pathlib import Path

import pytest

from equiformer2.errors import InputError
from equiformer2.pruning.cost.targets import LatencyTarget, MacTarget
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


def make_study(files, out: Path, **changes: object) -> TimedStudy:
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
    return TimedStudy(
        files["dense"], files["calibration"], held_out, TimedSettings(**settings), out, recovery
    )


def test_plans_for_time_join_a_study_that_had_none(files, tmp_path, monkeypatch) -> None:
    config = tiny_model().config
    # All that takes time: half a call is the attention of block 0, in proportion to its heads.
    heads = lambda self, plan: 0.5 + 0.25 * plan.applied_to(config).block(0).num_heads  # noqa: E731
    monkeypatch.setattr(LatencyTarget, "fraction_of", heads)
    make_study(files, tmp_path, methods=("random",)).run(progress=False)
    options = {"methods": ("random", TIMED), "seeds": (0,), "latency": 0.8}
    made = make_study(files, tmp_path, **options).run(progress=False)
    assert [result["method"] for result in made] == ["dense", "random", "multi_time"]
    assert len(made[2]["plan"]["blocks"][0]["heads"]) == 1
    assert made[2]["macs"] <= 0.7
    with pytest.raises(InputError, match="other timing"):
        make_study(files, tmp_path, **options | {"latency": 0.7})
    make_study(files, tmp_path, methods=("random",))


def test_plans_for_time_can_be_searched_before(files, tmp_path, monkeypatch) -> None:
    stand_in = MacTarget(tiny_model().config, 0.5, 8, 48)
    asked = []
    monkeypatch.setattr(
        LatencyTarget, "fraction_of", lambda self, plan: asked.append(plan) or stand_in.fraction_of(plan)
    )
    options = {"methods": ("uniform", TIMED), "seeds": (0,), "latency": 0.8}
    study = make_study(files, tmp_path, **options)
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
