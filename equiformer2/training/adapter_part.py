"""Adapter of a run: attached to its start, pruned on its data, and written as its result."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch_geometric.data import Batch

from datasets_oc20.frame_selection import spread_frames
from datasets_oc20.untrusted import AnyPath
from equiformer2.adapters import AdapterSettings, attach_adapter, prune_adapter
from equiformer2.checkpoint import Checkpoint, Normalizers
from equiformer2.checkpoint.adapter_files import Adapter, Base, read_adapter, write_adapter
from equiformer2.checkpoint.contents import check_energy_kind
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.folding import plain_name, plain_state
from equiformer2.model.parametrizations import LowRank, low_rank_maps
from equiformer2.shipped import find_checkpoint
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.start import with_whole_model


def with_start_model(
    model: ModelConfig, settings: AdapterSettings, init_from: str | None, text: str
) -> tuple[ModelConfig, str]:
    """Take over the whole network of `init_from` where it gets an adapter, but for dropout.

    Args:
        model: as configured.
        settings: of the adapter.
        init_from: the checkpoint to start from, or None.
        text: the configuration as YAML.

    Raises:
        InputError: an adapter without a network to start from, or with denoising.
    """
    if settings.rank == 0:
        return model, text
    if init_from is None:
        raise InputError("adapter.rank needs init_from, the checkpoint of the network to adapt: give both")
    values = yaml.safe_load(text)
    if model.dens or values["task"].get("dens") is not None:
        raise InputError("task.dens trains a part of its own, which an adapter does not hold: leave one out")
    return with_whole_model(model, init_from, text)


class AdapterPart:
    """The adapter of a network in training.

    Args:
        model: with the weights of `start`, or with heads rescaled; it is frozen and gets the maps.
        start: network that the adapter belongs to.
        path: of its file.
        settings: of the adapter.
        seed: of its random numbers.

    Attributes:
        base: network that the adapter belongs to.
    """

    def __init__(
        self, model: EquiformerV2, start: Checkpoint, path: str, settings: AdapterSettings, seed: int
    ) -> None:
        file = find_checkpoint(path)
        self.settings, self.seed = settings, seed
        self.base = Base(fingerprint_of_weights(start.model), sha256(file), file.name, start.weights)
        # Of matrices that the checkpoint stores in fewer bits, the weights that are computed from them.
        before = plain_state(start.model, start.model.state_dict())
        changed = {
            name
            for name, value in model.state_dict().items()
            if name not in before or not torch.equal(value, before[name])
        }
        self._maps = attach_adapter(model, settings, seed, self._start_maps())
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        whole = {name for name in trained if "parametrizations." not in name}
        self._replaced = sorted(changed | whole)

    def _start_maps(self) -> dict[str, LowRank] | None:
        """Maps to start with; None for new ones.

        Raises:
            InputError: the file is no adapter, of another network, or changes more than its maps.
        """
        if self.settings.start is None:
            return None
        adapter = read_adapter(self.settings.start)
        if adapter.base.fingerprint != self.base.fingerprint:
            raise InputError(
                f"{adapter.source} is an adapter of another network, {adapter.base.file}, and not of "
                f"{self.base.file}: give the adapter that was written with it"
            )
        check_start(adapter)
        return dict(adapter.maps)

    def prune(
        self,
        model: nn.Module,
        data: ResumableDataModule,
        loss: Callable[[Batch], Tensor],
        device: torch.device,
    ) -> None:
        """Choose the entries to train by the loss of training structures.

        Args:
            model: the network with the maps.
            data: to train on.
            loss: of a batch.
            device: to compute on.
        """
        if self.settings.start is not None:
            return  # its entries are chosen
        count = min(self.settings.frames, len(data.training))
        rows = spread_frames(len(data.training), count)

        def of_row(row: int) -> Callable[[], Tensor]:
            return lambda: loss(Batch.from_data_list([data.training[row]]).to(device))

        training, losses = model.training, [of_row(row) for row in rows]
        model.to(device).eval()
        try:
            prune_adapter(self._maps, self.settings, losses, self.seed)
        finally:
            model.cpu().train(training)

    def write(
        self,
        path: AnyPath,
        network: nn.Module,
        normalizers: Normalizers,
        energy_kind: str,
        provenance: dict[str, Any],
    ) -> None:
        """Write the adapter file of a network in training, or of its average."""
        maps = low_rank_maps(network)
        factors = {id(factor) for each in maps.values() for factor in (each.left, each.right)}
        parameters = {plain_name(n): p for n, p in network.named_parameters() if id(p) not in factors}
        write_adapter(
            path,
            Adapter(
                source=str(path),
                base=self.base,
                settings=self.settings.to_dict(),
                maps=maps,
                replaced={name: parameters[name] for name in self._replaced},
                normalizers=normalizers,
                energy_kind=check_energy_kind(energy_kind, str(path)),
                provenance=provenance,
            ),
        )


def check_start(adapter: Adapter) -> None:
    """Raise `InputError` for an adapter to start with that changes more of its network than its maps do."""
    if adapter.replaced:
        raise InputError(
            f"{adapter.source} replaces {len(adapter.replaced)} parameters of its network, and a training "
            "starts with maps alone: give an adapter of prune quantize --recover"
        )


def scoring_device(accelerator: Any, devices: Sequence[int]) -> torch.device:
    """Device on which this process of a run scores its adapter: its GPU, or the processor.

    Args:
        accelerator: of Lightning's trainer.
        devices: indices, as far as they are given.
    """
    if accelerator not in ("auto", "gpu", "cuda", None) or not torch.cuda.is_available():
        return torch.device("cpu")
    # As torchrun, Lightning and Slurm number the processes of a machine.
    process = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    known = devices or range(torch.cuda.device_count())
    return torch.device("cuda", known[process % len(known)])
