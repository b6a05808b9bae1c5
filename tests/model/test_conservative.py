"""Forces and stress as derivatives of the energy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from model_helpers import as_data, batch_of, cluster, far_apart, lone_atom, random_model, small_config, water
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch_geometric.data import Data

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph
from equiformer2.kernels.backend import BACKENDS, Features
from equiformer2.model.output_request import OutputRequest
from equiformer2.model.so3 import EdgeFrames

GRADIENT = {"forces": "gradient", "stress": True, "max_neighbors": 1000}
# No grid, so that energies do not depend on the angle of a frame about its edge.
GATE = {"use_gate_act": True, "use_grid_mlp": False}


def gradient_model(**changes: object) -> EquiformerV2:
    return random_model(small_config(**(GRADIENT | changes)), torch.float64)


def crystal() -> Data:
    """Four atoms in a skewed cell, nothing symmetric."""
    cell = [[3.9, 0.2, -0.1], [0.3, 3.4, 0.4], [-0.5, 0.1, 4.3]]
    places = [[0.02, 0.05, 0.01], [0.48, 0.55, 0.04], [0.52, 0.03, 0.46], [0.07, 0.49, 0.56]]
    return as_data(Atoms("CuPdOPt", scaled_positions=places, cell=cell, pbc=True), torch.float64)


def with_fixed_edges(model: EquiformerV2, data: Data) -> Callable[[Tensor, Tensor], Tensor]:
    """Energies `[S]` of positions `[S, N, 3]` and cells `[S, 3, 3]`, always with the edges of `data`."""
    graph, num_atoms = model.build_graph(data), len(data.pos)
    source, target = graph.edge_index

    def energies(pos: Tensor, cell: Tensor) -> Tensor:
        count = len(pos)
        shift = graph.cell_offsets.to(pos.dtype) @ cell
        vectors = (pos[:, source] - pos[:, target] + shift).flatten(0, 1)
        first = num_atoms * torch.arange(count).repeat_interleave(len(source))
        edge_index = graph.edge_index.repeat(1, count) + first
        offsets = graph.cell_offsets.repeat(count, 1)
        moved = RadiusGraph(edge_index, offsets, vectors, vectors.norm(dim=1))
        with torch.no_grad():
            return model(batch_of(*[data] * count), graph=moved)["energy"]

    return energies


def central_differences(energies: Callable[[Tensor], Tensor], directions: Tensor, step: float) -> Tensor:
    """Derivatives along `directions [D, …]`, to fourth order, from energies of displacements `[S, …]`."""
    at = [energies(size * step * directions) for size in (1, -1, 2, -2)]
    return (8 * (at[0] - at[1]) - (at[2] - at[3])) / (12 * step)


def numerical_forces(model: EquiformerV2, data: Data) -> Tensor:
    energies, count = with_fixed_edges(model, data), data.pos.numel()
    cells = data.cell.expand(count, -1, -1)
    directions = torch.eye(count, dtype=torch.float64).view(count, -1, 3)
    slope = central_differences(lambda moved: energies(data.pos + moved, cells), directions, 1e-4)
    return -slope.view_as(data.pos)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Relative to the largest component."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lmax": 3, "mmax": 2},
        GATE,
        {"use_sep_s2_act": False, "use_attn_renorm": False, "norm_type": "rms_norm_sh"},
        {"norm_type": "layer_norm", "use_m_share_rad": True, "use_grid_mlp": False},
        {"share_atom_edge_embedding": True, "grid_resolution": None},
    ],
    ids=["paper", "m = 2", "gate", "plain S2", "no grid network", "smallest grid"],
)
@pytest.mark.parametrize(
    "structure",
    [
        pytest.param(crystal, id="crystal", marks=pytest.mark.slow),
        pytest.param(lambda: cluster(torch.float64), id="cluster"),
    ],
)
def test_forces_are_minus_the_derivative_of_the_energy(
    structure: Callable[[], Data], changes: dict[str, object]
) -> None:
    model, data = gradient_model(**changes), structure()
    with torch.no_grad():
        out = model(data)
    assert_close(out["forces"], numerical_forces(model, data))
    assert model.force_block is None
    assert not [name for name, _ in model.named_parameters() if name.startswith("force_block")]


# Where the frames are special: both polar axes, the border between their charts (sine 1/2), and beside them.
DIRECTIONS = {
    "pole": (0.0, 1.0, 0.0),
    "other pole": (0.0, -1.0, 0.0),
    "second pole": (1.0, 0.0, 0.0),
    "third axis": (0.0, 0.0, 1.0),
    "beside a pole": (1e-8, 1.0, 1e-9),
    "near a pole": (1e-3, 1.0, -1e-3),
    "near the second pole": (1.0, 1e-6, -1e-6),
    "inside the border": (0.5 - 2e-3, 0.75**0.5, 0.0),
    "outside the border": (0.5 + 2e-3, 0.75**0.5, 0.0),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("changes", [{"lmax": 3, "mmax": 2}, GATE], ids=["S2", "gate"])
def test_forces_where_edge_frames_are_special(
    changes: dict[str, object], direction: tuple[float, float, float]
) -> None:
    along = np.array(direction) / np.linalg.norm(direction)
    across = np.cross(along, [0.3, 0.2, -0.9])
    positions = [[0, 0, 0], 1.7 * along, 3.9 * along, 1.9 * across / np.linalg.norm(across) + 0.8 * along]
    data = as_data(Atoms("CuOPtC", positions=positions), torch.float64)
    model = gradient_model(**changes)
    with torch.no_grad():
        forces = model(data)["forces"]
    assert_close(forces, numerical_forces(model, data))


def test_a_perfect_lattice_has_finite_derivatives_of_both_orders() -> None:
    """Every edge is along an axis or a diagonal, and the tensors of every atom vanish by symmetry."""
    places = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    data = as_data(Atoms("Cu4", scaled_positions=places, cell=[3.6, 3.6, 3.6], pbc=True))
    model = random_model(small_config(**GRADIENT))
    out = model(data)
    assert torch.isfinite(out["forces"]).all()
    assert torch.isfinite(out["stress"]).all()
    (out["forces"].square().sum() + out["stress"].square().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_stress_is_the_derivative_by_strain() -> None:
    model, data = gradient_model(lmax=3, mmax=2), crystal()
    with torch.no_grad():
        stress = model(data)["stress"][0]
    energies, identity = with_fixed_edges(model, data), torch.eye(3, dtype=torch.float64)
    unit = torch.eye(9, dtype=torch.float64).view(9, 3, 3)
    strains = 0.5 * (unit + unit.transpose(1, 2))

    def strained(strain: Tensor) -> Tensor:
        return energies(data.pos @ (identity + strain), data.cell @ (identity + strain))

    expected = central_differences(strained, strains, 1e-4).view(3, 3) / data.cell[0].det().abs()
    assert_close(stress, expected)
    assert torch.equal(stress, stress.T)


def test_structures_of_a_batch_do_not_see_each_other() -> None:
    model, structures = gradient_model(), [crystal(), water(torch.float64), far_apart(torch.float64)]
    structures += [lone_atom(torch.float64), crystal()]
    with torch.no_grad():
        together = model(batch_of(*structures))
        alone = [model(structure) for structure in structures]
    for name in ("energy", "forces", "stress"):
        expected = torch.cat([out[name] for out in alone])
        assert torch.allclose(together[name], expected, rtol=1e-11, atol=1e-13, equal_nan=True), name
    for structure, forces in zip(structures, together["forces"].split([4, 3, 2, 1, 4]), strict=True):
        assert forces.sum(0).abs().max() <= 1e-12 * forces.abs().max().clamp(min=1), structure
    assert not together["forces"][-5].any(), "no neighbour, no force"
    # Without a volume there is no stress.
    assert together["stress"].isnan().flatten(1).any(1).tolist() == [False, True, True, True, False]


def test_forces_and_stress_turn_with_the_structure() -> None:
    model, data = gradient_model(lmax=3, mmax=2, **GATE), crystal()
    turn = torch.tensor(Rotation.random(random_state=3).as_matrix())
    turned = data.clone()
    turned.pos, turned.cell = data.pos @ turn.T, data.cell @ turn.T
    with torch.no_grad():
        before, after = model(data), model(turned)
    assert_close(after["energy"], before["energy"], 1e-12)
    assert_close(after["forces"], before["forces"] @ turn.T, 1e-10)
    assert_close(after["stress"], turn @ before["stress"] @ turn.T, 1e-10)


def test_a_supercell_has_the_forces_and_the_stress_of_its_cell() -> None:
    model, data = gradient_model(), crystal()
    atoms = Atoms(data.atomic_numbers.numpy(), data.pos.numpy(), cell=data.cell[0].numpy(), pbc=True)
    with torch.no_grad():
        one, many = model(data), model(as_data(atoms.repeat((2, 1, 2)), torch.float64))
    assert_close(many["energy"], 4 * one["energy"], 1e-12)
    assert_close(many["forces"], one["forces"].repeat(4, 1), 1e-10)
    assert_close(many["stress"], one["stress"], 1e-10)


def test_the_energy_jumps_where_frames_turn_by_as_much_as_the_grid_aliases() -> None:
    """Across the border between the two charts of the frames, which has forces on either side."""
    border = np.arcsin(0.5)
    cases: dict[str, dict[str, object]] = {
        "gate": {"lmax": 3, **GATE},
        "coarse": {"lmax": 3, "grid_resolution": 8},
        "paper": {"lmax": 6, "grid_resolution": 18},
    }
    jumps = {}
    for name, changes in cases.items():
        model, energies = gradient_model(mmax=2, **changes), []
        for angle in (border - 1e-10, border + 1e-10):
            at = 1.8 * np.array([0.6 * np.sin(angle), np.cos(angle), 0.8 * np.sin(angle)])
            data = as_data(Atoms("CuOC", positions=[[0, 0, 0], at, [0.3, 0.4, 1.9]]), torch.float64)
            with torch.no_grad():
                energies.append(model(data)["energy"].item())
        jumps[name] = abs(energies[1] - energies[0]) / abs(energies[0])
    assert jumps["gate"] < 1e-9, jumps
    assert jumps["gate"] < jumps["paper"] < 1e-5, jumps
    assert jumps["paper"] < jumps["coarse"] < 1e-3, jumps


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_forces_come_where_gradients_are_off(mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
    data, model = crystal(), gradient_model()
    expected = gradient_model()(data)
    with mode():
        batch = batch_of(crystal())
        out = model(batch)
        again = model(batch, graph=model.build_graph(batch))
    for name in ("energy", "forces", "stress"):
        assert expected[name].requires_grad
        assert not out[name].requires_grad
        assert_close(out[name], expected[name].detach(), 1e-12)
        assert torch.equal(again[name], out[name])
    # What that mode has cached can still be differentiated.
    gradient_model()(data)["forces"].sum().backward()


def test_older_configurations_keep_their_meaning() -> None:
    assert ModelConfig.from_dict({"regress_forces": True}) == ModelConfig()
    assert ModelConfig.from_dict({"regress_forces": False}) == ModelConfig(forces="none")
    both = {"regress_forces": True, "forces": "gradient"}
    assert ModelConfig.from_dict(both) == ModelConfig(forces="gradient")
    config = ModelConfig(forces="gradient", stress=True)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match=r"regress_forces = False contradicts model\.forces = 'gradient'"):
        ModelConfig.from_dict({"regress_forces": False, "forces": "gradient"})
    with pytest.raises(InputError, match=r"model\.stress needs model\.forces: gradient, not direct"):
        ModelConfig(stress=True)
    with pytest.raises(InputError, match=r"model\.forces = 'energy': must be one of direct, gradient, none"):
        ModelConfig(forces="energy")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"torch"}))
def test_backends_without_these_derivatives_are_refused_before_the_first_step(backend: str) -> None:
    model = gradient_model()
    assert model.resolve_backend().name == "torch"
    model.backend = backend
    for call in (model.check_backend, lambda: model(crystal())):
        with pytest.raises(InputError, match=f"the backend '{backend}' .* use the backend 'auto' or 'torch'"):
            call()


def test_what_would_break_the_derivative_is_refused() -> None:
    model, data = gradient_model(), crystal()
    every = [torch.ones(4, dtype=torch.bool), None]
    with pytest.raises(InputError, match="the gradient of its energy, which jumps"):
        model(data, active=every)
    with pytest.raises(InputError, match="which jumps"):
        model.check_backend(Features(routing=True))
    graph = model.build_graph(data)
    frames = EdgeFrames.from_vectors(graph.vectors, graph.distances, 2, 1)
    with pytest.raises(InputError, match="the network's own edge frames"):
        model(data, frames=frames)
    with pytest.raises(InputError, match="from_edges needs a network with direct forces or none"):
        model.from_edges(data.atomic_numbers, *[torch.zeros(4)] * 5)


def test_output_request_leave_the_values_as_they_are() -> None:
    model, data = gradient_model(), crystal()
    some = torch.tensor([True, False, True, False])
    with torch.no_grad():
        whole = model(data)
        asked = model(data, request=OutputRequest(energy=False, force_atoms=some))
    assert set(asked) == {"forces", "stress"}
    assert torch.equal(asked["forces"], whole["forces"] * some[:, None])
    with pytest.raises(InputError, match="force_atoms must have one true or false per atom"):
        model(data, request=OutputRequest(force_atoms=some[:3]))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
def test_a_loss_of_forces_and_stress_has_exact_parameter_gradients(checkpointing: bool) -> None:
    """Double backward, against finite differences along the gradient of each parameter."""
    model, data = gradient_model(), batch_of(crystal(), cluster(torch.float64))
    model.activation_checkpointing = checkpointing

    def loss() -> Tensor:
        out = model(data)
        stress = out["stress"][:1]
        return out["energy"].square().sum() + out["forces"].square().sum() + stress.square().sum()

    loss().backward()
    names = ["sphere_embedding.weight", "blocks.0.ga.alpha_dot", "blocks.0.ffn.grid_mlp.2.weight"]
    names += ["edge_degree_embedding.rad_func.net.0.weight", "blocks.1.ga.so2_conv_1.so2_m_conv.0.fc.weight"]
    for name in [*names, "energy_block.scalar_mlp.0.weight", "blocks.0.norm_1.affine_weight"]:
        parameter = model.get_parameter(name)
        direction, values = parameter.grad / parameter.grad.norm(), []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(loss().item())
        with torch.no_grad():
            parameter.add_(1e-5 * direction)
        difference = (values[0] - values[1]) / 2e-5
        assert difference == pytest.approx(parameter.grad.norm().item(), rel=1e-6), name
