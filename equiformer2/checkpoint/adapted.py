"""Networks with adapters: attached and exchanged without reloading, or merged into an ordinary checkpoint."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiformer2.checkpoint.adapter_files import Adapter, read_adapter
from equiformer2.checkpoint.checkpoint import Checkpoint, load_checkpoint, read_contents, save_checkpoint
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.training_data import inherited
from equiformer2.errors import InputError
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.model.folding import plain_state
from equiformer2.model.parametrizations import LowRank, attach, detach, find_weight
from equiformer2.shipped import find_checkpoint


class AdaptedNetwork:
    """One loaded network, whose adapter can be exchanged.

    Args:
        checkpoint: what the network predicts without an adapter.
        model: the network itself, on any device; it is changed in place.

    Attributes:
        adapter: in use, or None.
    """

    def __init__(self, checkpoint: Checkpoint, model: EquiformerV2) -> None:
        self.base, self.model = checkpoint, model
        self.adapter: Adapter | None = None
        self._fingerprint: str | None = None
        self._maps: list[LowRank] = []
        self._plain: dict[str, Tensor] = {}  # parameters of the base that the adapter in use replaces

    def use(self, adapter: Adapter | None) -> Checkpoint:
        """Exchange the adapter; None takes it off. A refused one changes nothing.

        Args:
            adapter: to use from now on.

        Returns:
            Meaning of the network's answers: normalizers, kind of energy and provenance.

        Raises:
            InputError: the adapter belongs to another network.
        """
        if adapter is not None:
            self.check(adapter)
        if self.adapter is not None:
            detach(self.model, self._maps)
        self._replace(self._plain)
        self._maps = []
        self._plain, self.adapter = {}, adapter
        if adapter is None:
            return self.base
        parameters = dict(self.model.named_parameters())
        self._plain = {name: parameters[name].detach().clone() for name in adapter.replaced}
        self._replace(adapter.replaced)
        maps = {name: _copy(each) for name, each in adapter.maps.items()}
        attach(self.model, maps)
        self._maps = list(maps.values())
        self.model.requires_grad_(False)
        return dataclasses.replace(
            self.base,
            model=self.model,
            normalizers=adapter.normalizers,
            energy_kind=adapter.energy_kind,
            provenance={**self.provenance(adapter), "adapter": adapter.describe()},
            surroundings=None,  # other weights see the same atoms differently
        )

    def provenance(self, adapter: Adapter) -> dict[str, Any]:
        """Return the origin of the network with an adapter.

        Maps that were not trained, such as those of `prune quantize --recover`, leave the network's training
        data as they were.
        """
        return {**inherited(self.base.provenance), **adapter.provenance}

    def check(self, adapter: Adapter) -> None:
        """Check that the adapter belongs to this network.

        Raises:
            InputError: it does not; or its maps do not fit.
        """
        if self._fingerprint is None:
            assert self.adapter is None
            self._fingerprint = fingerprint_of_weights(self.model)
        base = adapter.base
        if self._fingerprint != base.fingerprint:
            raise InputError(
                f"{adapter.source} is an adapter of another network: it belongs to the {base.weights} "
                f"weights of {base.file} (fingerprint {base.fingerprint}), and this network has the "
                f"fingerprint {self._fingerprint}: give the checkpoint that it was trained on"
            )
        before = self._plain
        parameters = dict(self.model.named_parameters())
        for name, tensor in adapter.replaced.items():
            own = parameters.get(name, before.get(name))
            if own is None or own.shape != tensor.shape:
                raise InputError(f"{adapter.source} replaces {name}, which its network has not in this shape")
        try:
            for name, each in adapter.maps.items():
                find_weight(self.model, name, each.shape)
        except InputError as error:
            raise InputError(f"{adapter.source}: {error}") from error
        adapter.normalizers.check_model(self.base.config, adapter.source)

    @torch.no_grad()
    def _replace(self, tensors: Any) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _copy(each: LowRank) -> LowRank:
    """A map with factors of its own, since attaching moves them to another device."""
    left, right = each.left.detach().clone(), each.right.detach().clone()
    return LowRank(left, right, each.scale, each.left_kept.clone(), each.right_kept.clone())


def load_base(
    path: str | os.PathLike[str],
    adapter: Adapter,
    weights: str | None = None,
    energy_kind: str | None = None,
) -> Checkpoint:
    """Load the network of an adapter, without the adapter.

    Args:
        path: as for `load_checkpoint`.
        adapter: chooses the weights, and stands for a file that does not state its kind of energy.
        weights: `raw` or `averaged`; None for those that the adapter was trained on, where the file has them.
        energy_kind: that the adapter must have; None for any.

    Raises:
        FileNotFoundError, InputError: as `load_checkpoint`; the adapter predicts another kind of energy.
    """
    if energy_kind is not None and energy_kind != adapter.energy_kind:
        raise InputError(
            f"{adapter.source} predicts {adapter.energy_kind} energies; {energy_kind} energies were asked for"
        )
    contents = read_contents(path)
    if weights is None and adapter.base.weights in contents.available_weights:
        weights = adapter.base.weights
    return load_checkpoint(path, weights, contents.energy_kind or adapter.energy_kind)


def merge_adapters(
    source: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
) -> dict[str, Any]:
    """Write an ordinary checkpoint that answers as the network with its adapter, at no cost.

    Several adapters of one kind, such as those of several seeds, become one network: the mean of the weights
    that each of them makes.

    Args:
        source: checkpoint of the network.
        adapters: adapter files.
        out: native checkpoint to write.

    Returns:
        A summary, in plain values: `bytes` of the file, `base_sha256` and `rank`, which the adapters share,
        the mean of their `kept_share`, the sum of their `trainable_parameters`, `energy_kind`, and every
        adapter by itself.

    Raises:
        InputError: an adapter belongs to another network; several have different ranks, kinds of energy or
            normalizers.
        OSError: a file cannot be read or written.
    """
    read = [read_adapter(path) for path in adapters]
    first = read[0]
    for other in read[1:]:
        _check_alike(first, other)
    checkpoint = load_base(source, first)
    network = AdaptedNetwork(checkpoint, checkpoint.model)
    sums: dict[str, Tensor] = {}
    for adapter in read:
        network.use(adapter)
        state = plain_state(checkpoint.model, checkpoint.model.state_dict())
        for name, value in state.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.double() / len(read)
    network.use(None)
    plain = plain_state(checkpoint.model, checkpoint.model.state_dict())
    state = {name: value.to(plain[name].dtype) for name, value in sums.items()}
    provenance = {
        **network.provenance(first),
        "adapter": [adapter.describe() for adapter in read],
        "merged_from": {
            "checkpoint": Path(source).name,
            "checkpoint_sha256": sha256(find_checkpoint(source)),
            "adapters": [Path(path).name for path in adapters],
            "adapters_sha256": [sha256(path) for path in adapters],
        },
    }
    save_checkpoint(
        out,
        model=EquiformerV2(checkpoint.config, device="meta"),  # of plain weights
        raw_state=state,
        averaged_state=None,
        normalizers=first.normalizers,
        energy_kind=first.energy_kind,
        provenance=provenance,
    )
    return {
        "out": str(out),
        "bytes": Path(out).stat().st_size,
        "base_sha256": first.base.sha256,
        "rank": first.rank,
        "kept_share": sum(adapter.kept_share for adapter in read) / len(read),
        "trainable_parameters": sum(adapter.trainable_parameters for adapter in read),
        "adapters": [{"file": adapter.source, **adapter.describe()} for adapter in read],
        "energy_kind": first.energy_kind,
        "parameters": sum(value.numel() for value in state.values()),
    }


def _check_alike(first: Adapter, other: Adapter) -> None:
    """Raise `InputError` for adapters whose mean means nothing."""
    facts = (
        ("ranks", first.rank, other.rank),
        ("networks", first.base.fingerprint, other.base.fingerprint),
        ("kinds of energy", first.energy_kind, other.energy_kind),
    )
    for name, one, two in facts:
        if one != two:
            raise InputError(
                f"{first.source} and {other.source} have different {name}, {one} and {two}: only adapters "
                "that were trained alike can be merged into one network; merge each into a file of its own"
            )
    if {n: each.rank for n, each in first.maps.items()} != {n: each.rank for n, each in other.maps.items()}:
        raise InputError(
            f"{first.source} and {other.source} change different weights: only adapters that were trained "
            "alike can be merged into one network; merge each into a file of its own"
        )
    if first.normalizers != other.normalizers:
        raise InputError(
            f"{first.source} and {other.source} have different normalizers, so that the mean of their "
            "networks means nothing: merge each into a file of its own"
        )
