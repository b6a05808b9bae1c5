"""Branches that multiply in bfloat16: in effect after folding, in files, and chosen by measured time."""

import json
from pathlib import Path

import pytest
import torch
from search_helpers import NORMALIZERS, save_tiny, slabs, tiny_model, write_lmdb
from torch_geometric.data import Batch

from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.model import EquiformerV2, equiformer
from equiformer2.model.branches import bf16_branches, branch_names, set_bf16_branches
from equiformer2.model.folding import Folding
from equiformer2.pruning.calibration import Calibration
from equiformer2.pruning.precision import products
from equiformer2.pruning.precision.compact import compact_network, write_compact
from equiformer2.pruning.precision.plan import PrecisionPlan, matrices
from equiformer2.pruning.precision.products import ProductTrials, Timing, folded, in_bf16
from equiformer2.pruning.precision.quantize_request import QuantizeRequest, quantize

BRANCH = "blocks.1.ga"
PLAN = PrecisionPlan(products=(BRANCH,))


def set_instructions(monkeypatch: pytest.MonkeyPatch, are_there: bool) -> None:
    """Make the device seem to have instructions for products in bfloat16, or to have none."""
    for module in (equiformer, products):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: are_there)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with such instructions; every processor computes the products correctly."""
    set_instructions(monkeypatch, True)


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without them."""
    set_instructions(monkeypatch, False)


def answers(model: EquiformerV2) -> torch.Tensor:
    with torch.no_grad():
        return model(Batch.from_data_list(slabs()))["forces"]


def test_only_folded_networks_multiply_in_bfloat16_and_only_in_the_branches(able: None):
    model = tiny_model()
    before = answers(model)
    set_bf16_branches(model, [BRANCH])
    assert torch.equal(answers(model), before)
    network = folded(model)
    after = answers(network)
    assert 1e-5 < (after - before).abs().max() < 0.1 * before.abs().max()
    everything = folded(model)
    set_bf16_branches(everything, branch_names(everything))
    everything.fold_weights()
    assert (answers(everything) - before).abs().mean() > (after - before).abs().mean()
    # The features in front of the branch are those of float32.
    seen: list[torch.Tensor] = []
    for each in (folded(tiny_model()), network):
        each.blocks[1].norm_1.register_forward_hook(lambda _, __, out: seen.append(out))
        answers(each)
    assert torch.equal(seen[0], seen[1])
    assert all(tensor.dtype == torch.float32 for tensor in seen)


def test_training_and_gradients_are_in_float32(able: None):
    model = tiny_model()
    expected = model(Batch.from_data_list(slabs()))["forces"]
    set_bf16_branches(model, branch_names(model))
    model.fold_weights()
    assert torch.allclose(model(Batch.from_data_list(slabs()))["forces"], expected, atol=1e-6)
    model.train().eval()
    assert torch.allclose(answers(model), expected, atol=1e-6)


def test_a_device_without_the_instructions_computes_in_float32(unable: None):
    model = compact_network(tiny_model(), PLAN)
    expected = answers(model)
    model.fold_weights()
    folding = [module for module in model.blocks[1].ga.modules() if isinstance(module, Folding)]
    assert {module.layout.dtype for module in folding} == {None}
    assert torch.allclose(answers(model), expected, atol=1e-5)
    # As fast as before: the matrices are kept, though their weights are stored in bfloat16.
    assert any(list(module.kept_tensors()) for module in folding)


@pytest.mark.parametrize(
    "option", [{}, {"use_grid_mlp": False, "use_gate_act": True}, {"use_swiglu_s2_act": True}]
)
def test_kinds_of_networks(option: dict[str, bool], able: None):
    model = tiny_model(**option)
    before = answers(model)
    network = folded(model)
    with in_bf16(network, branch_names(network)):
        change = (answers(network) - before).abs().max()
    assert 1e-5 < change < 0.2 * before.abs().max()
    assert torch.allclose(answers(network), before, atol=1e-5)


def test_a_file_keeps_the_choice(tmp_path: Path, able: None):
    dense = load_checkpoint(save_tiny(tmp_path / "dense.pt"))
    network = compact_network(dense.model, PLAN)
    write_compact(tmp_path / "small.pt", dense, network, PLAN)
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    assert (content["format_version"], content["products"]) == (4, {"averaged": [BRANCH]})
    loaded = load_checkpoint(tmp_path / "small.pt")
    assert bf16_branches(loaded.model) == (BRANCH,)
    expected = folded(network)
    energies = Predictor(str(tmp_path / "small.pt")).predict(Batch.from_data_list(slabs()))
    with torch.no_grad():
        own = expected(Batch.from_data_list(slabs()))
    assert torch.equal(
        energies["forces"], NORMALIZERS.denormalize(own, Batch.from_data_list(slabs()))["forces"]
    )
    for damage, message in [
        ({"averaged": ["blocks.7.ga"]}, "has no branch blocks.7.ga"),
        ({"averaged": ["so3"]}, "which is no branch"),
        ({"averaged": "blocks.0.ga"}, "must be a list"),
        ({"raw": ["blocks.0.ga"]}, "does not store"),
        ([], "products"),
    ]:
        torch.save({**content, "products": damage}, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=message) as error:
            load_checkpoint(tmp_path / "bad.pt")
        assert "bad.pt" in str(error.value)


def test_plans_name_branches():
    config = tiny_model().config
    plan = PLAN.checked(config)
    inside = {name for name in matrices(tiny_model()) if name.startswith(f"{BRANCH}.")}
    assert dict(plan.modules) == dict.fromkeys(inside, "bf16")
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    for bad, message in [
        (PrecisionPlan(products=("blocks.9.ga",)), "branches are blocks.N.ga"),
        (PrecisionPlan((("blocks.1.ga.proj", "int8"),), products=(BRANCH,)), "leave one out"),
    ]:
        with pytest.raises(InputError, match=message):
            bad.checked(config)
    with pytest.raises(InputError, match="named twice"):
        PrecisionPlan(products=(BRANCH, BRANCH))
    with pytest.raises(InputError, match="must be a list of names"):
        PrecisionPlan.from_dict({**PLAN.to_dict(), "products": "blocks.0.ga"})


def test_losses_of_branches_are_those_of_the_compact_network(able: None):
    model = tiny_model()
    calibration = Calibration(model, NORMALIZERS, slabs())
    trials = ProductTrials(calibration, folded(model))
    loss = trials.loss({BRANCH: "bf16", "blocks.0.ffn": "float32"})
    network = folded(compact_network(model, PLAN))
    assert loss == pytest.approx(calibration.loss(network), rel=1e-3)
    assert trials.loss({BRANCH: "float32"}) == pytest.approx(0.0, abs=1e-5)


def test_a_limit_of_time_chooses_branches(able: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("optuna")
    # Each attention saves a tenth of the time and feed-forward networks nothing: 0.85 takes both.
    monkeypatch.setattr(
        "equiformer2.pruning.precision.quantize_request.time_network",
        lambda *_, **__: Timing(1.0, {"ga": 0.1}),
    )
    save_tiny(tmp_path / "dense.pt")
    write_lmdb(tmp_path / "data.lmdb", slabs())
    request = QuantizeRequest(
        checkpoint=str(tmp_path / "dense.pt"),
        data=(str(tmp_path / "data.lmdb"),),
        targets=("latency=0.85",),
        structures=2,
        trials=3,
    )
    found = quantize(request, tmp_path / "small.pt", tmp_path / "state.json", progress=False)
    assert found["plan"]["products"] == ["blocks.0.ga", "blocks.1.ga"]
    assert found["ms_bf16"] is None or found["ms_bf16"] > 0
    assert {found["modules"][name] for name in found["modules"] if ".ga." in name and "blocks" in name} == {
        16
    }
    state = json.loads((tmp_path / "state.json").read_text())
    assert Timing.read(state["timings"][0], "timings") == Timing(1.0, {"ga": 0.1})
    assert set(found["search"]["sensitivity"]["blocks.0.ga"]) == {"float32", "bf16"}


def test_measured_times_are_of_the_network_itself(able: None):
    model = folded(tiny_model())
    timing = products.time_network(model, model, Batch.from_data_list(slabs()[:1]))
    assert timing.ratio == 1.0
    assert set(timing.savings) <= {"ga", "ffn"}
    assert bf16_branches(model) == ()
