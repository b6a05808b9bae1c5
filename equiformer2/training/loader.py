"""A training loader that can start in the middle of an epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader, Sampler
from torch_geometric.data import Batch

from datasets_oc20 import OC20DataModule
from equiformer2.training.losses import with_terms
from equiformer2.training.stopping import leave_signals_to_the_parent


class _FromBatch(Sampler[list[int]]):
    """The batches of `batches` from number `first` on; `first` holds for one pass."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.first = 0

    def __iter__(self) -> Iterator[list[int]]:
        first, self.first = self.first, 0
        yield from self.batches.batches_from(first)

    def __len__(self) -> int:
        return len(self.batches)


class ResumableLoader:
    """A `DataLoader` that Lightning can save and restore in mid-epoch.

    Its batch sampler must be a function of (seed, epoch), so that the number of batches already served
    says everything; those are skipped without being read.

    Args:
        loader: with a `BalancedBatchSampler`.
        plan: gives the micro-batches of an optimizer step and the batches of an epoch; asked in every epoch.
    """

    def __init__(self, loader: DataLoader, plan: Callable[[], tuple[int, int]]) -> None:
        self._plan = plan
        self.batch_sampler = loader.batch_sampler
        self._offset = _FromBatch(loader.batch_sampler)
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=self._offset,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            persistent_workers=loader.persistent_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=leave_signals_to_the_parent,
            # Of its own: a loader draws from the global generator whenever it is started.
            generator=torch.Generator(),
        )
        self._first = self._served = 0

    def __len__(self) -> int:
        return len(self._offset)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: the sampler's epoch, set by Lightning after iter(), is read at the first batch.
        first, self._first = self._first, 0
        self._served = self._offset.first = first
        together, last = self._plan()
        batches = self._loader if together == 1 else with_terms(self._loader, first, together, last)
        for batch in batches:
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches served of the current epoch."""
        return {"served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass begin where the saved one was; after a finished pass comes a whole one."""
        self._first = self._served = state["served"] if state["served"] < len(self) else 0


class ResumableDataModule(OC20DataModule):
    """`OC20DataModule` whose training loader can start in the middle of an epoch."""

    def train_dataloader(self) -> ResumableLoader:  # type: ignore[override]
        """Shuffled by (seed, epoch)."""
        loader = ResumableLoader(super().train_dataloader(), self._plan)
        self._validate_within(len(loader))
        return loader

    def _validate_within(self, batches: int) -> None:
        """Validate once an epoch where the interval is longer, which Lightning would refuse.

        So configurations made for millions of structures begin on a hundred.
        """
        trainer = self.trainer
        if trainer is None or trainer.check_val_every_n_epoch is None:
            return
        interval, limit = trainer.val_check_interval, trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if type(interval) is int and interval > batches > 0:
            rank_zero_info(
                f"trainer.val_check_interval is {interval} and an epoch has {batches} batches: validating "
                "after every epoch"
            )
            trainer.val_check_interval = batches

    def _plan(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches)

    def val_dataloader(self) -> DataLoader:
        """Make the validation loader, in stored order."""
        loader = super().val_dataloader()
        loader.worker_init_fn = leave_signals_to_the_parent
        loader.generator = torch.Generator()
        return loader

    @property
    def normalizers_are_given(self) -> bool:
        """True where the configuration states the normalizers instead of leaving them to the data."""
        return self._given_normalizers is not None
