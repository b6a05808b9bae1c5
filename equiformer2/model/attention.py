"""Equivariant graph attention with eSCN convolutions (paper section 4, Figure 1b)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equiformer2.kernels import SO2Weights, attend, convolve_edges, segment_softmax
from equiformer2.kernels.aggregate import at_least_float32
from equiformer2.kernels.backend import Backend
from equiformer2.kernels.chunks import no_autocast
from equiformer2.model.activation import (
    EdgeActivation,
    GateActivation,
    S2Activation,
    SeparableS2Activation,
    SmoothLeakyReLU,
    SwiGLUS2Activation,
)
from equiformer2.model.block_config import ResolvedBlock
from equiformer2.model.config import Activation, ModelConfig
from equiformer2.model.edge_context import EVERYTHING, BlockRouting, EdgeGraph, Part, joined
from equiformer2.model.folding import read
from equiformer2.model.radial import RadialFunction, RadialWeights
from equiformer2.model.so2_convolution import SO2Convolution
from equiformer2.model.so3 import DerivedConstants, S2Grid
from equiformer2.model.so3.grid import m_major_order, truncation_scales
from equiformer2.model.so3_linear import SO3Linear, SO3LinearWeights

_SMALLEST = 1e-30


class AttentionWeights(NamedTuple):
    """Weights of one attention layer, read once for all parts of the edges.

    Attributes:
        radial: of the radial function.
        tables: element embeddings for it, of source and target, or None.
        first, second: of the two convolutions.
        alpha: `[H, A]`, which makes a logit of every head's scalars.
        alpha_norm: weight and bias `[A]` of the layer norm of the scalars; none without it.
        projection: of the last linear map.
    """

    radial: RadialWeights
    tables: tuple[Tensor, Tensor] | None
    first: SO2Weights
    second: SO2Weights
    alpha: Tensor
    alpha_norm: tuple[Tensor, ...]
    projection: SO3LinearWeights


class AttentionOutput(NamedTuple):
    """Result of an attention layer.

    Attributes:
        messages: `[n, K, out_channels]` sums over the edges into the n target atoms.
        weights: `[e, H]` attention weights before dropout, None unless observed.
    """

    messages: Tensor
    weights: Tensor | None


class SO2EquivariantGraphAttention(DerivedConstants):
    """Attention over incoming edges: SO(2) convolution, activation, SO(2) convolution, weighted sum, linear.

    Args:
        config: hyper-parameters.
        block: widths and degrees of the messages; these may be lower than those of the atoms' features.
        grid: S2 grid of the coefficients of the messages in m-major order.
        out_channels: channels of the output coefficients.
        alpha_drop: dropout rate of the attention weights.
        activation: nonlinearity of the messages.
    """

    scale: Tensor

    def __init__(
        self,
        config: ModelConfig,
        block: ResolvedBlock,
        grid: S2Grid,
        out_channels: int,
        alpha_drop: float,
        activation: Activation,
    ) -> None:
        super().__init__()
        lmax, mmax, hidden = block.lmax, block.mmax, block.attn_hidden_channels
        self.num_heads = block.num_heads
        self.lmax, self.mmax = lmax, mmax
        self.frame_degrees = config.lmax, config.mmax
        self.add_constant("scale", truncation_scales(lmax, mmax))
        self.alpha_dot = nn.Parameter(torch.empty(block.num_heads, config.attn_alpha_channels))
        nn.init.uniform_(
            self.alpha_dot, -(config.attn_alpha_channels**-0.5), config.attn_alpha_channels**-0.5
        )
        radial_inputs = radial_input_size(config)
        self.source_embedding, self.target_embedding = None, None
        if config.block_atom_edge_embedding:
            self.source_embedding = element_embedding(config)
            self.target_embedding = element_embedding(config)
        self.rad_func: RadialFunction | None = None
        if config.use_m_share_rad:
            self.rad_func = RadialFunction(
                radial_inputs, config.edge_channels, 2 * config.sphere_channels * (lmax + 1)
            )
        self.hidden_channels = hidden
        self.activation = self._make_activation(activation, block, grid)
        alpha_channels = block.num_heads * config.attn_alpha_channels
        self.so2_conv_1 = SO2Convolution(
            2 * config.sphere_channels,
            self.activation.inputs_per_channel * hidden,
            lmax,
            mmax,
            extra_m0_channels=alpha_channels + self.activation.num_gate_rows * hidden,
            radial_inputs=None if config.use_m_share_rad else radial_inputs,
            radial_hidden=config.edge_channels,
        )
        self.alpha_norm = (
            nn.LayerNorm(config.attn_alpha_channels) if config.use_attn_renorm else nn.Identity()
        )
        self.alpha_act = SmoothLeakyReLU()
        self.alpha_dropout = nn.Dropout(alpha_drop)
        value_channels = block.num_heads * block.attn_value_channels
        self.so2_conv_2 = SO2Convolution(hidden, value_channels, lmax, mmax)
        self.proj = SO3Linear(value_channels, out_channels, lmax)

    def forward(
        self,
        x: Tensor,
        edges: EdgeGraph,
        backend: Backend,
        routing: BlockRouting = EVERYTHING,
        observe: bool = False,
    ) -> AttentionOutput:
        """Attend to the edges of `routing`'s target atoms.

        Args:
            x: `[N, K, C]` features.
            edges: the edges into the target atoms.
            backend: the implementation.
            routing: which atoms the targets are, and gates of the edges.
            observe: return the attention weights, too.
        """
        weights = self._weights(edges, self.so2_conv_2.weights(), self.proj.weights())
        kept = self.lmax, self.mmax
        x = self._message_degrees(x)
        x_target = routing.at_targets(x)

        def layer(part: Part) -> tuple[Tensor, Tensor | None]:
            scalars, hidden = self._convolve(x, x_target[part.atoms], part.graph, weights, backend)
            alpha = self._attention_weights(scalars, part, weights, backend, routing.edge_gates)
            total = self._sum(hidden, alpha, part.graph, backend, None, weights, kept)
            return self.proj(total * self.scale, weights.projection), alpha if observe else None

        outputs = [layer(part) for part in edges.parts(backend)]
        out = joined([total for total, _ in outputs])
        observed = [alpha for _, alpha in outputs if alpha is not None]
        missing = (self.frame_degrees[0] + 1) ** 2 - out.shape[1]
        return AttentionOutput(
            nn.functional.pad(out, (0, 0, 0, missing)) if missing else out,
            joined(observed) if observe else None,
        )

    def _weights(
        self, edges: EdgeGraph, second: SO2Weights, projection: SO3LinearWeights
    ) -> AttentionWeights:
        own = None
        if self.source_embedding is not None and self.target_embedding is not None:
            own = (self.source_embedding, self.target_embedding)
        radial = self.rad_func or self.so2_conv_1.rad_func
        assert radial is not None
        normed = isinstance(self.alpha_norm, nn.LayerNorm)
        return AttentionWeights(
            radial.weights(),
            edges.element_tables(own),
            self.so2_conv_1.weights(),
            second,
            read(self, "alpha_dot"),
            tuple(read(self.alpha_norm, name) for name in ("weight", "bias")) if normed else (),
            projection,
        )

    def _message_degrees(self, x: Tensor) -> Tensor:
        """The coefficients `[N, (lmax + 1)^2, C]` that messages are made of."""
        return x[:, : (self.lmax + 1) ** 2].contiguous()

    def _rotations(self, edges: EdgeGraph) -> Tensor:
        return edges.rotations_up_to((self.lmax, self.mmax), self.frame_degrees)

    def _sum(
        self,
        hidden: Tensor,
        alpha: Tensor,
        edges: EdgeGraph,
        backend: Backend,
        rows: int | None,
        weights: AttentionWeights,
        kept: tuple[int, int],
    ) -> Tensor:
        """Weighted sum of the messages, `[N, (kept degree + 1)^2, value channels]`.

        `rows` of the activation's outputs are computed (None for all of them).
        """

        def activate(hidden: Tensor) -> Tensor:
            return self.activation.of_columns(hidden, self.hidden_channels, backend, rows)

        with no_autocast(alpha):
            alpha = self.alpha_dropout(alpha)
        return attend(
            hidden,
            alpha,
            self._rotations(edges),
            edges.edge_index[1],
            edges.num_atoms,
            activate,
            weights.second,
            (self.lmax, self.mmax),
            kept,
            backend,
            edges.neighbors(backend),
        )

    def _convolve(
        self, x: Tensor, x_target: Tensor, edges: EdgeGraph, weights: AttentionWeights, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        """Inputs `[E, H * A]` of the attention weights and hidden features `[E, gates + R * hidden]`."""
        radial = weights.radial
        return convolve_edges(
            x,
            x_target,
            self._rotations(edges),
            edges.edge_index[0],
            edges.edge_index[1],
            radial.hidden(edges.basis(), edges.element_pairs(weights.tables)),
            radial.output,
            radial.bias,
            weights.first,
            weights.alpha.numel(),
            self.lmax,
            self.rad_func is not None,
            backend,
            edges.neighbors(backend),
        )

    def _attention_weights(
        self,
        scalars: Tensor,
        part: Part,
        weights: AttentionWeights,
        backend: Backend,
        gates: Tensor | None,
    ) -> Tensor:
        """`[E, H * A]` scalars to `[E, H]` weights; renormalized before the nonlinearity (section 4.2).

        With a smooth cutoff they are env * env exp(logit) / sum of env exp(logit) (EquiformerV3). The first
        env is that of the values; without it the only edge of an atom would not fade.
        """
        with no_autocast(scalars):
            # Cheap to compute again, and its intermediates would be half of what training stores per edge.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                logits = self._logits(scalars, weights.alpha, *weights.alpha_norm)
            else:
                tensors = scalars, weights.alpha, *weights.alpha_norm
                logits = checkpoint(self._logits, *tensors, use_reentrant=False, preserve_rng_state=False)
            if gates is not None:
                logits = logits + torch.log(gates[part.edges].to(logits.dtype)).unsqueeze(1)
            edges = part.graph
            envelope = edges.envelope()
            if envelope is not None:
                envelope = envelope.to(logits.dtype).unsqueeze(1)
                # The logarithm of zero has no derivative; what is this small is cut by the factor below.
                logits = logits + torch.log(envelope.clamp(min=_SMALLEST))
            near = edges.neighbors(backend)
            alpha = segment_softmax(logits, edges.edge_index[1], edges.num_atoms, near)
            return alpha if envelope is None else alpha * envelope

    @staticmethod
    def _make_activation(name: Activation, block: ResolvedBlock, grid: S2Grid) -> EdgeActivation:
        if name == "gate":
            return GateActivation([int(k**0.5) for k in m_major_order(block.lmax, block.mmax)])
        if name == "swiglu_s2":
            return SwiGLUS2Activation(grid)
        return SeparableS2Activation(grid) if name == "separable_s2" else S2Activation(grid)

    def _logits(self, scalars: Tensor, alpha: Tensor, *norm: Tensor) -> Tensor:
        scalars = scalars.to(alpha.dtype).unflatten(1, (self.num_heads, -1))
        if norm:
            scalars = nn.functional.layer_norm(scalars, norm[0].shape, norm[0], norm[1])
        return (self.alpha_act(scalars) * alpha).sum(2)


class VectorHead(SO2EquivariantGraphAttention):
    """Attention of which the l = 1 output alone is read: one vector per target atom.

    Args:
        config: hyper-parameters.
        grid: S2 grid of the coefficients of the messages in m-major order.
    """

    def __init__(self, config: ModelConfig, grid: S2Grid) -> None:
        super().__init__(config, config.force_block, grid, 1, 0.0, config.force_activation)
        # No output depends on these.
        self.so2_conv_2.so2_m_conv[1:].requires_grad_(False)
        self.proj.bias.requires_grad_(False)

    def forward(  # type: ignore[override]
        self, x: Tensor, edges: EdgeGraph, backend: Backend, routing: BlockRouting = EVERYTHING
    ) -> Tensor:
        """Compute what is read and nothing else.

        Args:
            x: `[N, K, C]` normed features.
            edges: the edges into the target atoms.
            backend: the implementation.
            routing: which atoms the targets are.

        Returns:
            `[n, 3]` in float32 or wider.
        """
        order = min(1, self.mmax)
        rows = (self.lmax + 1) + 2 * self.lmax * order
        with no_autocast(x):
            projection = self.proj.weights()
        weights = self._weights(edges, self.so2_conv_2.weights_of_vectors(), projection)
        x = self._message_degrees(x)
        x_target = routing.at_targets(x)

        def layer(part: Part) -> Tensor:
            scalars, hidden = self._convolve(x, x_target[part.atoms], part.graph, weights, backend)
            alpha = self._attention_weights(scalars, part, weights, backend, routing.edge_gates)
            total = self._sum(hidden, alpha, part.graph, backend, rows, weights, (1, order))
            with no_autocast(total):  # what leaves the network is not rounded
                return self.proj.degree(total[:, 1:4] * self.scale[1:4], 1, projection)

        return at_least_float32(joined([layer(part) for part in edges.parts(backend)]).squeeze(2))


def radial_input_size(config: ModelConfig) -> int:
    """Inputs of a radial function: distance basis and the embeddings of both elements."""
    return config.num_distance_basis + (2 * config.edge_channels if config.use_atom_edge_embedding else 0)


def element_embedding(config: ModelConfig) -> nn.Embedding:
    """Element embedding for a radial function; near zero, so that the distance dominates at first."""
    embedding = nn.Embedding(config.max_num_elements, config.edge_channels)
    nn.init.uniform_(embedding.weight, -0.001, 0.001)
    return embedding
