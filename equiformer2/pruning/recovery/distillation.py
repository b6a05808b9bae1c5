"""Distillation after a cut: the pruned network learns the dense one's energies and forces.

No labels are needed. The dense network answers once for every structure, its answers are stored as an
ordinary dataset, and training on that dataset is an ordinary run: energies of all structures, forces of
free atoms only (`training.losses`), the run folder, resuming and all settings of `equiformer2 train`.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20 import LmdbWriter, open_dataset
from datasets_oc20.datamodule import NormalizerValues
from datasets_oc20.targets import NUM_ELEMENTS
from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint import Checkpoint, Normalizers, load_checkpoint
from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.training_data import DENSE_ANSWERS
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, whole_file, write_json
from equiformer2.inference import Predictor
from equiformer2.pruning.calibration import unlabelled
from equiformer2.pruning.calibration_data import raw_files, read_structures
from equiformer2.training.configuration import parse
from equiformer2.training.run import RunConfig, train

log = logging.getLogger("equiformer2")

Paths = str | Path | Sequence[str | Path]
RUN = "run"
"""Name of the run's folder inside the folder of a distillation."""
_RECORD = "distill.json"
_EVERY = 100
"""Optimizer steps between checkpoints: a killed distillation, often of one epoch, loses no more."""


def distill(
    student: str | Path,
    teacher: str | Path,
    train_data: Paths,
    val_data: Paths,
    out: AnyPath,
    arguments: Sequence[str],
    from_scratch: bool = False,
    device: str = "cpu",
    labels: AnyPath | None = None,
) -> Path:
    """Train a pruned network on the answers of the dense one; an interrupted call is continued.

    Args:
        student: native checkpoint of the pruned network.
        teacher: checkpoint of the dense network.
        train_data: files of training structures, as in `read_structures`; labels in them are not read.
        val_data: files of validation structures, best of other systems.
        out: folder of the run, `run/`, and of `train.lmdb` and `val.lmdb`, the teacher's answers.
        arguments: arguments of `equiformer2 train`, such as `--config FILE` and `--optim.lr 1e-4`; model,
            data, name and starting point are decided here.
        from_scratch: start from random weights instead of the student's: the baseline of the same size.
        device: device that the teacher answers on.
        labels: folder of the teacher's answers, for several students of one teacher; None for `out`.

    Returns:
        The run's folder.

    Raises:
        InputError: student and teacher predict different kinds of energy; wrong `arguments`; `out` holds a
            distillation of another student, from another teacher or another start.
        datasets_oc20.DataError: data that cannot be read.
    """
    out = Path(out)
    labels = None if labels is None else Path(labels)
    small, dense = load_checkpoint(student), load_checkpoint(teacher)
    if small.energy_kind != dense.energy_kind:
        raise InputError(
            f"{student} predicts {small.energy_kind} energies and {teacher} {dense.energy_kind} energies: "
            "a network can only learn from one of its own kind"
        )
    _check_same_distillation(out / _RECORD, small, dense, from_scratch)
    answers = out if labels is None else labels
    for folder in (out, answers):
        folder.mkdir(parents=True, exist_ok=True)
    predictor = Predictor(dense, device=device)
    files = {}
    for name, paths in (("train", train_data), ("val", val_data)):
        files[name] = label(predictor, paths, answers / f"{name}.lmdb")
    config = _run_config(small, out, files, arguments)
    # Begins again what was killed before its first checkpoint, else goes on.
    run = replace(config.run, init_from=None if from_scratch else str(student), ckpt_path="auto")
    return train(replace(config, run=run))


def _check_same_distillation(path: Path, small: Checkpoint, dense: Checkpoint, from_scratch: bool) -> None:
    identity = {
        "student": fingerprint_of_weights(small.model),
        "teacher": fingerprint_of_weights(dense.model),
        "from_scratch": from_scratch,
    }
    if not path.exists():
        write_json(path, identity, make_folder=True)
        return
    known = read_json(path)
    for name, value in identity.items():
        if known.get(name) != value:
            raise InputError(
                f"{path.parent} holds a distillation with another {name} ({known.get(name)}, now {value}): "
                "name another folder"
            )


def label(teacher: Predictor, paths: Paths, target: AnyPath, batch_size: int = 8) -> Path:
    """Write structures with the teacher's energies and forces to an LMDB file.

    Skipped when the file holds this teacher's answers for these structures already.

    Args:
        teacher: the dense network.
        paths: files of structures, as in `read_structures`.
        target: LMDB file to write.
        batch_size: structures per forward pass.

    Returns:
        The path of the file.

    Raises:
        InputError: `target` holds something else, or is one of `paths`.
        datasets_oc20.DataError: a file cannot be read.
    """
    target = Path(target)
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    check_target(target, inputs=named)
    origin = {
        "labels": DENSE_ANSWERS,
        "teacher": fingerprint_of_weights(teacher.checkpoint.model),
        "structures": [str(path) for path in named],
        "content": _content_of(named),
    }
    record = target.with_name(f"{target.name}.json")
    if target.exists() and record.exists():
        # Records of earlier versions do not tell the content.
        if {"content": origin["content"], **read_json(record)} != origin:
            raise InputError(
                f"{target} holds the answers of another teacher or to other structures: remove it or name "
                "another folder"
            )
        return target
    with LmdbWriter(target, teacher.energy_kind, origin) as writer:

        def write(structures: list[Data]) -> None:
            out = teacher.predict(Batch.from_data_list(structures))
            forces = out["forces"].split([int(structure.natoms) for structure in structures])
            for structure, energy, force in zip(structures, out["energy"], forces, strict=True):
                structure.energy, structure.forces = energy.view(1), force
                writer.write(structure)

        batch: list[Data] = []
        for structure in tqdm(_structures(named), desc=f"dense answers for {target.name}", unit="structures"):
            batch.append(unlabelled(structure))
            if len(batch) == batch_size:
                write(batch)
                batch = []
        if batch:
            write(batch)
    write_json(record, origin)
    return target


def _content_of(paths: Sequence[str | Path]) -> str:
    """Hash the files that are named or lie in the named folders, but for locks."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            if not file.name.endswith(("-lock", "lock.mdb")):
                digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _structures(paths: Sequence[str | Path]) -> Iterator[Data]:
    """Read structures one by one, so that a large dataset need not fit into memory."""
    for path in map(Path, paths):
        if raw_files(path):
            yield from read_structures(path)
        else:
            dataset = open_dataset(path, needs_energy=False)
            for index in range(len(dataset)):
                yield dataset[index]


def _run_config(
    student: Checkpoint, out: Path, files: dict[str, Path], arguments: Sequence[str]
) -> RunConfig:
    """Configuration of the run, with the model and the normalizers of the student."""

    def plain(values: Any) -> Any:
        """Tuples as lists, for YAML."""
        if isinstance(values, dict):
            return {key: plain(value) for key, value in values.items()}
        return [plain(value) for value in values] if isinstance(values, list | tuple) else values

    own = [f"--data.{name}={path}" for name, path in files.items()]
    own += [f"--data.energy_kind={student.energy_kind}", f"--runs_dir={out}", f"--name={RUN}"]
    config = parse([f"--checkpoint_every_n_steps={_EVERY}", *arguments, *own])
    values = yaml.safe_load(config.text) | {"model": student.config.to_dict()}
    text = yaml.safe_dump(plain(values), sort_keys=False)
    data = config.data | {"normalizers": _normalizer_values(student.normalizers, out)}
    return replace(config, model=student.config, data=data, text=text)


def _normalizer_values(normalizers: Normalizers, out: Path) -> NormalizerValues:
    """Normalizers of the student, whose weights were trained with them."""
    references = None
    if normalizers.linear_references is not None:
        references = out / "references.npz"
        with whole_file(references) as file:
            known = normalizers.linear_references.numpy()[:NUM_ELEMENTS]
            np.savez(file, coeff=np.pad(known, (0, NUM_ELEMENTS - len(known))))
    return NormalizerValues(
        energy_mean=normalizers.energy.mean,
        energy_std=normalizers.energy.std,
        forces_std=normalizers.forces.std,
        linear_references=None if references is None else str(references),
    )
