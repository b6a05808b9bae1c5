"""Units of a network to keep: one object for all structured cuts."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from equiformer2.errors import InputError
from equiformer2.model.block_config import BlockConfig
from equiformer2.model.config import ModelConfig
from equiformer2.model.conservative import check_config
from equiformer2.pruning.plan_files import PlanFile
from equiformer2.pruning.structured.block_plan import BlockPlan, check_indices, compose_indices, without_full

_MOST_BLOCKS = 256
_KEEP_ALL = BlockPlan()


def check_prunable(config: ModelConfig) -> None:
    """Refuse networks that have parts without rules for pruning.

    Args:
        config: configuration of the network.

    Raises:
        InputError: networks of `config` cannot be pruned.
    """
    if config.use_swiglu_s2_act:
        raise InputError(
            "a network with model.use_swiglu_s2_act cannot be pruned: train a smaller one, or one without it"
        )
    check_config(config, "pruning")


@dataclasses.dataclass(frozen=True)
class PruningPlan(PlanFile):
    """Units to keep of every block, of both heads, and of the channels common to all of them.

    Immutable and hashable. Indices count in the network that the plan is applied to, which may itself be
    pruned already: `first.compose(second)` is `second` applied after `first`.

    Attributes:
        blocks: units of each block. Blocks keep their numbers: one that loses both branches stays, empty.
        sphere_channels: kept channels of the atoms' features in all of the network; None for all.
        force_head: units of the attention of the force head.
        energy_head: units of the feed-forward network of the energy head.

    Raises:
        InputError: kept channels that are no ascending indices.
    """

    kind: ClassVar[str] = "pruning plan"
    file_format: ClassVar[str] = "equiformer2.pruning_plan"

    blocks: tuple[BlockPlan, ...]
    sphere_channels: tuple[int, ...] | None = None
    force_head: BlockPlan = _KEEP_ALL
    energy_head: BlockPlan = _KEEP_ALL

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.sphere_channels is not None:
            kept = check_indices(self.sphere_channels, "pruning plan: sphere_channels")
            object.__setattr__(self, "sphere_channels", kept)

    @classmethod
    def keep_all(cls, config: ModelConfig) -> PruningPlan:
        """Return the plan that keeps everything, to start from.

        Raises:
            InputError: networks of `config` cannot be pruned.
        """
        check_prunable(config)
        return cls((_KEEP_ALL,) * config.num_layers)

    def with_block(self, index: int, **changes: Any) -> PruningPlan:
        """Return a copy with other fields of one block, as `with_block(3, heads=(0, 2), mmax=1)`.

        Args:
            index: number of the block, from 0.
            **changes: fields of `BlockPlan`.

        Returns:
            The changed plan.

        Raises:
            InputError: there is no such block, or a field has no valid value.
        """
        if not 0 <= index < len(self.blocks):
            raise InputError(f"pruning plan: there is no block {index}, only 0 … {len(self.blocks) - 1}")
        block = dataclasses.replace(self.blocks[index], **changes)
        return dataclasses.replace(self, blocks=(*self.blocks[:index], block, *self.blocks[index + 1 :]))

    def checked(self, config: ModelConfig) -> PruningPlan:
        """Return the same plan in its one canonical form, so that equal plans are equal.

        Args:
            config: configuration of the network that the plan applies to.

        Returns:
            The plan with None wherever all is kept.

        Raises:
            InputError: the plan does not fit a network of `config`; block and field are named.
        """
        check_prunable(config)
        if len(self.blocks) != config.num_layers:
            raise InputError(
                f"pruning plan: it is for {len(self.blocks)} blocks, the network has {config.num_layers}"
            )
        if self.force_head != _KEEP_ALL and not config.regress_forces:
            raise InputError("pruning plan: force_head cuts a head that the network does not have")
        blocks = [
            plan.checked(config.block(index), config, f"block {index}")
            for index, plan in enumerate(self.blocks)
        ]
        for name, head, other in (
            ("force_head", self.force_head, "feed_forward"),
            ("energy_head", self.energy_head, "attention"),
        ):
            head.check_is_head(f"pruning plan: {name}", other)
        return PruningPlan(
            tuple(blocks),
            without_full(self.sphere_channels, config.sphere_channels, "pruning plan: sphere_channels"),
            self.force_head.checked(config.force_block, config, "force_head"),
            self.energy_head.checked(config.energy_block, config, "energy_head"),
        )

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of the pruned network.

        Args:
            config: configuration of the network that the plan applies to.

        Returns:
            The configuration after the cuts.

        Raises:
            InputError: as `checked`.
        """
        plan = self.checked(config)
        channels = config.sphere_channels if plan.sphere_channels is None else len(plan.sphere_channels)
        own = config.blocks or (None,) * config.num_layers
        blocks = tuple(
            cut.applied_to(old, config.block(index))
            for index, (cut, old) in enumerate(zip(plan.blocks, own, strict=True))
        )
        return dataclasses.replace(
            config,
            sphere_channels=channels,
            blocks=tuple(block or BlockConfig() for block in blocks) if any(blocks) else None,
            force_head=plan.force_head.applied_to(config.force_head, config.force_block),
            energy_head=plan.energy_head.applied_to(config.energy_head, config.energy_block),
        )

    def compose(self, other: PruningPlan) -> PruningPlan:
        """Return one plan for this one and then another.

        Args:
            other: plan whose indices count in the network that this plan has pruned already.

        Returns:
            The plan for the network that this plan applies to.

        Raises:
            InputError: `other` keeps something that this plan has removed.
        """
        if len(self.blocks) != len(other.blocks):
            raise InputError(
                f"pruning plans for {len(self.blocks)} and for {len(other.blocks)} blocks cannot be composed"
            )
        blocks = [
            first.compose(second, f"block {index}")
            for index, (first, second) in enumerate(zip(self.blocks, other.blocks, strict=True))
        ]
        return PruningPlan(
            tuple(blocks),
            compose_indices(self.sphere_channels, other.sphere_channels, "pruning plan: sphere_channels"),
            self.force_head.compose(other.force_head, "force_head"),
            self.energy_head.compose(other.energy_head, "energy_head"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the fields that keep everything."""
        values: dict[str, Any] = {
            **self.header(),
            "blocks": [block.to_dict() for block in self.blocks],
        }
        if self.sphere_channels is not None:
            values["sphere_channels"] = list(self.sphere_channels)
        for name in ("force_head", "energy_head"):
            if head := getattr(self, name).to_dict():
                values[name] = head
        return values

    @classmethod
    def from_dict(cls, values: Any, source: str = "the pruning plan") -> PruningPlan:
        """Read the plain values of `to_dict`; see `PlanFile.from_dict`."""
        cls.check_keys(values, [field.name for field in dataclasses.fields(cls)], source)
        blocks = values.get("blocks")
        if not isinstance(blocks, list | tuple):
            raise InputError(f"{source}: blocks must be a list with one entry per block")
        if len(blocks) > _MOST_BLOCKS:
            raise InputError(f"{source} is for {len(blocks)} blocks; a network has at most {_MOST_BLOCKS}")
        heads = {
            name: BlockPlan.from_dict(values[name], f"{source}: {name}")
            for name in ("force_head", "energy_head")
            if name in values
        }
        parts = tuple(BlockPlan.from_dict(block, f"{source}: block {i}") for i, block in enumerate(blocks))
        try:
            return cls(parts, values.get("sphere_channels"), **heads)
        except InputError as error:
            raise InputError(f"{source}: {str(error).removeprefix('pruning plan: ')}") from error
