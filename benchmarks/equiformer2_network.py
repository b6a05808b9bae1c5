"""equiformer2 for the worker."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizers, load_checkpoint, model_from_reference, save_checkpoint
from equiformer2.checkpoint.normalizers import Normalizer
from equiformer2.checkpoint.reference import config_from_reference
from equiformer2.graph import radius_graph

if TYPE_CHECKING:
    from equiformer2.inference import EquiformerV2Calculator

NAME = "equiformer2"


def build(config: dict[str, Any], parameters: dict[str, torch.Tensor] | None) -> EquiformerV2:
    """The network of one of `sizes.SIZES` with the reference's parameters, or with random ones of its own."""
    if parameters is None:
        return EquiformerV2(config_from_reference(config))
    return model_from_reference(config, parameters)


def load(checkpoint: str) -> EquiformerV2:
    """A trained network from a file."""
    return load_checkpoint(checkpoint).model


def select_backend(model: EquiformerV2, backend: str) -> None:
    """Choose how the hot operations run. Raises ValueError where there is no such choice."""
    if not hasattr(model, "backend"):
        if backend not in ("auto", "torch"):
            raise ValueError(
                f"this version has no backend {backend!r}: its network has no choice of backends"
            )
    elif model.backend != backend:
        setattr(model, "backend", backend)  # noqa: B010 - not every version has it


def set_inference_mode(model: EquiformerV2, as_shipped: bool, precision: str) -> None:
    """As `Predictor` prepares a network: what follows from the weights alone is computed once."""
    model.fold_weights(torch.bfloat16 if precision == "bf16" else None)


def edges(model: EquiformerV2, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`edge_index [2, E]` (source, target) and `vectors [E, 3]` (Å) of the graph that the forward uses."""
    config = model.config
    graph = radius_graph(
        batch.pos,
        batch.cell,
        batch.pbc,
        batch.natoms,
        max_radius=config.max_radius,
        max_neighbors=config.max_neighbors,
        strict=config.enforce_max_neighbors_strictly,
    )
    return graph.edge_index, graph.vectors


def calculator(model: EquiformerV2, precision: str, backend: str, device: str) -> "EquiformerV2Calculator":
    """The package's ASE calculator as a user makes it, from a checkpoint file with the model's parameters."""
    # Only here: what it imports should not count as memory of a training step.
    from equiformer2.inference import EquiformerV2Calculator

    units = Normalizers(energy=Normalizer(0.0, 1.0), forces=Normalizer(0.0, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save_checkpoint(
            path,
            model=model,
            raw_state=model.state_dict(),
            averaged_state=None,
            normalizers=units,
            energy_kind="adsorption",
            provenance={},
        )
        return EquiformerV2Calculator(path, device=device, precision=precision, backend=backend)


def relaxer(model: EquiformerV2, device: str) -> Callable[..., dict[str, Any]]:
    """Function that relaxes structures, see `Worker.relax_systems`."""
    from benchmarks.worker import relax_one_by_one
    from equiformer2.inference import relax_many
    from equiformer2.inference.batched import RelaxationSettings

    made = calculator(model, "float32", "auto", device)

    def relax(
        atoms: list[Any], method: str, settings: dict[str, Any], batch_size: int | None
    ) -> dict[str, Any]:
        if method == "ase":
            return relax_one_by_one(atoms, made, settings)
        wanted = RelaxationSettings(**settings, frames="ends")
        found = relax_many(atoms, made.predictor, settings=wanted, batch_size=batch_size or "auto")
        return {
            "evaluations": sum(one.model_evaluations for one in found),
            "converged": sum(one.converged for one in found),
            "energies_eV": [one.energy_eV for one in found],
        }

    return relax
