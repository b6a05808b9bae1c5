"""Reader of checkpoint files of OCP and fairchem v1, which have three layouts of the same content.

    ocp-v0             config["model"] is a name, its attributes in config["model_attributes"];
                       normalizers target, grad_target (mean, std)
    fairchem-v1-flat   config["model"] is the attributes with a name; normalizers energy, forces (mean, rmsd)
    fairchem-v1-hydra  config["model"] has a backbone and heads; normalizers as above

`checkpoint.pt` has the raw weights in `state_dict` and their moving average in `ema`, a bare list in the
order of the parameters. `best_checkpoint.pt` has the average in `state_dict` and no training state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equiformer2.checkpoint.constants import is_derived_constant, shorten
from equiformer2.checkpoint.contents import Contents, EnergyKind, WeightsKind
from equiformer2.checkpoint.normalizers import Normalizer, Normalizers
from equiformer2.checkpoint.reference import ReferenceState, config_from_reference, strip_prefix
from equiformer2.checkpoint.tensor_files import plain
from equiformer2.errors import InputError
from equiformer2.values import Number, Optional, Switch, mapping, shown, shown_name

_TRAINING_STATE = ("epoch", "step", "optimizer", "scheduler", "ema")
_KEYS = {
    "state_dict",
    "config",
    "normalizers",
    "elementrefs",
    "val_metrics",
    "amp",
    "best_val_metric",
    "primary_metric",
    *_TRAINING_STATE,
}
_NORMALIZER_NAMES = {"target": "energy", "grad_target": "forces", "energy": "energy", "forces": "forces"}
# The mean and standard deviation of OC20's adsorption energies (S2EF-2M), written into every OC20 S2EF
# configuration of OCP and fairchem; eV.
_OC20_ADSORPTION = (-0.7554450631141663, 2.887317180633545)


def is_fairchem_v1(file: Mapping[str, Any]) -> bool:
    """Tell whether a loaded file has the three parts that every OCP and fairchem v1 checkpoint has."""
    return all(isinstance(file.get(part), Mapping) for part in ("state_dict", "config", "normalizers"))


def read_fairchem_v1(file: Mapping[str, Any], source: str) -> Contents:
    """Interpret a loaded OCP or fairchem v1 file.

    Args:
        file: as `read_tensors` returns it.
        source: name of the file, for errors.

    Raises:
        InputError: naming the parts that are missing, unknown or not supported; see `model_from_reference`.
    """
    return _FairchemFile(file, source).contents()


class _FairchemFile:
    """A loaded OCP or fairchem v1 file.

    Args:
        file: its parts by key.
        source: name of the file, for errors.

    Raises:
        InputError: if a part is unknown.
    """

    def __init__(self, file: Mapping[str, Any], source: str) -> None:
        self._file, self._source = file, source
        unknown = [shown_name(key) for key in file if not isinstance(key, str) or key not in _KEYS]
        if unknown:
            raise InputError(
                f"{source} has parts that no OCP or fairchem v1 checkpoint has: {shorten(unknown)}"
            )
        # Plain values from here on: a tensor in a configuration would be compared number by number.
        self._training_config = mapping(plain(file["config"]), f"{source}: config")

    def contents(self) -> Contents:
        """Translate the file."""
        file, source = self._file, self._source
        source_format, model_block = self._layout()
        config = config_from_reference(model_block, f"{source}: the model config")
        state = ReferenceState.from_state_dict(config, file["state_dict"], source)
        normalizers = self._normalizers(state.energy_lin_ref)
        energy_kind, reason = self._energy_kind(normalizers)
        recorded = ("epoch", "step", "val_metrics")
        return Contents(
            source=source,
            source_format=source_format,
            config=config,
            weights=self._weights(state.parameters, model_block),
            normalizers=normalizers,
            energy_kind=energy_kind,
            provenance={
                "source_format": source_format,
                "energy_kind_from": reason,
                "training_config": {
                    key: value for key, value in self._training_config.items() if key != "slurm"
                },
                **{key: plain(file[key]) for key in recorded if file.get(key) is not None},
            },
        )

    def _layout(self) -> tuple[str, Mapping[str, Any]]:
        """Name of the layout and its `model` block, with the model's name in it."""
        model = self._training_config.get("model")
        if isinstance(model, str):
            attributes = self._training_config.get("model_attributes")
            if not isinstance(attributes, Mapping):
                raise InputError(f"{self._source}: config['model_attributes'] is missing")
            return "ocp-v0", {**attributes, "name": model}
        if not isinstance(model, Mapping):
            raise InputError(f"{self._source}: config['model'] is missing")
        return ("fairchem-v1-hydra" if "backbone" in model else "fairchem-v1-flat"), model

    def _weights(
        self, parameters: dict[str, Tensor], model_block: Mapping[str, Any]
    ) -> dict[WeightsKind, dict[str, Tensor]]:
        """Weights by kind: raw and averaged with `ema`, one of them without."""
        file, source = self._file, self._source
        frozen = model_block.get("freeze_backbone")
        is_frozen = bool(Optional(Switch()).read(frozen, f"{source}: the model config: freeze_backbone"))
        ema = file.get("ema")
        if ema is None:
            # The trainer copies the average into the network for files that have no training state.
            optim = mapping(self._training_config.get("optim") or {}, f"{source}: config['optim']")
            decay = Optional(Number(0.0, 1.0)).read(optim.get("ema_decay"), f"{source}: ema_decay")
            is_average = bool(decay) and not any(key in file for key in _TRAINING_STATE)
            return {"averaged" if is_average else "raw": parameters}

        shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
        if not isinstance(shadow, list) or not all(isinstance(tensor, torch.Tensor) for tensor in shadow):
            raise InputError(f"{source}: ema['shadow_params'] is not a list of tensors")
        # `shadow_params` follows `model.parameters()`, which has the order of the state dictionary, without
        # the parameters that are not trained.
        names = [
            name
            for key in file["state_dict"]
            if not is_derived_constant(name := strip_prefix(str(key)))
            and name != "energy_lin_ref"
            and not (is_frozen and "output_heads." not in str(key))
        ]
        wrong = [
            name
            for name, tensor in zip(names, shadow, strict=False)
            if tensor.shape != parameters[name].shape
        ]
        if len(names) != len(shadow) or wrong:
            raise InputError(
                f"{source}: the moving average does not fit the weights: {len(shadow)} tensors for "
                f"{len(names)} parameters{f', first other shape at {wrong[0]}' if wrong else ''}"
            )
        return {"raw": parameters, "averaged": parameters | dict(zip(names, shadow, strict=True))}

    def _normalizers(self, energy_lin_ref: Tensor | None) -> Normalizers:
        """Normalizers of the file; `energy_lin_ref` are per-element energies among the parameters."""

        def one_number(value: Any) -> Any:
            # OCP keeps a number in a tensor of one.
            if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
                return float(value)
            return value

        source = self._source
        by_name = {"energy": Normalizer(0.0, 1.0), "forces": Normalizer(0.0, 1.0)}
        seen: set[str] = set()
        for key, values in self._file["normalizers"].items():
            name = _NORMALIZER_NAMES.get(key) if isinstance(key, str) else None
            if name is None or name in seen:
                raise InputError(f"{source} has a normalizer that is not supported: {shown_name(key)}")
            seen.add(name)
            numbers = mapping(values, f"{source}: the normalizer {key}")
            mean, std = numbers.get("mean"), numbers.get("rmsd", numbers.get("std"))
            try:
                by_name[name] = Normalizer(one_number(mean), one_number(std))
            except InputError as error:
                raise InputError(
                    f"{source}: the normalizer {key} needs one mean and one std: {error}"
                ) from error
        references = self._element_references()
        if energy_lin_ref is not None and bool(energy_lin_ref.any()):
            if references is not None:
                raise InputError(
                    f"{source} has per-element energies twice, in elementrefs and in energy_lin_ref"
                )
            # The network's parameter is in units of the standard deviation.
            references = energy_lin_ref.double() * by_name["energy"].std
        subtracted = self._dataset().get("lin_ref")
        if references is None and subtracted:
            raise InputError(
                f"{source} was trained on energies less the per-element energies of dataset.lin_ref "
                f"({shown(subtracted)}), which the file does not hold, so that its energies would lack them: "
                "add that table (its array coeff, as a tensor) to the file under "
                "['elementrefs']['energy']['element_references']"
            )
        try:
            return Normalizers(by_name["energy"], by_name["forces"], references)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    def _dataset(self) -> Mapping[str, Any]:
        """Settings of the training data; empty where they are not stated."""
        dataset = self._training_config.get("dataset")
        return dataset if isinstance(dataset, Mapping) else {}

    def _element_references(self) -> Tensor | None:
        """Table of per-element energies, or None."""
        source, part = self._source, self._file.get("elementrefs")
        references = mapping({} if part is None else part, f"{source}: elementrefs")
        unknown = sorted(set(references) - {"energy"})
        if unknown:
            raise InputError(
                f"{source} has per-element references that are not supported: {shorten(unknown)}"
            )
        if "energy" not in references:
            return None
        table = mapping(references["energy"], f"{source}: elementrefs['energy']").get("element_references")
        if not isinstance(table, torch.Tensor):
            raise InputError(f"{source}: elementrefs['energy'] has no tensor element_references")
        return table

    def _energy_kind(self, normalizers: Normalizers) -> tuple[EnergyKind | None, str]:
        """Kind of energy that the training configuration implies, and the reason."""
        if self._dataset().get("total_energy") is True:
            return "total", "dataset.total_energy of the training configuration"
        if normalizers.linear_references is not None:
            return "total", "the per-element energies in the file"
        energy = normalizers.energy
        if all(abs(a - b) < 1e-5 for a, b in zip((energy.mean, energy.std), _OC20_ADSORPTION, strict=True)):
            return "adsorption", "the energy normalizer, which is OC20's for adsorption energies"
        return None, "not stated by the file"
