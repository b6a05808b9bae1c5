"""The console command: help, statuses, names of options, scripts, JSON, completion, lazy imports."""

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT, run_command, run_script_file

from equiformer2.cli import options as shared
from equiformer2.cli.adsorption import GAS_SOURCES
from equiformer2.cli.main import COMMANDS, command_parser
from equiformer2.cli.training import MAIN_KEYS

SCRIPTS = {
    "train": "train",
    "evaluate": "evaluate",
    "predict": "predict",
    "relax": "relax",
    "adsorption_energy": "adsorption energy",
    "relax_is2re": "relax-is2re",
    "make_submission": "submission",
    "download_oc20": "data download",
    "preprocess_oc20": "data preprocess",
    "inspect_data": "data inspect",
    "convert_lmdb": "data convert",
    "fit_references": "data references",
    "import_checkpoint": "checkpoint import",
    "prune": "prune",
    "demo": "demo",
    "report_run": "report",
}
"""Scripts that stay for ever -> their commands."""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_options_with_dashes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: equiformer2 {command}" in text
    names = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text))
    keys = {"--print_config", *(f"--{key}" for key in MAIN_KEYS)}  # of training configurations
    assert not {name for name in names - keys if "_" in name}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    parser = command_parser(command)[1]
    bare = [action.dest for action in parser._actions if not action.help]
    # "of …" and single words name no thing.
    vague = [
        action.dest for action in parser._actions if re.match(r"(of|where|what|whose) ", action.help or "")
    ]
    assert not bare + vague


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train"}))
def test_an_unknown_option_has_status_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command, "--no-such-option") == 2
    assert f"equiformer2 {command}: error:" in capsys.readouterr().err


def test_unknown_keys_commands_and_names_have_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("train", "--model.num_layer=4") == 2
    assert "model.num_layers" in capsys.readouterr().err
    assert run_command("trian") == 2
    assert "'train'" in capsys.readouterr().err
    assert run_command("data") == 2
    assert run_command("predict", "--checkpoint", "nothing", "--data", "a", "--out", "b.npz") == 2
    assert "oc20_small" in capsys.readouterr().err
    assert run_command("train", "--config", "nothing") == 2
    assert "oc20_2m_83M" in capsys.readouterr().err


def test_scripts_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    files = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"benchmark"}
    assert files == set(SCRIPTS)
    for script, command in SCRIPTS.items():
        assert run_script_file(script, "--help") == 0
        of_script = capsys.readouterr().out
        assert run_command(command, "--help") == 0
        assert of_script == capsys.readouterr().out
        tree = ast.parse((ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 3  # docstring, import, call


def test_old_spellings_are_accepted_and_named_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    arguments = ("--checkpoint", "oc20_small", "--data", tmp_path / "none.lmdb", "--out", tmp_path / "a.npz")
    for _ in range(2):
        assert run_command("predict", *arguments, "--max_atoms", 100) == 2
    assert caplog.text.count("--max_atoms is now spelt --max-atoms") == 1
    parser = command_parser("predict")[1]
    assert parser.parse_args([*map(str, arguments), "--batch_size=3"]).batch_size == 3


def test_json_is_one_document_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ROOT / "tests/fixtures/datasets_oc20/s2ef_val_20.lmdb"
    out = tmp_path / "predictions.npz"
    assert run_command("predict", "--checkpoint", "oc20_small", "--data", data, "--out", out, "--json") == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["schema"] == "predict/1"
    assert record["structures"] == 20
    assert len(record["checkpoint_sha256"]) == 64
    assert {"command", "commit", "seconds"} <= set(record)
    assert str(out) in printed.err


def test_help_version_and_completion_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from equiformer2.cli.main import main\n"
        "import equiformer2\n"
        "statuses = [main(words) for words in (['--help'], ['--version'], ['train', '--help'], "
        "['completion', 'bash'])]\n"
        "heavy = {'torch', 'numpy', 'ase', 'pytorch_lightning', 'jsonargparse', 'wandb'} & set(sys.modules)\n"
        "print(statuses, heavy, file=sys.stderr)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[0, 0, 0, 0] set()"
    assert time.monotonic() - start < 10  # a tenth of a second for each, on a machine that is not busy
    assert "--checkpoint" in done.stdout


def test_completion_knows_commands_and_files() -> None:
    bash = subprocess.run(
        [sys.executable, "-m", "equiformer2", "completion", "bash"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    request = "COMP_WORDS=(equiformer2 prune '') COMP_CWORD=2; _shtab_equiformer2; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", f"{bash}\n{request}"], capture_output=True, text=True, check=True)
    assert {"report", "plan", "route", "pareto"} <= set(done.stdout.split())


def test_choices_are_those_of_the_packages() -> None:
    from datasets_oc20.convert import WRITERS
    from equiformer2.adsorption import references
    from equiformer2.inference.relaxation import OPTIMIZERS
    from equiformer2.training.configuration import build_parser

    assert tuple(OPTIMIZERS) == shared.OPTIMIZERS
    assert GAS_SOURCES == references.GAS_SOURCES
    to = next(action for action in command_parser("data convert")[1]._actions if action.dest == "to")
    assert sorted(WRITERS) == sorted(to.choices or ())
    assert set(MAIN_KEYS) <= {action.dest for action in build_parser()._actions}


def test_a_missing_file_is_named_without_an_error_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, name in (("relax", "none.traj"), ("adsorption volcano", "none.csv")):
        model = ["--checkpoint", "oc20_small"] if command == "relax" else []
        assert run_command(command, tmp_path / name, *model, "--out", tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert name in told
        assert "Errno" not in told
