"""Configuration of the network: one validated dataclass, with the paper's presets."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from equiformer2.errors import InputError
from equiformer2.model.block_config import WIDTH, BlockConfig, ResolvedBlock
from equiformer2.model.grid_resolution import GridResolution, Grids
from equiformer2.values import Items, Number, OneOf, Optional, Rule, Switch, Whole, shown

# Statistics of the first 100,000 structures of OC20 IS2RE (cutoff 5 Å, at most 100 neighbours), constants of
# the reference implementation that every public checkpoint was trained with.
AVG_NUM_NODES = 77.81317
AVG_DEGREE = 23.395238876342773

Activation = Literal["gate", "s2", "separable_s2", "swiglu_s2"]
NormType = Literal["layer_norm", "layer_norm_sh", "rms_norm_sh"]
WeightInit = Literal["normal", "uniform"]
Forces = Literal["direct", "gradient", "none"]

MAX_DEGREE = 11
"""Highest degree and order: there the rotation tables of the reference (e3nn's) end."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of EquiformerV2 (paper Table 7; names as in the reference implementation).

    Every field is checked, type and range, wherever the values come from; numpy's scalars become Python's.

    Args:
        num_layers: Transformer blocks N.
        sphere_channels: channels C of every irreps coefficient (`d_embed`).
        attn_hidden_channels: hidden channels of the attention's SO(2) convolutions.
        num_heads: attention heads H.
        attn_alpha_channels: channels per head of the vector that attention weights are computed from.
        attn_value_channels: channels per head of the values.
        ffn_hidden_channels: hidden channels of the feed-forward networks.
        norm_type: `layer_norm_sh` (separable layer norm, paper section 4.4), `rms_norm_sh` (one norm of all
            degrees: EquiformerV3's merged layer norm) or `layer_norm`.
        lmax: maximum degree L of the irreps.
        mmax: maximum order M of the SO(2) convolutions, at most lmax.
        grid_resolution: points along latitude and along longitude of the S2 grids; None for the
            smallest grid per (lmax, mmax), which makes equivariance a poor approximation. Grids of their own
            for attention and feed-forward networks as `{"attn": (latitudes, longitudes), "ffn": (…, …)}`.
        edge_channels: hidden channels of the radial functions.
        max_num_elements: atomic numbers must be below this.
        max_neighbors: nearest neighbours kept per atom.
        max_radius: cutoff radius, Å.
        enforce_max_neighbors_strictly: keep exactly `max_neighbors` edges; otherwise all that are
            as near as the last one (degenerate shell).
        num_distance_basis: Gaussian basis functions of the distance.
        use_atom_edge_embedding: give the elements of both atoms to the radial functions.
        share_atom_edge_embedding: one such element embedding for all blocks.
        use_m_share_rad: one radial weight for all orders m of a degree (EquiformerV3's per-degree weights).
        use_attn_renorm: attention re-normalization (paper section 4.2).
        use_gate_act: gate activation instead of the S2 activation.
        use_grid_mlp: feed-forward network on the sphere grid.
        use_sep_s2_act: separable S2 activation (paper section 4.3); otherwise the plain one.
        use_swiglu_s2_act: EquiformerV3's SwiGLU-S2 in place of the separable S2 activation, in attention and
            feed-forward networks; the force head gets the gate activation.
        smooth_cutoff: EquiformerV3's envelope: messages fade to zero at `max_radius`. The energy is smooth as
            long as `max_neighbors` cuts nothing.
        alpha_drop: dropout rate of attention weights.
        drop_path_rate: probability that a residual branch is dropped for a structure.
        proj_drop: equivariant dropout rate on the output of each branch.
        weight_init: `normal` or `uniform` initial linear weights.
        forces: `direct`: a head predicts them; `gradient`: they are minus the derivative of the energy
            (`model.conservative`); `none`.
        stress: with `forces: gradient`, give the stress, too.
        dens: build the parts for denoising (`model.denoising`), which `task.dens` trains; needs
            `forces: direct`.
        avg_num_nodes: average number of atoms, divides the sum of atomic energies.
        avg_degree: average number of edges per atom, divides the edge-degree embedding.
        blocks: widths and degrees of every block where they differ from those above (a pruned network); None
            if all blocks are equal.
        force_head: the same for the attention of the force head.
        energy_head: the same for the feed-forward network of the energy head.
    """

    num_layers: int = 12
    sphere_channels: int = 128
    attn_hidden_channels: int = 64
    num_heads: int = 8
    attn_alpha_channels: int = 64
    attn_value_channels: int = 16
    ffn_hidden_channels: int = 128
    norm_type: NormType = "layer_norm_sh"
    lmax: int = 6
    mmax: int = 2
    grid_resolution: int | GridResolution | None = 18
    edge_channels: int = 128
    max_num_elements: int = 90
    max_neighbors: int = 20
    max_radius: float = 12.0
    enforce_max_neighbors_strictly: bool = True
    num_distance_basis: int = 600
    use_atom_edge_embedding: bool = True
    share_atom_edge_embedding: bool = False
    use_m_share_rad: bool = False
    use_attn_renorm: bool = True
    use_gate_act: bool = False
    use_grid_mlp: bool = True
    use_sep_s2_act: bool = True
    use_swiglu_s2_act: bool = False
    smooth_cutoff: bool = False
    alpha_drop: float = 0.1
    drop_path_rate: float = 0.05
    proj_drop: float = 0.0
    weight_init: WeightInit = "uniform"
    forces: Forces = "direct"
    stress: bool = False
    dens: bool = False
    avg_num_nodes: float = AVG_NUM_NODES
    avg_degree: float = AVG_DEGREE
    blocks: tuple[BlockConfig, ...] | None = None
    force_head: BlockConfig | None = None
    energy_head: BlockConfig | None = None

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            object.__setattr__(self, name, rule.read(getattr(self, name), f"model.{name}"))
        if self.mmax > self.lmax:
            raise InputError(f"model.mmax = {self.mmax}: must be at most lmax ({self.lmax})")
        self._check_grid()
        if self.stress and self.forces != "gradient":
            raise InputError(f"model.stress needs model.forces: gradient, not {self.forces}")
        if self.dens and self.forces != "direct":
            raise InputError(f"model.dens needs model.forces: direct, not {self.forces}")
        if self.share_atom_edge_embedding and not self.use_atom_edge_embedding:
            raise InputError("model.share_atom_edge_embedding needs model.use_atom_edge_embedding")
        if self.use_swiglu_s2_act and (self.use_gate_act or not (self.use_sep_s2_act and self.use_grid_mlp)):
            raise InputError(
                "model.use_swiglu_s2_act takes the place of the other activations: leave model.use_gate_act "
                "false, model.use_sep_s2_act and model.use_grid_mlp true"
            )
        self._check_blocks()

    def _check_grid(self) -> None:
        if isinstance(self.grid_resolution, GridResolution):
            self.grid_resolution.check(self.lmax, self.mmax)
        elif self.grid_resolution is not None:
            smallest = 2 * (self.lmax + 1)
            if self.grid_resolution < smallest or self.grid_resolution % 2:
                raise InputError(
                    f"model.grid_resolution = {self.grid_resolution}: must be null or an even number of at "
                    f"least 2 * (lmax + 1) = {smallest}"
                )

    def _check_blocks(self) -> None:
        if self.is_pruned and self.use_swiglu_s2_act:
            raise InputError("model.use_swiglu_s2_act: blocks cannot have widths or degrees of their own")
        widths = self.widths
        if self.blocks is not None:
            if len(self.blocks) != self.num_layers:
                raise InputError(
                    f"model.blocks has {len(self.blocks)} blocks: must be as many as num_layers "
                    f"({self.num_layers})"
                )
            for index, block in enumerate(self.blocks):
                block.check(widths, self.use_grid_mlp, f"model.blocks[{index}]")
        for name, head in (("force_head", self.force_head), ("energy_head", self.energy_head)):
            if head is not None:
                head.check(widths, self.use_grid_mlp, f"model.{name}")
                if not (head.attention and head.feed_forward):
                    raise InputError(f"model.{name} = {head!r}: a head has no branch to drop")

    @property
    def regress_forces(self) -> bool:
        """Whether there is a force head; the reference's name for it."""
        return self.forces == "direct"

    @property
    def is_pruned(self) -> bool:
        """Whether some part has widths or degrees of its own, which the reference's layout cannot hold."""
        return any(part is not None for part in (self.blocks, self.force_head, self.energy_head))

    @property
    def widths(self) -> ResolvedBlock:
        """Model-wide widths and degrees, which blocks and heads have unless they name their own."""
        hidden = self.ffn_hidden_channels
        return ResolvedBlock(
            attention=True,
            feed_forward=True,
            lmax=self.lmax,
            mmax=self.mmax,
            num_heads=self.num_heads,
            attn_hidden_channels=self.attn_hidden_channels,
            attn_value_channels=self.attn_value_channels,
            ffn_hidden_channels=hidden,
            ffn_input_channels=hidden,
            ffn_grid_channels_1=hidden,
            ffn_grid_channels_2=hidden,
        )

    def block(self, index: int) -> ResolvedBlock:
        """Widths and degrees of block `index`, nothing left out."""
        return (BlockConfig() if self.blocks is None else self.blocks[index]).resolved(self.widths)

    @property
    def force_block(self) -> ResolvedBlock:
        """Degrees of the force head."""
        return (self.force_head or BlockConfig()).resolved(self.widths)

    @property
    def energy_block(self) -> ResolvedBlock:
        """Degrees of the energy head."""
        return (self.energy_head or BlockConfig()).resolved(self.widths)

    @property
    def attn_activation(self) -> Activation:
        """Nonlinearity of the messages of the blocks."""
        if self.use_swiglu_s2_act:
            return "swiglu_s2"
        return self.force_activation

    @property
    def force_activation(self) -> Activation:
        """Nonlinearity of the messages of the force head."""
        if self.use_gate_act or self.use_swiglu_s2_act:
            return "gate"
        return "separable_s2" if self.use_sep_s2_act else "s2"

    def with_v3(self) -> "ModelConfig":
        """The same sizes with everything of EquiformerV3 that there are switches for (docs/model.md)."""
        return dataclasses.replace(
            self, smooth_cutoff=True, norm_type="rms_norm_sh", use_swiglu_s2_act=True, use_m_share_rad=True
        )

    @property
    def attn_grid(self) -> int | tuple[int, int] | None:
        """Resolution of the grid in the attention, as `S2Grid` takes it."""
        grid = self.grid_resolution
        return grid.attn if isinstance(grid, GridResolution) else grid

    @property
    def ffn_grid(self) -> int | tuple[int, int] | None:
        """Resolution of the grid in the feed-forward networks."""
        grid = self.grid_resolution
        return grid.ffn if isinstance(grid, GridResolution) else grid

    @property
    def block_atom_edge_embedding(self) -> bool:
        """Whether every block has an element embedding of its own for its radial function."""
        return self.use_atom_edge_embedding and not self.share_atom_edge_embedding

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of all fields."""
        values = dataclasses.asdict(self)
        for key in _PARTS:
            # Networks whose blocks are all equal are described as they were before there were others.
            if values[key] is None:
                del values[key]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`; an unknown key is an `InputError` that names the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        values = with_present_keys(values)
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key)[:100], known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise InputError(f"unknown model key {shown(key)}{hint}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The paper's models: `83M` (Table 1, S2EF-2M), `31M` and `153M` (Table 2, S2EF-All+MD)."""
        if not isinstance(name, str) or name not in _PRESETS:
            raise InputError(f"unknown preset {shown(name)}; known are {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])


def with_present_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a model with `regress_forces`, which older files have, in the words of `forces`."""
    found = {key: value for key, value in values.items() if key != "regress_forces"}
    if values.get("regress_forces") is None:
        return found
    wanted = Switch().read(values["regress_forces"], "model.regress_forces")
    forces = OneOf(*get_args(Forces)).read(found.get("forces", "direct"), "model.forces")
    if not wanted and forces == "direct":
        found["forces"] = "none"
    elif wanted != (forces != "none"):
        raise InputError(
            f"model.regress_forces = {wanted} contradicts model.forces = {forces!r}: "
            "leave out regress_forces, the older of the two keys"
        )
    return found


_PARTS = ("blocks", "force_head", "energy_head")


class _Block:
    """Rule of a head: widths and degrees of its own, as `BlockConfig` or as a dictionary of its fields."""

    def read(self, value: Any, name: str) -> BlockConfig:
        """See `values.Rule`."""
        return BlockConfig.read(value, name)


class _Blocks:
    """Rule of the blocks: a list of what `_Block` says."""

    def read(self, value: Any, name: str) -> tuple[BlockConfig, ...]:
        """See `values.Rule`."""
        return tuple(Items(_Block(), most=256).read(value, name))


_RATE = Number(0.0, 1.0, below=True)
_AVERAGE = Number(1e-3, 1e9)
#: What every field must be, in the order of the fields.
_RULES: dict[str, Rule] = {
    "num_layers": Whole(1, 256),
    "sphere_channels": WIDTH,
    "attn_hidden_channels": WIDTH,
    "num_heads": WIDTH,
    "attn_alpha_channels": WIDTH,
    "attn_value_channels": WIDTH,
    "ffn_hidden_channels": WIDTH,
    "norm_type": OneOf(*get_args(NormType)),
    "lmax": Whole(1, MAX_DEGREE),
    "mmax": Whole(0, MAX_DEGREE),
    "grid_resolution": Grids(),
    "edge_channels": WIDTH,
    "max_num_elements": Whole(1, 256),
    "max_neighbors": Whole(1, 2**31 - 1),
    "max_radius": Number(0.1, 100.0),
    "enforce_max_neighbors_strictly": Switch(),
    "num_distance_basis": Whole(2, WIDTH.most),
    "use_atom_edge_embedding": Switch(),
    "share_atom_edge_embedding": Switch(),
    "use_m_share_rad": Switch(),
    "use_attn_renorm": Switch(),
    "use_gate_act": Switch(),
    "use_grid_mlp": Switch(),
    "use_sep_s2_act": Switch(),
    "use_swiglu_s2_act": Switch(),
    "smooth_cutoff": Switch(),
    "alpha_drop": _RATE,
    "drop_path_rate": _RATE,
    "proj_drop": _RATE,
    "weight_init": OneOf(*get_args(WeightInit)),
    "forces": OneOf(*get_args(Forces)),
    "stress": Switch(),
    "dens": Switch(),
    "avg_num_nodes": _AVERAGE,
    "avg_degree": _AVERAGE,
    "blocks": Optional(_Blocks()),
    "force_head": Optional(_Block()),
    "energy_head": Optional(_Block()),
}

# Paper Table 7: L, M, N and drop path per model; everything else is shared and the default of ModelConfig.
_PRESETS: dict[str, dict[str, Any]] = {
    "31M": {"num_layers": 8, "lmax": 4, "mmax": 2, "drop_path_rate": 0.1},
    "83M": {"num_layers": 12, "lmax": 6, "mmax": 2, "drop_path_rate": 0.05},
    "153M": {"num_layers": 20, "lmax": 6, "mmax": 3, "drop_path_rate": 0.1},
}
