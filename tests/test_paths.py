"""Functions that users call take a path as text, too."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets_oc20.catalogue import find_splits
from datasets_oc20.extxyz import read_frames
from datasets_oc20.partial_file import md5_sum
from datasets_oc20.preprocess import PreprocessOptions, preprocess
from datasets_oc20.raw_release import list_raw_files, read_adsorbate_names, read_references
from equiformer2.pruning.calibration_data import raw_files, read_structures
from equiformer2.training.submission_checks import submission_problems

ROOT = Path(__file__).parents[1]
TRAJECTORIES = ROOT / "data/oc20_trajs"
#: Machinery that only the packages themselves call, with paths that they have made.
INTERNAL = {
    *("callbacks", "cli", "folder", "guard", "record", "relaxation_folder", "relaxation_log", "resume"),
    *("resume_state", "search_state", "router_state", "pareto", "tensor_files"),
    *("cache", "library", "atomic", "convert", "disk_space", "locking", "shards", "structure_files"),
}

CALLS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("references", read_references, "data/oc20_trajs"),
    ("raw files", lambda path: list_raw_files(path, True, None, ()), "data/oc20_trajs"),
    ("frames", lambda path: next(read_frames(path)).pos.tolist(), "data/oc20_trajs/random1447590.extxyz.xz"),
    ("sum", md5_sum, "data/oc20_trajs/system.txt"),
    ("splits", lambda path: find_splits(path, ["system"]), "data/oc20_trajs"),
    ("raw structures", raw_files, "data/oc20_trajs"),
    (
        "structures",
        lambda path: len(read_structures([path], 1, 0)),
        "data/oc20_trajs/random1447590.extxyz.xz",
    ),
    ("adsorbates", read_adsorbate_names, "data/oc20_trajs/system.txt"),
    ("submission", submission_problems, "data/oc20_trajs/system.txt"),
]


def answer(function: Callable[[Any], Any], path: Any) -> Any:
    """Result of a call, or the sentence of a refusal."""
    try:
        return function(path)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("function", "name"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS])
def test_text_is_as_good_as_a_path(function: Callable[[Any], Any], name: str) -> None:
    assert answer(function, str(ROOT / name)) == answer(function, ROOT / name)


def test_a_folder_given_as_text_is_preprocessed(tmp_path: Path) -> None:
    out = str(tmp_path / "out.lmdb")
    report = preprocess(str(TRAJECTORIES), out, PreprocessOptions(frames=1), systems=["random1447590"])
    assert report.written == 1
    assert Path(out).is_file()


def bare_paths(source: str) -> list[str]:
    """`line: function(argument)` of public functions that take nothing but a `Path`."""
    found = []
    for node in ast.parse(source).body:
        functions = [node] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        for function in functions:
            if function.name.startswith("_") and function.name != "__init__":
                continue
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            found += [
                f"{function.lineno}: {function.name}({argument.arg})"
                for argument in arguments
                if argument.annotation is not None
                and ast.unparse(argument.annotation) in ("Path", "Path | None")
            ]
    return found


@pytest.mark.parametrize("package", ["equiformer2", "datasets_oc20"])
def test_no_public_function_wants_a_path_object(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{argument}"
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.stem not in INTERNAL
        for argument in bare_paths(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_bare_paths_are_found() -> None:
    assert bare_paths("def read(path: Path, n: int): ...\ndef _own(path: Path): ...") == ["1: read(path)"]
