"""Peak memory of a call and of a training step, by counting what they allocate on a CPU."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch_geometric.data import Batch

from equiformer2.model import EquiformerV2

_ALLOCATION = "[memory]"
_CPU = 0


def peak_allocated(call: Callable[[], object]) -> int:
    """Bytes of CPU tensors that `call` holds at its peak, beyond those that were there before it.

    From the profiler's record of every allocation, so it is the same each time, unlike the memory of the
    process; what libraries allocate past PyTorch is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    records = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == _ALLOCATION and event["args"]["Device Type"] == _CPU
    ]
    held = peak = 0
    for _, size in sorted(records, key=lambda record: record[0]):
        held += size
        peak = max(peak, held)
    return peak


def training_memory(model: EquiformerV2, batch: Batch) -> dict[str, int]:
    """Measure the second step of AdamW for the parameters that need gradients.

    Args:
        model: is trained by two steps.
        batch: structures of a step.

    Returns:
        Bytes of weights and buffers (`weights_bytes`), of the optimizer (`optimizer_bytes`), of what the step
        allocates on top at its peak (`peak_step_bytes`), their sum (`peak_bytes`), and the number of
        parameters that are `trained`.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = model(batch)
        (out["energy"].square().sum() + out["forces"].square().sum()).backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    states = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    peak = peak_allocated(step)
    return {
        "weights_bytes": held,
        "optimizer_bytes": states,
        "peak_step_bytes": peak,
        "peak_bytes": held + states + peak,
        "trained": sum(parameter.numel() for parameter in parameters),
    }
