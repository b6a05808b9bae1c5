"""EquiformerV3's switches: their formulas, symmetries, smoothness, and what stays as it was without them."""

import dataclasses
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.reference import config_from_reference
from equiformer2.errors import InputError
from equiformer2.kernels import chunks, grid_product
from equiformer2.model.activation import SwiGLUS2Activation
from equiformer2.model.norm import RMSNorm
from equiformer2.model.radial import smooth_envelope
from equiformer2.model.requests import OutputRequest
from equiformer2.model.routing import BlockState, Decision
from equiformer2.model.so3 import S2Grid
from equiformer2.model.so3.grid import m_major_order
from equiformer2.model.swiglu_feed_forward import SwiGLUFeedForwardNetwork
from equiformer2.pruning import PruningPlan
from equiformer2.symmetry import SYMMETRIES, assert_symmetries, check_symmetries
from equiformer2.training.run import _NOT_IN_WEIGHTS

F64 = torch.float64
SWITCHES: dict[str, dict[str, Any]] = {
    "smooth cutoff": {"smooth_cutoff": True},
    "merged layer norm": {"norm_type": "rms_norm_sh"},
    "SwiGLU-S2": {"use_swiglu_s2_act": True},
    "per-degree radial weights": {"use_m_share_rad": True},
}
ALL = {key: value for switch in SWITCHES.values() for key, value in switch.items()}
EACH = pytest.mark.parametrize("changes", [*SWITCHES.values(), ALL], ids=[*SWITCHES, "all"])
# Enough points for products of two functions: more than 3 lmax and more than 3 mmax.
EXACT_GRID = {"attn": (6, 7), "ffn": (8, 7)}
SHELLS = {"mmax": 2, "max_neighbors": 20, "enforce_max_neighbors_strictly": False}


def test_all_of_them() -> None:
    assert small_config().with_v3() == small_config(**ALL)
    assert small_config(**ALL).v3_switches == ["smooth_cutoff", "use_swiglu_s2_act"]
    assert not small_config(norm_type="rms_norm_sh", use_m_share_rad=True).v3_switches


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
    layer._logits = lambda scalars: logits.append(plain(scalars)) or logits[-1]
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
    found = SwiGLUS2Activation(grid).of_columns(torch.cat((gates, x.flatten(1)), dim=1), 3)
    first, second = (torch.einsum("gr,brc->bgc", grid.to_grid, part) for part in (x[..., :3], x[..., 3:]))
    expected = torch.einsum("rg,bgc->brc", grid.from_grid, first * second)
    expected = expected * torch.sigmoid(gates[:, None, 6:])
    expected[:, 0] += nn.functional.silu(gates[:, :3]) * gates[:, 3:6]
    torch.testing.assert_close(found, expected)
    some = SwiGLUS2Activation(grid).of_columns(torch.cat((gates, x.flatten(1)), dim=1), 3, rows=2)
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
    torch.testing.assert_close(network(x), network.so3_linear_2(hidden))


def test_product_of_functions_and_its_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CPU_POINT_BYTES", 1)  # one atom at a time
    grid = S2Grid(2, 2, (8, 7), list(range(9))).double()
    pairs = torch.randn(3, 9, 4, dtype=F64, requires_grad=True)

    def product(pairs: Tensor) -> Tensor:
        return grid_product(pairs, grid.to_grid, grid.from_grid)

    assert torch.autograd.gradcheck(product, pairs)
    assert torch.autograd.gradgradcheck(product, pairs)


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
    assert layer.rad_func.output.out_features == 2 * 8 * 3
    assert layer.so2_conv_1.rad_func is None


# --- symmetries -------------------------------------------------------------------------------------------


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


# --- the rest of the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
def test_requested_outputs(pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces:
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 1)
    model = random_model(small_config(max_radius=3.0, **ALL), F64)
    batch = batch_of(slab(F64), lone_atom(F64), cluster(F64))
    wanted = torch.zeros(len(batch.pos), dtype=torch.bool)
    wanted[12:17] = True
    with torch.no_grad():
        dense = model(batch)
        for energy in (True, False):
            out = model(batch, request=OutputRequest(energy, wanted))
            torch.testing.assert_close(out["forces"][wanted], dense["forces"][wanted], rtol=0, atol=1e-12)
            assert not out["forces"][~wanted].any()
            if energy:
                assert torch.equal(out["energy"], dense["energy"])


def test_heads_are_the_whole_layers_rows() -> None:
    """What the heads compute is what all of their layer would give."""
    model = random_model(small_config(**ALL), F64)
    batch = batch_of(cluster(F64))
    head = model.force_block
    assert head is not None
    rows: list[Tensor] = []
    plain = head.vectors
    head.vectors = lambda x, edges: rows.append(head(x, edges)[:, 1:4]) or plain(x, edges)  # type: ignore[method-assign]
    with torch.no_grad():
        out = model(batch)
    torch.testing.assert_close(out["forces"], rows[0].squeeze(2))


class _FewEdges:
    """Keeps the edges of a mask; all atoms."""

    observes_attention = True

    def __init__(self, edges: Tensor) -> None:
        self.edges = edges
        self.seen: list[Tensor] = []

    def start(self, *arguments: Any) -> "_FewEdges":
        return self

    def decide(self, state: BlockState) -> Decision:
        assert state.attention is not None
        self.seen.append(state.attention)
        return Decision(None, self.edges)


def test_routers() -> None:
    model = random_model(small_config(max_radius=5.0, **ALL), F64)
    batch = batch_of(cluster(F64))
    graph = model.build_graph(batch)
    kept = torch.arange(len(graph.distances)) % 3 > 0
    router = _FewEdges(kept)
    with torch.no_grad():
        x = [None] * 2
        for number, edges in enumerate((kept, kept.to(F64))):
            router.edges = edges
            x[number] = model(batch, graph=graph, active=router)["energy"]
        dense = model(batch, graph=graph)
        everything = model(batch, graph=graph, active=[torch.ones(7, dtype=torch.bool)] * 2)
    torch.testing.assert_close(x[0], x[1])
    torch.testing.assert_close(everything["forces"], dense["forces"])
    assert float((x[0] - dense["energy"]).abs()) > 1e-6
    # Observed weights are those that multiply the values: with the envelope they sum to less than one.
    weights = router.seen[-1]
    total = torch.zeros(7, 2, dtype=F64).index_add(0, graph.edge_index[1], weights)
    assert bool((total < 1).all())
    assert bool((total > 0).all())


def test_parameters_exist_only_where_a_switch_needs_them() -> None:
    def names(**changes: Any) -> list[str]:
        return list(EquiformerV2(small_config(**changes)).state_dict())

    assert names(smooth_cutoff=True) == names()
    swiglu = set(names(use_swiglu_s2_act=True)) - set(names())
    assert {name.split(".", 3)[-1] for name in swiglu} == {
        "scalar_linear.weight",
        "scalar_linear.bias",
        "gating_linear.weight",
        "gating_linear.bias",
        "grid_linear_1.weight",
        "grid_linear_2.weight",
    }


def test_scalars_of_two_parts_start_with_the_weight_of_one() -> None:
    torch.manual_seed(0)
    model = EquiformerV2(small_config(weight_init="normal", attn_hidden_channels=64, use_swiglu_s2_act=True))
    weight = model.blocks[0].ga.so2_conv_2.fc_m0.weight
    scalars, others = weight[:, :64].std().item(), weight[:, 64:].std().item()
    assert abs(scalars / others - 0.5**0.5) < 0.05


@pytest.mark.parametrize(
    "change", [{"use_gate_act": True}, {"use_sep_s2_act": False}, {"use_grid_mlp": False}], ids=str
)
def test_contradicting_activations(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"model\.use_swiglu_s2_act takes the place"):
        small_config(use_swiglu_s2_act=True, **change)


def test_pruning_works_or_is_refused() -> None:
    with pytest.raises(InputError, match="use_swiglu_s2_act cannot be pruned"):
        PruningPlan.keep_all(small_config(**ALL))
    with pytest.raises(InputError, match="use_swiglu_s2_act cannot be pruned"):
        PruningPlan.keep_all(small_config()).applied_to(small_config(**ALL))
    with pytest.raises(InputError, match=r"use_swiglu_s2_act: blocks cannot have"):
        small_config(use_swiglu_s2_act=True, blocks=[{"mmax": 0}, {}])
    config = small_config(smooth_cutoff=True, norm_type="rms_norm_sh", use_m_share_rad=True)
    plan = PruningPlan.keep_all(config).with_block(0, heads=(1,), mmax=0)
    assert plan.applied_to(config).smooth_cutoff


# --- checkpoints ------------------------------------------------------------------------------------------


def test_native_checkpoints_keep_the_switches(tmp_path: Path) -> None:
    model = random_model(small_config(**ALL))
    normalizers = Normalizers(energy=Normalizer(0.5, 2.0), forces=Normalizer(0.0, 3.0))
    save_checkpoint(
        tmp_path / "v3.pt",
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=normalizers,
        energy_kind="adsorption",
        provenance={},
    )
    loaded = load_checkpoint(tmp_path / "v3.pt")
    assert loaded.config == model.config
    batch = batch_of(cluster())
    with torch.no_grad():
        assert torch.equal(loaded.model(batch)["energy"], model(batch)["energy"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smooth_cutoff": True}, "smooth_cutoff=True"),
        ({"use_swiglu_s2_act": True}, "use_swiglu_s2_act=True"),
        ({"use_envelope": True}, "use_envelope=True"),
        ({"norm_type": "merge_layer_norm"}, "norm_type='merge_layer_norm'"),
        ({"ffn_activation": "sep-merge_gates2_swiglu"}, "ffn_activation='sep-merge_gates2_swiglu'"),
        ({"name": "equiformer_v3"}, "only EquiformerV2 can be loaded"),
    ],
    ids=str,
)
def test_imports_with_a_switch_are_refused(changes: dict[str, Any], message: str) -> None:
    assert isinstance(config_from_reference({"name": "equiformer_v2"}), ModelConfig)
    with pytest.raises(InputError, match=message):
        config_from_reference({"name": "equiformer_v2"} | changes)


def test_training_from_other_switches_is_refused() -> None:
    """`init_from` compares every field but these."""
    assert not {"smooth_cutoff", "use_swiglu_s2_act", "norm_type", "use_m_share_rad"} & _NOT_IN_WEIGHTS
    assert {"smooth_cutoff", "use_swiglu_s2_act"} < {field.name for field in dataclasses.fields(ModelConfig)}
