"""Memory that a call needs at its peak."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

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
