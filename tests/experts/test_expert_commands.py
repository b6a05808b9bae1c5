"""The commands experts prune and experts retrieve: keys, files, what they print, and refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import add_adsorbate, fcc111
from ase.io import write
from model_helpers import random_model, small_config
from search_helpers import slab as small_slab
from search_helpers import write_lmdb
from tiny_experts import contents_of, network

from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.expert_files import read_experts, write_experts
from equiformer2.checkpoint.samples import Samples
from equiformer2.cli.main import main
from equiformer2.experts.composition import composition_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of experts, structures of one of its tasks, and a structure file."""
    folder = tmp_path_factory.mktemp("experts")
    structures = {"dft": [small_slab("a"), small_slab("b", "Pt")], "teacher": [small_slab("c", "Ni")]}
    samples = {name: Samples.from_structures(own) for name, own in structures.items()}
    contents = contents_of(network(num_experts=8), samples=samples)
    for name, info in contents.tasks.items():
        info.composition.copy_(torch.cat([composition_of(each, 90) for each in structures[name]]).mean(0))
    write_experts(folder / "joint.safetensors", contents)
    write_lmdb(folder / "data.lmdb", [*structures["dft"], small_slab("d", "Ni")])
    atoms = fcc111("Pt", (1, 1, 3), vacuum=6.0)
    add_adsorbate(atoms, "O", 1.2, "fcc")
    write(folder / "slab.traj", atoms)
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any], str]:
    """Status, JSON document and messages of a command."""
    status = main([*map(str, words), "--json"])
    out, messages = capsys.readouterr()
    return status, json.loads(out) if out else {}, messages


def test_prune_and_use_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint, half = folder / "joint.safetensors", folder / "half.safetensors"
    words = ["experts", "prune", "--checkpoint", joint, "--task", "dft", "--keep", "0.5", "--out", half]
    status, record, told = run(capsys, *words)
    assert status == 0
    assert (record["schema"], len(record["tcess"]), len(record["kept"])) == ("experts-prune/1", 8, 4)
    assert record["weight_change"] <= record["bound"]
    assert record["measured_change_eV_A"] > 0
    assert told.index("bound of the change") < told.index("measured change on 2 structures")
    assert json.loads((folder / "half.safetensors.json").read_text()) == record
    assert half.stat().st_size == record["bytes"] < 0.7 * record["bytes_before"]
    status, _, told = run(capsys, *words)
    assert (status, "exists already" in told) == (2, True)
    status, record, told = run(capsys, *words, "--data", folder / "data.lmdb", "--overwrite")
    assert (status, record["systems"], [each["sid"] for each in record["flagged"]]) == (0, 3, ["d"])
    assert record["force_mae_eV_A"] > 0
    assert "Ni not among the training data of dft" in told
    merged = folder / "half.pt"
    assert main(["experts", "merge", "--checkpoint", str(half), "--task", "dft", "--out", str(merged)]) == 0
    assert load_checkpoint(merged).energy_kind == "adsorption"


def test_retrieve_reads_less_than_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint, out = folder / "joint.safetensors", folder / "slab.pt"
    words = ["experts", "retrieve", "--checkpoint", joint, "--structure", folder / "slab.traj"]
    status, record, told = run(capsys, *words, "--out", out)
    assert (status, record["schema"]) == (0, "experts-retrieve/1")
    assert (record["task"], record["energy_kind"], len(record["experts"])) == ("dft", "adsorption", 4)
    assert record["bytes_read"] < record["bytes"] == joint.stat().st_size
    assert "bytes read" in told
    provenance = load_checkpoint(out).provenance["merged_from"]
    assert (provenance["task"], provenance["experts"]) == ("dft", record["experts"])
    status, few, _ = run(capsys, *words, "--keep", "0.125", "--per", "composition", "--tasks", "d*")
    assert (status, len(few["experts"]), few["bytes_read"] < record["bytes_read"]) == (0, 1, True)


def plain_checkpoint(path: Path) -> Path:
    model = random_model(small_config(num_layers=1))
    save_checkpoint(
        path,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(Normalizer(0.0, 1.0), Normalizer(0.0, 1.0)),
        energy_kind="adsorption",
        provenance={},
    )
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prune --task pbe --out {0}/o", "no task 'pbe': its tasks are dft, teacher"),
        ("prune --task dft --keep 0.01 --out {0}/o", "keeps none"),
        ("prune --task dft --keep 1 --out {0}/o", "keeps all"),
        ("prune --task dft --keep 4 --out {0}/o", "above 0 and below 1"),
        ("prune --task dft --top 0 --out {0}/o", "at least 1"),
        ("prune --task dft --method random --seed 99999999999999999999 --out {0}/o", "whole number of 0 to"),
        ("prune --task dft --data {0}/data.lmdb --seed -1 --out {0}/o", "whole number of 0 to"),
        ("prune --task dft --structures 0 --data {0}/data.lmdb --out {0}/o", "at least 1"),
        ("prune --task dft --data {0}/none.lmdb --out {0}/o", "none.lmdb"),
        ("prune --task dft --out {0}/joint.safetensors --overwrite", "is read as input"),
        ("retrieve --structure {0}/slab.traj --tasks pbe", "no task 'pbe'"),
        ("retrieve --structure {0}/gold.traj", "no task of .* was trained on Au"),
        ("retrieve --structure {0}/none.traj", "none.traj"),
        ("retrieve --structure {0}/slab.traj --out {0}/slab.traj --overwrite", "is read as input"),
    ],
)
def test_bad_input_gets_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    write(folder / "gold.traj", fcc111("Au", (1, 1, 3), vacuum=6.0))
    kind, *rest = words.format(folder).split()
    status, _, told = run(capsys, "experts", kind, "--checkpoint", folder / "joint.safetensors", *rest)
    assert status == 2
    assert re.search(message, told)
    assert "Traceback" not in told
    assert not (folder / "o").exists()


def test_a_plain_checkpoint_is_no_file_of_experts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = plain_checkpoint(folder / "plain.pt")
    for words in (
        ("prune", "--task", "dft", "--out", folder / "o"),
        ("retrieve", "--structure", folder / "slab.traj"),
    ):
        status, _, told = run(capsys, "experts", words[0], "--checkpoint", plain, *words[1:])
        assert status == 2
        assert "is no file of an expert network" in told
    assert len(read_experts(folder / "joint.safetensors").experts) == 8
