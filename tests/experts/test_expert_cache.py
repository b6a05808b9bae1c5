"""The cache of merged networks: what is kept within the limit, and what is given up."""

import threading
import time

import pytest

from equiformer2.errors import InputError
from equiformer2.experts.cache import BoundedCache


def test_the_one_used_longest_ago_is_given_up() -> None:
    cache: BoundedCache[str] = BoundedCache(10)
    for key in "abc":
        assert cache.get(key, lambda key=key: (key * 2, 4)) == key * 2
    assert ("a" in cache, "b" in cache, "c" in cache) == (False, True, True)
    cache.get("b", lambda: ("never made", 4))
    cache.get("d", lambda: ("dd", 4))
    assert ("b" in cache, "c" in cache, cache.bytes) == (True, False, 8)
    assert (cache.hits, cache.misses) == (1, 4)
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_value_larger_than_the_limit_is_made_and_not_kept() -> None:
    cache: BoundedCache[str] = BoundedCache(10)
    cache.get("small", lambda: ("s", 6))
    assert cache.get("large", lambda: ("l", 11)) == "l"
    assert "large" not in cache
    assert "small" in cache
    nothing: BoundedCache[str] = BoundedCache(0)
    assert [nothing.get("a", lambda: ("v", 1)) for _ in range(2)] == ["v", "v"]
    assert nothing.misses == 2


def test_a_value_that_fails_to_be_made_changes_nothing() -> None:
    cache: BoundedCache[str] = BoundedCache(10)
    cache.get("a", lambda: ("a", 6))
    with pytest.raises(ZeroDivisionError):
        cache.get("b", lambda: (str(1 // 0), 6))
    assert cache.get("a", lambda: ("made again", 6)) == "a"


def test_threads_make_a_value_once() -> None:
    cache: BoundedCache[int] = BoundedCache(10)
    made = []

    def make() -> tuple[int, int]:
        time.sleep(0.02)
        made.append(1)
        return 7, 1

    threads = [threading.Thread(target=lambda: cache.get("key", make)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


@pytest.mark.parametrize("limit", [-1, 1.5, True])
def test_limits_that_are_none(limit: object) -> None:
    with pytest.raises(InputError, match="limit of the cache"):
        BoundedCache(limit)  # type: ignore[arg-type]
