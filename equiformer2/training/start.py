"""Start a run: the weights of `init_from`, and the units of energies and forces."""

import logging
import math
import os
from dataclasses import fields, replace
from typing import Any

import torch
import yaml

from datasets_oc20 import DataError, OC20DataModule
from equiformer2.checkpoint import Checkpoint, Normalizer, Normalizers, load_checkpoint
from equiformer2.checkpoint.checkpoint import read_contents
from equiformer2.checkpoint.tensor_files import plain
from equiformer2.checkpoint.training_data import TrainingData, count_contents
from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.model.folding import plain_state
from equiformer2.training.loader import ResumableDataModule
from equiformer2.training.task import NOT_IN_WEIGHTS

log = logging.getLogger("equiformer2")

# Spreads that differ by more than this factor, and means that differ by more standard deviations than this,
# are worth a warning: the loss then weighs energies, or forces, several times more or less than its
# coefficients say.
_FACTOR, _DEVIATIONS = 3.0, 2.0
_MOST_LOOKED_AT = 50_000
_REFIT = "--refit_normalizers true takes those of the training data"
FITTED = "normalizers_fitted"
"""Key of the provenance of a start whose normalizers were made for the training data."""


def with_pruned_blocks(model: ModelConfig, init_from: str | None, text: str) -> tuple[ModelConfig, str]:
    """Take over the blocks of a pruned `init_from`, so that nobody has to copy them into a configuration.

    Args:
        model: as configured.
        init_from: the checkpoint to start from, or None.
        text: the configuration as YAML.

    Returns:
        both, with the checkpoint's blocks and heads where it is pruned and `model` is not.
    """
    if init_from is None or model.is_pruned:
        return model, text
    start = read_contents(init_from).config
    if not start.is_pruned:
        return model, text
    names = ["blocks", "force_head", "energy_head"]
    if model.forces != "direct":  # there is no force head
        names.remove("force_head")
    model = replace(model, **{name: getattr(start, name) for name in names})
    values = yaml.safe_load(text)
    values["model"] |= {name: value for name, value in plain(model.to_dict()).items() if name in names}
    return model, yaml.safe_dump(values, sort_keys=False)


def with_whole_model(model: ModelConfig, init_from: str, text: str) -> tuple[ModelConfig, str]:
    """Take over the whole network of `init_from`, but for dropout.

    Args:
        model: as configured.
        init_from: the checkpoint to start from.
        text: the configuration as YAML.
    """
    own = {name: getattr(model, name) for name in NOT_IN_WEIGHTS}
    model = replace(read_contents(init_from).config, **own)
    values = yaml.safe_load(text)
    values["model"] = {**values["model"], **plain(model.to_dict())}
    return model, yaml.safe_dump(values, sort_keys=False)


def read_start(path: str, data: ResumableDataModule, refit: bool) -> Checkpoint:
    """Read the checkpoint to start from.

    Args:
        path: native, OCP or fairchem v1 file.
        data: to train on; a foreign file that does not state its kind of energy is taken to have theirs.
        refit: whether the normalizers are those of the data, which may then have another kind of energy.

    Raises:
        InputError: the kinds of energy differ, or as `load_checkpoint`.
    """
    start = load_checkpoint(path, energy_kind=read_contents(path).energy_kind or data.energy_kind)
    if start.energy_kind != data.energy_kind and not refit and not data.normalizers_are_given:
        raise InputError(
            f"init_from: {path} predicts {start.energy_kind} energies and the training data hold "
            f"{data.energy_kind} energies: {_REFIT} and the checkpoint's weights (forces are the same in "
            "both kinds, energies are learned anew); or use data of the checkpoint's kind"
        )
    return start


def load_start(model: EquiformerV2, start: Checkpoint, path: str) -> None:
    """Load the checkpoint's weights into `model`; refuse another architecture.

    Gradient forces, and a network without forces, need the weights of the energy alone: those of a force head
    are left behind.

    Raises:
        InputError: the architectures differ; the keys are listed.
    """
    mine, theirs = vars(model.config), dict(vars(start.config))
    # Weights that the checkpoint stores in fewer bytes are trained in float32.
    state = plain_state(start.model, start.model.state_dict())
    if model.config.forces != "direct":
        theirs |= {"forces": model.config.forces, "force_head": mine["force_head"]}
        state = {name: value for name, value in state.items() if not name.startswith("force_block.")}
    different = [
        f"model.{field.name} is {theirs[field.name]!r} there and {mine[field.name]!r} here"
        for field in fields(ModelConfig)
        if field.name not in NOT_IN_WEIGHTS and mine[field.name] != theirs[field.name]
    ]
    if different:
        raise InputError(f"init_from: {path} holds another model: {'; '.join(different)}")
    # Checkpoints have no parts for denoising; these start anew.
    own = {} if model.dens is None else model.dens.state_dict(prefix="dens.")
    model.load_state_dict({**own, **state})
    log.info(f"starting from the {start.weights} weights of {os.fspath(path)}")


def choose_normalizers(
    data: ResumableDataModule, start: Checkpoint | None, path: str | None, refit: bool, forces: str
) -> Normalizers:
    """Choose normalizers: the configuration's, else the checkpoint's when starting from one, else the data's.

    The log says which, and warns where they are far from the training data.

    Args:
        data: to train on.
        start: the checkpoint to start from, read from `path`, or None.
        path: see there.
        refit: take those of the data with a checkpoint, too.
        forces: of the model, `direct`, `gradient` (of the energy, whose std they need) or `none`.

    Raises:
        InputError, DataError: they cannot be of these data.
    """
    gradient = forces == "gradient"
    fitted = start is not None and start.provenance.get(FITTED) is True
    if start is not None and not data.normalizers_are_given and not refit:
        used, source = start.normalizers, f"of init_from {path}"
        if gradient and used.forces.std != used.energy.std:
            used = used.for_gradient()
        try:
            if not fitted:
                data.check_normalizers(used.energy.mean, used.energy.std, used.linear_references)
        except DataError as error:
            raise DataError(f"init_from: {path}: {error} Or {_REFIT}.") from error
    else:
        source = "given in data.normalizers" if data.normalizers_are_given else "of the training data"
        table = data.normalizers
        used = Normalizers(
            energy=Normalizer(*table["energy"]),
            forces=Normalizer(*table["forces"]),
            linear_references=table["linear_references"],
        )
        if gradient and not data.normalizers_are_given:
            used = used.for_gradient()
    after = "" if used.linear_references is None else " after linear references"
    summary = f"energy {used.energy.mean:.4f} ± {used.energy.std:.4f} eV{after}"
    if forces != "none":
        summary += f", forces ± {used.forces.std:.4f} eV/Å"
    log.info(f"normalizers in use: {source}: {summary}")
    targets = data.training_targets(used.linear_references)
    # OC20's published values give forces the energy's spread, on purpose; so do those of gradient forces.
    mean, std = targets["energy"]
    far = []

    def differ(one: float, other: float) -> bool:
        return min(one, other) > 0 and abs(math.log(one / other)) > math.log(_FACTOR)

    if differ(used.energy.std, std) or abs(used.energy.mean - mean) > _DEVIATIONS * used.energy.std:
        far.append(
            f"energy {used.energy.mean:.4f} ± {used.energy.std:.4f} eV in use, {mean:.4f} ± {std:.4f} eV in "
            "the data"
        )
    checks_forces = forces == "direct" and not data.normalizers_are_given
    if checks_forces and differ(used.forces.std, targets["forces"][1]):
        far.append(
            f"forces ± {used.forces.std:.4f} eV/Å in use, ± {targets['forces'][1]:.4f} eV/Å in the data"
        )
    if far and not fitted:
        remedy = "correct data.normalizers or leave it out" if data.normalizers_are_given else _REFIT
        log.warning(
            f"the normalizers {source} are far from the training data: {'; '.join(far)}; energies or forces "
            f"then weigh more or less in the loss than its coefficients say: {remedy}"
        )
    return used


def keep_predictions(model: EquiformerV2, before: Normalizers, after: Normalizers) -> None:
    """Rescale the last linear maps of both heads, so that outputs in eV and eV/Å stay what they are.

    Energies stay but for the mean and the references, which are those of `after`.
    """
    energy, forces = (getattr(before, name).std / getattr(after, name).std for name in ("energy", "forces"))
    with torch.no_grad():
        if energy != 1.0:
            model.energy_block.so3_linear_2.weight.mul_(energy)
            model.energy_block.so3_linear_2.bias.mul_(energy)
        if model.force_block is not None and forces != 1.0:
            model.force_block.proj.weight.mul_(forces)


def describe_training_data(
    data: OC20DataModule, start: Checkpoint | None, normalizers: Normalizers
) -> dict[str, Any]:
    """Count what the training data hold, for the provenance of the checkpoints (`checkpoint.training_data`).

    Structures of which only forces are learned count, too. Of more than 50,000 structures as many are looked
    at, evenly spaced.

    Args:
        data: to train on.
        start: the checkpoint that the run starts from, or None.
        normalizers: in use.

    Returns:
        One stage of training, in plain values.
    """
    mean, std = data.training_targets(normalizers.linear_references)["energy"]
    training = data.training
    return {
        # An evaluation compares with a model that always answers the mean.
        "energy_mean_eV": mean,
        "energy_std_eV": std,
        "frames": len(training),
        **count_contents(training, _MOST_LOOKED_AT),
        "labels": data.labels,
        "earlier": [] if start is None else TrainingData(start.provenance).before(),
    }
