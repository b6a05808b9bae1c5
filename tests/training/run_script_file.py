"""Scripts run in the test's own process."""

import importlib.util
import sys
from pathlib import Path

import pytest

from equiformer2.script import run_script

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    """The exit status of `scripts/SCRIPT.py ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as stopped:
        run_script(module.main)
    return int(stopped.value.code or 0)
