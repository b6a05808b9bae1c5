"""Replaying fixed compositions. On a CPU a stand-in for CUDA graphs runs what was recorded once more."""

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.checkpoint import load_checkpoint
from equiformer2.errors import InputError
from equiformer2.graph import radius_graph
from equiformer2.graph.search import find_pairs
from equiformer2.inference import EquiformerV2Calculator, Predictor
from equiformer2.inference.atoms import atoms_to_data
from equiformer2.inference.cuda_graph import (
    GraphedNetwork,
    capture_unavailable_reason,
    edge_capacity,
    record_cuda_graph,
)
from equiformer2.model import EquiformerV2
from tests.observed import observed

Outputs = dict[str, Tensor]


def record_on_cpu(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """As CUDA graphs: the results of every replay are in the same memory."""
    out = {name: torch.full_like(value, torch.nan) for name, value in run().items()}

    def replay() -> Outputs:
        for name, value in run().items():
            out[name].copy_(value)
        return out

    return replay


def replaying(checkpoint: Path, max_graphs: int = 8, backend: str = "auto") -> Predictor:
    predictor = Predictor(checkpoint, backend=backend)
    predictor.graphed = GraphedNetwork(predictor.model, record_on_cpu, max_graphs)
    return predictor


def moved(atoms: Atoms, step: int, scale: float = 1.0) -> Batch:
    """The structure after some steps: other positions, and with `scale` other numbers of edges."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell[:] * scale, scale_atoms=True)
    atoms.positions += 0.05 * np.random.default_rng(step).standard_normal((len(atoms), 3))
    return Batch.from_data_list([atoms_to_data(atoms, notify=False)])


def assert_equal(found: Outputs, expected: Outputs) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Matrix products of other sizes may add in another order.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_answers_of_a_trajectory(
    make_checkpoint: Callable[..., Path], oxygen_on_copper: Atoms, strict: bool
) -> None:
    path = make_checkpoint("adsorption", enforce_max_neighbors_strictly=strict, max_neighbors=14)
    plain, graphed = Predictor(path), replaying(path)
    edges = set()
    for step in range(6):
        batch = moved(oxygen_on_copper, step)
        edges.add(plain.model.build_graph(batch).edge_index.shape[1])
        assert_equal(graphed.predict(batch), plain.predict(batch))
    assert (graphed.graphed.captures, graphed.graphed.replays) == (1, 5)
    assert strict or len(edges) > 1


def test_changed_weights_are_recorded_again(
    make_checkpoint: Callable[..., Path], oxygen_on_copper: Atoms
) -> None:
    path = make_checkpoint("adsorption")
    plain, graphed = Predictor(path), replaying(path)
    for step in range(6):
        if step == 3:
            for predictor in (plain, graphed):
                with torch.no_grad():
                    predictor.model.blocks[0].ga.proj.weight.mul_(1.5)
        batch = moved(oxygen_on_copper, step)
        assert_equal(graphed.predict(batch), plain.predict(batch))
    assert (graphed.graphed.captures, graphed.graphed.replays) == (2, 4)


def test_networks_with_the_switches_of_v3(
    make_checkpoint: Callable[..., Path], oxygen_on_copper: Atoms
) -> None:
    switches = {"smooth_cutoff": True, "use_swiglu_s2_act": True, "use_m_share_rad": True}
    path = make_checkpoint("adsorption", max_radius=4.0, norm_type="rms_norm_sh", **switches)
    plain, graphed = Predictor(path), replaying(path)
    for step in range(3):
        batch = moved(oxygen_on_copper, step)
        assert_equal(graphed.predict(batch), plain.predict(batch))
    assert graphed.graphed.replays == 2


def test_captured_again_when_there_are_more_edges(
    make_checkpoint: Callable[..., Path], oxygen_on_copper: Atoms
) -> None:
    path = make_checkpoint("adsorption", max_neighbors=60)
    plain, graphed = Predictor(path), replaying(path)
    captures = []
    for step, scale in enumerate((1.3, 1.3, 1.0, 1.3, 1.0)):
        batch = moved(oxygen_on_copper, step, scale)
        assert_equal(graphed.predict(batch), plain.predict(batch))
        captures.append(graphed.graphed.captures)
    # The larger capacity serves fewer edges, too.
    assert captures == [0, 1, 2, 2, 2]


def test_edges_without_influence(checkpoint: Path) -> None:
    """No edges at all, isolated atoms, several structures: everything else in the buffers is ghosts."""
    far = Atoms("OH", positions=[[0, 0, 0], [40.0, 0, 0]])
    near = Atoms("OH", positions=[[0, 0, 0], [1.0, 0, 0]])
    plain, graphed = Predictor(checkpoint), replaying(checkpoint)
    for structures in ((far, far), (near, far), (far, near), (far, far)):
        batch = Batch.from_data_list([atoms_to_data(atoms, notify=False) for atoms in structures])
        assert_equal(graphed.predict(batch), plain.predict(batch))
    assert graphed.graphed.replays == 3


def test_results_outlive_the_next_step(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    graphed = replaying(checkpoint).graphed
    graphed(moved(oxygen_on_copper, 0))
    first = graphed(moved(oxygen_on_copper, 1))
    kept = first["forces"].clone()
    graphed(moved(oxygen_on_copper, 2))
    assert torch.equal(first["forces"], kept)


def test_few_recordings_are_kept(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    predictor = replaying(checkpoint, max_graphs=1)
    small, large = oxygen_on_copper[-3:], oxygen_on_copper
    for atoms in (small, small, large, large, small):
        predictor.predict(moved(atoms, 0))
    assert (predictor.graphed.captures, predictor.graphed.replays) == (2, 2)


def test_a_copy_makes_recordings_of_its_own(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    predictor = replaying(checkpoint)
    for step in range(3):
        expected = predictor.predict(moved(oxygen_on_copper, step))
    for again in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        assert again.graphed.model is again.model
        for step in range(3):
            found = again.predict(moved(oxygen_on_copper, step))
        assert (again.graphed.captures, again.graphed.replays) == (1, 2)
        assert_equal(found, expected)


def test_what_is_asked_for_alone(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    plain, graphed = Predictor(checkpoint), replaying(checkpoint)
    batch = moved(oxygen_on_copper, 0)
    mask = torch.arange(len(batch.pos)) % 2 == 0
    for _ in range(2):
        found = graphed.predict(batch, energy=False, force_atoms=mask)
        assert_equal(found, plain.predict(batch, energy=False, force_atoms=mask))
    assert graphed.graphed.replays == 1
    with pytest.raises(InputError, match="force_atoms must have one true or false per atom"):
        graphed.predict(batch, force_atoms=mask[1:])


def test_large_systems_run_as_usual(
    checkpoint: Path, oxygen_on_copper: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = replaying(checkpoint)
    monkeypatch.setattr("equiformer2.kernels.chunks.CPU_CHUNK_BYTES", 10_000)
    for step in range(3):
        predictor.predict(moved(oxygen_on_copper, step))
    assert predictor.graphed.captures == 0


def test_a_failed_capture_is_told_once(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    def fail(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    plain, predictor = Predictor(checkpoint), Predictor(checkpoint)
    predictor.graphed = GraphedNetwork(predictor.model, fail)
    predictor.predict(moved(oxygen_on_copper, 0))
    batch = moved(oxygen_on_copper, 1)
    with pytest.warns(UserWarning, match=r"captured \(operation not permitted when stream is capturing\)"):
        assert_equal(predictor.predict(batch), plain.predict(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(predictor.predict(batch), plain.predict(batch))


def test_capacity() -> None:
    class Model:
        class config:  # noqa: N801
            max_neighbors = 20
            enforce_max_neighbors_strictly = True

    assert edge_capacity(Model, 1600, 80) == 1600
    assert edge_capacity(Model, 1000, 80) == 1088
    assert edge_capacity(Model, 0, 1) == 1
    Model.config.enforce_max_neighbors_strictly = False
    assert edge_capacity(Model, 1600, 80) == 1728


def test_refusals(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="CUDA graphs cannot be used: they need a CUDA device, not cpu"):
        Predictor(checkpoint, cuda_graphs=True)
    assert Predictor(checkpoint).graphed is None
    gpu = torch.device("cuda")
    assert capture_unavailable_reason(gpu, "triton", False, False) is None
    assert "'compile' is not captured" in capture_unavailable_reason(gpu, "compile", False, False)
    assert "router" in capture_unavailable_reason(gpu, "torch", True, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_on_a_gpu(make_checkpoint: Callable[..., Path], oxygen_on_copper: Atoms, backend: str) -> None:
    path = make_checkpoint("adsorption", max_neighbors=60)
    plain = Predictor(path, "cuda", backend=backend, cuda_graphs=False)
    graphed = Predictor(path, "cuda", backend=backend)
    for step, scale in enumerate((1.3, 1.3, 1.0, 1.3, 1.0)):
        batch = moved(oxygen_on_copper, step, scale)
        found, expected = graphed.predict(batch), plain.predict(batch)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    assert (graphed.graphed.captures, graphed.graphed.replays) == (2, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recording_on_a_gpu() -> None:
    x = torch.ones(3, device="cuda")
    replay = record_cuda_graph(lambda: {"energy": 2 * x})
    x.fill_(3.0)
    assert replay()["energy"].tolist() == [6.0, 6.0, 6.0]


def test_the_network_from_edges_on(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    model: EquiformerV2 = load_checkpoint(checkpoint).model.eval()
    batch = moved(oxygen_on_copper, 0)
    graph = model.build_graph(batch).in_precision(torch.float32)
    with torch.no_grad():
        expected = model(batch)
        edges = graph.edge_index, graph.vectors, graph.distances
        found = model.from_edges(batch.atomic_numbers, batch.batch, batch.natoms, *edges)
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_calculator_is_switchable(checkpoint: Path) -> None:
    assert EquiformerV2Calculator(checkpoint, cuda_graphs=False).predictor.graphed is None
    with pytest.raises(InputError, match="CUDA graphs cannot be used"):
        EquiformerV2Calculator(checkpoint, cuda_graphs=True)


@pytest.mark.parametrize("graphed", [False, True])
def test_neighbours_are_searched_where_the_network_is(
    checkpoint: Path, oxygen_on_copper: Atoms, monkeypatch: pytest.MonkeyPatch, graphed: bool
) -> None:
    """A CPU that counts as a device with a search of its own: the search on the CPU is not called."""
    module = sys.modules[radius_graph.__module__]
    batches = [moved(oxygen_on_copper, step) for step in range(3)]
    expected = [Predictor(checkpoint).predict(batch) for batch in batches]
    predictor = replaying(checkpoint) if graphed else Predictor(checkpoint)

    monkeypatch.setattr(module, "on_device", lambda device: True)
    with observed(find_pairs) as on_the_cpu:
        for batch, answer in zip(batches, expected, strict=True):
            assert_equal(predictor.predict(batch), answer)
    assert not on_the_cpu
