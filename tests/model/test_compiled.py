"""The network through torch.compile: equal answers, a bounded number of graphs, real inductor."""

import copy
import gc
import shutil

import pytest
import torch
from model_helpers import (
    batch_of,
    cluster,
    far_apart,
    lone_atom,
    loss_of,
    random_model,
    slab,
    small_config,
    trace_only,
    water,
)
from torch import Tensor
from torch_geometric.data import Batch, Data

from equiformer2 import EquiformerV2
from equiformer2.kernels.rows import sum_sorted_rows

SMALLEST = {"num_layers": 2, "lmax": 1, "grid_resolution": 4, "num_distance_basis": 8, "max_neighbors": 6}
# Numbers of structures, atoms and edges that are equal to 0, to 1 and to each other.
BATCHES = {
    "one structure": [slab],
    "isolated atom among others": [water, lone_atom, cluster],
    "one atom": [lone_atom],
    "as many atoms as structures, no edges": [lone_atom, lone_atom],
    "no edges": [far_apart, far_apart],
}


def small_model(**changes: object) -> EquiformerV2:
    model = random_model(small_config(**(SMALLEST | changes)))
    model.backend = "compile"
    return model


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)


def with_gradients(model: EquiformerV2, batch: Batch) -> dict[str, Tensor]:
    """Outputs and the gradients of all trained parameters."""
    out = model(batch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss_of(out), list(trained.values()))
    return {name: value.detach() for name, value in (out | dict(zip(trained, grads, strict=True))).items()}


def assert_as_torch(model: EquiformerV2, batch: Batch) -> None:
    """The same outputs and gradients as the backend `torch`, the same bits every time."""
    model.backend = "torch"
    expected = with_gradients(model, batch)
    model.backend = "compile"
    found, again = with_gradients(model, batch), with_gradients(model, batch)
    with torch.no_grad():
        inference, inference_again = model(batch), model(batch)
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert torch.isfinite(found[name]).all(), name
        # Gradients of biases are small sums of large terms.
        tolerance = 1e-5 if name in ("energy", "forces") else 3e-5
        assert (found[name] - value).abs().max() <= tolerance * scale, name
        assert torch.equal(found[name], again[name]), name
    for name, value in inference.items():
        assert (value - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max().clamp(min=1e-3)
        assert torch.equal(value, inference_again[name])


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_answers_and_number_of_graphs_for_all_kinds_of_batches() -> None:
    model = small_model()
    for builders in BATCHES.values():
        assert_as_torch(model, batch_of(*(build() for build in builders)))
    # Embedding, block and heads, with gradients and without.
    assert model.compiled_graphs == 6


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_an_epoch_of_different_batches_compiles_three_graphs() -> None:
    model = small_model(alpha_drop=0.1, drop_path_rate=0.1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    sizes = set()
    for number, batch in enumerate(epoch()):
        loss = loss_of(model(batch))
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sizes.add((len(batch.pos), model.build_graph(batch).edge_index.shape[1], batch.num_graphs))
        assert model.compiled_graphs == 3, f"batch {number}"
    assert len(sizes) >= 12


def epoch() -> list[Batch]:
    """Fourteen batches of one to five structures, no two of the same size."""
    kinds = (slab, water, cluster, lone_atom)

    def first(count: int, start: int) -> list[Data]:
        return [kinds[(start + i) % len(kinds)]() for i in range(count)]

    return [batch_of(*first(count, start)) for count in (1, 2, 3, 5) for start in range(4)][:14]


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_activation_checkpointing_keeps_the_gradients() -> None:
    model, batch = small_model(), batch_of(cluster(), water())
    plain = with_gradients(model, batch)
    model.activation_checkpointing = True
    for name, value in with_gradients(model, batch).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_a_copy_runs_its_own_weights() -> None:
    model, batch = small_model(), batch_of(cluster())
    before = model(batch)["energy"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(twin(batch)["energy"], before, rtol=1e-3)
    assert torch.equal(model(batch)["energy"], before)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_many_networks_in_one_process() -> None:
    # More than the number of graphs that torch.compile keeps for one piece of code.
    for channels in range(2, 13):
        model = small_model(ffn_hidden_channels=channels, num_layers=1)
        with torch.no_grad():
            model(batch_of(water()))
        assert model.compiled_graphs == 3
    del model
    gc.collect()


def test_sums_of_rows_without_atomic_additions() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 3, 4, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 9, (50,), generator=generator)
    expected = rows.new_zeros(11, 3, 4).index_add(0, index, rows)
    torch.testing.assert_close(sum_sorted_rows(rows, index, 11), expected)
    nothing = sum_sorted_rows(rows[:0], index[:0], 3)
    assert torch.equal(nothing, torch.zeros(3, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("operator", ["gather_rows", "sum_rows"])
def test_row_operators_keep_their_promises(operator: str) -> None:
    index = torch.tensor([2, 0, 2, 1, 2])
    wide = torch.randn(5 if operator == "sum_rows" else 4, 3, dtype=torch.float64, requires_grad=True)
    arguments = (wide, index, 4) if operator == "sum_rows" else (wide, index)
    torch.library.opcheck(getattr(torch.ops.equiformer2, operator).default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("lmax", [2, 4])
def test_inductor_on_this_machine(lmax: int) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    model = small_model(lmax=lmax, mmax=min(lmax, 2), grid_resolution=2 * (lmax + 1))
    for builders in BATCHES.values():
        assert_as_torch(model, batch_of(*(build() for build in builders)))
    # With and without gradients three each; inductor was seen to make one of them twice.
    assert model.compiled_graphs <= 7
