"""Times of parts, and searches that choose by them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from search_helpers import NORMALIZERS, slabs, tiny_model
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.cost import latency as latency_module
from equiformer2.pruning.cost.targets import CombinedTarget, LatencyTarget, MacTarget
from equiformer2.pruning.cost.time_table import Part, PartTimer, TimeTable, parts_of
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.pruning.structured.plan_methods import search_settings
from equiformer2.pruning.structured.search import Cost, GreedySearch

MODEL = tiny_model()
CONFIG = MODEL.config
KEEP = PruningPlan.keep_all(CONFIG)
SHARES = {"attention": 0.3, "feed_forward": 0.05, "force_head": 0.2}  # two blocks: the rest is 0.1


class FakeTimer:
    """A part takes its share times heads and orders, whatever else is cut; counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, part: Part, reference: Part | None) -> float:
        self.asked.append((part.name, reference and reference.name))
        if reference is None:
            return SHARES[part.kind]
        assert part.kind == reference.kind
        if part.kind == "feed_forward":
            return 0.9
        return part.shape[2] * (1 + part.shape[1]) / (reference.shape[2] * (1 + reference.shape[1]))


def test_times_are_added_up() -> None:
    timer = FakeTimer()
    table = TimeTable(CONFIG, timer)
    assert table.fraction_of(KEEP) == 1.0
    assert table.fraction_of(KEEP.with_block(0, attention=False)) == pytest.approx(0.7)
    assert table.fraction_of(KEEP.with_block(1, heads=(0,))) == pytest.approx(0.85)
    both = KEEP.with_block(1, heads=(1,), mmax=0).with_block(0, feed_forward=False)
    assert table.fraction_of(both) == pytest.approx(1 - 0.3 * 5 / 6 - 0.05)
    nothing = dict.fromkeys(("attention", "feed_forward"), False)
    assert table.fraction_of(KEEP.with_block(0, **nothing).with_block(1, **nothing)) == pytest.approx(0.3)


def test_a_pruned_network_can_be_pruned_further(tmp_path: Path) -> None:
    """Its configuration names options that a dense one has not; a dense one's table is not its own."""
    pruned, path = KEEP.with_block(0, heads=(0,)).applied_to(CONFIG), tmp_path / "times.json"
    assert TimeTable(pruned, FakeTimer(), path).fraction_of(PruningPlan.keep_all(pruned)) == pytest.approx(
        1.0
    )
    with pytest.raises(InputError, match="another network"):
        TimeTable(CONFIG, FakeTimer(), path)


def test_a_shape_is_measured_once() -> None:
    timer = FakeTimer()
    table = TimeTable(CONFIG, timer)
    for plan in (
        KEEP,
        KEEP.with_block(0, heads=(0,)),
        KEEP.with_block(0, heads=(1,)),
        KEEP.with_block(1, heads=(0,)),
    ):
        table.fraction_of(plan)
    assert len(timer.asked) == len(set(timer.asked)) == 4
    names = [part.name for part in parts_of(CONFIG)]
    assert names[:2] == names[2:4] == ["attention 8: 2 2 2 8 4", "feed_forward 8: 8 8 8 8"]
    narrow = dataclasses.replace(KEEP, sphere_channels=(0, 1))
    table.fraction_of(narrow)
    assert {name.split(":")[0] for name, _ in timer.asked[4:]} == {
        "attention 2",
        "feed_forward 2",
        "force_head 2",
    }


def test_a_kept_table_is_not_measured_again(tmp_path: Path) -> None:
    path, plan = tmp_path / "state.times.json", KEEP.with_block(0, heads=(0,))
    known = TimeTable(CONFIG, FakeTimer(), path, {"threads": 2}).fraction_of(plan)
    later = FakeTimer()
    assert TimeTable(CONFIG, later, path, {"threads": 2}).fraction_of(plan) == known
    assert later.asked == []
    with pytest.raises(InputError, match=r"another threads \(2, now 1\)"):
        TimeTable(CONFIG, later, path, {"threads": 1})
    with pytest.raises(InputError, match="another network"):
        TimeTable(tiny_model(num_heads=1).config, later, path, {"threads": 2})
    path.write_text("{}")
    with pytest.raises(InputError, match="no table of times"):
        TimeTable(CONFIG, later, path)


def search(calibration: Calibration, timer: FakeTimer, folder: Path | None = None) -> GreedySearch:
    table = TimeTable(CONFIG, timer, None if folder is None else folder / "times.json")

    class Timed:
        quantity = "latency"
        fraction = 0.75
        fraction_of = staticmethod(table.fraction_of)

        def reached(self, plan: PruningPlan) -> bool:
            return self.fraction_of(plan) <= self.fraction

    together = CombinedTarget([MacTarget(CONFIG, 0.9, 16, 96), Timed()])
    return GreedySearch(
        MODEL,
        NORMALIZERS,
        calibration,
        together.cost,
        together.target,
        search_settings("multi", tries=2),
        None if folder is None else folder / "state.json",
        progress=False,
    )


def test_a_search_cuts_what_saves_time_until_all_targets_are_reached(tmp_path: Path) -> None:
    calibration = Calibration(MODEL, NORMALIZERS, slabs()[:2])
    found = search(calibration, FakeTimer()).run()
    assert MacTarget(CONFIG, 0.9, 16, 96).reached(found.plan)
    assert TimeTable(CONFIG, FakeTimer()).fraction_of(found.plan) <= 0.75
    stopped = search(calibration, FakeTimer(), tmp_path)
    for _ in range(2):
        stopped._step()
        stopped.state.save(tmp_path / "state.json")
    names = set(json.loads((tmp_path / "times.json").read_text())["shares"])
    later = FakeTimer()
    again = search(calibration, later, tmp_path)
    assert len(again.state.steps) == 2
    assert again.run().plan == found.plan
    assert later.asked
    assert not names & {name for name, _ in later.asked}


@pytest.mark.slow
def test_time_changes_what_is_cut() -> None:
    """Compare searches where widths take no time: one for operations cuts them and one for time does not."""
    calibration = Calibration(MODEL, NORMALIZERS, slabs()[:2])
    macs, table = MacTarget(CONFIG, 0.8, 16, 96), TimeTable(CONFIG, FakeTimer())

    def dimensions(cost: Cost) -> set[str]:
        settings = search_settings("multi", tries=2)
        found = GreedySearch(MODEL, NORMALIZERS, calibration, cost, 0.8, settings, progress=False).run()
        return {step.cut.split("/")[0] for step in found.steps}

    assert "attn_hidden" in dimensions(macs.fraction_of)
    assert dimensions(table.fraction_of) <= {"block", "order", "head", "ffn"}


def test_several_targets_as_one_cost() -> None:
    class Share:
        quantity = "share"

        def __init__(self, fraction: float, left: float) -> None:
            self.fraction, self.left = fraction, left

        def fraction_of(self, plan: PruningPlan) -> float:
            return self.left

        def reached(self, plan: PruningPlan) -> bool:
            return self.left <= self.fraction

    def cost(*pairs: tuple[float, float]) -> tuple[float, float]:
        together = CombinedTarget([Share(*pair) for pair in pairs])
        return together.cost(KEEP), together.target

    assert cost((0.7, 0.8)) == (0.8, 0.7)
    assert cost((0.7, 0.6)) == (pytest.approx(0.6), 0.7)
    assert cost((0.5, 0.8), (0.5, 0.9)) == (pytest.approx(1.7), 1.0)
    assert cost((0.5, 0.2), (0.5, 0.9)) == (pytest.approx(1.4), 1.0)
    assert cost((0.5, 0.2), (0.5, 0.4)) == (pytest.approx(0.9), 1.0)
    with pytest.raises(InputError, match="no target"):
        CombinedTarget([])


def test_parts_are_timed_alone_in_turns(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The clock moves by what runs: 4 for a network and as much as it has heads for attention."""
    clock = {"now": 0.0}
    monkeypatch.setattr(latency_module.time, "perf_counter", lambda: clock["now"])

    def advance(module: nn.Module, inputs: object) -> None:
        if type(module) is type(MODEL):
            clock["now"] += 4.0
        elif type(module) is type(MODEL.blocks[0].ga):
            clock["now"] += module.num_heads

    hook = register_module_forward_pre_hook(advance)
    request.addfinalizer(hook.remove)
    batch = Batch.from_data_list(slabs()[:1])
    weights = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    timer = PartTimer(MODEL, batch, threads=1, repeats=3)
    assert timer.facts["threads"] == 1
    assert timer.facts["forces"] == 2
    table = TimeTable(CONFIG, timer)
    assert table.fraction_of(KEEP.with_block(0, attention=False)) == pytest.approx(1 - 2 / 8)
    assert table.fraction_of(KEEP.with_block(0, heads=(1,))) == pytest.approx(1 - 1 / 8)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in MODEL.state_dict().items())
    assert MODEL.blocks[0].ga.so2_conv_1._kept.layout is None


def test_every_part_runs(tmp_path: Path) -> None:
    batch = Batch.from_data_list(slabs()[:1])
    target = LatencyTarget(MODEL, batch, 0.9, tmp_path / "times.json", repeats=1, warm_up=0)
    plan = dataclasses.replace(
        KEEP.with_block(0, lmax=1, mmax=1, ffn_hidden_channels=(0, 3)), sphere_channels=(1, 2)
    )
    assert target.fraction_of(plan) < 10
    assert target.measured(plan) > 0
    assert (tmp_path / "times.json").exists()
    with pytest.raises(InputError, match="at least one repeat"):
        LatencyTarget(MODEL, batch, 0.9, repeats=0)
