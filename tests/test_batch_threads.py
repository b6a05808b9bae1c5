"""Several batches at a time: order, errors, threads, and the bits of one thread."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch_geometric.data import Batch

from datasets_oc20 import OC20Lmdb
from datasets_oc20.datamodule import collate
from equiformer2.batch_threads import map_all, map_batches, side_by_side
from equiformer2.errors import InputError
from equiformer2.inference import Predictor

DATA = Path(__file__).parent / "fixtures" / "datasets_oc20" / "s2ef_val_20.lmdb"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor("oc20_small")


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    data = OC20Lmdb(DATA, "adsorption")
    return [collate([data[index] for index in range(first, first + 2)]) for first in range(0, 8, 2)]


def test_results_have_the_order_of_the_batches(two_threads: None) -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0.0)
        return number

    assert list(map_batches(slow_at_first, iter(range(9)))) == list(range(9))


def test_every_batch_has_one_thread_and_a_single_one_has_all(two_threads: None) -> None:
    def threads(_: int) -> tuple[int, str]:
        time.sleep(0.02)
        return torch.get_num_threads(), threading.current_thread().name

    several = map_all(threads, range(6))
    assert {count for count, _ in several} == {1}
    assert len({name for _, name in several}) == 2
    assert map_all(threads, [0]) == [(2, threading.current_thread().name)]
    assert torch.get_num_threads() == 2


def test_the_first_error_is_raised_and_later_batches_are_not_begun(two_threads: None) -> None:
    begun = []

    def fail(number: int) -> int:
        begun.append(number)
        time.sleep(0.01)
        raise InputError(f"number {number}")

    with pytest.raises(InputError, match="number 0"):
        list(map_batches(fail, iter(range(100))))
    assert len(begun) < 10
    assert torch.get_num_threads() == 2


def test_batches_are_read_a_few_ahead(two_threads: None) -> None:
    read = []

    def source() -> Iterator[int]:
        for number in range(50):
            read.append(number)
            yield number

    results = map_batches(lambda number: number, source())
    next(results)
    assert len(read) <= 6
    results.close()
    assert torch.get_num_threads() == 2


def test_modes_of_autograd_are_those_of_the_caller(two_threads: None) -> None:
    def needs_gradients(_: int) -> bool:
        return torch.is_grad_enabled()

    assert all(map_all(needs_gradients, range(3)))
    with torch.no_grad():
        assert not any(map_all(needs_gradients, range(3)))


@pytest.mark.parametrize("setting", ["precision", "matmul", "device"])
def test_changed_settings_of_the_process_mean_one_at_a_time(setting: str, two_threads: None) -> None:
    assert side_by_side(4) == 2
    try:
        if setting == "precision":
            torch.set_default_dtype(torch.float64)
        if setting == "matmul":
            torch.set_float32_matmul_precision("medium")
        assert side_by_side(4, "meta" if setting == "device" else "cpu") == 1
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


def test_predictions_have_the_bits_of_one_thread(
    predictor: Predictor, batches: list[Batch], two_threads: None
) -> None:
    torch.set_num_threads(1)
    alone = [out for _, out in predictor.predict_batches(batches)]
    torch.set_num_threads(2)
    fresh = Predictor("oc20_small")  # both threads fold its weights at the same time
    for network in (predictor, fresh):
        together = list(network.predict_batches(batches, len(batches)))
        assert all(batch is given for (batch, _), given in zip(together, batches, strict=True))
        for (_, out), expected in zip(together, alone, strict=True):
            assert all(torch.equal(out[name], expected[name]) for name in ("energy", "forces"))


def test_a_fork_has_threads_of_its_own(two_threads: None) -> None:
    map_all(abs, range(4))
    child = os.fork()
    if child == 0:
        os._exit(0 if map_all(abs, [-1, -2, -3]) == [1, 2, 3] else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the forked process waits for threads that it does not have")
