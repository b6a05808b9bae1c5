"""Plans as values: canonical form, composition, JSON, refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from plans import GRID_PLANS, KEEP, MANY, PLANS, config_of

from equiformer2.errors import InputError
from equiformer2.model.block_config import BlockConfig
from equiformer2.pruning import BlockPlan, PruningPlan

ALL = PLANS | GRID_PLANS | {"many": MANY, "nothing": KEEP}


@pytest.mark.parametrize("name", ALL)
def test_json_and_back(name: str, tmp_path: Path) -> None:
    plan = ALL[name]
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert len({plan, again, PLANS["lmax 1"]}) == (1 if name == "lmax 1" else 2)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def test_lists_become_tuples_and_all_becomes_none() -> None:
    config = config_of()
    spelled_out: dict[str, Any] = {
        "heads": [0, 1, 2],
        "attn_hidden_channels": range(6),
        "value_channels": [[0, 1, 2]] * 3,
        "lmax": 3,
        "mmax": 2,
    }
    plan = dataclasses.replace(KEEP.with_block(1, **spelled_out), sphere_channels=list(range(8)))  # type: ignore[arg-type]
    assert plan.blocks[1].heads == (0, 1, 2)
    assert hash(plan)
    assert plan.checked(config) == KEEP
    assert plan.applied_to(config) == config


def test_orders_never_exceed_degrees() -> None:
    config = config_of()
    for plan in (KEEP.with_block(0, lmax=1), KEEP.with_block(0, lmax=1, mmax=2)):
        assert plan.checked(config).blocks[0] == BlockPlan(lmax=1)
        pruned = plan.applied_to(config)
        assert (pruned.block(0).lmax, pruned.block(0).mmax) == (1, 1)
        assert pruned.block(1) == config.block(1)


def test_configuration_of_the_pruned_network() -> None:
    pruned = MANY.applied_to(config_of())
    assert pruned.sphere_channels == 4
    assert pruned.blocks == (
        BlockConfig(
            lmax=2,
            mmax=1,
            num_heads=2,
            attn_hidden_channels=3,
            attn_value_channels=2,
            ffn_hidden_channels=3,
        ),
        BlockConfig(attention=False),
    )
    assert pruned.force_head == BlockConfig(lmax=2, mmax=1, num_heads=2, attn_hidden_channels=3)


def test_composition() -> None:
    first = KEEP.with_block(0, heads=(0, 2), ffn_hidden_channels=(1, 4, 6), lmax=2)
    second = KEEP.with_block(0, heads=(1,), value_channels=((0, 2),), mmax=1).with_block(1, attention=False)
    assert first.compose(second).blocks == (
        BlockPlan(heads=(2,), value_channels=((0, 2),), ffn_hidden_channels=(1, 4, 6), lmax=2, mmax=1),
        BlockPlan(attention=False),
    )
    assert first.compose(KEEP) == first
    assert KEEP.compose(first) == first
    by_head = KEEP.with_block(0, heads=(0, 2), value_channels=((0, 1), (1, 2)))
    later = KEEP.with_block(0, heads=(1,), value_channels=((1,),))
    assert by_head.compose(later).blocks[0] == BlockPlan(heads=(2,), value_channels=((2,),))
    dropped = KEEP.with_block(0, attention=False)
    assert by_head.compose(dropped).blocks[0] == BlockPlan(attention=False)
    assert first.compose(second).applied_to(config_of()) == second.applied_to(first.applied_to(config_of()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (0, 3)}, r"block 1: heads keeps 3, but there are only 0 … 2"),
        ({"attn_hidden_channels": (6,)}, "block 1: attn_hidden_channels keeps 6"),
        ({"value_channels": ((0, 5),) * 3}, "block 1: value_channels keeps 5"),
        ({"value_channels": ((0,),)}, "block 1: value_channels has lists for 1 heads; 3 are kept"),
        ({"lmax": 4}, "block 1: lmax is 4, but the messages have 3"),
        ({"mmax": 3}, "block 1: mmax is 3, but the messages have 2"),
        ({"attention": False, "heads": (0,)}, "block 1: heads is given, but the block has no attention"),
        ({"feed_forward": False, "ffn_input_channels": (0,)}, "block 1: ffn_input_channels is given"),
    ],
    ids=str,
)
def test_plans_that_do_not_fit_name_block_and_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KEEP.with_block(1, **changes).checked(config_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ()}, "heads keeps nothing"),
        ({"heads": (1, 0)}, "heads must ascend"),
        ({"heads": (1, 1)}, "heads must ascend"),
        ({"heads": (True,)}, "heads holds True"),
        ({"heads": (-1,)}, "heads holds -1"),
        ({"heads": "01"}, "heads is '01'"),
        ({"value_channels": 3}, "value_channels is 3"),
        ({"value_channels": ((0,), (0, 1))}, "equally many"),
        ({"lmax": 0}, "lmax is 0"),
        ({"mmax": -1}, "mmax is -1"),
        ({"attention": 1}, "attention is 1"),
    ],
    ids=str,
)
def test_impossible_blocks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockPlan(**changes)


def test_cuts_that_the_network_cannot_have() -> None:
    grid = GRID_PLANS["input of the grid MLP"]
    for plan, changes, message in (
        (
            grid,
            {"use_grid_mlp": False},
            "block 0: ffn_input_channels is given, but the network has no grid MLP",
        ),
        (PLANS["output heads"], {"forces": "none"}, "force_head cuts a head"),
        (KEEP, {"num_layers": 3}, "for 2 blocks, the network has 3"),
        (dataclasses.replace(KEEP, sphere_channels=(8,)), {}, "sphere_channels keeps 8"),
        (dataclasses.replace(KEEP, force_head=BlockPlan(attention=False)), {}, "a head cannot be dropped"),
        (dataclasses.replace(KEEP, energy_head=BlockPlan(heads=(0,))), {}, "energy_head: heads is given"),
    ):
        with pytest.raises(InputError, match=message):
            plan.checked(config_of(**changes))


def test_cuts_of_what_is_gone() -> None:
    gone = KEEP.with_block(0, attention=False)
    for first, second, message in (
        (
            gone,
            KEEP.with_block(0, heads=(0,)),
            "block 0: heads is given, but the attention branch was dropped",
        ),
        (PLANS["heads"], KEEP.with_block(0, heads=(2,)), "block 0: heads keeps 2, but only 2 were kept"),
        (PLANS["lmax 2"], KEEP.with_block(0, lmax=3), "block 0: lmax is 3, but it was cut to 2"),
        (PLANS["value channels"], KEEP.with_block(0, value_channels=((0,),)), "value_channels do not fit"),
        (KEEP, PruningPlan((BlockPlan(),)), "for 2 and for 1 blocks"),
    ):
        with pytest.raises(InputError, match=message):
            first.compose(second)
    with pytest.raises(InputError, match="there is no block 2"):
        KEEP.with_block(2, mmax=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "is no pruning plan"),
        ({"version": 2}, "version 2; only 1"),
        ({"block": []}, "unknown key 'block'; did you mean 'blocks'"),
        ({"blocks": None}, "blocks must be a list"),
        ({"blocks": [{"head": [0]}]}, "block 0: unknown key 'head'; did you mean 'heads'"),
        ({"blocks": [{}, {"heads": [2, 1]}]}, "block 1: heads must ascend"),
        ({"blocks": [3]}, "block 0 must be a mapping"),
        ({"sphere_channels": [1.5]}, "sphere_channels holds 1.5"),
        ({"force_head": {"heads": "all"}}, "force_head: heads is 'all'"),
    ],
    ids=str,
)
def test_files_that_are_no_plans(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(KEEP.to_dict() | change))
    with pytest.raises(InputError, match=message) as error:
        PruningPlan.load(path)
    assert "plan.json" in str(error.value)


def test_files_that_are_not_json(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{")
    (tmp_path / "b").write_bytes(b"\xff\xfe\xff")
    for name, message in (("a", "not readable as JSON"), ("b", "not text")):
        with pytest.raises(InputError, match=message):
            PruningPlan.load(tmp_path / name)
