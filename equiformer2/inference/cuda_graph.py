"""CUDA graphs for structures of a fixed composition: relaxations and molecular dynamics.

A network of small kernels spends its time on launching them. A CUDA graph records all launches once and
repeats them as one, on the same memory. Atoms stay the same from step to step, edges do not: there are
buffers for a few more edges than there are, and the rest goes between ghost atoms in a structure of their
own, which send nothing to other atoms and which nothing reads.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.kernels.chunks import chunks
from equiformer2.model import EquiformerV2
from equiformer2.model.folding import Snapshot

Outputs = dict[str, Tensor]
#: From a computation on fixed memory to one that repeats it.
Recorder = Callable[[Callable[[], Outputs]], Callable[[], Outputs]]

#: Backends without a step that waits for the device.
CAPTURED_BACKENDS = ("auto", "torch", "triton")
_EDGE_STEP = 64
_EDGES_PER_GHOST = 32
_WARM_UP_RUNS = 2


def capture_unavailable_reason(
    device: torch.device, backend: str, routed: bool, gradient: bool
) -> str | None:
    """Return the reason why CUDA graphs cannot be used, as half a sentence, or None if they can."""
    if device.type != "cuda":
        return f"they need a CUDA device, not {device.type}"
    if backend not in CAPTURED_BACKENDS:
        return f"the backend {backend!r} is not captured: use one of {', '.join(CAPTURED_BACKENDS)}"
    if routed:
        return "a router chooses other atoms at every step"
    if gradient:
        return "forces as the gradient of the energy take a backward pass, which is not captured"
    return None


class GraphedNetwork:
    """The network on compositions that come again, captured once per size.

    A size (atoms and structures) that comes for the first time is computed as usual; the second time it is
    captured, and replayed from then on until there are more edges than there is room for, or weights have
    changed. Then it is captured once more. If a capture fails, there is a warning and everything is computed
    as usual from then on.

    Args:
        model: in evaluation mode, on its device.
        record: captures; other than CUDA graphs for tests.
        max_graphs: sizes that are kept; the least recently used one goes.

    Attributes:
        captures, replays: how many there have been.
    """

    def __init__(self, model: EquiformerV2, record: "Recorder | None" = None, max_graphs: int = 8) -> None:
        self.model, self.max_graphs = model, max_graphs
        self._record = record or record_cuda_graph
        self._recordings: OrderedDict[tuple[int, int], _Recording | None] = OrderedDict()
        self._too_large: set[tuple[int, int]] = set()
        self._weights = Snapshot(model)
        self._failed = False
        self.captures = self.replays = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and those in other processes, make recordings of their own."""
        return GraphedNetwork, (self.model, self._record, self.max_graphs)

    def __call__(self, batch: Batch) -> Outputs | None:
        """All outputs for `batch`, on its device; None where the network should run as usual.

        Raises:
            InputError: what the graph refuses.
        """
        if not self._weights.is_current():
            # Recordings read the matrices that were kept for the former weights.
            self._recordings.clear()
            self._weights = Snapshot(self.model)
        if not self._weights.comparable:
            return None
        size = len(batch.pos), batch.num_graphs
        if self._failed or size in self._too_large:
            return None
        if size not in self._recordings:
            self._keep(size, None)
            return None
        inputs = _Inputs.of(self.model, batch)
        recording = self._recordings[size]
        if recording is None or recording.buffers.capacity < len(inputs.distances):
            capacity = edge_capacity(self.model, len(inputs.distances), size[0])
            # Attention asks the device where to cut more edges than one part takes; that many keep a GPU busy
            # without a graph.
            device = self.model.sphere_embedding.weight.device
            if len(list(chunks(capacity, self.model.bytes_per_edge, device))) > 1:
                self._too_large.add(size)
                return None
            self._keep(size, None)  # its memory is free before the next capture
            try:
                recording = self._capture(inputs, capacity, size)
            except RuntimeError as error:
                self._failed = True
                first = next(iter(str(error).splitlines()), type(error).__name__)
                warnings.warn(f"no CUDA graph could be captured ({first}): running without", stacklevel=2)
                return None
        self._keep(size, recording)
        recording.buffers.fill(inputs)
        self.replays += 1
        out = recording.replay()
        # Replaying writes to the same memory again.
        return {"energy": out["energy"][: size[1]].clone()} | {
            name: value[: size[0]].clone() for name, value in out.items() if name != "energy"
        }

    def _capture(self, inputs: "_Inputs", capacity: int, size: tuple[int, int]) -> "_Recording":
        buffers = _Buffers(self.model, capacity, *size)
        buffers.fill(inputs)
        self.captures += 1
        return _Recording(buffers, self._record(lambda: self.model.from_edges(*buffers.tensors)))

    def _keep(self, size: tuple[int, int], recording: "_Recording | None") -> None:
        self._recordings[size] = recording
        self._recordings.move_to_end(size)
        while len(self._recordings) > self.max_graphs:
            self._recordings.popitem(last=False)


def edge_capacity(model: EquiformerV2, num_edges: int, num_atoms: int) -> int:
    """Edges to have room for: a sixteenth more, in steps, but never more than there can be."""
    capacity = -(-(num_edges + num_edges // 16) // _EDGE_STEP) * _EDGE_STEP
    most = num_atoms * model.config.max_neighbors
    if model.config.enforce_max_neighbors_strictly:
        capacity = min(capacity, max(most, num_edges))
    return max(capacity, 1)


def record_cuda_graph(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """Capture `run`, which reads and writes the same memory every time and never waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries allocate their workspaces, constants go to the device and Triton compiles.
        for _ in range(_WARM_UP_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Outputs:
        graph.replay()
        return out

    return replay


class _Inputs(NamedTuple):
    """Inputs of the network, on its device."""

    numbers: Tensor
    structure: Tensor
    edge_index: Tensor
    vectors: Tensor
    distances: Tensor

    @classmethod
    def of(cls, model: EquiformerV2, batch: Batch) -> "_Inputs":
        graph = model.build_graph(batch).in_precision(model.sphere_embedding.weight.dtype)
        return cls(batch.atomic_numbers.long(), batch.batch, graph.edge_index, graph.vectors, graph.distances)


class _Buffers:
    """Memory that a recording reads: the atoms, `capacity` edges and the ghosts."""

    def __init__(self, model: EquiformerV2, capacity: int, num_atoms: int, num_structures: int) -> None:
        weight = model.sphere_embedding.weight
        self.capacity, self._atoms = capacity, num_atoms
        # Few edges each: kernels that work through an atom's edges one by one should not wait for ghosts.
        self._ghosts = 1 + capacity // (16 * _EDGES_PER_GHOST)
        size = num_atoms + self._ghosts
        self.numbers = torch.zeros(size, dtype=torch.long, device=weight.device)
        self.structure = torch.full_like(self.numbers, num_structures)
        self.natoms = torch.zeros(num_structures + 1, dtype=torch.long, device=weight.device)  # for its size
        self.edge_index = torch.zeros(2, capacity, dtype=torch.long, device=weight.device)
        self.vectors = weight.new_zeros(capacity, 3)
        self.distances = weight.new_zeros(capacity)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Arguments of `EquiformerV2.from_edges`."""
        return self.numbers, self.structure, self.natoms, self.edge_index, self.vectors, self.distances

    def fill(self, inputs: _Inputs) -> None:
        """Write the atoms and edges of a step, ghosts behind them; edges stay sorted by target."""
        edges = len(inputs.distances)
        self.numbers[: self._atoms].copy_(inputs.numbers)
        self.structure[: self._atoms].copy_(inputs.structure)
        self.edge_index[:, :edges].copy_(inputs.edge_index)
        self.vectors[:edges].copy_(inputs.vectors)
        self.distances[:edges].copy_(inputs.distances)
        rest = self.capacity - edges
        ghosts = torch.arange(rest, device=self.edge_index.device) * self._ghosts // max(rest, 1)
        self.edge_index[:, edges:] = self._atoms + ghosts
        # Any direction and length that a frame can be computed of.
        self.vectors[edges:, 0], self.vectors[edges:, 1:] = 1.0, 0.0
        self.distances[edges:] = 1.0


class _Recording(NamedTuple):
    buffers: _Buffers
    replay: Callable[[], Outputs]


def check_captured(device: torch.device, backend: str, routed: bool, gradient: bool) -> None:
    """Raise `InputError` where CUDA graphs were asked for and cannot be used."""
    reason = capture_unavailable_reason(device, backend, routed, gradient)
    if reason is not None:
        raise InputError(f"CUDA graphs cannot be used: {reason}")
