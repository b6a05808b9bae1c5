"""EquiformerV3's switches: their formulas, symmetries and smoothness."""

import dataclasses
from typing import Any

import pytest
import torch
from ase import Atoms
from model_helpers import ALL_OF_V3 as ALL
from model_helpers import (
    V3_SWITCHES,
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
from torch import Tensor, nn

from equiformer2 import EquiformerV2
from equiformer2.kernels import chunks, grid_product
from equiformer2.kernels.backend import TORCH
from equiformer2.model.activation import SwiGLUS2Activation
from equiformer2.model.feed_forward import SwiGLUFeedForwardNetwork
from equiformer2.model.norm import RMSNorm
from equiformer2.model.radial import smooth_envelope
from equiformer2.model.so3 import S2Grid
from equiformer2.model.so3.grid import m_major_order
from equiformer2.symmetry import SYMMETRIES, assert_symmetries, check_symmetries

F64 = torch.float64
EACH = pytest.mark.parametrize("changes", [*V3_SWITCHES.values(), ALL], ids=[*V3_SWITCHES, "all"])
# Enough points for products of two functions: more than 3 lmax and more than 3 mmax.
EXACT_GRID = {"attn": (6, 7), "ffn": (8, 7)}
SHELLS = {"mmax": 2, "max_neighbors": 20, "enforce_max_neighbors_strictly": False}


def test_all_of_them() -> None:
    assert small_config().with_v3() == small_config(**ALL)


# --- formulas ---------------------------------------------------------------------------------------------


def test_envelope() -> None:
    x = torch.linspace(0, 1.5, 301, dtype=F64, requires_grad=True)
    value = smooth_envelope(4.0 * x, 4.0)
    polynomial = 1 - 21 * x**5 + 35 * x**6 - 15 * x**7
    torch.testing.assert_close(value, torch.where(x < 1, polynomial, 0.0), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    beyond = x >= 1 - 1e-9
    for derivative, largest_step in ((value, 0.02), (slope, 0.1), (bend, 1.5)):
        assert not derivative[beyond].any()
        assert derivative.diff().abs().max() < largest_step  # no jump anywhere
    assert float(smooth_envelope(torch.tensor(3.9999999), 4.0)) >= 0


def test_attention_weights() -> None:
    """env * env exp(logit) / sum of env exp(logit), over the edges into each atom."""
    model = random_model(small_config(smooth_cutoff=True), F64)
    batch = batch_of(cluster(F64))
    graph = model.build_graph(batch)
    found, logits = [], []
    layer = model.blocks[0].ga
    layer.alpha_dropout.register_forward_hook(lambda m, a, out: found.append(out))
    plain = layer._logits
    layer._logits = lambda *inputs: logits.append(plain(*inputs)) or logits[-1]
    with torch.no_grad():
        model(batch)
    envelope = smooth_envelope(graph.distances, 6.0)[:, None]
    assert 0.01 < float(envelope.min()) < 0.9
    factors = envelope * torch.exp(logits[0])
    target = graph.edge_index[1]
    total = torch.zeros(len(batch.pos), 2, dtype=F64).index_add(0, target, factors)
    torch.testing.assert_close(found[0], envelope * factors / total[target], rtol=1e-10, atol=1e-12)


def test_swiglu_activation() -> None:
    grid = S2Grid(2, 1, (6, 4), m_major_order(2, 1)).double()
    rows = grid.to_grid.shape[1]
    x, gates = torch.randn(5, rows, 6, dtype=F64), torch.randn(5, 9, dtype=F64)
    found = SwiGLUS2Activation(grid).of_columns(torch.cat((gates, x.flatten(1)), dim=1), 3, TORCH)
    first, second = (torch.einsum("gr,brc->bgc", grid.to_grid, part) for part in (x[..., :3], x[..., 3:]))
    expected = torch.einsum("rg,bgc->brc", grid.from_grid, first * second)
    expected = expected * torch.sigmoid(gates[:, None, 6:])
    expected[:, 0] += nn.functional.silu(gates[:, :3]) * gates[:, 3:6]
    torch.testing.assert_close(found, expected)
    some = SwiGLUS2Activation(grid).of_columns(torch.cat((gates, x.flatten(1)), dim=1), 3, TORCH, rows=2)
    torch.testing.assert_close(some, expected[:, :2])


def test_feed_forward_network_on_grid_points() -> None:
    """As EquiformerV3 writes it, with both linear maps and the gate on the grid points."""
    config = small_config(**ALL)
    network = random_model(config, F64).blocks[0].ffn
    assert isinstance(network, SwiGLUFeedForwardNetwork)
    x = torch.randn(4, 9, 8, dtype=F64)
    points = torch.einsum("gk,nkc->ngc", network.grid.to_grid, network.so3_linear_1(x))
    first, second = (points @ network.grid_linear_1.weight.t()).chunk(2, dim=2)
    gate = torch.sigmoid(network.gating_linear(x[:, :1]))
    points = (first * gate * second) @ network.grid_linear_2.weight.t()
    hidden = torch.einsum("kg,ngc->nkc", network.grid.from_grid, points)
    a, b = network.scalar_linear(x[:, 0]).chunk(2, dim=1)
    hidden[:, 0] += nn.functional.silu(a) * b
    torch.testing.assert_close(network(x, TORCH), network.so3_linear_2(hidden))


def test_product_of_functions_and_its_derivatives() -> None:
    grid = S2Grid(2, 2, (8, 7), list(range(9))).double()
    pairs = torch.randn(3, 9, 4, dtype=F64, requires_grad=True)

    def product(pairs: Tensor) -> Tensor:
        return grid_product(pairs, grid.to_grid, grid.from_grid, TORCH)

    assert torch.autograd.gradcheck(product, pairs)
    assert torch.autograd.gradgradcheck(product, pairs)
    # So many channels that every atom is a chunk of its own.
    channels = 2 * chunks.CPU_POINT_BYTES // (8 * 56)
    wide = torch.randn(3, 9, channels, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(product(wide).square().sum(), wide)
    for part in (slice(0, 2), slice(channels // 2, channels // 2 + 2)):
        assert slope[:, :, part].any()
    narrow = torch.cat((wide[:, :, :2], wide[:, :, channels // 2 : channels // 2 + 2]), dim=2).detach()
    narrow.requires_grad_()
    (expected,) = torch.autograd.grad(product(narrow).square().sum(), narrow)
    torch.testing.assert_close(product(wide)[:, :, :2], product(narrow))
    torch.testing.assert_close(slope[:, :, :2], expected[:, :, :2])


def test_merged_layer_norm() -> None:
    """Scalars centred, then one mean square of all degrees, each degree counting equally."""
    norm = RMSNorm(2, 4).double()
    x = torch.randn(3, 9, 4, dtype=F64)
    centred = torch.cat((x[:, :1] - x[:, :1].mean(2, keepdim=True), x[:, 1:]), dim=1)
    by_degree = [centred[:, l * l : (l + 1) ** 2].square().mean((1, 2)) for l in range(3)]
    expected = centred / (sum(by_degree) / 3 + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(norm(x), expected)


def test_radial_weights_per_degree_commute_with_the_rotation() -> None:
    """EquiformerV3 multiplies before the rotation: 2 C (lmax + 1) weights, one per degree."""
    layer = random_model(small_config(use_m_share_rad=True)).blocks[0].ga
    assert layer.rad_func.net[6].out_features == 2 * 8 * 3
    assert layer.so2_conv_1.rad_func is None


# --- symmetries -------------------------------------------------------------------------------------------


@pytest.mark.slow
@EACH
def test_symmetries(changes: dict[str, Any]) -> None:
    config = small_config(**({"grid_resolution": 36} | SHELLS | changes))
    tolerance = dict.fromkeys(SYMMETRIES, 1e-11) | {"rotation": 1e-6}
    with torch.no_grad():
        assert_symmetries(
            random_model(config, F64), [slab(F64), water(F64), cluster(F64)], tolerance, trials=1
        )


def test_swiglu_is_strictly_equivariant_on_a_coarse_grid() -> None:
    def rotation_error(**changes: Any) -> float:
        config = small_config(grid_resolution=EXACT_GRID, **SHELLS, **changes)
        with torch.no_grad():
            report = check_symmetries(
                random_model(config, F64), [cluster(F64)], symmetries=["rotation"], trials=2
            )
        return report.errors["rotation"].forces_max

    assert rotation_error(**ALL) < 1e-11
    assert rotation_error() > 1e-6


# --- smoothness -------------------------------------------------------------------------------------------

CUTOFF = 4.0


def energy_and_slope(model: EquiformerV2, distance: float, others: bool) -> tuple[float, float]:
    """Energy, and its derivative as the last atom moves away from the first one."""
    near = [[0.0, 0.0, 0.0], [0.0, 1.1, 0.2], [-0.9, -0.3, 0.4]] if others else [[0.0, 0.0, 0.0]]
    data = as_data(Atoms([29, 8, 1, 7][-len(near) - 1 :], positions=[*near, [0.0, 0.0, 0.0]]), F64)
    direction = torch.tensor([0.6, 0.48, 0.64], dtype=F64)
    distance_ = torch.tensor(distance, dtype=F64, requires_grad=True)
    data.pos = torch.cat((data.pos[:-1], (distance_ * direction)[None]))
    energy = model(batch_of(data))["energy"].sum()
    slope = torch.autograd.grad(energy, distance_, allow_unused=True)[0]
    return energy.item(), 0.0 if slope is None else slope.item()


@pytest.mark.parametrize("others", [True, False], ids=["one edge of several", "the only edge"])
@pytest.mark.parametrize("changes", [{"smooth_cutoff": True}, ALL], ids=["smooth cutoff", "all"])
def test_energy_across_the_cutoff_is_continuously_differentiable(
    changes: dict[str, Any], others: bool
) -> None:
    def jumps(**switches: Any) -> tuple[float, float]:
        # No atom has more neighbours than this: the neighbour limit would make jumps of its own.
        config = small_config(max_radius=CUTOFF, max_neighbors=10, avg_num_nodes=1.0, **switches)
        model = random_model(config, F64)
        inside = energy_and_slope(model, CUTOFF - 1e-6, others)
        outside = energy_and_slope(model, CUTOFF + 1e-6, others)
        return abs(outside[0] - inside[0]), abs(outside[1] - inside[1])

    energy, slope = jumps(**changes)
    assert energy < 1e-6
    assert slope < 1e-5
    energy, slope = jumps(**changes | {"smooth_cutoff": False})
    assert energy > 1e-3
    assert slope > 1e-3


def test_energy_curve_has_no_kink() -> None:
    """Second differences of a fine curve through the cutoff go with the square of the step."""
    config = small_config(max_radius=CUTOFF, max_neighbors=10, avg_num_nodes=1.0, **ALL)
    model = random_model(config, F64)

    def largest(step: float) -> float:
        energies = [energy_and_slope(model, CUTOFF + step * k, True)[0] for k in range(-5, 6)]
        return float(torch.tensor(energies, dtype=F64).diff(n=2).abs().max())

    assert largest(0.004) < 0.4 * largest(0.008)
    assert largest(0.002) < 0.4 * largest(0.004)


@EACH
def test_no_neighbours(changes: dict[str, Any]) -> None:
    model = random_model(small_config(max_radius=3.0, **changes))
    out = model(batch_of(lone_atom(), far_apart(), water()))
    grads = torch.autograd.grad(loss_of(out), [p for p in model.parameters() if p.requires_grad])
    assert all(bool(torch.isfinite(value).all()) for value in (*out.values(), *grads))
    assert not out["forces"][:3].any()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_edges_at_the_cutoff_count_for_nothing(backend: str) -> None:
    """All envelopes of an atom zero: the same as without edges, and derivatives are finite."""
    model = random_model(small_config(max_radius=0.5, **ALL), F64)
    model.backend = backend
    batch = batch_of(water(F64), cluster(F64))
    batch.pos.requires_grad_()
    further = dataclasses.replace(model.config, max_radius=6.0)
    graph = EquiformerV2(further).build_graph(batch)
    assert graph.edge_index[1].bincount().min() >= 2
    out = model(batch, graph=graph)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss_of(out), [batch.pos, *parameters], allow_unused=True)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None)
    bare = model(batch)
    torch.testing.assert_close(out["energy"], bare["energy"])
    assert not out["forces"].any()
