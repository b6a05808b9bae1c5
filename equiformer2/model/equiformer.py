"""EquiformerV2 (paper Figure 1)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import Batch, Data

from equiformer2.devices import own_defaults
from equiformer2.errors import InputError
from equiformer2.graph import RadiusGraph, checked_graph, radius_graph, structure_index
from equiformer2.graph.validation import locate_atom
from equiformer2.kernels.backend import COMPILE, NOTHING_MORE, Backend, Features, resolve, validate
from equiformer2.kernels.chunks import chunks
from equiformer2.kernels.linear import multiplies_bfloat16
from equiformer2.kernels.rows import gather_rows, sum_rows
from equiformer2.kernels.scratch_buffers import keep_freed_memory
from equiformer2.model.attention import VectorHead, element_embedding
from equiformer2.model.block import BlockOutput, TransformerBlock
from equiformer2.model.branches import bf16_branches
from equiformer2.model.compiled import Steps, compiled_graphs, compiled_network
from equiformer2.model.config import ModelConfig
from equiformer2.model.conservative import check_config, outside_inference_mode, with_derivatives
from equiformer2.model.denoising import Denoising, EncodedForces
from equiformer2.model.edge_context import EVERYTHING, BlockRouting, EdgeEncoding, EdgeGraph, GraphInputs
from equiformer2.model.embedding import EdgeDegreeEmbedding
from equiformer2.model.feed_forward import EnergyHead
from equiformer2.model.folding import Folding, Layout, plain_name, read
from equiformer2.model.initialization import initialize_weights
from equiformer2.model.norm import make_norm
from equiformer2.model.output_request import ALL_OUTPUTS, OutputRequest, receptive_fields
from equiformer2.model.parameters import check_memory, count_parameters
from equiformer2.model.radial import GaussianBasis
from equiformer2.model.routing import Decision, FixedRouting, Prefix, RoutedEdges, Router, Routing
from equiformer2.model.so3 import EdgeFrames, S2Grid
from equiformer2.model.so3.grid import m_major_order, smallest_resolution


class EquiformerV2(nn.Module):
    """Equivariant transformer for energies and forces of atomistic structures.

    Parameters have the names and shapes of the reference implementation. Those that cannot influence any
    output (parts of the two heads) exist for that compatibility, with `requires_grad` off.

    A new network is float32 and in evaluation mode, as one of `load_checkpoint` is: call `train()` to train
    it. torch's default precision and default device play no part.

    Args:
        config: the hyper-parameters.
        device: where its parameters are made; `meta` for shapes without numbers.

    Raises:
        InputError: its parameters would not fit into the memory of this machine.

    Attributes:
        config: the hyper-parameters.
        activation_checkpointing: recompute blocks in the backward pass instead of storing their activations.
        bytes_per_edge: what an attention layer holds per edge, at most.
        fades_at: Å, where messages fade to zero; None without a smooth cutoff.
        backend: `auto`, `torch`, `cpp`, `compile` or `triton` (see `kernels.backend`).
    """

    def __init__(self, config: ModelConfig, device: str | torch.device = "cpu") -> None:
        super().__init__()
        if torch.device(device).type != "meta":
            check_memory(count_parameters(config), "give fewer layers or channels")
        self.config = config
        with own_defaults(device):
            self._build(config)
        self.eval()

    def _build(self, config: ModelConfig) -> None:
        self.activation_checkpointing = False
        self.backend = "auto"
        lmax = config.lmax
        blocks = [config.block(index) for index in range(config.num_layers)]
        # Messages of lower degrees are sampled at the same points.
        resolution = config.attn_grid or smallest_resolution(lmax, config.mmax)
        degrees = {(part.lmax, part.mmax) for part in (*blocks, config.force_block)}
        edge_grids = {each: S2Grid(*each, resolution, m_major_order(*each)) for each in sorted(degrees)}
        node_grid = S2Grid(lmax, lmax, config.ffn_grid, list(range((lmax + 1) ** 2)))
        self.sphere_embedding = nn.Embedding(config.max_num_elements, config.sphere_channels)
        self.distance_basis = GaussianBasis(config.max_radius, config.num_distance_basis)
        self.source_embedding, self.target_embedding = None, None
        if config.share_atom_edge_embedding:
            self.source_embedding = element_embedding(config)
            self.target_embedding = element_embedding(config)
        self.edge_degree_embedding = EdgeDegreeEmbedding(config)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, block, edge_grids[block.lmax, block.mmax], node_grid) for block in blocks
        )
        self.norm = make_norm(config.norm_type, lmax, config.sphere_channels)
        self.energy_block = EnergyHead(config, node_grid)
        self.force_block: VectorHead | None = None
        if config.regress_forces:
            head = config.force_block
            self.force_block = VectorHead(config, edge_grids[head.lmax, head.mmax])
        self.bytes_per_edge = 4 * self._floats_per_edge(config)
        self.fades_at = config.max_radius if config.smooth_cutoff else None
        initialize_weights(self, config.weight_init)
        self.dens = Denoising(config, edge_grids) if config.dens else None

    def forward(
        self,
        batch: Batch | Data,
        graph: RadiusGraph | None = None,
        frames: EdgeFrames | None = None,
        active: Sequence[Tensor | None] | Router | None = None,
        request: OutputRequest | None = None,
        dens: EncodedForces | None = None,
        start: Prefix | None = None,
        keep: Callable[[Prefix], None] | None = None,
    ) -> dict[str, Tensor]:
        """Energies and forces in normalised units.

        Args:
            batch: structures (`pos`, `atomic_numbers`, `cell`, `pbc`, `natoms`).
            graph: edges, when they are known already.
            frames: edge frames in place of the deterministic ones.
            active: which atoms every block updates: one mask (bool `[N]`) or gate (`[N]`, in [0, 1]) or None
                (all atoms) per block, or a router that decides before each block. See `model.routing`.
            request: which of the outputs are read; None for all of them.
            dens: forces to encode, with `config.dens`; adds `noise [N, 3]` to the outputs (see
                `model.denoising`).
            start: an earlier pass over the same structures, to go on from; only later blocks are run. Its
                edges stand for `graph` and `frames`.
            keep: called before every block that is run, and before the heads, with the pass so far, from
                which others can start.

        Returns:
            `energy [B]`, `forces [N, 3]` unless `config.forces` is none, and with `config.stress`
            `stress [B, 3, 3]` (see `conservative.with_derivatives`); what `request` leaves of them.

        Raises:
            InputError: an element is not below `max_num_elements`, the structure or `graph` is malformed,
                `request` or `start` does not fit, or the backend cannot do what is asked for.
        """
        partial = start is not None or keep is not None
        request, conservative = request or OutputRequest(), self.config.forces == "gradient"
        differentiable = torch.is_grad_enabled()
        with own_defaults(), torch.inference_mode(False) if conservative else nullcontext():
            if conservative:
                backend = self.check_backend(Features(routing=active is not None, partial=partial))
                if frames is not None:
                    raise InputError("gradient forces need the network's own edge frames: leave out frames")
                batch, graph = outside_inference_mode(batch, graph)
            numbers = self._checked_numbers(batch)
            request.check(len(numbers), self.config.forces != "none")
            natoms = torch.as_tensor(batch.natoms, device=numbers.device).reshape(-1)
            structure = structure_index(natoms, len(numbers))
            atoms = numbers, structure, natoms
            if start is not None:
                start.check(len(numbers), len(self.blocks))
            graph = self.build_graph(batch) if graph is None else checked_graph(graph, len(numbers))
            dtype = self.sphere_embedding.weight.dtype
            if conservative:

                def energies(moved: RadiusGraph) -> Tensor:
                    return self.propagate(self._inputs(*atoms, moved), backend)["energy"]

                lattice = (batch.cell, batch.pbc) if self.config.stress else None
                out = with_derivatives(energies, graph, structure, dtype, lattice, differentiable)
                return request.cut(out)
            graph = graph.in_precision(dtype)
            inputs = self._inputs(*atoms, graph, frames) if start is None else start.inputs(*atoms)
            differentiated = differentiable and inputs.rotations.requires_grad
            features = Features(differentiated, active is not None, dens is not None, partial=partial)
            backend = self.check_backend(features)
            if dens is not None:
                self._check_denoising(dens, len(numbers))
            if backend is COMPILE:
                return request.cut(compiled_network(self)(self, inputs))
            if not backend.routing:
                return request.cut(self.propagate(inputs, backend, dens=dens, start=start, keep=keep))
            if active is None and not request.energy and request.force_atoms is not None:
                active = receptive_fields(graph.edge_index, request.force_atoms, len(self.blocks))
            routing = self._routing(active, batch, graph)
            return self.propagate(inputs, backend, routing, request, dens, start=start, keep=keep)

    def propagate(
        self,
        inputs: GraphInputs,
        backend: Backend,
        routing: Routing | None = None,
        request: OutputRequest = ALL_OUTPUTS,
        dens: EncodedForces | None = None,
        steps: Steps | None = None,
        start: Prefix | None = None,
        keep: Callable[[Prefix], None] | None = None,
    ) -> dict[str, Tensor]:
        """Go from edges to outputs: embedding, blocks, norm, heads.

        Args:
            inputs: atoms and edges, checked.
            backend: the implementation of the hot operations.
            routing: decides what each block computes; None for everything.
            request: which of the outputs are read.
            dens: forces to encode.
            steps: compiled regions in place of the network's own steps.
            start: an earlier pass over the same edges, to go on from.
            keep: called with the pass so far before every block that is run, and before the heads.

        Returns:
            As `forward`.
        """
        steps = steps or self
        numbers, structure, natoms = inputs.numbers, inputs.structure, inputs.natoms
        if start is None:
            edges = self._edges(inputs)
            x = steps.embed(numbers, edges, backend)
            if dens is not None and self.dens is not None:
                x = x + self.dens.force_embedding(dens)
        else:
            edges, x = start.edges, start.x
        first = 0 if start is None else start.block
        decisions: tuple[Decision, ...] = () if start is None else start.decisions

        def hand_out(number: int) -> None:
            if keep is not None:
                keep(Prefix(number, x, edges, None if routed is None else routed.attention, decisions))

        routed = None if routing is None else RoutedEdges(edges, routing, start)
        observe = routing is not None and routing.observes_attention
        here, places = edges, EVERYTHING
        for number, block in enumerate(self.blocks[first:], first):
            hand_out(number)
            if routed is not None:
                decision, here, places = routed.decide(number, x)
                decisions = (*decisions, decision)
                if here.num_atoms == 0:
                    continue
            arguments = block, x, here, structure, natoms, backend, places, observe
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, attention = checkpoint(steps.run_block, *arguments, use_reentrant=False)
            else:
                x, attention = steps.run_block(*arguments)
            if routed is not None:
                routed.observe(decision, here, places, attention)
        hand_out(len(self.blocks))

        outputs = steps.read_out(x, edges, backend, request, dens is not None)
        if "energy" in outputs:
            energy = sum_rows(outputs["energy"], structure, len(natoms))
            outputs["energy"] = energy / self.config.avg_num_nodes
        return outputs

    @torch.no_grad()
    def invariant_features(self, batch: Batch | Data) -> Tensor:
        """Degree 0 `[N, C]` of the features that the heads read; all blocks, whatever a router would skip.

        Args:
            batch: structures, on the network's device.

        Raises:
            InputError: as `forward`.
        """
        with own_defaults():
            numbers = self._checked_numbers(batch)
            natoms = torch.as_tensor(batch.natoms, device=numbers.device).reshape(-1)
            structure = structure_index(natoms, len(numbers))
            graph = self.build_graph(batch).in_precision(self.sphere_embedding.weight.dtype)
            edges = self._edges(self._inputs(numbers, structure, natoms, graph))
            backend = self.resolve_backend()
            x = self.embed(numbers, edges, backend)
            for block in self.blocks:
                x, _ = self.run_block(block, x, edges, structure, natoms, backend)
            invariant: Tensor = self.norm(x)[:, 0]
            return invariant

    def from_edges(
        self,
        numbers: Tensor,
        structure: Tensor,
        natoms: Tensor,
        edge_index: Tensor,
        vectors: Tensor,
        distances: Tensor,
    ) -> dict[str, Tensor]:
        """All outputs, from tensors on the network's device that have been checked; waits for nothing.

        Without gradients and the backend `compile`, for as many edges as one chunk takes (`bytes_per_edge`).

        Args:
            numbers: `[N]` atomic numbers.
            structure: `[N]` index of the structure of each atom.
            natoms: `[B]`; only its size is read.
            edge_index, vectors, distances: see `RadiusGraph`; in the network's precision.
        """
        check_config(self.config, "from_edges")
        rotations = self._rotations(vectors, distances)
        inputs = GraphInputs(numbers, structure, natoms, edge_index, rotations, distances)
        return self.propagate(inputs, self.resolve_backend())

    def _inputs(
        self,
        numbers: Tensor,
        structure: Tensor,
        natoms: Tensor,
        graph: RadiusGraph,
        frames: EdgeFrames | None = None,
    ) -> GraphInputs:
        """Add the edge frames; `graph` is in the network's precision."""
        rotations = self._rotations(graph.vectors, graph.distances) if frames is None else frames.entries
        return GraphInputs(numbers, structure, natoms, graph.edge_index, rotations, graph.distances)

    def _edges(self, inputs: GraphInputs) -> EdgeGraph:
        """Edges as all layers read them."""
        shared = None
        if self.source_embedding is not None and self.target_embedding is not None:
            shared = (self.source_embedding, self.target_embedding)
        encoding = EdgeEncoding(self.distance_basis, shared, self.bytes_per_edge, self.fades_at)
        elements = inputs.numbers[inputs.edge_index]
        return EdgeGraph(
            inputs.edge_index, inputs.rotations, inputs.distances, elements, len(inputs.numbers), encoding
        )

    def embed(self, numbers: Tensor, edges: EdgeGraph, backend: Backend) -> Tensor:
        """First features `[N, K, C]`: the elements of the atoms and their surroundings."""
        x = self.edge_degree_embedding(edges, backend)
        elements = gather_rows(read(self.sphere_embedding), numbers)
        return torch.cat((x[:, :1] + elements.unsqueeze(1), x[:, 1:]), dim=1)

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
        """Call one block; see `TransformerBlock.forward`."""
        out: BlockOutput = block(x, edges, structure, len(natoms), backend, routing, observe)
        return out

    def read_out(
        self,
        x: Tensor,
        edges: EdgeGraph,
        backend: Backend,
        request: OutputRequest = ALL_OUTPUTS,
        denoise: bool = False,
    ) -> dict[str, Tensor]:
        """Norm and heads: `energy [N]` of every atom, `forces [N, 3]` and, to `denoise`, `noise [N, 3]`."""
        x, out = self.norm(x), {}
        if self.force_block is not None and request.force_atoms is None:
            out["forces"] = self.force_block(x, edges, backend)
        elif self.force_block is not None:
            here, places = edges.restricted(request.force_atoms)
            forces = self.force_block(x, here, backend, places)
            out["forces"] = places.put_targets(forces.new_zeros(len(x), 3), forces)
        if request.energy:
            out = {"energy": self.energy_block(x, backend), **out}
        if denoise and self.dens is not None:
            out["noise"] = self.dens.noise(x, edges, backend)
        return out

    @property
    def compiled_graphs(self) -> int:
        """Number of graphs that the backend `compile` has compiled for this network so far."""
        return compiled_graphs(self)

    def _routing(
        self, active: Sequence[Tensor | None] | Router | None, batch: Batch | Data, graph: RadiusGraph
    ) -> Routing | None:
        if active is None:
            return None
        if isinstance(active, Sequence):
            return FixedRouting(active, len(batch.pos), len(self.blocks))
        return active.start(batch, graph, len(self.blocks))

    def check_backend(self, features: Features = NOTHING_MORE) -> Backend:
        """Refuse, before the first step, what `backend` cannot do.

        Args:
            features: what the run will ask for.

        Returns:
            The backend; for `auto` the one that it stands for where the network is.

        Raises:
            InputError: `backend` cannot run this network here, or lacks one of `features`.
        """
        weight = self.sphere_embedding.weight
        return validate(self.backend, self.config, weight.device, weight.dtype, features)

    def resolve_backend(self) -> Backend:
        """`backend`, or the one that `auto` stands for where the network is; nothing is checked."""
        weight = self.sphere_embedding.weight
        return resolve(self.backend, self.config, weight.device, weight.dtype)

    def build_graph(self, batch: Batch | Data) -> RadiusGraph:
        """The edges that `forward` uses for these structures."""
        config = self.config
        return radius_graph(
            batch.pos,
            batch.cell,
            batch.pbc,
            torch.as_tensor(batch.natoms).reshape(-1),
            max_radius=config.max_radius,
            max_neighbors=config.max_neighbors,
            strict=config.enforce_max_neighbors_strictly,
        )

    def fold_weights(self, dtype: torch.dtype | None = None) -> None:
        """Let passes without gradients keep merged, rounded and packed matrices instead of the weights.

        They take up to one and a half times the memory of the weights of the attention in addition, are
        computed by the first pass, and again after every change of the weights but those through `.data`.
        `train()` ends it, and copies start without.

        Branches that are to multiply in bfloat16 (`model.branches`) do so where the device has instructions
        for it, and keep their matrices whatever form their weights are stored in.

        Args:
            dtype: precision of the matrix products, if not that of the weights.
        """
        self.eval()
        keep_freed_memory()
        layout = Layout(dtype, packed=self.backend not in ("compile", "triton"))
        for module in self.modules():
            if isinstance(module, Folding):
                module.fold(layout)
        # Compiled networks are one piece.
        rounds = self.backend != "compile" and multiplies_bfloat16(self.sphere_embedding.weight.device)
        quick = layout._replace(dtype=torch.bfloat16 if rounds else dtype, keeps_stored=True)
        for name in bf16_branches(self):
            for module in self.get_submodule(name).modules():
                if isinstance(module, Folding):
                    module.fold(quick)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: biases of linear maps and everything in a norm."""
        linear = {name for name, module in self.named_modules() if hasattr(module, "in_features")}
        names = set()
        for parameter, _ in self.named_parameters():
            name = plain_name(parameter)
            module, _, leaf = name.rpartition(".")
            if (
                (module in linear and leaf == "bias")
                or "norm" in module
                or ".net.1" in name
                or ".net.4" in name
            ):
                names.add(parameter)
        return names

    def _rotations(self, vectors: Tensor, distances: Tensor) -> Tensor:
        """Packed Wigner-D entries of the deterministic frames."""
        lmax, mmax = self.config.lmax, self.config.mmax
        # Products of cosines and sines of two angles, in two charts, beside the entries.
        bytes_per_edge = 32 * (2 * lmax + 1) ** 2
        parts = list(chunks(len(distances), bytes_per_edge, distances.device))
        if torch.is_grad_enabled() or len(parts) <= 1:
            parts = [slice(None)]
        packed = [EdgeFrames.from_vectors(vectors[p], distances[p], lmax, mmax).entries for p in parts]
        return packed[0] if len(packed) == 1 else torch.cat(packed)

    def _check_denoising(self, encoded: EncodedForces, num_atoms: int) -> None:
        if self.dens is None:
            raise InputError("this network has no parts for denoising: build it with dens: true")
        if encoded.forces.shape != (num_atoms, 3) or encoded.atoms.shape != (num_atoms,):
            raise InputError(
                f"encoded forces must be [{num_atoms}, 3] with a mask [{num_atoms}], "
                f"not {tuple(encoded.forces.shape)} with {tuple(encoded.atoms.shape)}"
            )

    def _checked_numbers(self, batch: Batch | Data) -> Tensor:
        numbers = batch.atomic_numbers.long()
        bad = (numbers >= self.config.max_num_elements) | (numbers < 0)
        if bool(bad.any()):
            atom = int(bad.nonzero()[0])
            name, structure = locate_atom(atom, torch.as_tensor(batch.natoms).reshape(-1).cpu().numpy())
            raise InputError(
                f"{name} has atomic number {int(numbers[atom])}, but this model knows only elements "
                f"below max_num_elements = {self.config.max_num_elements}",
                structure,
            )
        return numbers

    @staticmethod
    def _floats_per_edge(config: ModelConfig) -> int:
        """Count the numbers per edge in distance basis, radial function and first convolution."""
        rows = sum(2 * min(l, config.mmax) + 1 for l in range(config.lmax + 1))
        widths = 2 * rows + 3 if config.use_swiglu_s2_act else rows + config.lmax
        outputs = widths * config.attn_hidden_channels
        outputs += config.num_heads * config.attn_alpha_channels
        degrees = (config.lmax + 1) * config.sphere_channels
        return config.num_distance_basis + 4 * config.edge_channels + 2 * outputs + degrees
