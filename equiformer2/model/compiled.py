"""The network through `torch.compile`: three kinds of regions, each compiled once.

They are the embedding, the Transformer block (one region for all blocks of the same sizes) and the heads.
Compiled in one piece, every block would be code of its own: twelve times as much to compile.

The numbers of atoms, edges and structures are dynamic. Only the sizes 0 and 1, and sizes that happen to be
equal to each other, would need graphs of their own; two ghost atoms in a structure of their own and a few
edges between them avoid both, so that the number of graphs does not depend on the batches. Ghosts send
nothing to other atoms, and nothing reads them.
"""

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

from equiformer2.model.edge_context import EdgeContext
from equiformer2.model.folding import Folding
from equiformer2.model.radial import smooth_envelope

if TYPE_CHECKING:
    from equiformer2.model.equiformer import EquiformerV2

#: What turns traced graphs into code.
COMPILER = "inductor"

_GHOST_ATOMS = 2
_GHOST_EDGES = 2


class CompiledNetwork:
    """The compiled regions of one network.

    Attributes:
        graphs: how many graphs have been compiled so far.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self._embed, self._heads = self._compiled(_embed), self._compiled(_heads)
        self._blocks: dict[Any, Callable[..., Any]] = {}

    def _compiled(self, region: Callable[..., Any]) -> Callable[..., Any]:
        # Graphs are kept, and limited in number, per code object: every network gets its own.
        assert isinstance(region, FunctionType)
        own = FunctionType(region.__code__.replace(), region.__globals__, region.__name__)
        return torch.compile(own, fullgraph=True, backend=self._count_and_compile)

    def _of_block(self, block: nn.Module) -> Callable[..., Any]:
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

    def __call__(
        self,
        model: "EquiformerV2",
        numbers: Tensor,
        structure: Tensor,
        natoms: Tensor,
        edge_index: Tensor,
        rotations: Tensor,
        distances: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Energies of the atoms `[N]` and, with a force head, forces `[N, 3]`."""
        for module in model.modules():
            if isinstance(module, Folding):
                module.refresh()
        num_atoms = len(numbers)
        numbers, structure, *edges = _with_ghosts(
            numbers, structure, len(natoms), edge_index, rotations, distances
        )
        edge_index, rotations, distances = edges
        basis = model.distance_basis(distances)
        envelope = None if model.fades_at is None else smooth_envelope(distances, model.fades_at)
        tensors = (edge_index, rotations, distances, numbers[edge_index], basis, envelope)
        structures = natoms.new_empty(len(natoms) + 1)  # only its size is read
        for tensor in (numbers, structure, structures, rotations, distances, basis, envelope):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for tensor in (edge_index, tensors[3]):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        shared = model.source_embedding, model.target_embedding
        x = self._embed(model, shared, numbers, tensors)
        for block in model.blocks:
            region = self._of_block(block)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            arguments = block, shared, x, structure, structures, tensors
            if model.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(region, *arguments, use_reentrant=False)
            else:
                x = region(*arguments)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        energies, forces = self._heads(model, shared, x, tensors)
        return energies[:num_atoms], None if forces is None else forces[:num_atoms]


_networks: "WeakKeyDictionary[nn.Module, CompiledNetwork]" = WeakKeyDictionary()


def compiled_network(model: nn.Module) -> CompiledNetwork:
    """That of `model`; nothing is compiled before its first call."""
    return _networks.setdefault(model, CompiledNetwork())


def compiled_graphs(model: nn.Module) -> int:
    """How many graphs have been compiled for `model`."""
    return _networks[model].graphs if model in _networks else 0


def _with_ghosts(
    numbers: Tensor,
    structure: Tensor,
    num_structures: int,
    edge_index: Tensor,
    rotations: Tensor,
    distances: Tensor,
) -> tuple[Tensor, ...]:
    """All but `num_structures`, with a structure of ghost atoms at the end; edges stay sorted by target."""
    ghosts = numbers.new_zeros(_GHOST_ATOMS)
    # At least one atom per structure: more atoms than structures, and only the edges are left to differ.
    sizes = len(numbers) + _GHOST_ATOMS, num_structures + 1
    count = next(n for n in range(_GHOST_EDGES, _GHOST_EDGES + 3) if len(distances) + n not in sizes)
    edges = torch.full((2, count), len(numbers), dtype=edge_index.dtype, device=edge_index.device)
    return (
        torch.cat((numbers, ghosts)),
        torch.cat((structure, ghosts + num_structures)),
        torch.cat((edge_index, edges), dim=1),
        torch.cat((rotations, rotations.new_zeros(count, rotations.shape[1]))),
        torch.cat((distances, distances.new_zeros(count))),
    )


def _context(shared: Any, tensors: tuple[Any, ...], num_atoms: int) -> EdgeContext:
    edge_index, rotations, distances, elements, basis, envelope = tensors
    memory = {"basis": basis}
    if envelope is not None:
        memory["envelope"] = envelope
    return EdgeContext(
        edge_index,
        rotations,
        distances,
        _known,
        elements,
        None if shared[0] is None else shared,
        num_atoms,
        bytes_per_edge=0,  # nothing is cut into parts
        _memory=memory,
    )


def _known(distances: Tensor) -> Tensor:
    raise AssertionError("the distance basis is given")


def _embed(model: "EquiformerV2", shared: Any, numbers: Tensor, tensors: tuple[Any, ...]) -> Tensor:
    return model.embed(numbers, _context(shared, tensors, len(numbers)))


def _block(
    block: nn.Module,
    shared: Any,
    x: Tensor,
    structure: Tensor,
    structures: Tensor,
    tensors: tuple[Any, ...],
) -> Tensor:
    return block(x, _context(shared, tensors, len(x)), structure, len(structures))  # type: ignore[no-any-return]


def _heads(
    model: "EquiformerV2", shared: Any, x: Tensor, tensors: tuple[Any, ...]
) -> tuple[Tensor, Tensor | None]:
    x = model.norm(x)
    edges = _context(shared, tensors, len(x))
    return model.atomic_energies(x), None if model.force_block is None else model.atomic_forces(x, edges)
