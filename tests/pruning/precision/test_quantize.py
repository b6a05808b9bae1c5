"""From a checkpoint and data to a compact checkpoint: search, limits, bad input."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_helpers import save_tiny, slab, slabs, tiny_model, write_lmdb
from torch_geometric.data import Data

from equiformer2 import EquiformerV2Calculator
from equiformer2.checkpoint import load_checkpoint, save_checkpoint
from equiformer2.cli.main import main
from equiformer2.errors import InputError
from equiformer2.inference import Predictor
from equiformer2.model.folding import resident_bytes
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.precision.compact import FileSize
from equiformer2.pruning.precision.measure import errors
from equiformer2.pruning.precision.plan import PrecisionPlan
from equiformer2.pruning.precision.quantize_request import QuantizeRequest, quantize
from equiformer2.pruning.precision.sensitivity import estimated

#: Large enough that numbers, not names, make up most of the file.
WIDE = {"sphere_channels": 32, "attn_hidden_channels": 32, "ffn_hidden_channels": 48, "edge_channels": 32}
WIDE |= {"num_layers": 1, "max_num_elements": 90, "attn_value_channels": 16}
KEYS = {"bytes", "bytes_float32", "resident_bytes", "modules", "force_mae_ratio", "force_change_eV_A", "ms"}
KEYS |= {"equivariance_ratio"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize")
    save_tiny(path / "dense.pt", **WIDE)
    write_lmdb(path / "data.lmdb", [*slabs(), slab("d", "Ag")])
    return path


def request(folder: Path, **changes: Any) -> QuantizeRequest:
    values = {
        "checkpoint": str(folder / "dense.pt"),
        "data": (str(folder / "data.lmdb"),),
        "structures": 3,
        "held_out": 2,
        "keep": (0.8,),
        "trials": 6,
    }
    return QuantizeRequest(**{**values, **changes})


@pytest.fixture(scope="module")
def searched(folder: Path) -> dict[str, Any]:
    pytest.importorskip("optuna")
    return quantize(
        request(folder, targets=("bytes=0.3",)), folder / "small.pt", folder / "state.json", progress=False
    )


def test_a_search_meets_its_limit_on_disk_and_in_memory(folder: Path, searched: dict[str, Any]):
    assert set(searched) >= KEYS
    assert searched["bytes"] == (folder / "small.pt").stat().st_size
    assert searched["bytes"] <= 0.3 * searched["bytes_float32"]
    assert searched["missed"] == []
    assert set(searched["modules"].values()) <= {4, 8, 16, 32}
    predictor = Predictor(str(folder / "small.pt"))
    predictor.predict(slabs()[0])
    assert searched["resident_bytes"] == resident_bytes(predictor.model)
    assert searched["resident_bytes"] < 0.4 * searched["resident_bytes_dense"]


def test_the_best_trial_is_at_least_as_good_as_the_allocations_it_starts_from(searched: dict[str, Any]):
    trials = searched["search"]["trials"]
    assert [trial["source"] for trial in trials[:3]] == ["sensitivity", "information", "sensitivity"]
    assert len(trials) == 6
    assert trials[searched["search"]["best"]]["loss"] == min(trial["loss"] for trial in trials)
    sensitivity = searched["search"]["sensitivity"]
    assert all(row["bf16"] <= row["int4"] for row in sensitivity.values())
    assert all(row["float32"] == 0 for row in sensitivity.values())
    bits = searched["search"]["information_bits"]
    assert set(bits) == set(sensitivity)
    assert max(bits.values()) > 0


def test_equivariance_is_as_before(searched: dict[str, Any]):
    assert searched["equivariance_ratio"] <= 1.1


def test_a_killed_search_ends_as_one_that_was_not(folder: Path, searched: dict[str, Any], tmp_path: Path):
    state = json.loads((folder / "state.json").read_text())
    damaged = {**state, "trials": [{**state["trials"][0], "base": 7}], "count": 1}
    (tmp_path / "bad.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError, match="a trial of another network"):
        quantize(request(folder, targets=("bytes=0.3",)), tmp_path / "a.pt", tmp_path / "bad.json")
    state["trials"] = state["trials"][:4]
    part = list(state["sensitivity"])[1]
    del state["sensitivity"][part]["int4"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    again = quantize(
        request(folder, targets=("bytes=0.3",)), tmp_path / "a.pt", tmp_path / "state.json", progress=False
    )
    assert again["search"]["trials"] == searched["search"]["trials"]
    assert again["plan"] == searched["plan"]
    with pytest.raises(InputError, match="another search: seed was 0 and is 1"):
        quantize(request(folder, targets=("bytes=0.3",), seed=1), tmp_path / "a.pt", tmp_path / "state.json")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="no state of a search"):
        quantize(request(folder, targets=("bytes=0.3",)), tmp_path / "a.pt", tmp_path / "state.json")


def test_a_search_without_time_ends_with_its_first_trial(folder: Path, tmp_path: Path):
    pytest.importorskip("optuna")
    found = quantize(
        request(folder, targets=("bytes=0.3",), keep=(), max_minutes=1e-9), tmp_path / "a.pt", progress=False
    )
    search = found["search"]
    assert (len(search["trials"]), search["trials_planned"]) == (1, 6)
    parts = search["sensitivity"]
    assert search["sensitivities_estimated"] == 3 * len(parts)
    assert all(0 == row["float32"] < row["bf16"] < row["int8"] < row["int4"] for row in parts.values())
    assert found["missed"] == []
    load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_label_counts_whatever_it_is_beside(folder: Path, batch_size: int):
    dense = Predictor(folder / "dense.pt")
    compact = Predictor(replace(dense.checkpoint, model=tiny_model(1, **WIDE)))
    labelled = slabs()[:2]
    for structure in labelled:
        structure.forces = torch.sin(structure.pos).float()
    expected = errors(compact, dense, labelled, 2)
    found = errors(compact, dense, [labelled[0], slab("d", "Ag"), labelled[1]], batch_size)
    assert expected["force_mae_eV_A"] > 0
    for name in ("force_mae_eV_A", "force_mae_dense_eV_A", "force_mae_ratio"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert errors(compact, dense, slabs(), 2)["force_mae_eV_A"] is None


def test_losses_that_were_not_measured_are_estimated():
    measured = {"a": {"float32": 0.0, "int4": 2.0, "int8": 0.3}, "b": {"int4": 4.0}, "c": {"int4": 6.0}}
    found = estimated(measured)
    assert found["a"] == {"float32": 0.0, "int4": 2.0, "int8": 0.3, "bf16": pytest.approx(0.3 * 127 / 256)}
    assert (found["b"]["int8"], found["c"]["int4"]) == (0.3, 6.0)


def test_the_file_serves_the_calculator_and_training(folder: Path, searched: dict[str, Any]):
    from ase.build import add_adsorbate, fcc111

    from equiformer2.training.start import load_start

    atoms = fcc111("Cu", (1, 1, 3), vacuum=6.0, periodic=True)
    add_adsorbate(atoms, "O", 1.3, "fcc")
    atoms.calc = EquiformerV2Calculator(str(folder / "small.pt"))
    assert abs(atoms.get_forces()).max() > 0
    start = load_checkpoint(folder / "small.pt")
    from equiformer2 import EquiformerV2

    model = EquiformerV2(start.config)
    load_start(model, start, "small.pt")
    batch = Predictor(start)._collated(slabs())
    with torch.no_grad():
        assert torch.allclose(model(batch)["forces"], start.model(batch)["forces"], atol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("precision", ["int4", "int8", "bf16"])
def test_uniform_precisions_need_no_search(folder: Path, tmp_path: Path, precision: str):
    found = quantize(request(folder, uniform=precision), tmp_path / "small.pt", progress=False)
    dense = load_checkpoint(folder / "dense.pt")
    size = FileSize(dense, dense.model)
    estimate = size.of(dict.fromkeys(size.matrices, precision))
    assert 0.9 * estimate < found["bytes"] <= estimate
    bits = {"bf16": 16, "int8": 8, "int4": 4}[precision]
    assert set(found["modules"].values()) == {bits}
    assert found["bytes"] < {16: 0.65, 8: 0.45, 4: 0.35}[bits] * found["bytes_float32"]
    assert found["search"] is None


def test_a_call_that_ends_while_it_measures_leaves_no_file(folder: Path, tmp_path: Path):
    """So that the same command goes on, without --overwrite."""
    checkpoint = load_checkpoint(folder / "dense.pt")
    with torch.no_grad():
        checkpoint.model.energy_block.so3_linear_2.weight.fill_(3e38)
    save_checkpoint(
        tmp_path / "dense.pt",
        model=checkpoint.model,
        raw_state=checkpoint.model.state_dict(),
        averaged_state=None,
        normalizers=checkpoint.normalizers,
        energy_kind=checkpoint.energy_kind,
        provenance={},
    )
    wanted = request(folder, checkpoint=str(tmp_path / "dense.pt"), uniform="int4", recover=2)
    with pytest.raises(InputError, match="non-finite energy"):
        quantize(wanted, tmp_path / "small.pt", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense.pt"]


def test_a_plan_with_pruning_is_applied(folder: Path, tmp_path: Path):
    config = load_checkpoint(folder / "dense.pt").config
    pruning = PruningPlan.keep_all(config).with_block(0, heads=(1,), mmax=1)
    plan = PrecisionPlan((("blocks.0.ga.so2_conv_1.fc_m0", "int8"),), pruning)
    found = quantize(request(folder, plan=plan), tmp_path / "small.pt", progress=False)
    loaded = load_checkpoint(tmp_path / "small.pt")
    assert loaded.config == pruning.applied_to(config)
    assert found["modules"]["blocks.0.ga.so2_conv_1.fc_m0"] == 8
    assert found["plan"]["pruning"] == pruning.to_dict()


def test_a_limit_of_time_prunes(folder: Path, tmp_path: Path):
    pytest.importorskip("optuna")
    # Times of so small a network are noise: the limit is one that every pruned network meets.
    found = quantize(request(folder, targets=("latency=0.99",), trials=1), tmp_path / "s.pt", progress=False)
    assert "pruning" in found["plan"]
    ratios = found["search"]["ms_ratios"]
    assert min(ratios) > 0
    assert max(ratios) <= 0.99


def test_the_command_writes_its_record(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "small.pt"
    arguments = ["prune", "quantize", "--checkpoint", str(folder / "dense.pt"), "--data"]
    arguments += [str(folder / "data.lmdb"), "--out", str(out), "--uniform", "int8", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path(f"{out}.json").read_text())
    assert printed["schema"] == "prune-quantize/1"
    assert set(printed) >= KEYS | {"command", "commit", "checkpoint_sha256", "seconds"}
    assert main([*arguments, "--overwrite", "--keep", "0.9"]) == 2
    assert "--keep has no meaning without --target" in capsys.readouterr().err


def held(data: Data) -> Data:
    data.fixed = torch.ones_like(data.fixed)
    return data


def test_bad_input_is_refused_in_a_sentence(folder: Path, tmp_path: Path):
    pytest.importorskip("optuna")
    write_lmdb(tmp_path / "held.lmdb", [held(data) for data in slabs()])
    save_tiny(tmp_path / "swiglu.pt", use_swiglu_s2_act=True)
    quantize(request(folder, uniform="int8"), tmp_path / "int8.pt", progress=False)
    out = tmp_path / "out.pt"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"targets": ("bytes=0.001",)}, "what stays float32 takes .* give at least bytes="),
        ({"targets": ("bytes=1.4",)}, "not understood"),
        ({"targets": ("macs=0.4",)}, "not understood"),
        ({"targets": ("bytes=0.4", "bytes=0.5")}, "not understood"),
        ({"targets": ("latency=0.000001",)}, "cannot be met: no choice takes less than .* of the time"),
        ({"uniform": "int8", "data": (str(tmp_path / "held.lmdb"),)}, "has a free atom"),
        ({"uniform": "int8", "checkpoint": str(tmp_path / "int8.pt")}, "in fewer bits already"),
        ({"plan": PrecisionPlan((("softmax", "int8"),))}, "stay float32"),
        ({"targets": ("latency=0.5",), "checkpoint": str(tmp_path / "swiglu.pt")}, "cannot be pruned"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            quantize(request(folder, **changes), out, progress=False)
    assert not out.exists()
    for changes, message in [
        ({}, "give one of"),
        ({"uniform": "int8", "targets": ("bytes=0.4",)}, "give one of"),
        ({"uniform": "int3"}, "no precision"),
        ({"uniform": "int8", "keep": (1.5,)}, "above 0 and below 1"),
        ({"uniform": "int8", "trials": 0}, "at least 1"),
        ({"uniform": "int8", "minutes": 0.0}, "more than 0"),
        ({"uniform": "int8", "max_minutes": -1.0}, "more than 0"),
        ({"uniform": "int8", "structures": 0}, "at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            request(folder, **changes)


def test_commands_that_prune_refuse_a_compact_file_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    compact, out = tmp_path / "int4.pt", tmp_path / "out"
    quantize(request(folder, uniform="int4"), compact, progress=False)
    PruningPlan.keep_all(load_checkpoint(compact).config).save(tmp_path / "plan.json")
    data = ["--data", str(folder / "data.lmdb")]
    for name, more in (
        ("plan", [*data, "--target", "macs=0.5", "--out", f"{out}.json"]),
        ("apply", ["--plan", str(tmp_path / "plan.json"), "--out", f"{out}.pt"]),
        ("report", [*data, "--out", str(out)]),
        ("grid", [*data, "--out", f"{out}.pt"]),
    ):
        assert main(["prune", name, "--checkpoint", str(compact), *more]) == 2
        assert "int4.pt holds" in (told := capsys.readouterr().err)
        assert "in fewer bits already" in told
    assert not list(tmp_path.glob("out*"))


def test_a_search_without_optuna_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="pip install"):
        quantize(request(folder, targets=("bytes=0.4",)), tmp_path / "small.pt")


@pytest.mark.slow
def test_networks_without_rules_for_pruning_get_precisions(tmp_path: Path, folder: Path):
    pytest.importorskip("optuna")
    save_tiny(tmp_path / "v3.pt", use_swiglu_s2_act=True, **WIDE)
    found = quantize(
        request(folder, checkpoint=str(tmp_path / "v3.pt"), targets=("bytes=0.4",), trials=2),
        tmp_path / "small.pt",
        progress=False,
    )
    assert found["bytes"] <= 0.4 * found["bytes_float32"]
    assert "pruning" not in found["plan"]


@pytest.mark.slow
def test_a_compact_file_loads_in_a_fresh_process(folder: Path, searched: dict[str, Any]):
    code = (
        "import sys; from equiformer2 import load_checkpoint; print(load_checkpoint(sys.argv[1]).energy_kind)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "small.pt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "adsorption"
    assert tiny_model(**WIDE).config == load_checkpoint(folder / "dense.pt").config
