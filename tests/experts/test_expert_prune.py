"""Pruned networks of experts: what stays, the bound against the change, structures unlike the task's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import cluster, slab, water
from tiny_experts import contents_of, network
from torch_geometric.data import Data

from equiformer2.checkpoint.expert_files import ExpertContents, read_experts, write_experts
from equiformer2.checkpoint.samples import Samples
from equiformer2.errors import InputError
from equiformer2.experts import ExpertNetwork
from equiformer2.experts.composition import composition_of
from equiformer2.experts.dropped import KEY, DroppedExperts
from equiformer2.experts.merge import merge_experts
from equiformer2.experts.outputs import expert_outputs
from equiformer2.experts.prune import PruneSettings, foreign_structures, measure, prune_experts
from equiformer2.experts.retrieve import ExpertStore


def ready(structure: Data, sid: str) -> Data:
    """The structure with the fields of a data set."""
    data = structure.clone()
    data.fixed = torch.zeros(len(data.pos), dtype=torch.bool)
    data.tags = torch.ones(len(data.pos), dtype=torch.long)
    data.natoms, data.sid, data.fid = len(data.pos), sid, 0
    data.cell, data.pbc = data.cell.view(1, 3, 3), data.pbc.view(1, 3)
    return data


STRUCTURES = [ready(slab(), "slab"), ready(cluster(), "cluster")]


@pytest.fixture(scope="module")
def contents() -> ExpertContents:
    return contents_of(network(), samples={"dft": Samples.from_structures(STRUCTURES)})


def test_half_of_the_experts_stay_and_answer_as_the_network_merged_from_them(
    contents: ExpertContents,
) -> None:
    pruned, record = prune_experts(contents, "dft", PruneSettings(0.5))
    assert (len(record["tcess"]), len(record["kept"]), record["systems"]) == (4, 2, 2)
    full = ExpertNetwork.from_contents(contents)
    small = ExpertNetwork.from_contents(pruned)
    assert small.tasks == ("dft",)
    assert {len(stack) for stack in small.expert_weights().values()} == {2}
    for structure in STRUCTURES:
        merged = full.merged("dft", composition_of(structure, 90)[0], record["kept"])
        with torch.no_grad():
            expected, found = merged(structure), small(structure, "dft")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no task 'teacher'"):
        small(STRUCTURES[0], "teacher")


@pytest.mark.parametrize(
    ("method", "keep"), [("tcess", 0.25), ("frequency", 0.5), ("reap", 0.5), ("random", 0.75)]
)
def test_the_change_of_weights_is_within_the_bound(
    contents: ExpertContents, method: Any, keep: float
) -> None:
    pruned, record = prune_experts(contents, "dft", PruneSettings(keep, method))
    assert 0 < record["weight_change"] <= record["bound"]
    assert 0 < record["weight_change_relative"] <= record["bound_relative"]
    full, small = ExpertNetwork.from_contents(contents), ExpertNetwork.from_contents(pruned)
    names = full.expert_weights()
    for structure in STRUCTURES:  # of the merged networks themselves
        both = [each.merged("dft", composition_of(structure, 90)[0]) for each in (full, small)]
        states = [each.state_dict() for each in both]
        change = torch.stack([(states[0][name] - states[1][name]).double().norm() for name in names])
        assert float(change.norm()) <= record["bound"]
    assert 0 < record["bound_relative"] < 0.6  # experts that differ by half of the weights
    found = measure(contents, pruned, "dft")
    assert found["measured_change_eV_A"] > 0
    assert found["measured_change_eV"] > 0
    assert found["force_mae_ratio"] is None


def test_an_expert_of_zeros_adds_nothing_to_any_layer() -> None:
    experts = network()
    with torch.no_grad():
        for stack in experts.expert_weights().values():
            stack[2] = 0.0
    outputs = expert_outputs(experts, STRUCTURES, "dft")
    assert outputs.shape == (2, 4)
    assert not outputs[:, 2].any()
    assert (outputs[:, [0, 1, 3]] > 0).all()


def test_labels_give_errors_and_no_structures_nothing(contents: ExpertContents) -> None:
    pruned, _ = prune_experts(contents, "dft", PruneSettings(0.5))
    labelled = []
    with torch.no_grad():
        for structure in STRUCTURES:
            out = ExpertNetwork.from_contents(contents)(structure, "dft")
            labelled.append(structure.clone())
            labelled[-1].forces = 2.5 * out["forces"]
    found = measure(contents, pruned, "dft", labelled, batch_size=1)
    assert found["force_mae_full_eV_A"] < 1e-6
    assert found["force_mae_eV_A"] == pytest.approx(found["measured_change_eV_A"], rel=1e-4)
    some = measure(contents, pruned, "dft", [STRUCTURES[0], labelled[1]])
    alone = measure(contents, pruned, "dft", labelled[1:])
    assert some["force_mae_eV_A"] == pytest.approx(alone["force_mae_eV_A"], rel=1e-4)
    assert some["measured_change_eV_A"] == pytest.approx(found["measured_change_eV_A"], rel=1e-4)
    without = contents_of(network())
    pruned, record = prune_experts(without, "dft", PruneSettings(0.5))
    assert record["systems"] == 1
    assert measure(without, pruned, "dft")["measured_change_eV"] is None


def test_the_file_is_smaller_and_is_pruned_again_down_to_one(
    contents: ExpertContents, tmp_path: Path
) -> None:
    write_experts(tmp_path / "full.safetensors", contents)
    sizes = [(tmp_path / "full.safetensors").stat().st_size]
    for number, keep in enumerate((0.5, 0.5)):
        read = read_experts(tmp_path / ("full.safetensors" if not number else f"{number - 1}.safetensors"))
        pruned, _ = prune_experts(read, "dft", PruneSettings(keep))
        write_experts(tmp_path / f"{number}.safetensors", pruned)
        sizes.append((tmp_path / f"{number}.safetensors").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]
    one = read_experts(tmp_path / "1.safetensors")
    (earlier,) = one.provenance[KEY]["earlier"]
    assert (len(earlier["kept"]), earlier["file"]) == (2, "full.safetensors")
    assert "dropped_gate" not in earlier
    alone = ExpertNetwork.from_contents(one)
    assert alone.coefficients(STRUCTURES[0], "dft").tolist() == [[1.0]]
    samples = one.tasks["dft"].samples
    assert samples is not None
    assert torch.equal(samples.pos.float(), torch.cat([each.pos for each in STRUCTURES]).float())
    with pytest.raises(InputError, match="nothing to remove"):
        prune_experts(one, "dft", PruneSettings(0.5))


def test_structures_unlike_those_of_the_task_are_named(contents: ExpertContents) -> None:
    pruned, record = prune_experts(contents, "dft", PruneSettings(0.5))
    dropped = DroppedExperts.from_provenance(pruned.provenance, "file", "raw")
    assert dropped is not None
    shares = torch.cat([composition_of(each, 90) for each in STRUCTURES])
    bounds = dropped.bounds(ExpertNetwork.from_contents(pruned).gate, 0, shares)
    assert float(bounds.max()) <= record["bound"] * 1.2  # of all weights as one vector: a little looser
    assert float(bounds.max()) == pytest.approx(dropped.limit, rel=1e-5)
    foreign = foreign_structures(pruned, "dft", [*STRUCTURES, ready(water(), "water")])
    named = {each["sid"]: each for each in foreign}
    assert set(named["water"]["elements"]) == {"H"}
    assert named["water"]["distance"] > named["water"]["reach"]
    assert "H not among the training data of dft" in named["water"]["text"]
    assert all("bound" not in named.get(each.sid, {}) for each in STRUCTURES)


def test_a_structure_that_needs_dropped_experts_is_worse_than_the_bound(tmp_path: Path) -> None:
    experts = network()
    with torch.no_grad():  # element 1 alone asks for expert 3, the others for expert 0
        experts.gate.hidden.weight.zero_()
        experts.gate.hidden.bias.zero_()
        experts.gate.elements.weight.zero_()
        experts.gate.elements.weight[1] = 5.0
        experts.gate.hidden.weight[0, 0] = 1.0
        experts.gate.out.weight.zero_()
        experts.gate.out.weight[3, 0] = 5.0
        experts.gate.out.bias.copy_(torch.tensor([5.0, 4.0, 0.0, 0.0]))
    samples = {"dft": Samples.from_structures([STRUCTURES[0]])}
    whole = contents_of(experts, samples=samples)
    shares = whole.tasks["dft"].composition
    shares[[1, 6]] = 0.1  # hydrogen and carbon are known
    shares /= shares.sum()
    pruned, record = prune_experts(whole, "dft", PruneSettings(0.5))
    assert record["kept"] == [0, 1]
    (found,) = foreign_structures(pruned, "dft", [ready(water(), "water")])
    assert found["bound"] > 5 * found["limit"]
    assert "worse than the bound of dft" in found["text"]
    file = tmp_path / "pruned.safetensors"
    write_experts(file, pruned)
    retrieved = [ExpertStore(file).find(each) for each in (STRUCTURES[0], ready(water(), "water"))]
    assert [each.excess is None for each in retrieved] == [True, False]
    assert "worse than the bound" in retrieved[1].warnings()[-1]
    # The record is of the weights that the file was pruned by.
    assert DroppedExperts.from_provenance(pruned.provenance, "file", "averaged") is None
    for formula, worse in (("Cu12CO", False), ("H2O", True)):
        summary = merge_experts(file, "dft", tmp_path / f"{formula}.pt", formula)
        assert (summary["excess_of_bound"] is not None) == worse


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kept": [0, 0]}, "dropped experts"),
        ({"kept": [0, 9]}, "must be at most 3"),
        ({"products": "many"}, "must be a list"),
        ({"products": []}, "square table"),
        ({"products": [[1.0], [1.0]]}, "square table"),
        ({"products": [["a"]]}, "must be a number"),
        ({"weights": "mean"}, "one of raw, averaged"),
        ({"dropped_gate": None}, "dictionary"),
        ({"dropped_gate": {"weight": [[1.0], [1.0, 2.0]], "bias": [0.0, 0.0]}}, "does not fit"),
        ({"dropped_gate": {"weight": [[1.0]], "bias": [0.0]}}, "dropped experts"),
        ({"limit": -1.0}, "at least 0"),
    ],
)
def test_changed_records_of_a_pruning(contents: ExpertContents, values: dict[str, Any], message: str) -> None:
    pruned, _ = prune_experts(contents, "dft", PruneSettings(0.5))
    provenance = {KEY: {**pruned.provenance[KEY], **values}}
    with pytest.raises(InputError, match=message):
        DroppedExperts.from_provenance(provenance, "file.safetensors", "raw")


def test_unknown_tasks_methods_and_elements(contents: ExpertContents) -> None:
    with pytest.raises(InputError, match="no task 'pbe': its tasks are dft, teacher"):
        prune_experts(contents, "pbe", PruneSettings(0.5))
    with pytest.raises(InputError, match="not by 'best'"):
        PruneSettings(0.5, "best")  # type: ignore[arg-type]
    heavy = STRUCTURES[0].clone()
    heavy.atomic_numbers = torch.full_like(heavy.atomic_numbers, 95)
    with pytest.raises(InputError, match=r"slab/0 \(sid/fid\): .*95"):
        prune_experts(contents, "dft", PruneSettings(0.5), [heavy])
    with pytest.raises(InputError, match="there are none"):
        prune_experts(contents_of(network()), "dft", PruneSettings(0.5, "reap"))
