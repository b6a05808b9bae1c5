"""Outputs that nobody reads are not computed, and the others stay as they are."""

from typing import Any

import pytest
import torch
from model_helpers import batch_of, cluster, far_apart, lone_atom, random_model, slab, small_config, water
from torch import Tensor, nn

from equiformer2.errors import InputError
from equiformer2.kernels import chunks
from equiformer2.model.output_request import OutputRequest, receptive_fields


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if a.dtype == torch.float64 else 1e-6)


def atoms_and_edges(module: nn.Module, counts: list[tuple[int, int]]) -> Any:
    return module.register_forward_pre_hook(lambda m, a: counts.append((a[1].num_atoms, len(a[1].distances))))


def some_atoms(batch: Any) -> Tensor:
    """The last two atoms of every structure."""
    chosen = torch.zeros(len(batch.pos), dtype=torch.bool)
    for start, stop in zip(batch.ptr[:-1].tolist(), batch.ptr[1:].tolist(), strict=True):
        chosen[max(start, stop - 2) : stop] = True
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
def test_forces_of_some_atoms(dtype: torch.dtype, pieces: bool) -> None:
    model = random_model(small_config(max_radius=3.0), dtype)
    if pieces:
        model.bytes_per_edge = chunks.CPU_CHUNK_BYTES  # every atom is a part of its own
    batch = batch_of(*(make(dtype) for make in (slab, lone_atom, water, far_apart, cluster)))
    wanted = some_atoms(batch)
    with torch.no_grad():
        dense = model(batch)
        for energy in (True, False):
            out = model(batch, request=OutputRequest(energy, wanted))
            assert ("energy" in out) == energy
            if energy:
                assert torch.equal(out["energy"], dense["energy"])
            close(out["forces"][wanted], dense["forces"][wanted])
            assert not out["forces"][~wanted].any()
        assert torch.equal(model(batch, request=OutputRequest(False))["forces"], dense["forces"])


def test_nothing_else_is_computed() -> None:
    model = random_model(small_config(num_layers=3, max_radius=2.7))
    batch = batch_of(slab(), far_apart())
    graph = model.build_graph(batch)
    wanted = torch.zeros(len(batch.pos), dtype=torch.bool)
    wanted[13] = True  # the oxygen of CO, away from the slab
    counts: list[tuple[int, int]] = []
    for block in model.blocks:
        atoms_and_edges(block.ga, counts)
    with torch.no_grad():
        model(batch, graph=graph, request=OutputRequest(False, wanted))
    fields = receptive_fields(graph.edge_index, wanted, 3)
    expected = [(int(field.sum()), int(field[graph.edge_index[1]].sum())) for field in fields]
    assert counts == expected
    assert [atoms for atoms, _ in counts] == sorted((atoms for atoms, _ in counts), reverse=True)
    assert counts[2][0] < counts[1][0] < len(batch.pos)


def test_receptive_fields_are_exactly_the_atoms_that_matter() -> None:
    """Every atom of a field changes a wanted force when its update is left out; no other atom does."""
    model = random_model(small_config(max_radius=2.7), torch.float64)
    batch = batch_of(slab(torch.float64), water(torch.float64))
    graph = model.build_graph(batch)
    wanted = torch.zeros(len(batch.pos), dtype=torch.bool)
    wanted[13] = True
    fields = receptive_fields(graph.edge_index, wanted, 2)
    with torch.no_grad():
        dense = model(batch, graph=graph)["forces"][13]
        for block, field in enumerate(fields):
            for atom in range(len(batch.pos)):
                active = [torch.ones_like(wanted) for _ in fields]
                active[block][atom] = False
                moved = model(batch, graph=graph, active=active)["forces"][13]
                assert bool(field[atom]) == bool((moved - dense).abs().max() > 1e-9), (block, atom)


def test_no_atom_at_all() -> None:
    model, batch = random_model(), batch_of(slab(), lone_atom())
    none = torch.zeros(len(batch.pos), dtype=torch.bool)
    with torch.no_grad():
        out = model(batch, request=OutputRequest(True, none))
        assert torch.equal(out["energy"], model(batch)["energy"])
        assert not out["forces"].any()
        assert not model(batch, request=OutputRequest(False, none))["forces"].any()


def test_gradients_of_what_is_read() -> None:
    model, batch = random_model(dtype=torch.float64), batch_of(slab(torch.float64))
    wanted = some_atoms(batch)
    weight = model.blocks[0].ga.proj.weight
    grads = []
    for request in (None, OutputRequest(False, wanted)):
        out = model(batch, request=request)["forces"][wanted]
        grads.append(torch.autograd.grad(out.square().sum(), weight)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (OutputRequest(True, torch.ones(3, dtype=torch.bool)), "one true or false per atom"),
        (OutputRequest(True, torch.ones(14)), "one true or false per atom"),
    ],
)
def test_output_request_that_do_not_fit(request_: OutputRequest, message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_model()(batch_of(slab()), request=request_)
    with pytest.raises(InputError, match="predicts no forces"):
        random_model(small_config(forces="none"))(batch_of(slab()), request=OutputRequest(False))


def test_other_backends_give_the_same() -> None:
    request = OutputRequest(False, torch.tensor([True, False]))
    out = request.cut({"energy": torch.ones(1), "forces": torch.ones(2, 3)})
    assert list(out) == ["forces"]
    assert out["forces"].tolist() == [[1, 1, 1], [0, 0, 0]]
