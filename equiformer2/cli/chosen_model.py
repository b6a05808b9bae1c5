"""The model of a command that takes `--checkpoint` or `--calculator`."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equiformer2.cli.options import only_one

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import BaseCalculator

    from equiformer2.inference import EquiformerV2Calculator


class ChosenModel:
    """Calculator of the options of `add_model_arguments(…, calculator=True)`.

    Attributes:
        calculator: of the network, the committee or ASE.
        checkpoint: path of the checkpoint, or paths of a committee; None with `--calculator`.
        files: all checkpoints, which no output may replace.
        energy_kind: `"adsorption"` or `"total"`.
        committee: True for several networks.
        adapter: path of the adapter file, or None.

    Args:
        options: of the command.
        router: of the network, see `EquiformerV2Calculator`.

    Raises:
        InputError: a checkpoint or calculator that cannot be used.
    """

    def __init__(self, options: argparse.Namespace, router: Any = None) -> None:
        from equiformer2.inference.named_calculators import calculator_by_name, resolve_energy_kind

        self.name: str | None = options.calculator
        self.files: list[str] = options.checkpoint or []
        self.committee = len(self.files) > 1
        self.checkpoint: str | list[str] | None = only_one(self.files) if self.files else None
        self.adapter: str | None = None
        self.calculator: BaseCalculator
        if self.name is not None:
            self.calculator = calculator_by_name(self.name)
        else:
            self.adapter = getattr(options, "adapter", None)
            self.calculator = network_calculator(
                options, self.checkpoint, router, options.weights, self.adapter
            )
        self.energy_kind = resolve_energy_kind(self.calculator, options.energy_kind, default="total")

    def record(self, structures: Sequence["Atoms"] = ()) -> dict[str, Any]:
        """Describe the model for a record of `structures`: see `inference.record.model_record`."""
        from equiformer2.inference import EquiformerV2Calculator
        from equiformer2.inference.engines import calculator_identity
        from equiformer2.inference.record import model_record

        if self.checkpoint is not None and isinstance(self.calculator, EquiformerV2Calculator):
            record = model_record(self.calculator.predictor, self.checkpoint, structures)
            return record if self.adapter is None else {**record, **adapter_record(self.adapter)}
        identity = calculator_identity(self.calculator)
        return {
            "checkpoint": None,
            "calculator": self.name,
            "class": identity["calculator"],
            "parameters": identity["parameters"],
            "energy_kind": self.energy_kind,
        }

    def identity(self) -> dict[str, Any]:
        """Plain values that tell the model from others, for folders that go on with their relaxations."""
        from equiformer2.checkpoint.tensor_files import sha256
        from equiformer2.inference import EquiformerV2Calculator
        from equiformer2.inference.engines import calculator_identity

        if not isinstance(self.calculator, EquiformerV2Calculator) or self.checkpoint is None:
            return {**calculator_identity(self.calculator), "energy_kind": self.energy_kind}
        predictor = self.calculator.predictor
        adapter = {} if self.adapter is None else {"adapter": sha256(self.adapter)}
        return {
            **adapter,
            "checkpoint": only_one([sha256(file) for file in self.files]),
            "weights": predictor.checkpoint.weights,
            "precision": predictor.precision,
            "energy_kind": self.energy_kind,
        }


def network_calculator(
    options: argparse.Namespace,
    checkpoint: Any,
    router: Any = None,
    weights: str | None = None,
    adapter: str | None = None,
) -> "EquiformerV2Calculator":
    """Calculator of a checkpoint, or of a committee's, on the device and in the precision of the options."""
    from equiformer2.inference import EquiformerV2Calculator

    return EquiformerV2Calculator(
        checkpoint,
        device=options.device,
        weights=weights,
        energy_kind=options.energy_kind,
        precision=options.precision,
        backend=options.backend,
        router=router,
        adapter=adapter,
    )


def adapter_record(path: str) -> dict[str, str]:
    """Name an adapter file in a record."""
    from equiformer2.checkpoint.tensor_files import sha256

    return {"adapter": path, "adapter_sha256": sha256(path)}
