"""The private attributes of Lightning that this program uses are there, and do what it takes them to do."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl

ROOT = Path(__file__).parents[2]
#: Owner, as an attribute path from a trainer, and the private names used of it.
USED = (
    ("", "_signal_connector"),
    ("", "_checkpoint_connector"),
    ("_signal_connector", "register_signal_handlers"),
    ("_checkpoint_connector", "_restore_modules_and_callbacks"),
    ("_checkpoint_connector", "restore_training_state"),
    ("_checkpoint_connector", "_loaded_checkpoint"),
    ("fit_loop", "_should_accumulate"),
    ("fit_loop", "_data_fetcher"),
    ("fit_loop.epoch_loop", "_broadcast_sigterm_tensor"),
    ("fit_loop.epoch_loop", "_should_check_val_fx"),
    ("fit_loop.epoch_loop.batch_progress.current", "ready"),
)
#: Private attributes of other objects, which look the same to the search below.
OTHERS = {"_foreach_lerp_", "_actions", "_fields", "_replace"}


@pytest.fixture(scope="module")
def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize(("owner", "name"), USED, ids=lambda value: value or "trainer")
def test_a_private_attribute_is_there(owner: str, name: str, trainer: pl.Trainer) -> None:
    found: object = trainer
    for part in filter(None, owner.split(".")):
        found = getattr(found, part)
    assert hasattr(found, name), f"Lightning {pl.__version__} has no {owner}.{name}"


def test_the_list_is_complete() -> None:
    """Every private attribute of something else than `self` in the training code stands above."""
    known = {name for _, name in USED} | OTHERS
    for path in sorted((ROOT / "equiformer2" / "training").glob("*.py")):
        for owner, name in re.findall(r"(\w+)\.(_[a-z]\w*)", path.read_text(encoding="utf-8")):
            assert owner in ("self", "cls") or name in known, f"{path.name}: {owner}.{name}"


def test_the_version_is_bounded() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bound = re.search(r'"pytorch-lightning>=2\.4,.*<2\.(\d+)"', text)
    assert bound is not None
    assert tuple(map(int, pl.__version__.split(".")[:2])) < (2, int(bound[1]))
