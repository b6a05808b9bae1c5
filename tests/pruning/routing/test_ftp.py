"""The trained router: its factors, its three losses, its training against the dense network."""

import dataclasses

import pytest
import torch
from routers import ftp
from routing_helpers import as_data, exact_model, masks, molecule_data, slab_atoms
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.model.routing import BlockState
from equiformer2.pruning.routing import CountingRouter, FTPRouter, RouterTraining, train_router
from equiformer2.pruning.routing.batch_geometry import BatchGeometry
from equiformer2.pruning.routing.geometric_routers import static_priority


def batches() -> list[Batch]:
    pairs = ((0.1, "OH"), (0.05, "CO")), ((0.02, "O"), (0.15, "OH"))
    return [Batch.from_data_list([as_data(slab_atoms(*a), torch.float32) for a in pair]) for pair in pairs]


def test_the_four_factors() -> None:
    batch = Batch.from_data_list([molecule_data(), as_data(slab_atoms(0.1))])
    graph = exact_model().build_graph(batch)
    system = BatchGeometry.from_batch(batch, graph)
    attention = torch.rand(len(graph.distances), 2, generator=torch.Generator().manual_seed(0)).double()
    state = BlockState(1, torch.zeros(len(batch.pos), 9, 8, dtype=torch.float64), attention)
    found = ftp().factors(system, state, 0.3)
    assert found.shape == (len(batch.pos), 7)
    assert torch.equal(found[:, 0] == 1, batch.tags == 1)
    assert torch.equal(found[:, 1] == 1, batch.tags == 2)
    assert not found[batch.tags == 2, 2].any()
    order, place = static_priority(system), found[:, 3]
    for part, rank in zip(order.split([9, 14]), place.split([9, 14]), strict=True):
        assert (rank[part > part.median()] > rank[part <= part.median()].max()).all()
    received = (
        attention.mean(1).new_zeros(len(batch.pos)).index_add(0, graph.edge_index[0], attention.mean(1))
    )
    for part, rank in zip(received.split([9, 14]), found[:, 5].split([9, 14]), strict=True):
        assert torch.equal(part.argsort(), rank.argsort())
        assert rank.mean() == pytest.approx(0.5)
    assert torch.equal(found[:, 4].argsort(), received.argsort())
    assert (found[:, 6] == 0.3).all()
    local = ftp(mode="threshold").factors(system, state, 0.3)
    assert ((local[:, 5] > 0) & (local[:, 5] < 1)).all()
    assert torch.equal(local[:, 3], order / 4)


@pytest.mark.slow
def test_training_lowers_the_discrepancy_and_meets_the_sparsity() -> None:
    model = exact_model(torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    router = FTPRouter(0.4, mode="threshold")
    history = train_router(model, router, batches(), RouterTraining(steps=60, learning_rate=0.02))
    assert history[-1].guide < 0.8 * history[0].guide
    assert sum(step.sparsity for step in history[-10:]) / 10 < 0.05
    recorder = CountingRouter(router)
    with torch.no_grad():
        for batch in batches():
            recorder(model, batch)
    achieved = recorder.computed_shares(model.config)
    assert achieved.atoms[0] == achieved.atoms[-1] == 1.0
    assert achieved.atoms[1] == pytest.approx(0.6, abs=0.12)
    # The network is as it was.
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if "energy_block" not in name
               and "force_block" not in name)  # fmt: skip
    assert not model.training


def test_training_is_what_is_run_later() -> None:
    """With a closed gate everywhere in the computation, the losses are those of really skipping."""
    model, data = exact_model(torch.float32), batches()[:1]
    router = ftp(mode="threshold")
    with torch.no_grad():
        dense, out = model(data[0]), router(model, data[0])
    (losses,) = train_router(model, router, data, RouterTraining(steps=1, learning_rate=0.0))
    assert losses.energy == pytest.approx(float((out["energy"] - dense["energy"]).abs().mean()), rel=1e-4)
    error = (out["forces"] - dense["forces"])[~data[0].fixed].norm(dim=1).mean()
    assert losses.forces == pytest.approx(float(error), rel=1e-4)


@pytest.mark.slow
def test_training_is_reproducible_and_noise_is_seeded() -> None:
    model = exact_model(torch.float32)
    settings = RouterTraining(steps=5, temperature=0.5, seed=1)

    def weights(settings: RouterTraining) -> torch.Tensor:
        router = FTPRouter(0.4)
        train_router(model, router, batches(), settings)
        return router.mlp[0].weight.detach().clone()

    assert torch.equal(weights(settings), weights(settings))
    assert not torch.equal(weights(settings), weights(dataclasses.replace(settings, seed=2)))


def test_sparsity_is_a_factor() -> None:
    model, data = exact_model(), as_data(slab_atoms(0.1))
    router = ftp(mode="threshold", cut=0.55)
    few, many = (
        masks(model, FTPRouter(**router.settings() | {"levels": level}), data) for level in (0.1, 0.9)
    )
    assert any((a != b).any() for a, b in zip(few, many, strict=True))


def test_refusals() -> None:
    model = exact_model(torch.float32)
    with pytest.raises(InputError, match="at least one batch"):
        train_router(model, FTPRouter(0.3), [])
    with pytest.raises(InputError, match="no block is routed"):
        train_router(exact_model(torch.float32, num_layers=2), FTPRouter(0.3), batches())
    with pytest.raises(InputError, match="other names or shapes"):
        FTPRouter(0.3, weights={"0.weight": [[1.0]]})
    with pytest.raises(InputError, match="for 0 steps"):
        RouterTraining(steps=0)
