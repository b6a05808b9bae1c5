"""The model of a command that takes `--checkpoint` or `--calculator`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from equiformer2.cli.options import only_one
from equiformer2.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import BaseCalculator

    from equiformer2.inference import EquiformerV2Calculator
    from equiformer2.inference.dispersion import Dispersion


class ChosenModel:
    """Calculator of the options of `add_model_arguments(…, calculator=True)`.

    Attributes:
        calculator: of the network, the committee or ASE, with D3 dispersion where that is asked for.
        network: the same without D3.
        dispersion: D3, if it is added.
        checkpoint: path of the checkpoint, or paths of a committee, the first one again for its twin in
            bfloat16; None with `--calculator`.
        files: all checkpoints and the adapter, which no output may replace.
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

        twin = bool(options.checkpoint) and getattr(options, "twin_bf16", False)
        if twin and options.precision == "bf16":
            raise InputError("--twin-bf16 has no meaning with --precision bf16: leave one of them out")
        self.name: str | None = options.calculator
        members: list[str] = [*(options.checkpoint or []), *(options.checkpoint[:1] if twin else [])]
        self.committee = len(members) > 1
        self.checkpoint: str | list[str] | None = only_one(members) if members else None
        self.adapter: str | None = None
        self.calculator: BaseCalculator
        if self.name is not None:
            self.calculator = calculator_by_name(self.name)
        else:
            self.adapter = options.adapter
            self.calculator = network_calculator(
                options, self.checkpoint, router, options.weights, twin, self.adapter
            )
        self.files: list[str] = [*members, *filter(None, [self.adapter])]
        self.energy_kind = resolve_energy_kind(self.calculator, options.energy_kind, default="total")
        self.network = self.calculator
        self.dispersion = _dispersion(options)
        if self.dispersion is not None:
            from equiformer2.inference.dispersion import DispersionCalculator

            self.calculator = DispersionCalculator(self.network, self.dispersion, self.energy_kind)

    def record(self, structures: Sequence["Atoms"] = ()) -> dict[str, Any]:
        """Describe the model for a record of `structures`: see `inference.record.model_record`."""
        from equiformer2.inference import EquiformerV2Calculator
        from equiformer2.inference.engines import calculator_identity
        from equiformer2.inference.record import model_record

        added: dict[str, Any] = {} if self.dispersion is None else {"d3": self.dispersion.summary()}
        if self.checkpoint is not None and isinstance(self.network, EquiformerV2Calculator):
            return {**model_record(self.network.predictor, self.checkpoint, structures), **added}
        identity = calculator_identity(self.network)
        return {
            "checkpoint": None,
            "calculator": self.name,
            "class": identity["calculator"],
            "parameters": identity["parameters"],
            "energy_kind": self.energy_kind,
            **added,
        }

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """Provenance of the checkpoint, or of a committee; None with `--calculator`."""
        from equiformer2.inference import EquiformerV2Calculator

        if not isinstance(self.network, EquiformerV2Calculator):
            return None
        return self.network.predictor.provenance

    @property
    def cutoff(self) -> float | None:
        """Cutoff radius of the network, Å; None with `--calculator`."""
        from equiformer2.inference import EquiformerV2Calculator

        if not isinstance(self.network, EquiformerV2Calculator):
            return None
        return float(self.network.predictor.checkpoint.config.max_radius)

    def identity(self) -> dict[str, Any]:
        """Plain values that tell the model from others, for folders that go on with their relaxations."""
        from equiformer2.checkpoint.tensor_files import sha256
        from equiformer2.inference import EquiformerV2Calculator
        from equiformer2.inference.engines import calculator_identity

        kind: dict[str, Any] = {"energy_kind": self.energy_kind}
        if self.dispersion is not None:
            kind |= {"d3": self.dispersion.summary()}
        if not isinstance(self.network, EquiformerV2Calculator) or self.checkpoint is None:
            return {**calculator_identity(self.network), **kind}
        predictor = self.network.predictor
        adapter = {} if self.adapter is None else {"adapter": sha256(self.adapter)}
        members = [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint
        return {
            **adapter,
            "checkpoint": only_one([sha256(file) for file in members]),
            "weights": predictor.checkpoint.weights,
            "precision": predictor.precision,
            **kind,
        }


def network_calculator(
    options: argparse.Namespace,
    checkpoint: Any,
    router: Any = None,
    weights: str | None = None,
    twin: bool = False,
    adapter: str | None = None,
) -> "EquiformerV2Calculator":
    """Calculator of a checkpoint, or of a committee's, on the device and in the precision of the options.

    With `twin` the last file of the committee is computed in bfloat16.
    """
    from equiformer2.inference import EquiformerV2Calculator, Predictor

    if twin:
        *others, last = checkpoint
        common = options.device, weights, options.energy_kind
        precisions = [*([options.precision] * len(others)), "bf16"]
        checkpoint = [
            Predictor(file, *common, precision, options.backend, adapter=adapter)
            for file, precision in zip([*others, last], precisions, strict=True)
        ]
        adapter = None
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


def _dispersion(options: argparse.Namespace) -> "Dispersion | None":
    """D3 of `--d3`, for a command that has it."""
    from equiformer2.inference.dispersion import Dispersion

    text = getattr(options, "d3", None)
    return None if text is None else Dispersion.read(text)
