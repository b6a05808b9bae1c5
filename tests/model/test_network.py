"""Behaviour of the whole network, whatever its weights."""

import copy

import pytest
import torch
from ase import Atoms
from model_helpers import (
    as_data,
    batch_of,
    cluster,
    far_apart,
    lone_atom,
    loss_of,
    random_model,
    slab,
    small_config,
    water,
)
from torch import Tensor

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError

VARIANTS = {
    "default": {},
    "gate": {"use_gate_act": True, "use_grid_mlp": False, "norm_type": "rms_norm_sh"},
    "plain S2": {"use_sep_s2_act": False, "use_attn_renorm": False, "norm_type": "layer_norm"},
    "S2 feed-forward": {"use_grid_mlp": False, "share_atom_edge_embedding": True},
    "shared radial": {"use_m_share_rad": True, "use_atom_edge_embedding": False},
    "mmax 0": {"mmax": 0},
    "mmax = lmax": {"mmax": 2, "grid_resolution": None},
    "lmax 1": {"lmax": 1, "mmax": 1},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def gradients(model: EquiformerV2) -> list[Tensor]:
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


@variants
def test_two_calls_have_equal_bits(changes: dict[str, object]) -> None:
    model, batch = random_model(small_config(**changes)).train(), batch_of(slab(), water())
    first, second = model(batch), model(batch)
    assert torch.equal(first["energy"], second["energy"])
    assert torch.equal(first["forces"], second["forces"])
    loss_of(first).backward()
    grads = gradients(model)
    loss_of(second).backward()
    for a, b in zip(grads, gradients(model), strict=True):
        assert torch.equal(a, b)


@variants
def test_every_trainable_parameter_matters_and_no_frozen_one_does(changes: dict[str, object]) -> None:
    model, batch = random_model(small_config(**changes), torch.float64), batch_of(slab(torch.float64))
    out = model(batch)
    loss_of(out).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    # Degrees that a head leaves unread, within tensors that it does read in part, are not named here.
    assert silent == []
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.add_(1.0)
        changed = model(batch)
    assert torch.equal(changed["energy"], out["energy"])
    assert torch.equal(changed["forces"], out["forces"])


def test_a_structure_does_not_see_the_others_of_its_batch() -> None:
    model = random_model(dtype=torch.float64)
    parts = [slab, water, lone_atom, far_apart]
    with torch.no_grad():
        for sequence in ([0, 1, 2, 3], [3, 2, 0, 1, 0]):
            structures = [parts[k](torch.float64) for k in sequence]
            together = model(batch_of(*structures))
            forces = together["forces"].split([s.num_nodes for s in structures])
            for k, structure in enumerate(structures):
                alone = model(batch_of(structure))
                torch.testing.assert_close(alone["energy"][0], together["energy"][k], rtol=1e-12, atol=1e-13)
                torch.testing.assert_close(alone["forces"], forces[k], rtol=1e-12, atol=1e-13)


def test_a_single_structure_needs_no_batch() -> None:
    model = random_model()
    alone, batched = model(slab()), model(batch_of(slab()))
    assert torch.equal(alone["energy"], batched["energy"])
    assert torch.equal(alone["forces"], batched["forces"])


@variants
def test_atoms_without_neighbours(changes: dict[str, object]) -> None:
    model = random_model(small_config(**changes))
    out = model(batch_of(lone_atom(), far_apart()))
    assert model.build_graph(batch_of(lone_atom(), far_apart())).edge_index.shape == (2, 0)
    assert torch.isfinite(out["energy"]).all()
    assert not out["forces"].any()
    loss_of(out).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    hydrogen = model(batch_of(as_data(Atoms("H", positions=[[0.0, 0.0, 0.0]]))))
    # Energies add up.
    torch.testing.assert_close(out["energy"][1], out["energy"][0] + hydrogen["energy"][0])


def test_energy_of_a_copy_far_away_doubles() -> None:
    model = random_model(dtype=torch.float64)
    one = water(torch.float64)
    two = one.clone()
    two.pos = torch.cat((one.pos, one.pos + 100.0))
    two.atomic_numbers = one.atomic_numbers.repeat(2)
    two.natoms = 6
    with torch.no_grad():
        single, double = model(one), model(two)
    torch.testing.assert_close(double["energy"], 2 * single["energy"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(double["forces"], single["forces"].repeat(2, 1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("number", [90, 118, -1])
def test_unknown_elements(number: int) -> None:
    model, data = random_model(), slab()
    data.atomic_numbers[5] = number
    with pytest.raises(InputError, match=rf"atom 5 of the structure has atomic number {number}.*= 90"):
        model(data)
    with pytest.raises(InputError, match=rf"atom 5 of structure 1 of the batch has .* {number}") as error:
        model(batch_of(slab(), data))
    assert error.value.structure == 1


def test_positions_that_are_not_numbers() -> None:
    data = slab()
    data.pos[3, 1] = float("nan")
    with pytest.raises(InputError, match="atom 3"):
        random_model()(data)


def test_activation_checkpointing_changes_no_gradient() -> None:
    """With dropout on: the recomputation draws the same masks."""
    config = small_config(alpha_drop=0.2, drop_path_rate=0.2, proj_drop=0.1)
    model, batch = random_model(config, torch.float64).train(), batch_of(slab(torch.float64))
    results = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        out = model(batch)
        loss_of(out).backward()
        results.append([out["energy"], out["forces"], *gradients(model)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_energy_only() -> None:
    model = random_model(small_config(forces="none"))
    assert set(model(slab())) == {"energy"}
    assert not [name for name, _ in model.named_parameters() if name.startswith("force_block")]


def test_outputs_have_the_type_of_the_weights() -> None:
    out = random_model(dtype=torch.float64)(slab())
    assert {value.dtype for value in out.values()} == {torch.float64}
    assert {value.dtype for value in random_model()(slab(torch.float64)).values()} == {torch.float32}


def test_bfloat16_stays_close_and_has_finite_gradients() -> None:
    model, batch = random_model(), batch_of(slab(), water())
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    loss_of(rounded).backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model))
    for key, value in exact.items():
        assert (rounded[key] - value).norm() <= 0.05 * value.norm(), key


def test_the_state_holds_parameters_alone() -> None:
    model = random_model()
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_conversion_keeps_the_constants_exact() -> None:
    batch = batch_of(slab(torch.float64))
    straight = EquiformerV2(small_config()).double().eval()
    detour = copy.deepcopy(straight).to(torch.bfloat16).double()
    detour.load_state_dict(straight.state_dict())
    with torch.no_grad():
        assert torch.equal(straight(batch)["forces"], detour(batch)["forces"])
    constants = dict(detour.named_buffers())
    assert len(constants) > 3
    for name, value in straight.named_buffers():
        assert torch.equal(value, constants[name]), name


def test_no_global_state_is_touched() -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state()
    model = random_model()
    state = torch.random.get_rng_state()
    model(slab())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before[:2]


@pytest.mark.parametrize("grid", [8, 14])
def test_derivatives_with_respect_to_positions(grid: int) -> None:
    """Exact through frames, graph and grids: they equal finite differences, poles included."""
    model = random_model(small_config(grid_resolution=grid), torch.float64)
    # Edges along all axes, in an irregular molecule; none near the border between the charts of the frames.
    points = [[0.0, 0, 0], [0, 1.1, 0], [1.3, 0, 0], [0, 0, 1.2], [0, -1.4, 0], [-0.2, 0.3, -1.3]]
    data = as_data(Atoms("OCHHHN", positions=points), torch.float64)

    def outputs(pos: Tensor) -> Tensor:
        moved = data.clone()
        moved.pos = pos
        out = model(moved)
        return torch.cat((out["energy"], out["forces"].flatten()[[0, 4, 8]]))

    pos = data.pos.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    values = outputs(pos)
    for k in range(len(values)):
        (grad,) = torch.autograd.grad(values[k], pos, retain_graph=True)
        assert torch.isfinite(grad).all()
        for _ in range(3):
            direction = torch.randn(pos.shape, generator=generator, dtype=torch.float64)
            step = 1e-5 * direction
            with torch.no_grad():
                difference = (outputs(data.pos + step)[k] - outputs(data.pos - step)[k]) / 2e-5
            expected = (grad * direction).sum()
            assert (difference - expected).abs() <= 1e-7 * grad.norm(), k


def test_edges_along_every_axis_have_finite_gradients() -> None:
    """A perfect cubic lattice in float32: every edge is along an axis or a diagonal."""
    model = random_model(small_config(max_neighbors=30))
    cube = as_data(Atoms("Cu", cell=[2.5, 2.5, 2.5], pbc=True))
    cube.pos = cube.pos.repeat(2, 1) + torch.tensor([[0.0, 0, 0], [1.25, 1.25, 1.25]])
    cube.atomic_numbers, cube.natoms = torch.tensor([29, 13]), 2
    cube.pos.requires_grad_()
    out = model(cube)
    assert torch.isfinite(out["forces"]).all()
    loss_of(out).backward()
    assert torch.isfinite(cube.pos.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_network_can_be_trained_on_the_derivative_of_its_energy() -> None:
    """Second derivatives with respect to positions and parameters, against finite differences."""
    model, data = random_model(dtype=torch.float64), cluster(torch.float64)
    data.pos.requires_grad_()

    def squared_force(keep_graph: bool) -> Tensor:
        (grad,) = torch.autograd.grad(model(data)["energy"].sum(), data.pos, create_graph=keep_graph)
        return grad.square().sum()

    squared_force(True).backward()
    for name in ("sphere_embedding.weight", "blocks.0.ga.alpha_dot", "blocks.0.ffn.grid_mlp.2.weight"):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        direction = parameter.grad / parameter.grad.norm()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
            values.append(squared_force(False))
            with torch.no_grad():
                parameter.sub_(step * direction)
        difference = (values[0] - values[1]).item() / 2e-5
        assert difference == pytest.approx(parameter.grad.norm().item(), rel=1e-6), name
