"""Expert networks: merged weights, coefficients, symmetry, heads of their own, groups of a batch."""

import copy
import threading

import pytest
import torch
from ase.build import bulk
from model_helpers import as_data, batch_of, cluster, random_model, slab, small_config, water
from tiny_experts import TASKS, network
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.experts import ExpertNetwork, ExpertSettings
from equiformer2.experts.composition import composition_from_formula, composition_of


@pytest.fixture(scope="module")
def experts() -> ExpertNetwork:
    return network()


def test_a_batch_of_tasks_and_compositions_equals_merged_networks(experts: ExpertNetwork) -> None:
    structures = [slab(), water(), cluster(), slab()]
    tasks = torch.tensor([0, 1, 0, 1])
    batch = batch_of(*structures)
    with torch.no_grad():
        out = experts(batch, tasks)
        start = 0
        for number, structure in enumerate(structures):
            composition = composition_of(structure, 90)[0]
            merged = experts.merged(TASKS[int(tasks[number])], composition)
            alone = merged(structure)
            assert out["energy"][number].item() == pytest.approx(alone["energy"].item(), abs=1e-6)
            end = start + len(structure.pos)
            torch.testing.assert_close(out["forces"][start:end], alone["forces"], rtol=0, atol=1e-6)
            start = end


def test_coefficients_are_those_of_the_cell_in_a_supercell(experts: ExpertNetwork) -> None:
    cell = bulk("NaCl", "rocksalt", a=5.6)
    cell.append("O")  # thirds, which floating-point numbers do not hold
    one, eight = (experts.coefficients(as_data(each), "dft") for each in (cell, cell.repeat((2, 2, 2))))
    assert torch.equal(one, eight)
    assert one.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (one > 0).all()
    formula = composition_from_formula("Na2Cl2O2", 90)
    torch.testing.assert_close(experts.gate.coefficients(formula[None], torch.tensor([0])), one)
    assert not torch.equal(one, experts.coefficients(as_data(cell), "teacher"))
    assert not torch.equal(one, experts.coefficients(water(), "dft"))


def test_a_batch_changes_no_answer(experts: ExpertNetwork) -> None:
    with torch.no_grad():
        together = experts(batch_of(slab(), water(), slab()), torch.tensor([0, 0, 1]))
        torch.testing.assert_close(together["energy"][1:2], experts(water(), "dft")["energy"])


def rotated(pos: Tensor) -> tuple[Tensor, Tensor]:
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=pos.dtype, generator=torch.Generator().manual_seed(3)))[0]
    turn = turn * torch.linalg.det(turn)
    return pos @ turn.T, turn


def test_energies_are_invariant_and_forces_turn() -> None:
    experts = network(dtype=torch.float64, grid_resolution=18)
    structure, turned = cluster(torch.float64), cluster(torch.float64)
    turned.pos, turn = rotated(structure.pos)
    with torch.no_grad():
        here, there = experts(structure, "dft"), experts(turned, "dft")
    plain = network(dtype=torch.float64, grid_resolution=18)
    merged = plain.merged("dft", composition_of(structure, 90)[0])
    with torch.no_grad():
        of_plain = (merged(turned)["forces"] - merged(structure)["forces"] @ turn.T).abs().max()
    error = (there["forces"] - here["forces"] @ turn.T).abs().max()
    assert error <= 1.1 * of_plain + 1e-12
    assert abs(there["energy"] - here["energy"]).item() < 1e-3


def test_the_heads_of_other_tasks_get_no_gradient(experts: ExpertNetwork) -> None:
    trained = copy.deepcopy(experts).train()
    out = trained(batch_of(slab(), water()), "teacher")
    (out["energy"].sum() + out["forces"].square().sum()).backward()
    heads = trained.task_weights()
    used = [stack.grad for stack in heads.values() if stack.grad is not None]
    assert used
    assert all(not grad[0].any() for grad in used)
    assert any(grad[1].any() for grad in used)
    for stack in trained.expert_weights().values():
        assert stack.grad is not None
    assert trained.gate.out.weight.grad.any()


def test_recomputed_groups_have_their_own_coefficients(experts: ExpertNetwork) -> None:
    gradients = []
    for recompute in (False, True):
        trained = copy.deepcopy(experts).train()
        trained.activation_checkpointing = recompute
        out = trained(batch_of(slab(), water(), cluster()), torch.tensor([0, 1, 1]))
        (out["energy"].square().sum() + out["forces"].square().sum()).backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_kept_matrices_are_made_again_for_other_coefficients(experts: ExpertNetwork) -> None:
    folded = copy.deepcopy(experts)
    folded.fold_weights()
    with torch.no_grad():
        for structure, task in ((slab(), "dft"), (water(), "dft"), (slab(), "teacher"), (slab(), "dft")):
            expected, found = experts(structure, task), folded(structure, task)
            torch.testing.assert_close(found["forces"], expected["forces"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["energy"], expected["energy"], rtol=1e-4, atol=1e-5)


def test_threads_wait_for_each_other(experts: ExpertNetwork) -> None:
    structures = [slab(), water(), cluster()]
    with torch.no_grad():
        expected = [experts(each, "dft")["forces"] for each in structures]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            found[number] = [experts(structures[number], "dft")["forces"] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2]  # no thread ended with an error
    for number, answers in found.items():
        for answer in answers:
            torch.testing.assert_close(answer, expected[number])


def test_some_experts_have_scaled_coefficients(experts: ExpertNetwork) -> None:
    composition = composition_of(slab(), 90)[0]
    c = experts.gate.coefficients(composition[None], torch.tensor([0]))[0]
    kept = [3, 1]
    merged = experts.merged("dft", composition, kept).state_dict()
    for name, stack in experts.expert_weights().items():
        share = c[kept] / c[kept].sum()
        torch.testing.assert_close(merged[name], (share[0] * stack[3] + share[1] * stack[1]).detach())


def test_experts_start_around_the_plain_weight() -> None:
    plain = random_model(small_config(num_layers=1))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    experts = ExpertNetwork(plain, ExpertSettings(num_experts=3, spread=0.1), ["one"])
    for name, stack in experts.expert_weights().items():
        torch.testing.assert_close(stack.mean(0), before[name], rtol=1e-5, atol=1e-6)
        rms = (stack - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
        assert 0.05 < rms < 0.12
    names = set(experts.expert_weights())
    assert {"blocks.0.ga.so2_conv_1.fc_m0.weight", "blocks.0.ffn.so3_linear_1.weight"} <= names
    assert not any(name.startswith("energy_block") or name.endswith("bias") for name in names)


def test_networks_of_all_kinds_have_experts() -> None:
    for changes in ({"use_swiglu_s2_act": True}, {"forces": "none"}, {"forces": "gradient"}):
        other = network(num_experts=2, **changes)
        composition = composition_of(slab(), 90)[0]
        found = other(slab(), "teacher")
        expected = other.merged("teacher", composition)(slab())
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_bad_input_gets_one_sentence(experts: ExpertNetwork) -> None:
    with pytest.raises(InputError, match="no task 'pbe': the experts know dft, teacher"):
        experts(slab(), "pbe")
    with pytest.raises(InputError, match="need a task each"):
        experts(slab())
    with pytest.raises(InputError, match="number 5"):
        experts(slab(), torch.tensor([5]))
    with pytest.raises(InputError, match="number -1"):
        experts(batch_of(slab(), water()), torch.tensor([1, -1]))
    with pytest.raises(InputError, match="need a task each"):
        experts(slab(), torch.tensor([0.7]))
    used = network()
    for _ in range(2):
        with pytest.raises(InputError, match="own forward pass alone"), torch.no_grad():
            used.network(slab())
        with torch.no_grad():
            used(slab(), "dft")  # leaves no coefficients behind for other structures
    with pytest.raises(InputError, match="2 or more experts"):
        ExpertNetwork(random_model(small_config(num_layers=1)), ExpertSettings(num_experts=1), ["one"])
    with pytest.raises(InputError, match="at least 0"):
        ExpertSettings(num_experts=-2)
    with pytest.raises(InputError, match="name some of 0 to 3"):
        experts.merged("dft", composition_of(slab(), 90)[0], [4])
    for text in ("", "Xx3", "Cu3(", "Lr200Og"):
        with pytest.raises(InputError, match="composition"):
            composition_from_formula(text, 90)
    other = copy.deepcopy(experts)
    other.backend = "compile"
    with pytest.raises(InputError, match="compile"):
        other.check_backend()
