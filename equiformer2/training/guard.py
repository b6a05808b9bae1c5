"""Stop at the first loss that is not a number, and say which structures made it so."""

import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.errors import InputError
from equiformer2.training.metrics import structure_index


class FiniteGuard:
    """Watches the losses of a run without making the host wait for a GPU.

    On a GPU the verdict on a step is read during the next step (or before a checkpoint is written), when
    it has long arrived; on a CPU at once.
    """

    def __init__(self) -> None:
        self._verdict: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._evidence: tuple[int, Batch, dict[str, Tensor]] | None = None
        self._sizes: tuple[int, int] | None = None

    def watch(self, step: int, loss: Tensor, batch: Batch, out: dict[str, Tensor]) -> None:
        """Judge the previous loss, then take on this one (a scalar) with what would explain it."""
        self.check()
        self._sizes = (batch.num_graphs, batch.pos.shape[0])
        self._verdict = torch.isfinite(loss.detach()).to("cpu", non_blocking=True)
        self._evidence = (step, batch, {name: value.detach() for name, value in out.items()})
        if loss.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self.check()

    def check(self) -> None:
        """Raise `InputError` if the last loss watched was not finite."""
        if self._verdict is None or self._evidence is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        finite, (step, batch, out) = bool(self._verdict), self._evidence
        self._verdict = self._evidence = self._arrived = None
        if not finite:
            names = ", ".join(_suspects(batch, out))
            raise InputError(
                f"the loss is not finite at step {step}; look at these structures (sid/fid): {names}; "
                "if their data are sound, lower optim.lr or use trainer.precision: 32-true"
            )

    def last_batch(self) -> str:
        """The size of the last batch watched, for messages; empty before the first."""
        if self._sizes is None:
            return ""
        return f" (the last batch had {self._sizes[0]} structures, {self._sizes[1]} atoms)"


def _suspects(batch: Batch, out: dict[str, Tensor], at_most: int = 8) -> list[str]:
    """Structures with a non-finite input, target or output; all of the batch when none stands out."""
    bad = torch.zeros(batch.num_graphs, dtype=torch.bool, device=batch.pos.device)
    index = structure_index(batch)
    for values in (batch.energy, batch.forces, batch.pos, *out.values()):
        wrong = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
        if len(wrong) == len(bad):
            bad |= wrong
        if len(wrong) == len(index):
            bad[index[wrong]] = True
    chosen = bad.nonzero().flatten().tolist() or list(range(batch.num_graphs))
    fids = torch.as_tensor(batch.fid).tolist()
    names = [f"{batch.sid[i]}/{fids[i]}" for i in chosen[:at_most]]
    return names + ["…"] * (len(chosen) > at_most)
