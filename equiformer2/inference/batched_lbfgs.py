"""L-BFGS for many structures at once, each with its own curvature and step length."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class _Pair(NamedTuple):
    moved: Tensor
    """`[N, 3]` Å: the last displacement, s."""
    change: Tensor
    """`[N, 3]` eV/Å: the change of the gradient along it, y."""
    rho: Tensor
    """`[B]`: 1 / (s · y); 0 where a structure has no such step, which takes the pair out of every sum."""


class BatchedLBFGS:
    """Limited-memory BFGS (Liu and Nocedal 1989) without line search, as `ase.optimize.LBFGS`.

    Every structure takes the steps that it would take alone. Structures can be added and taken out between
    steps. Everything is float64.

    Args:
        memory: steps to remember.
        max_step: largest displacement of an atom in one step, Å.
        alpha: first guess of the curvature, eV/Å².
        damping: factor on every step.
    """

    def __init__(
        self, memory: int = 50, max_step: float = 0.04, alpha: float = 70.0, damping: float = 1.0
    ) -> None:
        self.max_step, self.alpha, self.damping = max_step, alpha, damping
        self._pairs: deque[_Pair] = deque(maxlen=memory)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # positions, forces [N, 3]; known [B]

    def step(self, positions: Tensor, forces: Tensor, structure: Tensor, count: int) -> Tensor:
        """The displacement `[N, 3]` Å.

        Args:
            positions: `[N, 3]` Å.
            forces: `[N, 3]` eV/Å, zero on atoms that must not move.
            structure: `[N]` the structure of each atom, 0 … count - 1.
            count: B, the number of structures.
        """

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return a.new_zeros(count).index_add(0, structure, (a * b).sum(dim=1))

        if self._last is not None:
            self._remember(positions, forces, structure, dot(*self._differences(positions, forces)))
        q, weights = -forces, []
        for pair in reversed(self._pairs):
            weights.append(pair.rho * dot(pair.moved, q))
            q = q - weights[-1][structure, None] * pair.change
        z = q / self.alpha
        for pair, weight in zip(self._pairs, reversed(weights), strict=True):
            z = z + pair.moved * (weight - pair.rho * dot(pair.change, z))[structure, None]
        self._last = (positions.clone(), forces.clone(), positions.new_ones(count, dtype=torch.bool))
        return -z * self._scale(z, structure, count)

    def _differences(self, positions: Tensor, forces: Tensor) -> tuple[Tensor, Tensor]:
        assert self._last is not None
        return positions - self._last[0], self._last[1] - forces

    def _remember(self, positions: Tensor, forces: Tensor, structure: Tensor, curvature: Tensor) -> None:
        assert self._last is not None
        # A structure that is new, or did not move, has no step to learn from.
        usable = self._last[2] & (curvature != 0)
        rho = torch.where(usable, 1.0 / torch.where(usable, curvature, 1.0), 0.0)
        moved, change = self._differences(positions, forces)
        keep = usable[structure, None]
        self._pairs.append(_Pair(torch.where(keep, moved, 0.0), torch.where(keep, change, 0.0), rho))

    def _scale(self, z: Tensor, structure: Tensor, count: int) -> Tensor:
        longest = z.new_zeros(count).scatter_reduce_(0, structure, z.norm(dim=1), reduce="amax")
        factor = torch.where(longest >= self.max_step, self.max_step / longest, 1.0)
        return self.damping * factor[structure, None]

    def add(self, atoms: int, structures: int) -> None:
        """Make room for new structures behind the present ones."""
        if self._last is None:
            return
        positions, forces, known = self._last
        self._last = (_longer(positions, atoms), _longer(forces, atoms), _longer(known, structures))
        self._pairs = deque(
            (
                _Pair(_longer(s, atoms), _longer(y, atoms), _longer(rho, structures))
                for s, y, rho in self._pairs
            ),
            maxlen=self._pairs.maxlen,
        )

    def keep(self, atoms: Tensor, structures: Tensor) -> None:
        """Forget all but the atoms and structures of these masks, `[N]` and `[B]` bool."""
        if self._last is None:
            return
        positions, forces, known = self._last
        self._last = (positions[atoms], forces[atoms], known[structures])
        kept = (_Pair(s[atoms], y[atoms], rho[structures]) for s, y, rho in self._pairs)
        # Pairs older than all that are left would only cost time.
        self._pairs = deque((pair for pair in kept if bool(pair.rho.any())), maxlen=self._pairs.maxlen)


def _longer(tensor: Tensor, more: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])
