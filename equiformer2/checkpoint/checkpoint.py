"""Loading, saving and import of trained networks, with normalizers and kind of energy."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equiformer2.checkpoint.adapter_files import FORMAT as ADAPTER_FORMAT
from equiformer2.checkpoint.contents import Contents, EnergyKind, WeightsKind, check_energy_kind
from equiformer2.checkpoint.expert_files import is_expert_file
from equiformer2.checkpoint.fairchem_v1 import is_fairchem_v1, read_fairchem_v1
from equiformer2.checkpoint.native import is_native, read_native, write_native
from equiformer2.checkpoint.normalizers import Normalizers
from equiformer2.checkpoint.surroundings import Surroundings
from equiformer2.checkpoint.tensor_files import plain, read_tensors, sha256
from equiformer2.checkpoint.training_data import KEY, TrainingData
from equiformer2.checkpoint.weights import build_model, check_weights
from equiformer2.devices import own_defaults, usable_device
from equiformer2.errors import InputError
from equiformer2.files import read_json
from equiformer2.model.config import ModelConfig
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.model.folding import parametrized_weights, plain_state
from equiformer2.model.parameters import count_parameters
from equiformer2.shipped import find_checkpoint
from equiformer2.values import shown_name

logger = logging.getLogger(__name__)


class SeenData(NamedTuple):
    """Training data of a checkpoint, told afterwards.

    Attributes:
        stage: lists of what they hold, as a training writes them (`checkpoint.training_data`).
        surroundings: of their atoms.
    """

    stage: Mapping[str, Any]
    surroundings: Surroundings


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, ready to predict.

    Attributes:
        model: in evaluation mode.
        config: of the model.
        normalizers: from the model's units to eV and eV/Å.
        energy_kind: `adsorption` (OC20's referenced energy) or `total` (DFT total energy).
        weights: kind of weights in `model`, `raw` or `averaged`.
        available_weights: kinds of weights in the file.
        provenance: plain values about the origin of the file.
        source_format: `equiformer2`, `ocp-v0`, `fairchem-v1-flat` or `fairchem-v1-hydra`.
        surroundings: of the atoms that these weights were trained on; None where the file does not hold them.
    """

    model: EquiformerV2
    config: ModelConfig
    normalizers: Normalizers
    energy_kind: EnergyKind
    weights: WeightsKind
    available_weights: tuple[WeightsKind, ...]
    provenance: dict[str, Any]
    source_format: str
    surroundings: Surroundings | None = None


def load_checkpoint(
    path: str | os.PathLike[str],
    weights: str | None = None,
    energy_kind: str | None = None,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Load a native file, or one of OCP or fairchem v1, without executing anything that it contains.

    The log (level INFO) states the weights that are used and the others in the file.

    Args:
        path: the file, or the name of a shipped model such as `oc20_small`.
        weights: `raw`, `averaged`, or None for the averaged ones where the file has them. None means the
            same for every format; fairchem's own calculator ignores the average in a `checkpoint.pt`.
        energy_kind: `adsorption` or `total`, for OCP and fairchem files that do not state it; must not
            contradict the others.
        device: device of the model.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file is damaged, of an unknown or newer format, or of another model; if it does not
            hold `weights`; if it does not state its kind of energy and `energy_kind` is None, or states
            another one; if there is no such device. One sentence names the file and lists the keys.
    """
    device = usable_device(device)
    contents = read_contents(path).with_energy_kind(energy_kind)
    if contents.energy_kind is None:
        raise InputError(
            f"{contents.source} does not state what kind of energy it predicts: give energy_kind="
            "'adsorption' (OC20's referenced energy) or 'total' (DFT total energy)"
        )
    used = contents.choose_weights(weights)
    model = build_model(contents.config, contents.weights[used], f"{contents.source} ({used} weights)")
    others = [f"the {kind} weights (weights='{kind}')" for kind in contents.available_weights if kind != used]
    logger.info(
        "%s (%s): using the %s weights; the file also holds %s; energies are %s energies",
        contents.source,
        contents.source_format,
        used,
        " and ".join(others) or "no others",
        contents.energy_kind,
    )
    return Checkpoint(
        model=model.to(device),
        config=contents.config,
        normalizers=contents.normalizers,
        energy_kind=contents.energy_kind,
        weights=used,
        available_weights=contents.available_weights,
        provenance=contents.provenance,
        source_format=contents.source_format,
        surroundings=contents.surroundings_of(used),
    )


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: EquiformerV2,
    raw_state: Mapping[str, Tensor] | None,
    averaged_state: Mapping[str, Tensor] | None,
    normalizers: Normalizers,
    energy_kind: str,
    provenance: Mapping[str, Any],
) -> None:
    """Write one native file atomically.

    Args:
        path: the new file; an existing one is replaced at the end.
        model: network whose configuration is written; its own weights are not. Of weights that it
            parametrizes the computed values are written, so that the file holds a plain network with the same
            answers.
        raw_state: weights of the last optimizer step by name, or None; names as in `model.state_dict()`.
        averaged_state: their exponential moving average, or None.
        normalizers: from the units of the model to eV and eV/Å.
        energy_kind: `adsorption` or `total`.
        provenance: origin of the weights, in plain values; all others are stored as text.

    Raises:
        InputError: if there are no weights, or they do not fit `model`.
        OSError: if the file cannot be written.
    """
    states: dict[WeightsKind, Mapping[str, Tensor]] = {}
    if raw_state is not None:
        states["raw"] = raw_state
    if averaged_state is not None:
        states["averaged"] = averaged_state
    if not states:
        raise InputError(f"{path}: there are no weights to save")
    plain_model = EquiformerV2(model.config, device="meta") if parametrized_weights(model) else model
    for kind in states:
        states[kind] = plain_state(model, states[kind])
        check_weights(plain_model, states[kind], f"{path} ({kind} weights)")
    normalizers.check_model(model.config, str(path))
    contents = Contents(
        source=str(path),
        source_format="equiformer2",
        config=model.config,
        weights=states,
        normalizers=normalizers,
        energy_kind=check_energy_kind(energy_kind, str(path)),
        provenance=dict(provenance),
    )
    write_native(path, contents)


def import_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    energy_kind: str | None = None,
    weights: str | None = None,
    seen: SeenData | None = None,
) -> dict[str, Any]:
    """Rewrite a checkpoint of OCP or fairchem v1 as a native file; or any checkpoint with changes.

    Args:
        source: the file of OCP or fairchem v1; with `weights` or `seen` also a native one or a shipped model.
        out: the native file to write.
        energy_kind: as in `load_checkpoint`.
        weights: `raw` or `averaged`, to leave out the other set, which halves the file; None for all.
        seen: data that the weights were trained on, to be stored with them. Lists that the checkpoint has are
            kept if they are complete.

    Returns:
        A summary of both files, in plain values.

    Raises:
        InputError: as `load_checkpoint`, and if `source` is `out`, or is a native file and `weights` is None.
        OSError: if `out` cannot be written.
    """
    if Path(out).resolve() == Path(source).resolve():
        raise InputError(f"{out} is the file to import: give another name for the native file")
    contents = read_contents(source).with_energy_kind(energy_kind)
    if contents.source_format == "equiformer2" and weights is None and seen is None:
        raise InputError(
            f"{source} is a native checkpoint already: give --weights averaged or raw for a copy with these "
            "weights alone, or --familiarity for one that tells what it was trained on"
        )
    if weights is not None:
        kept = contents.choose_weights(weights)
        contents = dataclasses.replace(
            contents, weights={kept: contents.weights[kept]}, surroundings=contents.surroundings_of(kept)
        )
    if contents.energy_kind is None:
        raise InputError(
            f"{source} does not state what kind of energy it predicts: give --energy-kind adsorption "
            "(OC20's referenced energy) or total (DFT total energy)"
        )
    for kind, state in contents.weights.items():
        build_model(contents.config, state, f"{source} ({kind} weights)")
    if seen is not None:
        contents = with_seen_data(contents, seen)
    origin = {"source_file": Path(source).name, "source_sha256": sha256(find_checkpoint(source))}
    write_native(out, dataclasses.replace(contents, provenance=contents.provenance | origin))
    return {
        "source": str(source),
        "source_format": contents.source_format,
        "source_sha256": origin["source_sha256"],
        "out": str(out),
        "parameters": count_parameters(contents.config),
        "weights": list(contents.available_weights),
        "energy_kind": contents.energy_kind,
        "energy_kind_from": contents.provenance.get("energy_kind_from", "the native file"),
        "training_data": contents.provenance.get(KEY),
        "surroundings": None if contents.surroundings is None else contents.surroundings.description,
        "normalizers": plain(contents.normalizers.to_dict()),
        "model_config": plain(contents.config.to_dict()),
    }


def with_seen_data(contents: Contents, seen: SeenData) -> Contents:
    """Return contents that tell what the weights were trained on; complete lists of theirs are kept."""
    told, provenance = TrainingData(contents.provenance), contents.provenance
    if None in (told.elements, told.pairs, told.adsorbates, told.substrates):
        before = provenance.get(KEY)
        stage = {**(before if isinstance(before, Mapping) else {}), **seen.stage, "earlier": []}
        provenance = {**provenance, KEY: stage}
    return dataclasses.replace(contents, provenance=provenance, surroundings=seen.surroundings)


def _with_lists_beside(contents: Contents, path: Path) -> Contents:
    """Add the lists of training data that lie beside a checkpoint without any, in `NAME.training_data.json`.

    So a file whose bytes others rely on can be told about. The lists count if they name its SHA-256.
    """
    lists = path.with_suffix(".training_data.json")
    if KEY in contents.provenance or not lists.is_file():
        return contents
    told = read_json(lists)
    if told.get("checkpoint_sha256") != sha256(path):
        logger.warning(f"{lists} is about another file than {path}: it is not used")
        return contents
    return dataclasses.replace(contents, provenance={**contents.provenance, KEY: told.get(KEY)})


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Read and translate a file of any known format, or a shipped model, without building the network.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: as `load_checkpoint`.
    """
    path = find_checkpoint(path)
    if is_expert_file(path):
        raise InputError(
            f"{path} is a network of experts for several tasks: make an ordinary checkpoint of one of them "
            f"with equiformer2 experts merge --checkpoint {path} --task TASK --out NEW.pt, and give that"
        )
    file = read_tensors(path)
    with own_defaults():
        if is_native(file):
            return _with_lists_beside(read_native(file, str(path)), path)
        if is_fairchem_v1(file):
            return _with_lists_beside(read_fairchem_v1(file, str(path)), path)
    if "pytorch-lightning_version" in file:
        raise InputError(
            f"{path} is the state of a training run, for resuming it: "
            "give the checkpoint that the run wrote beside it"
        )
    if file.get("format") == ADAPTER_FORMAT:
        raise InputError(
            f"{path} is an adapter and no network: give the checkpoint that it belongs to, and this file as "
            "--adapter (adapter= in Python)"
        )
    names = ", ".join(sorted(map(shown_name, file))[:8]) or "nothing"
    raise InputError(f"{path} is no equiformer2, OCP or fairchem v1 checkpoint: it holds {names}")
