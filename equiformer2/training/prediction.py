"""Predictions of a checkpoint for a dataset, as one NumPy or JSON file."""

import io
from pathlib import Path

import numpy as np

from datasets_oc20 import OC20Lmdb
from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.files import check_target, write_bytes, write_json
from equiformer2.training.evaluation import PredictBatches, predicted_batches


def predict_dataset(
    predict: PredictBatches,
    dataset: OC20Lmdb,
    batch_size: int = 8,
    max_atoms: int | None = None,
    num_workers: int = 0,
) -> dict[str, np.ndarray]:
    """Predict a dataset: arrays over its n structures and over all their N atoms, in stored order.

    Args:
        predict: `predict_batches` of a predictor.
        dataset: structures.
        batch_size: maximum number of structures per batch.
        max_atoms: maximum number of atoms per batch; None for no limit.
        num_workers: number of loader processes.

    Returns:
        `sid` [n] text, `fid` [n], `natoms` [n], `energy` [n] eV, and for a model with forces `forces`
        [N, 3] eV/Å and `fixed` [N]: atoms that OC20 holds in place, where the forces were never trained.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("sid", "fid", "natoms", "energy")}
    for batch, out in predicted_batches(predict, dataset, batch_size, max_atoms, num_workers):
        parts["sid"].append(np.array([str(sid) for sid in batch.sid]))
        parts["fid"].append(batch.fid.view(-1).numpy())
        parts["natoms"].append(batch.natoms.view(-1).numpy())
        parts["energy"].append(out["energy"].view(-1).numpy())
        if "forces" in out:
            parts.setdefault("forces", []).append(out["forces"].numpy())
            parts.setdefault("fixed", []).append(batch.fixed.bool().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def check_output(target: AnyPath) -> None:
    """Raise `InputError` unless the file is to be a `.npz` or a `.json`, where it can be written."""
    target = Path(target)
    if target.suffix not in (".npz", ".json"):
        raise InputError(f"{target}: predictions are written as .npz or .json, choose one of these endings")
    check_target(target)


def write_predictions(target: AnyPath, arrays: dict[str, np.ndarray]) -> None:
    """Write predictions as `.npz`, or as `.json` with the same names, atomically.

    Args:
        target: file to write.
        arrays: output of `predict_dataset`.

    Raises:
        InputError: another ending, a place that cannot be written to, or an energy or force that is not
            finite; its structure is named.
    """
    target = Path(target)
    check_output(target)
    structure = np.repeat(np.arange(len(arrays["natoms"])), arrays["natoms"])
    good = {"energy": np.isfinite(arrays["energy"])}
    if "forces" in arrays:
        good["force"] = np.isfinite(arrays["forces"]).all(axis=1)
    for name, finite in good.items():
        wrong = np.flatnonzero(~finite)
        if len(wrong):
            at = int(wrong[0] if name == "energy" else structure[wrong[0]])
            raise InputError(
                f"{target} was not written: the {name} of structure {arrays['sid'][at]}/{arrays['fid'][at]} "
                "(sid/fid) is not finite; check the structure and the checkpoint"
            )
    if target.suffix == ".json":
        write_json(target, {name: array.tolist() for name, array in arrays.items()}, make_folder=True)
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(target, buffer.getvalue(), make_folder=True)
