"""Reads what W&B has written offline: a LevelDB log of protocol buffers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a `.wandb` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return rows


def _records(content: bytes) -> Iterator[bytes]:
    position, parts = HEADER, b""  # the file begins with seven bytes of its own
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        end = position + HEADER + length
        if kind == 0 or end > len(content):  # a killed process has not finished it
            return
        parts += content[position + HEADER : end]
        position = end
        if kind in (FULL, LAST):
            yield parts
            parts = b""
