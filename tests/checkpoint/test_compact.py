"""Files whose weights are stored in fewer bytes than float32."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from search_helpers import save_tiny, slabs, tiny_model
from torch_geometric.data import Batch

from equiformer2.checkpoint import load_checkpoint, save_checkpoint
from equiformer2.checkpoint.checkpoint import import_checkpoint, read_contents
from equiformer2.checkpoint.native import FORMAT_VERSION
from equiformer2.errors import InputError
from equiformer2.model.folding import read
from equiformer2.model.parametrizations import stored_kinds
from equiformer2.pruning.precision.compact import compact_network, write_compact
from equiformer2.pruning.precision.plan import PrecisionPlan

CONV = "blocks.0.ga.so2_conv_1.fc_m0"
MIXED = {CONV: "int8", "blocks.1.ga.proj": "int4", "blocks.1.ffn.so3_linear_1": "bf16"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compact")
    dense = load_checkpoint(save_tiny(folder / "dense.pt"))
    plan = PrecisionPlan(tuple(MIXED.items()))
    path = folder / "small.pt"
    write_compact(path, dense, compact_network(dense.model, plan), plan)
    return path


def test_a_file_gives_the_network_back(file: Path):
    loaded = load_checkpoint(file)
    assert stored_kinds(loaded.model) == {f"{name}.weight": kind for name, kind in MIXED.items()}
    expected = compact_network(tiny_model(), PrecisionPlan(tuple(MIXED.items())))
    batch = Batch.from_data_list(slabs())
    with torch.no_grad():
        assert torch.equal(loaded.model(batch)["forces"], expected(batch)["forces"])
    assert loaded.available_weights == ("averaged",)


def test_a_file_loads_in_a_fresh_process_without_code_in_it(file: Path):
    code = (
        "import sys, torch; content = torch.load(sys.argv[1], weights_only=True); "
        "print(content['format_version'], sorted(content['stored']['averaged'])); "
        "from equiformer2 import load_checkpoint; print(load_checkpoint(sys.argv[1]).energy_kind)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "3"
    assert f"{CONV}.weight" in done.stdout
    assert done.stdout.split()[-1] == "adsorption"


def test_other_readers_see_plain_weights(file: Path, tmp_path: Path):
    contents = read_contents(file)
    weights = contents.weights["averaged"]
    model = load_checkpoint(file).model
    assert weights[f"{CONV}.weight"].dtype == torch.float32
    assert torch.equal(weights[f"{CONV}.weight"], read(model.get_submodule(CONV)))
    assert len(dict(weights)) == len(weights) == len(tiny_model().state_dict())
    # Copies keep the stored form, and a plain checkpoint of the network has its answers.
    import_checkpoint(file, tmp_path / "copy.pt", weights="averaged")
    assert stored_kinds(load_checkpoint(tmp_path / "copy.pt").model) == stored_kinds(model)
    loaded = load_checkpoint(file)
    save_checkpoint(
        tmp_path / "plain.pt",
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=loaded.normalizers,
        energy_kind=loaded.energy_kind,
        provenance={},
    )
    plain = load_checkpoint(tmp_path / "plain.pt").model
    assert stored_kinds(plain) == {}
    assert torch.equal(plain.get_submodule(CONV).weight, weights[f"{CONV}.weight"])


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        content["stored"]["averaged"][f"{CONV}.weight"].update(values)

    return apply


def rename_kind(content: dict[str, Any]) -> None:
    content["stored"]["raw"] = content["stored"].pop("averaged")


def twice(content: dict[str, Any]) -> None:
    content["weights"]["averaged"][f"{CONV}.weight"] = torch.zeros(3)


def not_finite(content: dict[str, Any]) -> None:
    content["stored"]["averaged"][f"{CONV}.weight"]["tensors"][1][0] = float("nan")


def unknown_weight(content: dict[str, Any]) -> None:
    stored = content["stored"]["averaged"]
    stored["nothing.weight"] = stored.pop(f"{CONV}.weight")


BROKEN = {
    "unknown kind": (change(kind="int3"), "int3"),
    "kind is no text": (change(kind=4), "must be a text"),
    "other kind": (change(kind="int4"), "needs tensors of the form"),
    "other shape": (change(shape=[2, 3]), "needs tensors of the form"),
    "huge shape": (change(shape=[1 << 40, 3]), "must be at most"),
    "shape is no list": (change(shape="x"), "must be a list"),
    "no tensors": (change(tensors=[1, 2]), "needs tensors of the form"),
    "unknown key": (change(more=1), "nothing else"),
    "kind of weights": (rename_kind, "of a kind that it does not hold"),
    "twice": (twice, "is there twice"),
    "not finite": (not_finite, "not finite"),
    "unknown weight": (unknown_weight, "do not fit"),
    "no dictionary": (lambda content: content.update(stored=[1]), "must be a dictionary"),
    "older version": (lambda content: content.update(format_version=1), "unknown parts"),
    "newer version": (lambda content: content.update(format_version=FORMAT_VERSION + 1), "newer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_refused(file: Path, tmp_path: Path, name: str):
    damage, message = BROKEN[name]
    content = torch.load(file, weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "broken.pt")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "broken.pt")
