"""Coefficients of experts from the mean composition of a structure and its task."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from equiformer2.errors import InputError
from equiformer2.experts.settings import ExpertSettings
from equiformer2.kernels.chunks import no_autocast
from equiformer2.values import shown_name


class ExpertGate(nn.Module):
    """Softmax of a small network of composition and task: coefficients that are positive and add up to 1.

    Args:
        settings: of the mixture.
        num_tasks: T.
        num_elements: Z, size of the table of elements.
    """

    def __init__(self, settings: ExpertSettings, num_tasks: int, num_elements: int) -> None:
        super().__init__()
        self.elements = nn.Embedding(num_elements, settings.channels)
        self.tasks = nn.Embedding(num_tasks, settings.channels)
        self.hidden = nn.Linear(2 * settings.channels, settings.hidden_channels)
        self.out = nn.Linear(settings.hidden_channels, settings.num_experts)

    @classmethod
    def from_state(
        cls,
        settings: ExpertSettings,
        num_tasks: int,
        num_elements: int,
        state: Mapping[str, Tensor],
        source: str,
    ) -> "ExpertGate":
        """Build the gate of a file, in float32.

        Args:
            settings, num_tasks, num_elements: see above.
            state: weights by name.
            source: name of the file, for errors.

        Raises:
            InputError: the weights do not fit the sizes, which is noticed before anything is built.
        """
        with torch.device("meta"):
            gate = cls(settings, num_tasks, num_elements)
        expected = {name: tuple(value.shape) for name, value in gate.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            raise InputError(
                f"{source}: weights of the gate do not fit the settings of the experts: "
                f"{', '.join(map(shown_name, wrong[:4]))}"
            )
        gate.load_state_dict({name: value.detach().float() for name, value in state.items()}, assign=True)
        return gate

    def coefficients(self, composition: Tensor, task: Tensor) -> Tensor:
        """Compute the coefficients of all experts.

        Args:
            composition: `[B, Z]` shares of the elements.
            task: `[B]` numbers of the tasks.

        Returns:
            `[B, K]`, rows of which add up to 1.

        Raises:
            InputError: a shape or a number of a task is wrong.
        """
        table = self.elements.weight
        if (
            composition.dim() != 2
            or composition.shape[1] != len(table)
            or task.shape != composition.shape[:1]
        ):
            raise InputError(
                f"compositions of shape {tuple(composition.shape)} and tasks of shape {tuple(task.shape)} do "
                f"not fit: give [structures, {len(table)}] and [structures]"
            )
        known = self.tasks.num_embeddings
        unknown = task[(task < 0) | (task >= known)]
        if len(unknown):
            raise InputError(f"a task has the number {int(unknown[0])}; there are {known}, counted from 0")
        with no_autocast(table):
            return self.out(self.features(composition, task)).softmax(dim=1)  # type: ignore[no-any-return]

    def features(self, composition: Tensor, task: Tensor) -> Tensor:
        """Compute what the last layer reads, `[B, hidden_channels]`; arguments as `coefficients`."""
        table = self.elements.weight
        both = torch.cat([composition.to(table.dtype) @ table, self.tasks(task)], dim=1)
        return nn.functional.silu(self.hidden(both))
