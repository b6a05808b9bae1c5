"""Executes the code blocks of a page, in order and in one namespace, in a folder of its own."""

import contextlib
import importlib
import io
import logging
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from pages import ROOT, Block

#: What pages name by relative paths. Linked: nothing may be written into them.
LINKED = ("benchmarks", "configs", "data", "docs", "models", "scripts", "studies", "tests")
#: Programs of hidden set-up and of pages that are executed as they are, without a shell.
PROGRAMS = ("cp", "ln", "mkdir", "rm")
_TAIL = 3000
_STATUS = re.compile(r"# exit status (\d+)")
_PROGRAM = re.compile(r"(scripts|benchmarks|studies)/\w+\.py")


class BlockError(AssertionError):
    """A block that fails, with the page and the line."""


def run_page(page_blocks: list[Block], folder: Path, slow: bool) -> None:
    """Execute the blocks that are not marked `not run`; those marked `slow` only if `slow`."""
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    namespace: dict[str, Any] = {"__name__": "__page__"}
    with _own_process_state(folder):
        for block in page_blocks:
            if block.not_run is not None or (block.slow is not None and not slow):
                continue
            if block.language == "python":
                _run_python(block, namespace)
            elif block.language == "bash":
                for line, command, status in commands(block):
                    _run_command(f"{block.page}:{line}", command, status)
            elif block.language == "yaml":
                check_yaml(block)


def commands(block: Block) -> list[tuple[int, list[str], int]]:
    """(line, words, exit status) of every command: lines that end in a backslash joined, comments removed.

    A comment `# exit status N` behind a command tells the reader, and the test, that it ends so.
    """
    found, words, start = [], "", block.line
    for line, text in enumerate(block.code.split("\n"), block.line):
        start = start if words else line
        words += text.removesuffix("\\") + " "
        if not text.endswith("\\"):
            split = shlex.split(words, comments=True)
            told = _STATUS.search(words)
            found += [(start, split, int(told[1]) if told else 0)] if split else []
            words = ""
    return found


def _run_python(block: Block, namespace: dict[str, Any]) -> None:
    # Empty lines in front give tracebacks the lines of the page.
    code = "\n" * (block.line - 1) + block.code
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, block.page, "exec"), namespace)
    except BaseException as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == block.page
        ]
        at = lines[-1] if lines else getattr(error, "lineno", None) or block.line
        raise BlockError(f"{block.page}:{at}: {type(error).__name__}: {error}") from error


def _run_command(place: str, words: list[str], expected: int) -> None:
    told = f"{place}: {shlex.join(words)}"
    if words[0] in PROGRAMS:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        status, output = done.returncode, done.stderr
    elif words[0] == "python" and len(words) > 1 and words[1].startswith("scripts/"):
        status, output = run_script_file(words[1], words[2:])
    elif words[0] == "equiformer2":
        status, output = run_console_command(words[1:])
    else:
        raise BlockError(
            f"{told}\nis no command that the tests run: mark the block `<!-- not run: reason -->`"
        )
    if status != expected:
        raise BlockError(f"{told}\nends with status {status}:\n{output[-_TAIL:]}")


def run_script_file(name: str, arguments: list[str]) -> tuple[int, str]:
    """(exit status, what it printed) of a script that is executed in this process."""
    output = io.StringIO()
    argv, path, status = sys.argv, list(sys.path), 0
    try:
        sys.argv, sys.path = [name, *arguments], [str(ROOT / "scripts"), *sys.path]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        status = 1
        output.write(traceback.format_exc())
    finally:
        sys.argv, sys.path = argv, path
    return status, output.getvalue()


def run_console_command(words: list[str]) -> tuple[int, str]:
    """(exit status, what it printed) of `equiformer2 …`, executed in this process."""
    from equiformer2.cli.main import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = main([*words, "--debug"])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, output.getvalue()


def check_yaml(block: Block) -> None:
    """Raise `BlockError` unless the block is valid YAML whose keys and values a run takes."""
    from equiformer2.errors import InputError
    from equiformer2.training.configuration import parse

    content = yaml.safe_load(block.code)
    file = Path(f"block_{block.line}.yaml")
    file.write_text(block.code, encoding="utf-8")
    try:
        parse(["--config", str(ROOT / "configs/oc20_small.yaml"), "--config", str(file)])
    except InputError as error:
        raise BlockError(f"{block.place}: {error} (in {list(content)})") from error


def check_without_running(block: Block, options: dict[str, str]) -> None:
    """Raise `BlockError` if a block that is not run could not work: syntax, imports, scripts, options.

    Args:
        options: the help of scripts seen before, kept for the next block.
    """
    if block.language == "python":
        _check_imports(block)
    elif block.language == "bash":
        for line, words, _ in commands(block):
            words = [_file_of_module(word) for word in words]
            names = [place for place, word in enumerate(words) if _PROGRAM.fullmatch(word)]
            if words[0] == "equiformer2":
                _check_console_options(f"{block.page}:{line}", words[1:], options)
            elif names:
                _check_options(f"{block.page}:{line}", words[names[0] :], options)


def _file_of_module(word: str) -> str:
    """`benchmarks/x.py` for the word `benchmarks.x` of `python -m benchmarks.x`; other words as they are."""
    return f"{word.replace('.', '/')}.py" if re.fullmatch(r"(benchmarks|studies)\.\w+", word) else word


def _check_imports(block: Block) -> None:
    import ast

    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            if missing:
                raise BlockError(
                    f"{block.page}:{block.line + node.lineno - 1}: {node.module} has no {missing}"
                )


def _check_options(place: str, words: list[str], seen: dict[str, str]) -> None:
    name, arguments = words[0], words[1:]
    if name.endswith("prune.py") and arguments and not arguments[0].startswith("-"):
        name = f"{name} {arguments[0]}"
    if name not in seen:
        flag = "--help-all" if name == "scripts/train.py" else "--help"
        status, seen[name] = run_script_file(name.split()[0], [*name.split()[1:], flag])
        if status != 0:
            raise BlockError(f"{place}: {name} --help ends with status {status}:\n{seen[name][-_TAIL:]}")
    _check_given(place, name, arguments, seen[name])


def _check_console_options(place: str, words: list[str], seen: dict[str, str]) -> None:
    """The same for `equiformer2 …`; words before the first option that is a command or a file."""
    from equiformer2.cli.main import COMMANDS

    name = next((name for count in (2, 1) if (name := " ".join(words[:count])) in COMMANDS), None)
    if name is None:
        raise BlockError(f"{place}: equiformer2 has no command {' '.join(words[:2])}")
    if name not in seen:
        status, seen[name] = run_console_command([*name.split(), "--help"])
        if name == "train":
            seen[name] += run_console_command(["train", "--help-all"])[1]
        if status != 0:
            raise BlockError(f"{place}: {name} --help ends with status {status}:\n{seen[name][-_TAIL:]}")
    _check_given(place, f"equiformer2 {name}", words[len(name.split()) :], seen[name])


def _check_given(place: str, name: str, arguments: list[str], text: str) -> None:
    given = [word.split("=")[0] for word in arguments if word.startswith("--")]
    missing = [word for word in given if not re.search(rf"{re.escape(word)}(?![\w-])", text)]
    if missing:
        raise BlockError(f"{place}: {name} has no option {', '.join(missing)}")


@contextlib.contextmanager
def _own_process_state(folder: Path) -> Iterator[None]:
    """Work in `folder`; afterwards the process is as it was."""
    place, environment = Path.cwd(), dict(os.environ)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    exact = torch.are_deterministic_algorithms_enabled()
    loggers = [
        logging.getLogger(name) for name in (None, "equiformer2", "datasets_oc20", "pytorch_lightning")
    ]
    logs = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(exact)
        for logger, level, handlers in logs:
            logger.setLevel(level)
            logger.handlers[:] = handlers
        for number, handler in signals.items():
            signal.signal(number, handler)
