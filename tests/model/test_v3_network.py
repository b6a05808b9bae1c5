"""EquiformerV3's switches in the rest of the package: requests, routers, parameters, pruning, checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import ALL_OF_V3 as ALL
from model_helpers import batch_of, cluster, lone_atom, random_model, slab, small_config
from torch import Tensor

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.reference import config_from_reference
from equiformer2.errors import InputError
from equiformer2.kernels import chunks
from equiformer2.model.attention import SO2EquivariantGraphAttention
from equiformer2.model.output_request import OutputRequest
from equiformer2.model.routing import BlockState, Decision
from equiformer2.pruning import PruningPlan
from equiformer2.training.task import NOT_IN_WEIGHTS

F64 = torch.float64


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
def test_requested_outputs(pieces: bool) -> None:
    model = random_model(small_config(max_radius=3.0, **ALL), F64)
    if pieces:
        model.bytes_per_edge = chunks.CPU_CHUNK_BYTES  # every atom is a part of its own
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

    def compute_all(module: Any, inputs: Any) -> None:
        rows.append(SO2EquivariantGraphAttention.forward(module, *inputs).messages[:, 1:4])

    head.register_forward_pre_hook(compute_all)
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
    assert not {"smooth_cutoff", "use_swiglu_s2_act", "norm_type", "use_m_share_rad"} & NOT_IN_WEIGHTS
    assert {"smooth_cutoff", "use_swiglu_s2_act"} < {field.name for field in dataclasses.fields(ModelConfig)}
