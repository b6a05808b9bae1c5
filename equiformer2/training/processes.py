"""Several processes: which strategies there are, and that all processes were given the same run."""

import socket
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import distributed

from equiformer2.errors import InputError


def strategy_of(trainer: Mapping[str, Any]) -> Any:
    """Lightning's `strategy` for the `trainer:` keys of a run.

    DDP for several processes, told that some parameters get no gradient (see `EquiformerV2`).

    Raises:
        InputError: another strategy, such as FSDP or DeepSpeed, which nobody has tested with this network; or
            devices that are no number or list.
    """
    strategy, devices = trainer["strategy"], trainer["devices"]
    if isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        return strategy
    if strategy not in ("auto", "ddp"):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise InputError(
            f"trainer.strategy is {name}; only 'auto' and 'ddp' are supported, which keep the whole network "
            "on every device (153M parameters with AdamW and the average take 3 GB): leave it out"
        )
    if devices in ("auto", -1, "-1"):
        count = torch.cuda.device_count() if trainer["accelerator"] in ("auto", "gpu", "cuda") else 1
    elif isinstance(devices, str):
        if not devices.replace(",", "").isdigit():
            raise InputError(f"trainer.devices is {devices!r}: give a number, a list such as 0,1 or auto")
        count = len(devices.split(",")) if "," in devices else int(devices)
    else:
        count = len(devices) if isinstance(devices, list) else int(devices)
    if strategy == "auto" and count * trainer["num_nodes"] <= 1:
        return strategy
    return DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False)


def check_launched_as_told(trainer: pl.Trainer) -> None:
    """Raise `ValueError` when Slurm was asked for other numbers of nodes or processes than the trainer."""
    if isinstance(trainer.strategy, DDPStrategy) and trainer.strategy.cluster_environment is not None:
        trainer.strategy.cluster_environment.validate_settings(trainer.num_devices, trainer.num_nodes)


class SameRunEverywhere(pl.Callback):
    """Refuses to begin when the processes of a run were not given the same.

    Nodes with another copy of the data, another configuration or without the checkpoint to resume from would
    otherwise train on quietly, or wait for each other for ever.

    Args:
        facts: gives what must be the same, name to value; called when the processes know each other.
    """

    def __init__(self, facts: Callable[[], dict[str, str]]) -> None:
        self._facts = facts

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or stage != "fit":
            return
        everywhere: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(everywhere, (socket.gethostname(), self._facts()))
        first_host, expected = everywhere[0]
        for process, (host, found) in enumerate(everywhere):
            for name, value in expected.items():
                if found[name] != value:
                    raise InputError(
                        f"{name}: {found[name]} in process {process} on {host}, but {value} in process 0 on "
                        f"{first_host}; all processes need the same configuration, data and runs_dir"
                    )


def settings_to_compare(**groups: Any) -> dict[str, str]:
    """`group.key` to value of dataclasses and mappings; without values that are no numbers or texts."""
    found = {}
    for group, settings in groups.items():
        if not isinstance(settings, Mapping):
            settings = {field.name: getattr(settings, field.name) for field in fields(settings)}
        for key, value in settings.items():
            if value is None or isinstance(value, bool | int | float | str | tuple):
                found[f"{group}.{key}"] = repr(value)
    return found


def fingerprint(natoms: np.ndarray) -> str:
    """Tells data from other data by their number and sizes."""
    checksum = zlib.crc32(np.ascontiguousarray(natoms, dtype=np.int32).tobytes())
    return f"{len(natoms)} structures (checksum of their sizes {checksum:08x})"
