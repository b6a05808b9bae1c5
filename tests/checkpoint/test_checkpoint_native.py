"""The native file: everything survives the round trip, and what does not fit is refused."""

import logging
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import PROVENANCE, random_state, small_config, some_normalizers, structure

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.native import FORMAT_VERSION
from equiformer2.errors import InputError


@pytest.fixture(scope="module")
def model() -> EquiformerV2:
    return EquiformerV2(small_config()).eval()


def save(path: Path, model: EquiformerV2, **changes: Any) -> Path:
    values = {
        "model": model,
        "raw_state": random_state(model, 1),
        "averaged_state": random_state(model, 2),
        "normalizers": some_normalizers(),
        "energy_kind": "adsorption",
        "provenance": PROVENANCE,
    }
    save_checkpoint(path, **(values | changes))
    return path


@pytest.fixture
def native(tmp_path: Path, model: EquiformerV2) -> Path:
    return save(tmp_path / "model.pt", model)


def edit(path: Path, **changes: Any) -> Path:
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("weights", "seed"), [("raw", 1), ("averaged", 2), (None, 2)])
def test_round_trip_gives_the_same_bits(
    native: Path, model: EquiformerV2, weights: str | None, seed: int
) -> None:
    model.load_state_dict(random_state(model, seed))
    checkpoint = load_checkpoint(native, weights=weights)
    batch = structure()
    with torch.no_grad():
        expected, found = model(batch), checkpoint.model(batch)
    assert torch.equal(found["energy"], expected["energy"])
    assert torch.equal(found["forces"], expected["forces"])
    assert checkpoint.weights == ("raw" if seed == 1 else "averaged")
    assert checkpoint.available_weights == ("raw", "averaged")
    assert checkpoint.config == small_config()
    assert checkpoint.normalizers == some_normalizers()
    assert checkpoint.energy_kind == "adsorption"
    assert checkpoint.source_format == "equiformer2"
    assert checkpoint.provenance.items() >= PROVENANCE.items()
    assert "equiformer2" in checkpoint.provenance["written_with"]
    assert not checkpoint.model.training


def test_total_energies_keep_their_references(tmp_path: Path, model: EquiformerV2) -> None:
    references = torch.randn(100, dtype=torch.float64)
    normalizers = Normalizers(Normalizer(0.25, 1.5), Normalizer(0.0, 1.5), references)
    path = save(tmp_path / "total.pt", model, normalizers=normalizers, energy_kind="total")
    checkpoint = load_checkpoint(path)
    assert checkpoint.normalizers == normalizers
    assert checkpoint.energy_kind == "total"


def test_the_log_says_which_weights_are_used(native: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="equiformer2")
    load_checkpoint(native)
    assert "using the averaged weights; the file also holds the raw weights (weights='raw')" in caplog.text
    caplog.clear()
    load_checkpoint(native, weights="raw")
    assert "using the raw weights; the file also holds the averaged weights" in caplog.text


def test_without_an_average_the_raw_weights_are_used(tmp_path: Path, model: EquiformerV2) -> None:
    path = save(tmp_path / "raw.pt", model, averaged_state=None)
    assert load_checkpoint(path).weights == "raw"
    with pytest.raises(InputError, match=r"raw\.pt .*averaged.* raw"):
        load_checkpoint(path, weights="averaged")
    with pytest.raises(InputError, match="'raw' or 'averaged', not 'ema'"):
        load_checkpoint(path, weights="ema")


def test_loading_leaves_the_random_numbers_alone(native: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(native)
    assert torch.equal(torch.rand(3), expected)


def test_the_file_is_plain_and_holds_no_more_than_the_weights(native: Path, model: EquiformerV2) -> None:
    content = torch.load(native, weights_only=True)
    assert content["units"] == {"energy": "eV", "forces": "eV/Å", "length": "Å"}
    size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert native.stat().st_size < 2 * size + 200_000


def test_a_view_does_not_drag_its_storage_along(tmp_path: Path, model: EquiformerV2) -> None:
    flat = torch.zeros(5_000_000)
    state, start = {}, 0
    for name, tensor in model.state_dict().items():
        state[name] = flat[start : start + tensor.numel()].view_as(tensor)
        start += tensor.numel()
    path = save(tmp_path / "views.pt", model, raw_state=state, averaged_state=None)
    assert path.stat().st_size < 2_000_000


def test_a_newer_format_is_refused(native: Path) -> None:
    newer = FORMAT_VERSION + 1
    edit(native, format_version=newer, something_new=1)
    with pytest.raises(InputError, match=rf"model\.pt .*version {newer}, .* update"):
        load_checkpoint(native)


@pytest.mark.parametrize("version", [0, "1", None, True])
def test_a_version_that_is_no_number_is_refused(native: Path, version: object) -> None:
    with pytest.raises(InputError, match="no valid format_version"):
        load_checkpoint(edit(native, format_version=version))


def test_parts_are_checked(native: Path) -> None:
    content = torch.load(native, weights_only=True)
    del content["normalizers"]
    content["extra"] = 1
    torch.save(content, native)
    with pytest.raises(InputError, match=r"\['normalizers'\].*\['extra'\]"):
        load_checkpoint(native)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": {"energy": "Ha"}}, "is in units"),
        ({"energy_kind": "formation"}, "energy_kind must be 'adsorption' or 'total', not 'formation'"),
        ({"weights": {}}, "holds no weights"),
        ({"weights": {"best": {}}}, "unknown kind: 'best'"),
        ({"weights": {"raw": {"norm": 1.0}}}, "raw weights are not a dictionary of tensors"),
        ({"weights": [1]}, "weights must be a dictionary, not list"),
        ({"normalizers": {"energy": {}}}, "normalizers must hold"),
        ({"model_config": {"num_layer": 3}}, "unknown model key 'num_layer'; did you mean 'num_layers'"),
        ({"model_config": {"num_layers": "three"}}, "model configuration is not valid"),
        ({"model_config": {"lmax": 2, "mmax": 3}}, "mmax"),
    ],
)
def test_malformed_parts_are_named(native: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(edit(native, **changes))
    assert str(native) in str(caught.value)


def test_weights_of_another_shape_are_listed(native: Path, model: EquiformerV2) -> None:
    state = random_state(model, 1)
    name = "blocks.0.ffn.so3_linear_1.weight"
    state["sphere_embedding.weight"] = state["sphere_embedding.weight"].t()
    state[name] = state[name][:2]
    with pytest.raises(InputError, match="2 of another shape") as caught:
        load_checkpoint(edit(native, weights={"raw": state}))
    assert "sphere_embedding.weight (8, 90) instead of (90, 8)" in str(caught.value)
    assert name in str(caught.value)


def test_missing_unknown_and_broken_weights_are_listed(native: Path, model: EquiformerV2) -> None:
    state = random_state(model, 1)
    state["norm.extra"] = state.pop("sphere_embedding.weight")
    state["blocks.0.ga.alpha_dot"][0, 0] = float("nan")
    state["blocks.0.ga.proj.bias"] = state["blocks.0.ga.proj.bias"].long()
    with pytest.raises(InputError) as caught:
        load_checkpoint(edit(native, weights={"averaged": state}))
    for part in (
        "averaged weights",
        "1 missing: sphere_embedding.weight",
        "1 unknown: norm.extra",
        "1 not finite: blocks.0.ga.alpha_dot",
        "1 not floating point: blocks.0.ga.proj.bias",
    ):
        assert part in str(caught.value)


def test_weights_of_another_model_are_refused_before_writing(tmp_path: Path, model: EquiformerV2) -> None:
    path = tmp_path / "wrong.pt"
    other = EquiformerV2(small_config(num_layers=2))
    with pytest.raises(InputError, match=r"wrong\.pt \(raw weights\): .* unknown: blocks\.1\."):
        save(path, model, raw_state=other.state_dict())
    with pytest.raises(InputError, match="no weights to save"):
        save(path, model, raw_state=None, averaged_state=None)
    with pytest.raises(InputError, match="'adsorption' or 'total'"):
        save(path, model, energy_kind="relaxed")
    assert not any(tmp_path.iterdir())


def test_asking_for_the_other_kind_of_energy_is_an_error(native: Path) -> None:
    assert load_checkpoint(native, energy_kind="adsorption").energy_kind == "adsorption"
    with pytest.raises(InputError, match=r"adsorption energies.* total energies"):
        load_checkpoint(native, energy_kind="total")


def test_a_full_disk_leaves_the_old_file(native: Path, model: EquiformerV2) -> None:
    before = native.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"model\.pt|too large"):
            save(native, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert native.read_bytes() == before
    assert [path.name for path in native.parent.iterdir()] == ["model.pt"]


def test_a_missing_folder_is_an_os_error(tmp_path: Path, model: EquiformerV2) -> None:
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "nowhere" / "model.pt", model)
