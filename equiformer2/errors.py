"""The one exception for wrong input."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence that names it and says what to do.

    Attributes:
        structure: where one structure of a batch is wrong, its index in the batch, else None.
    """

    def __init__(self, message: str, structure: int | None = None) -> None:
        super().__init__(message)
        self.structure = structure


@contextmanager
def naming_structures(batch: Any) -> Iterator[None]:
    """Inside, an `InputError` about one structure of `batch` also says its `sid` and `fid`.

    Args:
        batch: B structures; where it has no `sid` (B texts) or `fid` `[B]`, errors stay as they are.
    """
    try:
        yield
    except InputError as error:
        sids, fids = getattr(batch, "sid", None), getattr(batch, "fid", None)
        if error.structure is None or not sids or fids is None or not sids[error.structure]:
            raise
        name = f"{sids[error.structure]}/{int(fids[error.structure])}"
        raise InputError(f"structure {name} (sid/fid): {error}", error.structure) from error
