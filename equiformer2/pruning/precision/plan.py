"""Precision of every weight matrix of a network: one object, beside the plan of what is pruned."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.branches import branch_names
from equiformer2.model.config import ModelConfig
from equiformer2.model.parametrizations import BITS
from equiformer2.pruning.plan_files import PlanFile
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.values import shown, shown_name

_MOST_MODULES = 20_000
#: Linear maps that make the outputs: nothing after them could make up for what rounding changes.
LAST_LAYERS = ("energy_block.so3_linear_2", "force_block.proj")
#: Parts without a weight matrix of their own, by the words that a plan could name them with.
_WITHOUT_MODULE = ("rotations", "grids", "norms", "softmax", "sums")
_INSIDE_PART = re.compile(r"\.(net\.\d+|fc_m0|so2_m_conv\.\d+\.fc|\d+)$")
_EMBEDDING = re.compile(r"(source|target)_embedding$")


def matrices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """List the modules whose weight matrix may have any precision, with its shape.

    Everything else stays float32: rotations, grids, norms, biases, the logits and the softmax of the
    attention, sums, and the last layer of either head.

    Args:
        model: a network with plain weights.
    """
    return {
        path: tuple(module.weight.shape)  # type: ignore[union-attr, arg-type]
        for path, module in model.named_modules()
        if "weight" in module._parameters
        and module.weight is not None
        and module.weight.dim() >= 2  # type: ignore[operator]
        and path not in LAST_LAYERS
        and not path.startswith("dens.")
    }


@functools.lru_cache(maxsize=8)
def skeleton(config: ModelConfig) -> EquiformerV2:
    """Make a network of shapes without numbers, to look up names in; it is shared and not to be changed."""
    return EquiformerV2(config, device="meta")


def parts_of(modules: Mapping[str, object]) -> dict[str, list[str]]:
    """Group modules into the parts that a search gives one precision: convolutions, radial functions, ….

    Args:
        modules: names of modules, as `matrices` lists them.

    Returns:
        Name of the part -> its modules, in the order of `modules`.
    """
    parts: dict[str, list[str]] = {}
    for name in modules:
        part = _EMBEDDING.sub("element_embeddings", _INSIDE_PART.sub("", name))
        parts.setdefault(part, []).append(name)
    return parts


@dataclasses.dataclass(frozen=True)
class PrecisionPlan(PlanFile):
    """Precision of weight matrices, and the pruning that comes before.

    Immutable and hashable. Modules that are not named are float32. Equal plans are equal after `checked`.

    Attributes:
        modules: pairs of a module's name in the dense network and `float32`, `bf16`, `int8` or `int4`.
        pruning: units that are kept; None for all.
        products: branches of the dense network whose matrix products run in bfloat16 where the device has
            instructions for it, such as `blocks.0.ga`. All of their matrices are stored as bfloat16.

    Raises:
        InputError: a precision that does not exist, or a module or branch that is named twice.
    """

    kind: ClassVar[str] = "precision plan"
    file_format: ClassVar[str] = "equiformer2.precision_plan"

    modules: tuple[tuple[str, str], ...] = ()
    pruning: PruningPlan | None = None
    products: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pairs = tuple(sorted((str(name), precision) for name, precision in self.modules))
        for name, precision in pairs:
            if not isinstance(precision, str) or precision not in BITS:
                raise InputError(
                    f"precision plan: {shown_name(name)} is to be {shown(precision)}: use one of "
                    f"{', '.join(BITS)}"
                )
        branches = tuple(sorted(self.products))
        for names in ([name for name, _ in pairs], branches):
            twice = next((name for name, other in itertools.pairwise(names) if name == other), None)
            if twice is not None:
                raise InputError(f"precision plan: {shown_name(twice)} is named twice")
        object.__setattr__(self, "modules", pairs)
        object.__setattr__(self, "products", branches)

    @classmethod
    def uniform(
        cls, config: ModelConfig, precision: str, pruning: PruningPlan | None = None
    ) -> PrecisionPlan:
        """Give every module that may have it the same precision.

        Args:
            config: of the dense network.
            precision: `float32`, `bf16`, `int8` or `int4`.
            pruning: units that are kept; None for all.
        """
        names = matrices(skeleton(config))
        return cls(tuple((name, precision) for name in names), pruning).checked(config)

    def checked(self, config: ModelConfig) -> PrecisionPlan:
        """Return the same plan in its one canonical form: no float32, nothing that the pruning removes.

        Args:
            config: of the dense network.

        Raises:
            InputError: an unknown module, one that stays float32 (the reason is given), or a pruning plan
                that does not fit.
        """
        dense = skeleton(config)
        known = matrices(dense)
        for name, _ in self.modules:
            if name not in known:
                raise InputError(f"precision plan: {_refusal(name, dense, known)}")
        pruning = None if self.pruning is None else self.pruning.checked(config)
        if pruning is not None and pruning == PruningPlan.keep_all(config).checked(config):
            pruning = None
        named = dict(self.modules) | self._in_products(dense, known)
        branches = branch_names(dense)
        if pruning is not None:
            small = skeleton(pruning.applied_to(config))
            known, branches = matrices(small), branch_names(small)
        kept = tuple(pair for pair in named.items() if pair[0] in known and pair[1] != "float32")
        return PrecisionPlan(kept, pruning, tuple(name for name in self.products if name in branches))

    def _in_products(self, dense: EquiformerV2, known: Mapping[str, object]) -> dict[str, str]:
        """Precisions of the matrices that multiply in bfloat16.

        Raises:
            InputError: no such branch, or a matrix of one that is to be stored otherwise.
        """
        given, found = dict(self.modules), {}
        for branch in self.products:
            if branch not in branch_names(dense):
                raise InputError(
                    f"precision plan: {shown_name(branch)} cannot multiply in bfloat16: branches are "
                    "blocks.N.ga and blocks.N.ffn"
                )
            for name in known:
                if name.startswith(f"{branch}."):
                    if given.get(name, "bf16") != "bf16":
                        raise InputError(
                            f"precision plan: {name} is to be {given[name]}, and {branch} multiplies in "
                            "bfloat16: leave one out"
                        )
                    found[name] = "bf16"
        return found

    def after(self, first: PruningPlan) -> PrecisionPlan:
        """Return one plan for a pruning and then this plan.

        Args:
            first: plan of the network that this plan counts in, for the network before it.

        Raises:
            InputError: this plan keeps something that `first` has removed.
        """
        return dataclasses.replace(
            self, pruning=first if self.pruning is None else first.compose(self.pruning)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values: dict[str, Any] = {**self.header(), "modules": dict(self.modules)}
        if self.pruning is not None:
            values["pruning"] = self.pruning.to_dict()
        if self.products:
            values["products"] = list(self.products)
        return values

    @classmethod
    def from_dict(cls, values: Any, source: str = "the precision plan") -> PrecisionPlan:
        """Read the plain values of `to_dict`; see `PlanFile.from_dict`."""
        cls.check_keys(values, ("modules", "pruning", "products"), source)
        modules = values.get("modules")
        if not isinstance(modules, Mapping) or not all(isinstance(name, str) for name in modules):
            raise InputError(f"{source}: modules must be a dictionary of names and precisions")
        if len(modules) > _MOST_MODULES:
            raise InputError(f"{source} names {len(modules)} modules: at most {_MOST_MODULES} are read")
        pruning = None
        if "pruning" in values:
            pruning = PruningPlan.from_dict(values["pruning"], f"{source}: pruning")
        products = values.get("products", [])
        if not isinstance(products, list | tuple) or not all(isinstance(name, str) for name in products):
            raise InputError(f"{source}: products must be a list of names of branches")
        if len(products) > _MOST_MODULES:
            raise InputError(f"{source} names {len(products)} branches: at most {_MOST_MODULES} are read")
        try:
            return cls(tuple(modules.items()), pruning, tuple(products))
        except InputError as error:
            raise InputError(f"{source}: {str(error).removeprefix('precision plan: ')}") from error


def _refusal(name: str, dense: EquiformerV2, known: Mapping[str, object]) -> str:
    """Say why a plan cannot name a module."""
    told = shown_name(name)
    if name in _WITHOUT_MODULE:
        return f"the {told} stay float32, so that the answers turn with the structure: leave them out"
    if name in LAST_LAYERS:
        return f"{told} is a last layer, which stays float32: leave it out"
    if name.removesuffix(".weight") in known:
        return f"{told} is a parameter: name its module, {name.removesuffix('.weight')}"
    inside = [module for module in known if module.startswith(f"{name}.")]
    if inside:
        return f"{told} holds {len(inside)} modules: name each, such as {inside[0]}"
    exists = name in dict(dense.named_modules()) or name in dict(dense.named_parameters())
    if name and exists:
        return (
            f"{told} stays float32, as all norms, biases, grids and the attention's softmax do: leave it out"
        )
    near = difflib.get_close_matches(name[:200], known, n=1)
    return f"the network has no module {told}" + (f"; did you mean '{near[0]}'?" if near else "")
