"""Settings of a mixture of linear experts."""

from dataclasses import asdict, dataclass
from typing import Any

from equiformer2.values import Number, Whole

MOST_EXPERTS = 1024


@dataclass(frozen=True)
class ExpertSettings:
    """Mixture of linear experts in the SO(2) convolutions and feed-forward networks.

    Args:
        num_experts: K, weights that each weight is a sum of; 0 for a plain network. Pruning may leave 1.
        channels: of the embeddings of elements and tasks that the coefficients are computed from.
        hidden_channels: of the layer behind them.
        spread: differences between the experts at the start, relative to the weights (root mean squares).

    Raises:
        InputError: a value is out of its range.
    """

    num_experts: int = 0
    channels: int = 32
    hidden_channels: int = 64
    spread: float = 0.2

    def __post_init__(self) -> None:
        for name, rule in (
            ("num_experts", Whole(0, MOST_EXPERTS)),
            ("channels", Whole(1, 4096)),
            ("hidden_channels", Whole(1, 4096)),
            ("spread", Number(0.0, 100.0, above=True)),
        ):
            object.__setattr__(self, name, rule.read(getattr(self, name), f"experts.{name}"))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)
