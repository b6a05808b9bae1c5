"""Keep non-finite steps from the weights: stop the run or skip the step, and save the structures."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer
from torch_geometric.data import Batch

from equiformer2.checkpoint.tensor_files import write_tensors
from equiformer2.errors import InputError
from equiformer2.graph import structure_index

log = logging.getLogger("equiformer2")

#: Beginning of the name of a file with the structures of a non-finite step.
DUMP_PREFIX = "non_finite_"
#: Largest number of atoms in such a file (about 100 bytes each), unless a single structure has more.
MAX_ATOMS = 20_000


class MicroBatch(NamedTuple):
    """One micro-batch with the network's answer.

    Attributes:
        step: optimizer step that it belongs to.
        loss: scalar.
        batch: the structures with their targets.
        out: outputs of the network in normalised units, by name.
    """

    step: int
    loss: Tensor
    batch: Batch
    out: dict[str, Tensor]

    def non_finite(self) -> Tensor:
        """Find the structures with a non-finite position, target or output, `[B]` bool."""
        batch = self.batch
        bad = torch.zeros(batch.num_graphs, dtype=torch.bool, device=batch.pos.device)
        index = structure_index(batch.natoms.view(-1), len(batch.pos))
        for values in (batch.energy, batch.get("forces"), batch.pos, *self.out.values()):
            if values is None:
                continue
            wrong = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
            if len(wrong) == len(bad):
                bad |= wrong
            if len(wrong) == len(index):
                bad[index[wrong]] = True
        return bad

    def names(self, only_non_finite: bool) -> list[str]:
        """Name the structures as `sid/fid`, all of them or those of `non_finite`."""
        fids = torch.as_tensor(self.batch.fid).tolist()
        names = [f"{sid}/{fid}" for sid, fid in zip(self.batch.sid, fids, strict=True)]
        bad = self.non_finite().tolist() if only_non_finite else [True] * len(names)
        return [name for name, chosen in zip(names, bad, strict=True) if chosen]

    def records(self) -> list[dict[str, Any]]:
        """Copy each structure as plain values and CPU tensors, its outputs under `predicted`."""
        batch = self.batch.cpu()
        sizes = torch.as_tensor(batch.natoms).reshape(-1).tolist()
        rows = {len(batch.pos): sizes, batch.num_graphs: [1] * batch.num_graphs}
        by_row = {name: value.cpu() for name, value in self.out.items() if len(value) in rows}
        parts = {name: value.split(rows[len(value)]) for name, value in by_row.items()}
        records = []
        for number, data in enumerate(batch.to_data_list()):
            # Clones: a part of a tensor would be stored with the whole of it.
            fields = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in data.to_dict().items()
                if isinstance(value, Tensor | int | float | str)
            }
            predicted = {name: split[number].clone() for name, split in parts.items()}
            records.append({**fields, "predicted": predicted})
        return records


class FiniteGuard:
    """Judges every optimizer step by the norm of its gradient, without making the host wait for a GPU.

    A step that is not finite changes neither weights nor optimizer. On a GPU the verdict is read during the
    next step (or before a checkpoint is written), when it has long arrived; on a CPU at once. All processes
    of a run have the same gradient, so that all come to the same verdict.

    Args:
        allowed: how many such steps may follow each other before the run stops.

    Attributes:
        folder: folder for the batch of the step that stopped the run; None writes none.
        max_atoms: largest number of atoms in its file.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.folder: Path | None = None
        self.max_atoms = MAX_ATOMS
        self._counts = torch.zeros(2)  # skipped in all, skipped one after the other
        self._running: list[MicroBatch] = []
        self._judged: list[MicroBatch] = []
        self._verdict: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    @property
    def skipped(self) -> Tensor:
        """Number of steps skipped so far (scalar)."""
        return self._counts[0]

    def watch(self, step: int, loss: Tensor, batch: Batch, out: dict[str, Tensor]) -> None:
        """Take on a micro-batch of the step that is going on; read the verdict on the step before."""
        self.check()
        if self._running and self._running[0].step != step:
            self._running = []
        out = {name: value.detach() for name, value in out.items()}
        self._running.append(MicroBatch(step, loss.detach(), batch, out))

    def judge(self, optimizer: Optimizer, norm: Tensor) -> None:
        """Judge the step by the norm of its gradient (scalar), before `optimizer` takes it.

        Raises:
            InputError: on a CPU, as `check`.
        """
        bad = (~torch.isfinite(norm.detach())).float()
        # What a fused optimizer looks at, where the gradients are, to leave out a step.
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        total, row = self._counts.to(bad.device, non_blocking=True)
        self._counts = torch.stack((total + bad, (row + 1) * bad))
        self._judged, self._running = self._running, []
        self._verdict = self._counts[1].to("cpu", non_blocking=True)
        if bad.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self.check()

    def check(self) -> None:
        """Read the verdict on the last step judged; log it if the step was left out.

        Raises:
            InputError: more than `allowed` steps one after the other were not finite.
        """
        if self._verdict is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        row, judged = int(self._verdict), self._judged
        self._verdict, self._arrived, self._judged = None, None, []
        if row == 0:
            return
        what, names, step = self._explain(judged)
        if row <= self.allowed:
            log.warning(f"step {step} left out: the {what} is not finite; structures (sid/fid): {names}")
            return
        often = "" if row == 1 else f", {row} times in a row"
        raise InputError(
            f"the {what} is not finite at step {step}{often}; look at these structures (sid/fid): {names}; "
            f"{self._dump(judged, what)}if their data are sound, lower optim.lr or use "
            "trainer.precision: 32-true"
        )

    def _explain(self, judged: list[MicroBatch]) -> tuple[str, str, int]:
        """Loss or gradient, the structures of all processes that stand out (all when none does), the step."""
        bad = [name for each in judged for name in each.names(only_non_finite=True)]
        everything = [name for each in judged for name in each.names(only_non_finite=False)]
        bad_loss = any(not bool(torch.isfinite(each.loss)) for each in judged)
        step = judged[0].step if judged else 0
        shares = [(bad_loss, bad, everything)]
        if distributed.is_available() and distributed.is_initialized():
            shares = [shares[0]] * distributed.get_world_size()
            distributed.all_gather_object(shares, (bad_loss, bad, everything))
        names = [name for share in shares for name in share[1]] or [n for share in shares for n in share[2]]
        what = "loss" if any(share[0] for share in shares) else "gradient"
        return what, ", ".join(names[:8] + ["…"] * (len(names) > 8)), step

    def _dump(self, judged: list[MicroBatch], what: str) -> str:
        """Write the batch; half a sentence that says where it is."""
        if self.folder is None or not judged:
            return ""
        process = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        path = self.folder / f"{DUMP_PREFIX}step{judged[0].step}_process{process}.pt"
        try:
            write_dump(path, judged, what, self.max_atoms)
        except OSError as error:
            return f"the batch could not be written ({error}); "
        return f"the batch is in {path}; "

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, for a checkpoint."""
        return {"counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on counting from `state`."""
        self._counts = state["counts"].clone()


def write_dump(
    path: Path, micro_batches: Iterable[MicroBatch], what: str, max_atoms: int = MAX_ATOMS
) -> None:
    """Write the structures of a step to a file, non-finite ones first.

    The file holds plain values and tensors, for `torch.load(path, weights_only=True)`: `step`, `what` (loss
    or gradient), `losses` of the micro-batches, `structures` (a dictionary of the data object's fields each,
    and `predicted`, in the network's units) and `left_out`, how many are missing.

    Args:
        path: file to write.
        micro_batches: those of one optimizer step.
        what: `loss` or `gradient`, whichever is not finite.
        max_atoms: largest number of atoms in the file, unless a single structure has more.

    Raises:
        OSError: it could not be written.
    """
    micro_batches = list(micro_batches)
    structures: list[tuple[bool, dict[str, Any]]] = []
    for each in micro_batches:
        structures += zip((~each.non_finite()).tolist(), each.records(), strict=True)
    structures.sort(key=lambda pair: pair[0])
    kept: list[dict[str, Any]] = []
    atoms = 0
    for _, record in structures:
        atoms += len(record["pos"])
        if kept and atoms > max_atoms:
            break
        kept.append(record)
    content = {
        "step": micro_batches[0].step,
        "what": what,
        "losses": [float(each.loss) for each in micro_batches],
        "structures": kept,
        "left_out": len(structures) - len(kept),
    }
    write_tensors(path, content)
