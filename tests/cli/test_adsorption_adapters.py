"""Adsorption commands with `--adapter`: the fine-tuned network answers, and every record names its file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import run_command
from tiny_adapters import make_adapter, network, write_network

from equiformer2.checkpoint.adapter_files import write_adapter
from equiformer2.checkpoint.tensor_files import sha256

SLAB = ["--slab", "Cu111", "--size", "2x2x2", "--free-layers", "1", "--adsorbate", "*CO"]
#: Everything has converged as it was placed.
AT_ONCE = ["--fmax", "1e6", "--placements", "3", "--no-stop", "--gas", "H=-3.5,O=-7.2,C=-7.3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    model = network(max_radius=5.0)
    write_network(folder / "base.pt", model)
    write_adapter(folder / "adapter.pt", make_adapter(model))
    write_adapter(folder / "other.pt", make_adapter(network(seed=3, max_radius=5.0)))
    return folder


@pytest.fixture(scope="module")
def searched(files: Path) -> Path:
    given = ["--checkpoint", files / "base.pt", "--adapter", files / "adapter.pt"]
    assert run_command("adsorption search", *given, *SLAB, *AT_ONCE, "--out", files / "found") == 0
    return files / "found"


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_a_search_names_its_adapter_and_is_verified_with_it(
    files: Path, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"adapter": str(files / "adapter.pt"), "adapter_sha256": sha256(files / "adapter.pt")}
    for name in ("search.json", "card.json"):
        model = read(searched / name)["model"]
        assert {key: model[key] for key in own} == own
    assert own["adapter_sha256"] in (searched / "report.html").read_text()
    assert read(searched / "search.json")["energy_kind"] == "total"  # the adapter's, not the network's
    capsys.readouterr()
    assert run_command("adsorption verify", searched / "card.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapter_sha256"]["ok"]
    # Without it, the folder is another model's.
    plain = ["--checkpoint", files / "base.pt", *SLAB, "--fmax", "1e6", "--out", searched, "--overwrite"]
    shutil.copytree(searched, tmp_path / "copy")
    plain[-2] = tmp_path / "copy"
    assert run_command("adsorption search", *plain, "--placements", "1") == 0
    assert "adapter" not in read(tmp_path / "copy" / "search.json")["model"]


def test_what_follows_from_a_search_uses_its_adapter(
    files: Path, searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = read(searched / "settings.json")["model"]
    assert run_command("adsorption free-energy", searched, "--overwrite") in (0, 3)
    assert read(searched / "free_energy.json")["model"] == known
    moved = shutil.move(files / "adapter.pt", files / "moved.pt")
    try:
        capsys.readouterr()
        assert run_command("adsorption free-energy", searched, "--overwrite") == 2
        assert "adapter.pt" in capsys.readouterr().err
        given = ["--adapter", files / "moved.pt", "--overwrite"]
        assert run_command("adsorption free-energy", searched, *given) in (0, 3)
        placements = read(searched / "search.json")["placements"]
        first, last, *_ = (row["id"] for row in placements if row["basin"] == row["id"])
        ends = ["--start", first, "--end", last, "--images", "1", "--steps", "1"]
        assert run_command("adsorption neb", searched, *ends, *given) in (0, 3)
        card = read(searched / "neb" / f"{first}-{last}" / "card.json")
        assert card["model"]["adapter_sha256"] == sha256(files / "moved.pt")
        assert card["model"]["familiarity"]["sentences"]
    finally:
        shutil.move(moved, files / "adapter.pt")
    for wrong, message in (
        (["--adapter", files / "other.pt"], "adapter of another network"),
        (["--adapter", files / "base.pt"], "checkpoint of a whole network"),
        (["--adapter", files / "adapter.pt", "--calculator", "emt"], "no meaning with --calculator"),
    ):
        assert run_command("adsorption free-energy", searched, "--overwrite", *wrong) == 2
        assert message in capsys.readouterr().err


def test_energies_and_coverages_take_an_adapter(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--checkpoint", files / "base.pt", "--adapter", files / "adapter.pt", *SLAB, *AT_ONCE[-2:]]
    sums = sha256(files / "adapter.pt")
    options = ["--counts", "1", "--placements", "1", "--fmax", "1e6", "--out", tmp_path / "c"]
    assert run_command("adsorption coverage", *given, *options) == 0
    assert read(tmp_path / "c" / "coverage.json")["model"]["adapter_sha256"] == sums
    assert run_command("adsorption energy", *given, "--fmax", "1e6", "--out", tmp_path / "e") == 0
    assert read(tmp_path / "e" / "adsorption_energy.json")["model"]["adapter_sha256"] == sums
    capsys.readouterr()
    committee = ["--checkpoint", files / "base.pt", files / "base.pt", *given[2:]]
    assert run_command("adsorption search", *committee, "--out", tmp_path / "s") == 2
    assert "an adapter belongs to one network" in capsys.readouterr().err
    assert run_command("adsorption search", "--calculator", "emt", *given[2:], "--out", tmp_path / "s") == 2
    assert "--adapter has no meaning with --calculator" in capsys.readouterr().err
