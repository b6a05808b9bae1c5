"""The structures of a step that went wrong: which of them stand out, and a file to look at them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2.checkpoint.files import write_tensors
from equiformer2.graph import structure_index

if TYPE_CHECKING:
    from equiformer2.training.guard import MicroBatch

#: Beginning of the file's name.
DUMP_PREFIX = "non_finite_"
#: Atoms in one file at most (about 100 bytes each), but for a single structure that has more.
MAX_ATOMS = 20_000


def suspects(batch: Batch, out: dict[str, Tensor], all_of_them: bool = False) -> list[str]:
    """`sid/fid` of the structures with a non-finite input, target or output, or of all."""
    chosen = range(batch.num_graphs) if all_of_them else _not_finite(batch, out).nonzero().flatten().tolist()
    fids = torch.as_tensor(batch.fid).tolist()
    return [f"{batch.sid[i]}/{fids[i]}" for i in chosen]


def _not_finite(batch: Batch, out: dict[str, Tensor]) -> Tensor:
    """`[B]` bool."""
    bad = torch.zeros(batch.num_graphs, dtype=torch.bool, device=batch.pos.device)
    index = structure_index(batch.natoms.view(-1), len(batch.pos))
    for values in (batch.energy, batch.get("forces"), batch.pos, *out.values()):
        if values is None:
            continue
        wrong = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
        if len(wrong) == len(bad):
            bad |= wrong
        if len(wrong) == len(index):
            bad[index[wrong]] = True
    return bad


def write_dump(path: Path, micro_batches: Iterable["MicroBatch"], what: str) -> None:
    """Write the structures of a step, those that stand out first, as many as `MAX_ATOMS` allow.

    The file holds plain values and tensors, for `torch.load(path, weights_only=True)`: `step`, `what` (loss
    or gradient), `losses` of the micro-batches, `structures` (a dictionary of the data object's fields each,
    and `predicted`, in the network's units) and `left_out`, how many are missing.

    Raises:
        OSError: it could not be written.
    """
    micro_batches = list(micro_batches)
    structures: list[tuple[bool, dict[str, Any]]] = []
    for each in micro_batches:
        fine = (~_not_finite(each.batch, each.out)).tolist()
        structures += zip(fine, _records(each.batch, each.out), strict=True)
    structures.sort(key=lambda pair: pair[0])
    kept: list[dict[str, Any]] = []
    atoms = 0
    for _, record in structures:
        atoms += len(record["pos"])
        if kept and atoms > MAX_ATOMS:
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


def _records(batch: Batch, out: dict[str, Tensor]) -> list[dict[str, Any]]:
    batch = batch.cpu()
    sizes = torch.as_tensor(batch.natoms).reshape(-1).tolist()
    rows = {len(batch.pos): sizes, batch.num_graphs: [1] * batch.num_graphs}
    # Clones: a part of a tensor would be stored with the whole of it.
    parts = {name: value.cpu().split(rows[len(value)]) for name, value in out.items() if len(value) in rows}
    records = []
    for number, data in enumerate(batch.to_data_list()):
        fields = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in data.to_dict().items()
            if isinstance(value, Tensor | int | float | str)
        }
        predicted = {name: split[number].clone() for name, split in parts.items()}
        records.append({**fields, "predicted": predicted})
    return records
