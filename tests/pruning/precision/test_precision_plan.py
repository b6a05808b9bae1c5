"""Plans of precisions."""

import pytest
from plans import MANY, config_of
from search_helpers import TINY

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.errors import InputError
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.precision.plan import LAST_LAYERS, PrecisionPlan, matrices, parts_of

CONFIG = ModelConfig(**TINY)
CONV, FFN = "blocks.0.ga.so2_conv_1.fc_m0", "blocks.1.ffn.so3_linear_1"


def test_plans_go_through_json_and_can_be_compared(tmp_path):
    plan = PrecisionPlan(((FFN, "int4"), (CONV, "bf16")), PruningPlan.keep_all(CONFIG).with_block(0, mmax=1))
    plan.save(tmp_path / "plan.json")
    same = PrecisionPlan.load(tmp_path / "plan.json")
    assert same == plan
    assert hash(same) == hash(plan)
    assert {plan: 1}[same] == 1
    assert dict(same.modules) == {FFN: "int4", CONV: "bf16"}
    assert plan != PrecisionPlan(((FFN, "int8"),))


def test_the_canonical_form_has_no_float32_and_nothing_that_is_pruned():
    whole = PruningPlan.keep_all(CONFIG)
    assert PrecisionPlan(((CONV, "float32"),), whole).checked(CONFIG) == PrecisionPlan()
    cut = whole.with_block(0, attention=False)
    assert PrecisionPlan(((CONV, "int8"), (FFN, "int8")), cut).checked(CONFIG).modules == ((FFN, "int8"),)


def test_a_plan_follows_a_pruning_plan():
    config = config_of()
    first = PruningPlan.keep_all(config).with_block(0, heads=(0, 2))
    second = PrecisionPlan(((CONV, "int8"),), PruningPlan.keep_all(config).with_block(0, heads=(1,)))
    both = second.after(first)
    assert both.pruning.blocks[0].heads == (2,)
    assert PrecisionPlan(((CONV, "int8"),)).after(MANY).checked(config).pruning == MANY.checked(config)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_a_uniform_plan_names_every_matrix_but_the_last_layers(precision: str):
    names = matrices(EquiformerV2(CONFIG, device="meta"))
    plan = PrecisionPlan.uniform(CONFIG, precision)
    assert dict(plan.modules) == dict.fromkeys(names, precision)
    assert not set(LAST_LAYERS) & set(names)
    assert not any("norm" in name for name in names)
    assert PrecisionPlan.uniform(CONFIG, "float32") == PrecisionPlan()


def test_parts_hold_every_module_once():
    names = matrices(EquiformerV2(CONFIG, device="meta"))
    parts = parts_of(names)
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert {"blocks.0.ga.so2_conv_1", "blocks.0.ga.element_embeddings", "blocks.1.ffn.grid_mlp"} <= set(parts)
    assert parts["blocks.0.ga.so2_conv_2"] == [
        f"blocks.0.ga.so2_conv_2.{name}" for name in ("fc_m0", "so2_m_conv.0.fc", "so2_m_conv.1.fc")
    ]


REFUSED = {
    "rotations": "rotations stay float32",
    "softmax": "softmax stay float32",
    "energy_block.so3_linear_2": "last layer",
    "force_block.proj": "last layer",
    "norm": "stays float32",
    "blocks.0.norm_1": "stays float32",
    "blocks.0.ga.alpha_dot": "stays float32",
    "blocks.0.ga.alpha_norm": "stays float32",
    "distance_basis": "stays float32",
    f"{CONV}.weight": f"name its module, {CONV}",
    f"{CONV}.bias": "stays float32",
    "blocks.0.ga.so2_conv_1": "name each, such as",
    "blocks.0.ga.so2_conv_1.fc_m1": "did you mean",
    "blocks.7.ga.proj": "no module",
    "": "no module",
}


@pytest.mark.parametrize("name", REFUSED)
def test_modules_that_stay_float32_or_do_not_exist_are_refused(name: str):
    with pytest.raises(InputError, match=REFUSED[name]):
        PrecisionPlan(((name, "int8"),)).checked(CONFIG)


HEAD = '{"format": "equiformer2.precision_plan", "version": 1'
BAD = {
    "[1]": "no precision plan",
    "{": "JSON",
    '{"format": "equiformer2.pruning_plan"}': "no precision plan",
    HEAD.replace("1", "2") + "}": "version 2",
    HEAD + "}": "modules must be a dictionary",
    HEAD + ', "modules": [1]}': "modules must be a dictionary",
    HEAD + ', "modules": {"a": "int3"}}': "int3",
    HEAD + ', "modules": {"a": 8}}': "is to be 8",
    HEAD + ', "modules": {"a": ["int8"]}}': "is to be",
    HEAD + ', "modules": {}, "prunning": {}}': "did you mean 'pruning'",
    HEAD + ', "modules": {}, "pruning": {}}': "no pruning plan",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_files_are_refused(text: str):
    with pytest.raises(InputError, match=BAD[text]):
        PrecisionPlan.from_json(text)


def test_a_module_is_named_once():
    with pytest.raises(InputError, match="twice"):
        PrecisionPlan(((CONV, "int8"), (CONV, "int4")))
