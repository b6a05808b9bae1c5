"""Lightning data module of OC20 data: files, normalizers and batches."""

import math
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data

from datasets_oc20.division import divide, group_names
from datasets_oc20.errors import DataError
from datasets_oc20.joined import MixedLabelDataset, Paths, TaskData, TaskDataset
from datasets_oc20.npz_file import read_npz
from datasets_oc20.own_data.opening import open_dataset
from datasets_oc20.reader import OC20Lmdb
from datasets_oc20.sampler import BalancedBatchSampler
from datasets_oc20.targets import (
    NUM_ELEMENTS,
    NormalizerStatistics,
    TargetSample,
    check_energies_match_kind,
    fit_linear_references,
    fit_normalizers,
    sample_targets,
)

_CHECKED_RECORDS = 200
_VALIDATION_SHARE = 0.1
_MAX_CHECKED_FIELDS = 50_000


@dataclass
class NormalizerValues:
    """Normalizers given in the configuration instead of fitted to the training data.

    Args:
        energy_mean: eV.
        energy_std: eV.
        forces_std: eV/Å.
        linear_references: `.npz` file whose array `coeff [100]` holds a reference per atomic number, eV (as
            `equiformer2 data references` writes), for total energies.
    """

    energy_mean: float
    energy_std: float
    forces_std: float
    linear_references: str | None = None

    def __post_init__(self) -> None:
        for name in ("energy_mean", "energy_std", "forces_std"):
            if not math.isfinite(getattr(self, name)):
                raise DataError(f"data.normalizers.{name} is {getattr(self, name)}; give a finite number.")


class NormalizerTable(TypedDict):
    """(mean, std) of energy (eV) and forces (eV/Å), and `[100]` references in eV or None."""

    energy: tuple[float, float]
    forces: tuple[float, float]
    linear_references: torch.Tensor | None


class OC20DataModule(pl.LightningDataModule):
    """Training, validation and test data, in batches limited by structures, atoms or edges.

    After `setup()`, `energy_kind` and `normalizers` describe the training data, `training` is the dataset
    that batches are drawn from (with `forces_only`), and `labels` lists what its files state about their
    labels. For total energies per-element references are fitted and subtracted before the mean and standard
    deviation are taken. With `tasks` every task has a data module of its own (`parts`), and `normalizers` are
    in these alone.

    For several processes give the Trainer `use_distributed_sampler=False`: this sampler deals the batches.

    Args:
        train: LMDB file, folder of shards, small set of other files that ASE reads, or list of them.
        val: likewise; None holds systems with a tenth of the frames out of `train`, or of a single
            system its last frames.
        test: likewise.
        forces_only: further training structures of which only the forces are learned, such as labels of
            another method, whose energies have another zero. They do not enter the normalizers.
        energy_kind: "adsorption" or "total"; needed for OC20's own files, which do not declare it.
        batch_size: maximum number of structures in a batch, per process.
        max_atoms: maximum number of atoms in a batch.
        max_edges: maximum number of edges in a batch, counted as `max_neighbors` per atom.
        max_neighbors: edges counted per atom for `max_edges`.
        num_workers: number of loader processes.
        seed: random seed; with the epoch it determines the order of the training batches.
        normalizers: values to use instead of fits to the training data.
        tasks: several sets of data that are trained together by a network of experts, in place of `train` and
            `val`: name -> `train`, `val`, `energy_kind` and `repeat` (`joined.TaskData`). Each keeps its own
            kind of energy, references and normalizers.

    Attributes:
        parts: data module of every task by name; empty without tasks.
        repeats: times that each training structure of a task is used in an epoch, by its name.

    Raises:
        DataError: for numbers out of range; on `setup`, for wrong files, mixed or undeclared kinds of energy,
            energies that cannot be of the declared kind or are not those that the given normalizers are of,
            or records larger than a batch.
    """

    def __init__(
        self,
        train: Paths | None = None,
        val: Paths | None = None,
        test: Paths | None = None,
        forces_only: Paths | None = None,
        energy_kind: str | None = None,
        batch_size: int = 8,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        max_neighbors: int = 20,
        num_workers: int = 0,
        seed: int = 0,
        normalizers: NormalizerValues | None = None,
        tasks: dict[str, dict[str, str | int | list[str] | None]] | None = None,
    ) -> None:
        super().__init__()
        if train is None and tasks is None:
            raise DataError("data.train is not set; name the data to train on (or data.tasks, for experts).")
        if max_neighbors < 1:
            raise DataError(f"data.max_neighbors is {max_neighbors}; it must be at least 1.")
        if num_workers < 0:
            raise DataError(f"data.num_workers is {num_workers}; it must be 0 (none) or more.")
        self._paths = {"train": train, "val": val, "test": test}
        self._forces_only = forces_only
        self._given_kind = energy_kind
        self.batch_size, self.max_atoms, self.max_edges = batch_size, max_atoms, max_edges
        self.max_neighbors, self.num_workers, self.seed = max_neighbors, num_workers, seed
        self._given_normalizers = normalizers
        self.datasets: dict[str, OC20Lmdb] = {}
        self.training: OC20Lmdb | MixedLabelDataset | TaskDataset
        self._samples: dict[str, TargetSample] = {}
        self._training_sample: TargetSample
        self._fitted: dict[bytes | None, NormalizerStatistics] = {}
        self.energy_kind: str = ""
        self.labels: list[str] = []
        self.normalizers: NormalizerTable
        given = {"train": train, "val": val, "test": test, "forces_only": forces_only}
        self.parts = self._parts(tasks, {**given, "energy_kind": energy_kind, "normalizers": normalizers})

    def _parts(
        self, tasks: dict[str, dict[str, str | int | list[str] | None]] | None, beside: dict[str, object]
    ) -> dict[str, "OC20DataModule"]:
        """Make the data module of every task; refuse settings beside `tasks` that have no meaning then."""
        self.repeats: dict[str, int] = {}
        if tasks is None:
            return {}
        for name, value in beside.items():
            if value is not None:
                raise DataError(
                    f"data.{name} has no meaning beside data.tasks; set it in a task, or leave it out."
                )
        if not isinstance(tasks, dict) or not tasks:
            raise DataError("data.tasks is empty; give train and val of each task by its name.")
        parts = {}
        for name, values in tasks.items():
            task = TaskData.read(values, str(name))
            self.repeats[str(name)] = task.repeat
            parts[str(name)] = OC20DataModule(
                task.train, task.val, energy_kind=task.energy_kind, seed=self.seed
            )
        return parts

    def setup(self, stage: str | None = None) -> None:
        """Open and check the files; fit the normalizers unless they are given."""
        if self.datasets:
            return
        if self.parts:
            self._setup_parts(stage)
            return
        datasets = {
            name: open_dataset(path, self._given_kind)
            for name, path in self._paths.items()
            if path is not None
        }
        if "val" not in datasets:
            datasets = datasets | self._hold_out(datasets["train"])
        self.energy_kind = self._common_kind(datasets)
        more = None if self._forces_only is None else open_dataset(self._forces_only)
        for name, dataset in datasets.items():
            check_same_fields(dataset, dataset.fields(0), needs_energy=name != "test")
        self._samples = {
            dataset.path: sample_targets(dataset, _CHECKED_RECORDS)
            for name, dataset in datasets.items()
            if name != "test" or "energy" in dataset[0]
        }
        for path, sample in self._samples.items():
            check_energies_match_kind(sample, self.energy_kind, path)
        self.normalizers = self._normalizers(datasets["train"])
        self.training = datasets["train"]
        if more is not None:
            self.training = MixedLabelDataset(datasets["train"], more)
            check_same_fields(more, datasets["train"].fields(0))
        opened = [datasets["train"], *([] if more is None else [more])]
        self.labels = sorted({statement for dataset in opened for statement in dataset.labels})
        self.datasets = datasets
        self._report()

    def _setup_parts(self, stage: str | None) -> None:
        """Open the data of all tasks; each is checked and normalised by itself."""
        first: frozenset[str] | None = None
        for name, part in self.parts.items():
            rank_zero_info(f"Task {name}:")
            part.setup(stage)
            fields = part.datasets["train"].fields(0)
            first = fields if first is None else first
            if fields != first:
                raise DataError(
                    f"data.tasks.{name}: its structures hold {', '.join(sorted(fields))}, and those of the "
                    f"first task {', '.join(sorted(first))}; all tasks need the same fields."
                )
        self.energy_kind = ", ".join(f"{name} {part.energy_kind}" for name, part in self.parts.items())
        self.training = TaskDataset(
            {name: part.datasets["train"] for name, part in self.parts.items()}, self.repeats
        )
        validation = TaskDataset({name: part.datasets["val"] for name, part in self.parts.items()})
        # They are read alike.
        self.datasets = {"train": self.training, "val": validation}  # type: ignore[dict-item]
        self.labels = self.training.labels

    def check_normalizers(self, mean: float, std: float, linear_references: torch.Tensor | None) -> None:
        """Check that normalizers fitted elsewhere can be of these energies.

        Args:
            mean: of the energy less the references, eV.
            std: standard deviation of the same, eV.
            linear_references: `[Z_max + 1]` eV, or None.

        Raises:
            DataError: the energies of a dataset are far from the mean.
        """
        for path, sample in self._samples.items():
            sample.check_normalized(mean, std, linear_references, path)

    def training_targets(self, linear_references: torch.Tensor | None) -> NormalizerStatistics:
        """Compute mean and spread of the training energies (eV), less references, and of the forces (eV/Å).

        They are taken over the frames that the normalizers were fitted to, or 200 where these are given.

        Args:
            linear_references: `[100]` eV, or None.
        """
        key = None if linear_references is None else linear_references.numpy().tobytes()
        if key not in self._fitted:
            self._fitted[key] = fit_normalizers(self._training_sample, linear_references)
        return self._fitted[key]

    def mean_composition(self) -> np.ndarray:
        """Average the shares of the elements over the frames of `training_targets`, `[100]`."""
        counts = self._training_sample.composition
        return (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0)

    def train_dataloader(self) -> DataLoader:
        """Return the training batches, shuffled by (seed, epoch)."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches in stored order."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches in stored order; raise `DataError` if there are no test data."""
        if "test" not in self.datasets:
            raise DataError("data.test is not set; name the dataset to test on.")
        return self._loader("test", shuffle=False)

    def _hold_out(self, dataset: OC20Lmdb) -> dict[str, OC20Lmdb]:
        """Divide the training data by system; read all of them once."""
        sids, numbers, frames = [], [], []
        for index in range(len(dataset)):
            data = dataset[index]
            sids.append(str(data.sid))
            numbers.append(data.atomic_numbers.numpy())
            frames.append(int(data.fid))
        division = divide(group_names(sids, numbers), frames, _VALIDATION_SHARE, self.seed, dataset.path)
        rank_zero_info(f"Validation (data.val is not set): {division.sentence}")
        return {
            "train": dataset.select(division.train, "training part"),
            "val": dataset.select(division.held_out, "held-out part"),
        }

    def _normalizers(self, train: OC20Lmdb) -> NormalizerTable:
        given = self._given_normalizers
        self._training_sample = self._samples[train.path] if given else sample_targets(train)
        if given is not None:
            if min(given.energy_std, given.forces_std) <= 0.0:
                raise DataError("data.normalizers: the standard deviations must be positive.")
            references = load_linear_references(given.linear_references)
            if references is not None and self.energy_kind != "total":
                raise DataError(
                    f"data.normalizers.linear_references: {given.linear_references} holds per-element parts "
                    "of total energies, and adsorption energies have none; leave it out."
                )
            self.check_normalizers(given.energy_mean, given.energy_std, references)
            return {
                "energy": (given.energy_mean, given.energy_std),
                "forces": (0.0, given.forces_std),
                "linear_references": references,
            }
        sample = self._training_sample
        references = fit_linear_references(sample) if self.energy_kind == "total" else None
        fitted = self.training_targets(references)
        return {"energy": fitted["energy"], "forces": fitted["forces"], "linear_references": references}

    @staticmethod
    def _common_kind(datasets: dict[str, OC20Lmdb]) -> str:
        """Return the kind of energy that all datasets have; raise `DataError` if there is none."""
        for dataset in datasets.values():
            if dataset.energy_kind is None:
                raise DataError(
                    f"{dataset.path}: the file does not say whether its energies are adsorption or total "
                    "energies; set data.energy_kind."
                )
        kinds = {name: dataset.energy_kind for name, dataset in datasets.items()}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise DataError(f"the datasets mix kinds of energy ({listed}); use one kind.")
        return str(kinds["train"])

    def _report(self) -> None:
        sizes = ", ".join(f"{name} {len(dataset)}" for name, dataset in self.datasets.items())
        if self._forces_only is not None:
            sizes += f", forces only {len(self.training) - len(self.datasets['train'])}"
        references = self.normalizers["linear_references"]
        targets = self.training_targets(references)
        mean, std = targets["energy"]
        after = "" if references is None else " after linear references"
        has_forces = self._training_sample.forces_rms is not None
        forces = f"forces ± {targets['forces'][1]:.4f} eV/Å" if has_forces else "no forces"
        rank_zero_info(
            f"Data: {sizes} records, {self.energy_kind} energies; training targets: energy "
            f"{mean:.4f} ± {std:.4f} eV{after}, {forces}"
        )

    def _loader(self, name: str, shuffle: bool) -> DataLoader:
        dataset = self.training if name == "train" else self.datasets[name]
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        counted = world_size > 1 or self.max_atoms is not None or self.max_edges is not None
        sampler = BalancedBatchSampler(
            len(dataset),
            self.batch_size,
            natoms=dataset.natoms if counted else None,
            max_atoms=self.max_atoms,
            max_edges=self.max_edges,
            max_neighbors=self.max_neighbors,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        if shuffle and world_size > 1:
            imbalance = sampler.imbalance()
            rank_zero_info(
                f"Batches: {len(sampler)} steps on {world_size} processes; the most loaded has "
                f"{100 * imbalance.mean:.2f} % more atoms than the mean (worst step "
                f"{100 * imbalance.worst:.1f} %)"
            )
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=partial(collate, like=dataset[0]),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def check_same_fields(dataset: OC20Lmdb, expected: frozenset[str], needs_energy: bool = False) -> None:
    """Check before training that all records have the same fields.

    All records of a dataset of at most 50,000 are checked, of a larger one as many, evenly spread.

    Args:
        dataset: the records.
        expected: names of the fields.
        needs_energy: require the field `energy`.

    Raises:
        DataError: a record has other fields, or no energy; file, key and field are named.
    """
    for index in np.unique(
        np.linspace(0, len(dataset) - 1, min(_MAX_CHECKED_FIELDS, len(dataset))).astype(np.int64)
    ).tolist():
        fields = dataset.fields(index)
        if needs_energy and "energy" not in fields:
            raise DataError(f"{dataset.describe(index)}: the record has no energy to train on.")
        if fields != expected:
            missing, extra = sorted(expected - fields), sorted(fields - expected)
            difference = f"has no {' and no '.join(missing)}" if missing else f"has {' and '.join(extra)}"
            others = "which the first one has" if missing else "which the first one has not"
            raise DataError(
                f"{dataset.describe(index)}: the record {difference}, {others}; keep records with other "
                "fields in a dataset of their own."
            )


def collate(structures: list[Data], like: Data | None = None) -> Batch:
    """Join structures to one batch.

    Args:
        structures: the structures.
        like: a structure with the fields that all must have; the first one by default.

    Raises:
        DataError: only some of them have a field, such as forces.
    """
    first = structures[0] if like is None else like
    fields = set(first.keys())
    for data in structures:
        different = sorted(fields ^ set(data.keys()))
        if different:
            names = [f"{item.sid}/{item.fid}" for item in (first, data)]
            raise DataError(
                f"of the records {' and '.join(names)} (sid/fid) only one has {', '.join(different)}; "
                "keep records with other fields in a dataset of their own."
            )
    return Batch.from_data_list(structures)


def load_linear_references(path: str | None) -> torch.Tensor | None:
    """Read the array `coeff [100]` (eV per atomic number) of an `.npz` file; None for None.

    Raises:
        DataError: there is no such array of finite numbers.
        OSError: the file is missing or unreadable.
    """
    if path is None:
        return None
    (coefficients,) = read_npz(path, ["coeff"])
    is_table = coefficients.dtype.kind in "iuf" and coefficients.shape == (NUM_ELEMENTS,)
    if not is_table or not np.isfinite(coefficients).all():
        raise DataError(f"{path}: 'coeff' must hold {NUM_ELEMENTS} finite numbers, one per atomic number.")
    return torch.from_numpy(coefficients.astype(np.float64))
