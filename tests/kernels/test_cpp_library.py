"""The C++ library: made once, loaded again, refused with a reason."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from equiformer2.kernels.cpu import library


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache of its own, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._library.cache_clear()
    yield
    library._library.cache_clear()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler was found" in str(library.why_missing())


def test_with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo 1;; *) echo "out of space" >&2; exit 1;; esac\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "could not compile the CPU kernels: out of space" in str(library.why_missing())
    assert not list((tmp_path / "equiformer2").iterdir())


def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = []

    def compile_(path: str, openmp: Path | None, target: Path) -> None:
        compiled.append(target)
        source = tmp_path / "empty.c"
        source.write_text("void gather_rotate_float32(void) {}\n")
        subprocess.run([path, "-x", "c", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)

    if library.compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(library, "_compile", compile_)
    assert library.why_missing() is None
    library._library.cache_clear()
    assert library.why_missing() is None
    assert len(compiled) == 1
    assert compiled[0].parent == tmp_path / "equiformer2"
    assert library.function("gather_rotate", torch.float32) is not None


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "equiformer2"
    folder.mkdir()
    folder.chmod(0o777)
    assert library._cache_folder() != folder


@pytest.mark.parametrize(
    ("device", "dtype", "lmax", "reason"),
    [
        ("cuda", torch.float32, 6, "run on a CPU, not on cuda"),
        ("cpu", torch.float16, 6, "not float16"),
        ("cpu", torch.float32, 9, "up to lmax = 8, not 9"),
    ],
)
def test_what_it_does_not_do(device: str, dtype: torch.dtype, lmax: int, reason: str) -> None:
    assert reason in str(library.why_not(torch.device(device), dtype, lmax))
