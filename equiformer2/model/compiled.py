"""The network through `torch.compile`: three kinds of regions, each compiled once.

They are the embedding, the Transformer block (one region for all blocks of the same sizes) and the heads.
Compiled in one piece, every block would be code of its own: twelve times as much to compile.

The numbers of atoms, edges and structures are dynamic. Only the sizes 0 and 1, and sizes that happen to be
equal to each other, would need graphs of their own; two ghost atoms in a structure of their own and a few
edges between them avoid both, so that the number of graphs does not depend on the batches. Ghosts send
nothing to other atoms, and nothing reads them.
"""

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from equiformer2.kernels.backend import COMPILE, Backend
from equiformer2.model.block import BlockOutput
from equiformer2.model.edge_context import EVERYTHING, BlockRouting, EdgeEncoding, EdgeGraph, GraphInputs
from equiformer2.model.folding import Folding
from equiformer2.model.output_request import ALL_OUTPUTS, OutputRequest

#: What turns traced graphs into code.
COMPILER = "inductor"

_GHOST_ATOMS = 2
_GHOST_EDGES = 2


class Steps(Protocol):
    """Three kinds of steps of a forward pass: those of `EquiformerV2`, or their compiled regions."""

    def embed(self, numbers: Tensor, edges: EdgeGraph, backend: Backend) -> Tensor:
        """First features `[N, K, C]`."""

    def run_block(
        self,
        block: nn.Module,
        x: Tensor,
        edges: EdgeGraph,
        structure: Tensor,
        natoms: Tensor,
        backend: Backend,
        routing: BlockRouting = EVERYTHING,
        observe: bool = False,
    ) -> BlockOutput:
        """Features after one block."""

    def read_out(
        self,
        x: Tensor,
        edges: EdgeGraph,
        backend: Backend,
        request: OutputRequest = ALL_OUTPUTS,
        denoise: bool = False,
    ) -> dict[str, Tensor]:
        """Outputs of every atom."""


class CompilableNetwork(Steps, Protocol):
    """The network as its compiled regions see it."""

    def modules(self) -> Iterator[nn.Module]:
        """The network and all modules inside."""

    def propagate(
        self, inputs: GraphInputs, backend: Backend, *, steps: Steps | None = None
    ) -> dict[str, Tensor]:
        """All outputs, computed by `steps`."""


class CompiledNetwork:
    """The compiled regions of one network.

    Attributes:
        graphs: how many graphs have been compiled so far.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.embed, self.read_out = self._compiled(_embed), self._compiled(_read_out)
        self._blocks: dict[Any, Callable[..., Any]] = {}

    def _compiled(self, region: Callable[..., Any]) -> Callable[..., Any]:
        # Graphs are kept, and limited in number, per code object: every network gets its own.
        assert isinstance(region, FunctionType)
        own = FunctionType(region.__code__.replace(), region.__globals__, region.__name__)
        return torch.compile(own, fullgraph=True, backend=self._count_and_compile)

    def of_block(self, block: nn.Module) -> Callable[..., Any]:
        """Find the region of all blocks with these sizes."""
        # Blocks of a pruned network differ: each kind has its own region, for the limit above.
        kind = tuple((name, *t.shape) for name, t in (*block.named_parameters(), *block.named_buffers()))
        if kind not in self._blocks:
            self._blocks[kind] = self._compiled(_block)
        return self._blocks[kind]

    def _count_and_compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        code = lookup_backend(COMPILER)(graph, inputs)
        # After it: a compiler may ask for the graph to be traced once more.
        self.graphs += 1
        return code  # type: ignore[no-any-return]

    def __call__(self, model: CompilableNetwork, inputs: GraphInputs) -> dict[str, Tensor]:
        """Run the forward pass of `model` through the compiled regions: all outputs."""
        for module in model.modules():
            if isinstance(module, Folding):
                module.refresh()
        padded = _with_ghosts(inputs)
        for tensor in (padded.numbers, padded.structure, padded.natoms):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        out = model.propagate(padded, COMPILE, steps=_CompiledSteps(self, model))
        sizes = {"energy": len(inputs.natoms), "forces": len(inputs.numbers)}
        return {name: value[: sizes[name]] for name, value in out.items()}


class _CompiledSteps:
    """Compiled regions in place of the steps of a network, for one forward pass.

    Regions take tensors alone: the edges are put together again inside.
    """

    def __init__(self, compiled: CompiledNetwork, model: CompilableNetwork) -> None:
        self.compiled, self.model = compiled, model

    def embed(self, numbers: Tensor, edges: EdgeGraph, backend: Backend) -> Tensor:
        self.shared = edges.encoding.shared_embedding
        one = (edges.rotations, edges.distances, edges.basis(), edges.envelope())
        two = (edges.edge_index, edges.elements)
        for dimension, tensors in enumerate((one, two)):
            for tensor in tensors:
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        self.edges = (*two, *one)
        return self.compiled.embed(self.model, self.shared, numbers, self.edges)  # type: ignore[no-any-return]

    def run_block(
        self,
        block: nn.Module,
        x: Tensor,
        edges: EdgeGraph,
        structure: Tensor,
        natoms: Tensor,
        backend: Backend,
        routing: BlockRouting = EVERYTHING,
        observe: bool = False,
    ) -> BlockOutput:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        region = self.compiled.of_block(block)
        return BlockOutput(region(block, self.shared, x, structure, natoms, self.edges), None)

    def read_out(
        self,
        x: Tensor,
        edges: EdgeGraph,
        backend: Backend,
        request: OutputRequest = ALL_OUTPUTS,
        denoise: bool = False,
    ) -> dict[str, Tensor]:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.compiled.read_out(self.model, self.shared, x, self.edges)  # type: ignore[no-any-return]


_networks: "WeakKeyDictionary[nn.Module, CompiledNetwork]" = WeakKeyDictionary()


def compiled_network(model: nn.Module) -> CompiledNetwork:
    """Find the regions of `model`; nothing is compiled before its first call."""
    return _networks.setdefault(model, CompiledNetwork())


def compiled_graphs(model: nn.Module) -> int:
    """Count the graphs that have been compiled for `model`."""
    return _networks[model].graphs if model in _networks else 0


def _with_ghosts(inputs: GraphInputs) -> GraphInputs:
    """Add a structure of ghost atoms at the end; edges stay sorted by target."""
    atoms, structures = len(inputs.numbers), len(inputs.natoms)
    ghosts = inputs.numbers.new_zeros(_GHOST_ATOMS)
    # At least one atom per structure: more atoms than structures, and only the edges are left to differ.
    sizes = atoms + _GHOST_ATOMS, structures + 1
    edges, rotations = len(inputs.distances), inputs.rotations
    count = next(n for n in range(_GHOST_EDGES, _GHOST_EDGES + 3) if edges + n not in sizes)
    between = torch.full((2, count), atoms, dtype=inputs.edge_index.dtype, device=inputs.edge_index.device)
    return GraphInputs(
        torch.cat((inputs.numbers, ghosts)),
        torch.cat((inputs.structure, ghosts + structures)),
        inputs.natoms.new_empty(structures + 1),
        torch.cat((inputs.edge_index, between), dim=1),
        torch.cat((rotations, rotations.new_zeros(count, rotations.shape[1]))),
        torch.cat((inputs.distances, inputs.distances.new_zeros(count))),
    )


def _edge_graph(shared: Any, edges: tuple[Any, ...], num_atoms: int) -> EdgeGraph:
    edge_index, elements, rotations, distances, basis, envelope = edges
    memory = {"basis": basis}
    if envelope is not None:
        memory["envelope"] = envelope
    # The basis is given, and nothing is cut into parts.
    encoding = EdgeEncoding(_given, shared, bytes_per_edge=0, fades_at=None)
    return EdgeGraph(edge_index, rotations, distances, elements, num_atoms, encoding, memory)


def _given(distances: Tensor) -> Tensor:
    raise AssertionError("the distance basis is given")


def _embed(model: CompilableNetwork, shared: Any, numbers: Tensor, edges: tuple[Any, ...]) -> Tensor:
    return model.embed(numbers, _edge_graph(shared, edges, len(numbers)), COMPILE)


def _block(
    block: nn.Module, shared: Any, x: Tensor, structure: Tensor, natoms: Tensor, edges: tuple[Any, ...]
) -> Tensor:
    out: BlockOutput = block(x, _edge_graph(shared, edges, len(x)), structure, len(natoms), COMPILE)
    return out.x


def _read_out(model: CompilableNetwork, shared: Any, x: Tensor, edges: tuple[Any, ...]) -> dict[str, Tensor]:
    return model.read_out(x, _edge_graph(shared, edges, len(x)), COMPILE)
