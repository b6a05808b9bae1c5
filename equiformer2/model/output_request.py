"""Choice of the outputs that a caller reads, and the atoms that blocks must update for them."""

from typing import NamedTuple

import torch
from torch import Tensor

from equiformer2.errors import InputError


class OutputRequest(NamedTuple):
    """Choice of outputs; what only the others need is not computed.

    What is read has the same values as without a request.

    Attributes:
        energy: give energies.
        force_atoms: bool `[N]`: the atoms whose forces are given, None for all. The others get zero.
    """

    energy: bool = True
    force_atoms: Tensor | None = None

    def check(self, num_atoms: int, has_forces: bool) -> None:
        """Raise `InputError` where it does not fit the structures or the network."""
        if not has_forces and (self.force_atoms is not None or not self.energy):
            raise InputError("this network predicts no forces, so nothing but its energies can be asked for")
        mask = self.force_atoms
        if mask is not None and (mask.shape != (num_atoms,) or mask.dtype != torch.bool):
            raise InputError(
                f"force_atoms must have one true or false per atom ({num_atoms}), "
                f"not the shape {tuple(mask.shape)} of {mask.dtype}"
            )

    def cut(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the chosen outputs from all of them."""
        chosen = {name: value for name, value in out.items() if self.energy or name != "energy"}
        if self.force_atoms is not None:
            chosen["forces"] = torch.where(self.force_atoms[:, None], chosen["forces"], 0.0)
        return chosen


ALL_OUTPUTS = OutputRequest()


def receptive_fields(edge_index: Tensor, force_atoms: Tensor, num_blocks: int) -> list[Tensor]:
    """Atoms that every block has to update so that the forces on some atoms come out unchanged.

    The force head reads the final features of these atoms and of the sources of the edges into them; the last
    block has to update those. Every block before it has to update what the next one reads: the atoms that the
    next one updates and the sources of the edges into them.

    Args:
        edge_index: `[2, E]`, source and target.
        force_atoms: bool `[N]`.
        num_blocks: L.

    Returns:
        L masks, bool `[N]`, of the first block to the last; each contains the next.
    """
    source, target = edge_index
    fields: list[Tensor] = []
    read = force_atoms
    for _ in range(num_blocks):
        grown = read.clone()
        grown[source[read[target]]] = True
        fields.append(grown)
        read = grown
    return fields[::-1]
