"""Network to start from: which parts of a checkpoint fit the data, its references and normalizers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from ase.data import chemical_symbols
from torch_geometric.data import Data

from datasets_oc20 import OC20Lmdb
from datasets_oc20.target_sums import NUM_ELEMENTS
from datasets_oc20.targets import TargetSample, fit_linear_references, fit_normalizers
from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Checkpoint, Normalizer, Normalizers, save_checkpoint
from equiformer2.checkpoint.training_data import inherited
from equiformer2.errors import InputError
from equiformer2.finetuning.energy_head import fit_last_layer
from equiformer2.finetuning.frames import Frames, spread
from equiformer2.inference import Predictor
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.folding import plain_state
from equiformer2.training.start import FITTED, keep_predictions

_LOOKED_AT = 100
"""Frames on which the checkpoint is compared with the data before the training."""
# Energies of another method or code differ by eV per atom, and by a sum over atoms; the errors of a network
# of the same method are some meV to tens of meV per atom and no such sum.
_OTHER_ZERO, _EXPLAINED = 0.25, 5.0
LEAST_FORCES = 0.05
"""eV/Å; the usual threshold at which relaxations end: forces below it are hardly more than noise."""
_LEAST_SCALE, _WORTH_SCALING = 0.01, 0.9
"""Least factor of a kept force head (0 could not be learned from); above the other it stays as it is."""
RESET = "--reset-head makes new normalizers, references and an energy head for them"


@dataclass(frozen=True)
class Start:
    """A checkpoint made ready for the data.

    Attributes:
        checkpoint: network, normalizers and kind of energy to train from.
        references: `[100]` eV per atomic number of the data's own fit (or as given), for a network from
            random weights and the trivial answer; None for adsorption energies.
        own: normalizers of the data alone, with these references.
        keeps_zero: False where the energies of the checkpoint's original data have another zero.
        watched: validation metric that chooses the best weights.
        energy_weight: factor of the energy's coefficient in the loss, for its unit.
        sentences: what was decided, and why.
    """

    checkpoint: Checkpoint
    references: np.ndarray | None
    own: Normalizers
    keeps_zero: bool
    watched: Literal["energy_mae", "forces_mae"]
    energy_weight: float
    sentences: list[str]


def reason_to_reset(checkpoint: Checkpoint, frames: Frames, predicted: "Predicted | None") -> str | None:
    """Say why the checkpoint's heads cannot be kept for these data; None where they can.

    Args:
        checkpoint: to start from.
        frames: to train on.
        predicted: the checkpoint's own answers, where energies are of one kind.
    """
    if checkpoint.energy_kind != frames.energy_kind:
        return (
            f"the checkpoint predicts {checkpoint.energy_kind} energies and the data hold "
            f"{frames.energy_kind} energies"
        )
    if not frames.has_forces and checkpoint.config.forces != "none":
        return (
            "the data have energies without forces, and the checkpoint predicts forces, which would be lost"
        )
    if frames.has_forces and checkpoint.config.forces == "none":
        return "the data have forces, and the checkpoint predicts energies alone"
    if predicted is not None and frames.energy_kind == "total":
        offset = predicted.offset_per_atom()
        if offset is not None:
            return (
                f"the total energies differ from the checkpoint's by {offset:.3g} eV per atom on average, "
                "mostly a constant per element, as of another functional, code or pseudopotential"
            )
    return None


@dataclass(frozen=True)
class Predicted:
    """A checkpoint's answers to some frames.

    Attributes:
        sample: compositions and true energies of the frames.
        error: `[n]` true less predicted energy, eV.
    """

    sample: TargetSample
    error: np.ndarray

    @classmethod
    def from_frames(cls, predictor: Predictor, frames: Frames, rows: np.ndarray) -> "Predicted":
        """Predict at most 100 of the frames `rows`, evenly spread."""
        chosen = spread(rows, _LOOKED_AT)
        energies = [float(predictor.predict(frames.dataset[row])["energy"]) for row in chosen.tolist()]
        return cls(frames.targets(chosen), frames.energy[chosen] - np.array(energies))

    def shift(self) -> np.ndarray:
        """Fit the error by a constant per element, `[100]` eV; 0 for elements that are not in the frames."""
        table = fit_linear_references(
            TargetSample(self.sample.composition, self.error, self.sample.forces_rms)
        ).numpy()
        return np.where(self.sample.composition.any(axis=0), table, 0.0)

    def offset_per_atom(self) -> float | None:
        """Mean size of the error, eV per atom, if a constant per element explains a large one; else None."""
        atoms = self.sample.composition.sum(axis=1)
        before = np.abs(self.error / atoms).mean()
        after = np.abs((self.error - self.sample.composition @ self.shift()) / atoms).mean()
        if before > _OTHER_ZERO and before > _EXPLAINED * after:
            return float(before)
        return None


def isolated_references(energies: dict[int, float], sample: TargetSample) -> tuple[np.ndarray, list[int]]:
    """Complete references of isolated atoms by a fit of the elements that they lack.

    Args:
        energies: eV by atomic number.
        sample: the frames to train on.

    Returns:
        `[100]` eV per atomic number, and the elements that were fitted.
    """
    known = np.zeros(NUM_ELEMENTS)
    for number, energy in energies.items():
        known[number] = energy
    present = np.flatnonzero(sample.composition.any(axis=0))
    missing = [int(number) for number in present if number not in energies]
    if not missing:
        return known, []
    rest = np.zeros_like(sample.composition)
    rest[:, missing] = sample.composition[:, missing]
    rows = rest.any(axis=1)
    fitted = fit_linear_references(
        TargetSample(rest[rows], sample.energy[rows] - sample.composition[rows] @ known, None)
    ).numpy()
    known[missing] = fitted[missing]
    return known, missing


def read_isolated_atoms(dataset: OC20Lmdb) -> dict[int, float]:
    """Read the energies of isolated atoms, eV by atomic number.

    Raises:
        InputError: a frame has several atoms or no energy, or an element occurs twice with other energies.
    """
    found: dict[int, float] = {}
    for row in range(len(dataset)):
        data = dataset[row]
        where = dataset.describe(row)
        if int(data.natoms) != 1 or "energy" not in data:
            raise InputError(
                f"{where} holds {int(data.natoms)} atoms{'' if 'energy' in data else ' and no energy'}: "
                "--isolated-atoms takes frames of one atom each with its energy"
            )
        number, energy = int(data.atomic_numbers[0]), float(data.energy)
        if abs(found.setdefault(number, energy) - energy) > 1e-3:
            raise InputError(
                f"{where}: the isolated atom {chemical_symbols[number]} has {energy:.6f} eV here and "
                f"{found[number]:.6f} eV before: keep the one of the calculations' settings"
            )
    return found


def prepare_start(
    predictor: Predictor,
    frames: Frames,
    rows: np.ndarray,
    isolated: dict[int, float],
    reset: bool,
    seed: int,
    check: bool = True,
) -> Start:
    """Choose references, normalizers and heads.

    Args:
        predictor: of the checkpoint, on any device.
        frames: all frames.
        rows: those to train on.
        isolated: energies of isolated atoms, eV by atomic number; may be empty.
        reset: whether heads may be replaced.
        seed: of new weights.
        check: whether `reset` is compared with the data; False for a part of data that were compared.

    Raises:
        InputError: the checkpoint does not fit the data, and `reset` is False.
    """
    checkpoint = predictor.checkpoint
    same_kind = checkpoint.energy_kind == frames.energy_kind
    predicted = Predicted.from_frames(predictor, frames, rows) if same_kind and not reset else None
    reason = reason_to_reset(checkpoint, frames, predicted)
    if reason is not None and not reset and check:
        raise InputError(f"{reason}: {RESET}")
    sample = frames.targets(rows)
    references, told = _own_references(frames, sample, isolated)
    sentences = [f"references: {told}"]
    weight = _size_ratio(checkpoint.config, sample)
    own = _normalizers(sample, references, weight)
    model = _fitting_model(checkpoint, frames.has_forces, seed)
    if predicted is None:
        what = reason or "asked for, though the checkpoint fits the data"
        normalizers, more = _with_new_head(model, predictor, frames, rows, own)
        sentences += [f"energy head: new last layer ({what}), {more[0]}", *more[1:]]
    else:
        fitted = _own_references(frames, sample, {})[0] if isolated else references
        normalizers, told = _adjusted(checkpoint.normalizers, predicted, _normalizers(sample, fitted, weight))
        if model.config.forces == "gradient":
            normalizers = normalizers.for_gradient()
        keep_predictions(model, checkpoint.normalizers, normalizers)
        sentences += ["heads: the checkpoint's, with the same answers at the start but for constants", told]
        if isolated:
            sentences.append(
                "isolated atoms: for the network from scratch and the trivial answer alone, because the "
                "checkpoint's head has learned energies less its own references (--reset-head for a new one)"
            )
    ready = replace(
        checkpoint,
        model=model,
        config=model.config,
        normalizers=normalizers,
        energy_kind=frames.energy_kind,  # type: ignore[arg-type]
    )
    small = frames.has_forces and (sample.forces_rms or 0.0) < LEAST_FORCES
    if small:
        sentences.append(
            f"best weights: by the energy, because forces are small ({sample.forces_rms or 0.0:.3f} eV/Å rms)"
        )
    watched: Literal["energy_mae", "forces_mae"] = (
        "energy_mae" if small or not frames.has_forces else "forces_mae"
    )
    return Start(ready, references, own, predicted is not None, watched, weight, sentences)


def _own_references(
    frames: Frames, sample: TargetSample, isolated: dict[int, float]
) -> tuple[np.ndarray | None, str]:
    """References of the data, `[100]` eV or None, and a sentence about them."""
    if frames.energy_kind == "adsorption":
        if isolated:
            raise InputError(
                "isolated atoms are references of total energies, and these are adsorption energies: leave "
                "them out"
            )
        return None, "none, because these are adsorption energies"
    if not isolated:
        return fit_linear_references(sample).numpy(), "fitted to the frames for training, one per element"
    references, fitted = isolated_references(isolated, sample)
    if not fitted:
        return references, "energies of isolated atoms"
    names = ", ".join(chemical_symbols[number] for number in fitted)
    return references, f"energies of isolated atoms; fitted for {names}, of which there is none"


def _size_ratio(config: ModelConfig, sample: TargetSample) -> float:
    """Number of atoms that the network's energy is divided by, over the mean of the frames.

    The energy is a sum over atoms divided by `avg_num_nodes`, OC20's mean. In cells of ten atoms every atom
    would have to answer eight standard deviations; the unit is larger by this ratio, and so is the energy's
    weight in the loss. Gradient forces have the energy's unit, which stays.
    """
    if config.forces == "gradient":
        return 1.0
    return float(np.clip(config.avg_num_nodes / sample.composition.sum(axis=1).mean(), 0.25, 40.0))


def _normalizers(sample: TargetSample, references: np.ndarray | None, ratio: float) -> Normalizers:
    """Normalizers of the data.

    The energy's spread is at least that of the forces times 1 Å: frames of one relaxation differ by less, and
    the energy would outweigh all forces. That of the forces is at least `LEAST_FORCES`: those of relaxed
    structures are noise, which would outweigh all energies.
    """
    table = None if references is None else torch.from_numpy(references)
    (mean, energy), (_, forces) = (fit_normalizers(sample, table)[name] for name in ("energy", "forces"))
    if sample.forces_rms is not None:
        forces = max(forces, LEAST_FORCES)
        energy = max(energy, forces)
    return Normalizers(Normalizer(mean, ratio * energy), Normalizer(0.0, forces), table)


def _adjusted(before: Normalizers, predicted: Predicted, own: Normalizers) -> tuple[Normalizers, str]:
    """The checkpoint's normalizers in the units of the data, and corrected by constants.

    The head keeps what it knows, so the constants are fitted to its errors and not to the energies; other
    references, such as isolated atoms, would move its answers by what binds the atoms, eV for each.
    """
    references, error = before.linear_references, predicted.error
    if own.linear_references is not None:
        table = np.zeros(NUM_ELEMENTS)
        if references is not None:
            size = min(len(references), NUM_ELEMENTS)
            table[:size] = references.numpy()[:size]
        shift = predicted.shift()
        references = torch.from_numpy(table + shift)
        error = error - predicted.sample.composition @ shift
    constant = float(error.mean())
    changed = Normalizers(
        Normalizer(before.energy.mean + constant, own.energy.std),
        Normalizer(0.0, own.forces.std),
        references,
    )
    size = np.abs(predicted.error).mean()
    by = (
        "constants per element and one per structure" if own.linear_references is not None else "one constant"
    )
    return changed, (
        f"energies: {by} fitted to the checkpoint's errors on the data, whose mean size was {size:.3f} eV "
        f"and is {np.abs(error - constant).mean():.3f} eV with that"
    )


def _fitting_model(checkpoint: Checkpoint, has_forces: bool, seed: int) -> EquiformerV2:
    """Copy the network, without the force head for data without forces, with a new one where it lacks one."""
    config = checkpoint.config
    wanted = config.forces if has_forces and config.forces != "none" else "direct" if has_forces else "none"
    if wanted != config.forces:
        config = replace(config, forces=wanted, stress=False, force_head=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EquiformerV2(config)
    own = model.state_dict()
    old = plain_state(checkpoint.model, checkpoint.model.state_dict())
    model.load_state_dict({name: old.get(name, own[name]).cpu() for name in own})
    return model


def _with_new_head(
    model: EquiformerV2,
    predictor: Predictor,
    frames: Frames,
    rows: np.ndarray,
    own: Normalizers,
) -> tuple[Normalizers, list[str]]:
    """Give `model` a new last layer of the energy head, fitted to frames, and forces in the data's units.

    Returns:
        The normalizers to use, and sentences about the energy head and about the force head.
    """
    checkpoint = predictor.checkpoint
    used = own.for_gradient() if model.config.forces == "gradient" else own
    chosen = spread(rows, _LOOKED_AT)
    data = [frames.dataset[row] for row in chosen.tolist()]
    targets = [float(used.normalize_energy(item.energy.view(1), item)[0]) for item in data]
    before, after = fit_last_layer(
        model.to(predictor.device), data, np.array(targets), [frames.systems[row] for row in chosen]
    )
    model.cpu()
    if after < before:
        std = used.energy.std
        told = (
            f"fitted to {len(chosen)} frames; on frames left out of the fit its error is {std * after:.3f} "
            f"eV, without the fit {std * before:.3f} eV"
        )
    else:
        told = f"answering the references at first, because a fit to {len(chosen)} frames fails on others"
    if not frames.has_forces:
        return used, [told, "force head: left out, because the data have no forces"]
    if checkpoint.config.forces == "none":
        return used, [told, "force head: new, because the checkpoint has none"]
    if model.config.forces != "direct":
        return used, [told, "force head: none, because forces are the gradient of the energy"]
    scale = _force_scale(predictor, data)
    forces = checkpoint.normalizers.forces
    keep_predictions(model, Normalizers(own.energy, replace(forces, std=scale * forces.std)), own)
    at_the_start = (
        "with the same forces in eV/Å at the start"
        if scale == 1.0
        else f"with {scale:.3g} times its forces at the start, which fits the {len(data)} frames best"
    )
    return used, [told, f"force head: the checkpoint's, {at_the_start}"]


def _force_scale(predictor: Predictor, frames: Sequence[Data]) -> float:
    """Factor of at most 1 with which the predicted forces on free atoms fit those of frames best.

    On structures that are foreign to the checkpoint its forces may be many times larger than the true ones,
    and a training would first have to unlearn them.
    """
    product = square = 0.0
    for frame in frames:
        free = ~frame.fixed
        predicted = predictor.predict(frame)["forces"][free].double()
        product += float((predicted * frame.forces[free].double()).sum())
        square += float((predicted**2).sum())
    scale = min(max(product / square, _LEAST_SCALE), 1.0) if square > 0.0 else 1.0
    return scale if scale < _WORTH_SCALING else 1.0


def write_start(start: Start, path: AnyPath, origin: dict[str, str]) -> None:
    """Write the native checkpoint that the trainer starts from; `origin` goes into its provenance."""
    checkpoint = start.checkpoint
    save_checkpoint(
        path,
        model=checkpoint.model,
        raw_state=checkpoint.model.state_dict(),
        averaged_state=None,
        normalizers=checkpoint.normalizers,
        energy_kind=checkpoint.energy_kind,
        provenance={**inherited(checkpoint.provenance), **origin, FITTED: True},
    )
