"""Loss curves of both implementations: what they share, the numbers, and the reference's process."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from benchmarks import compare_loss_curves
from benchmarks.compare_loss_curves import DifferentLossError, make_curves, parse_arguments, train_reference
from benchmarks.loss_curve_data import CurveSettings, prepare, reference_config
from benchmarks.loss_curve_report import DEPARTURES, draw, markdown, summarize
from benchmarks.worker_session import BenchmarkError
from datasets_oc20 import OC20Lmdb
from datasets_oc20.safe_pickle import load_inert
from equiformer2.checkpoint import load_checkpoint
from equiformer2.checkpoint.reference import config_from_reference
from equiformer2.errors import InputError
from equiformer2.graph import radius_graph
from equiformer2.training.configuration import parse

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "fixtures" / "datasets_oc20" / "s2ef_val_20.lmdb"
STUDY = str(ROOT / "configs" / "study.yaml")


def settings(folder: Path, **changes: Any) -> CurveSettings:
    return replace(CurveSettings(str(DATA), STUDY, steps=2, batch_size=2, folder=folder), **changes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurveSettings, dict[str, Any]]:
    wish = settings(tmp_path_factory.mktemp("curves"))
    return wish, prepare(wish)


def test_stored_edges_are_those_of_our_graph(prepared: tuple[CurveSettings, dict[str, Any]]) -> None:
    wish, _ = prepared
    dataset = OC20Lmdb(str(wish.folder / "structures.lmdb"), "adsorption")
    assert len(dataset) == 4
    stored = reference_record(wish.folder / "structures.lmdb", 1)
    data = dataset[1]
    graph = radius_graph(
        data.pos, data.cell, data.pbc, data.natoms, max_radius=8.0, max_neighbors=12, strict=True
    )
    assert torch.equal(stored.edge_index, graph.edge_index)
    # fairchem's `get_pbc_distances`.
    vectors = stored.pos[stored.edge_index[0]] - stored.pos[stored.edge_index[1]]
    vectors = vectors + stored.cell_offsets.float() @ stored.cell[0]
    torch.testing.assert_close(vectors, graph.vectors.float(), rtol=0, atol=1e-5)
    assert stored.y.item() == data.energy.float().item()
    assert torch.equal(stored.force, data.forces)


def reference_record(path: Path, key: int) -> Data:
    """A record with its edges, which our reader drops."""
    with lmdb.open(str(path), subdir=False, lock=False, readonly=True) as environment:
        record = load_inert(environment.begin().get(str(key).encode()))
    fields = record.state["_store"].state["_mapping"]
    return Data(**{name: value.tensor() for name, value in fields.items() if hasattr(value, "tensor")})


def test_order_is_that_of_our_training(prepared: tuple[CurveSettings, dict[str, Any]]) -> None:
    from equiformer2.training.loader import ResumableDataModule

    wish, shared = prepared
    module = ResumableDataModule(**parse(wish.words("equiformer2")).data)
    module.setup()
    served = [sid for batch in module.train_dataloader().batch_sampler for sid in batch]
    assert served == shared["order"]


def test_both_get_the_same_network_weights_and_settings(
    prepared: tuple[CurveSettings, dict[str, Any]],
) -> None:
    wish, shared = prepared
    config = parse(wish.words("equiformer2"))
    assert config_from_reference(shared["model"]) == config.model
    assert not shared["model"]["otf_graph"]
    initial = load_checkpoint(wish.folder / "weights.pt")
    assert initial.model.config == config.model
    assert shared["normalizers"]["energy"] == [
        initial.normalizers.energy.mean,
        initial.normalizers.energy.std,
    ]
    assert shared["optim"]["lr"] == config.optim.lr
    assert not config.task.ema_warmup
    assert config.model.alpha_drop == config.model.drop_path_rate == config.model.proj_drop == 0.0


def test_curves_of_other_settings_are_not_mixed(prepared: tuple[CurveSettings, dict[str, Any]]) -> None:
    wish, shared = prepared
    assert prepare(wish) == shared
    with pytest.raises(InputError, match="--work"):
        prepare(replace(wish, steps=3))


def test_too_few_structures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lower --steps"):
        prepare(settings(tmp_path, steps=100))


def test_networks_that_the_reference_lacks_are_refused(tmp_path: Path) -> None:
    model = parse(settings(tmp_path).words("equiformer2")).model
    with pytest.raises(InputError, match="switches"):
        reference_config(replace(model, smooth_cutoff=True))


def executable(folder: Path, *rows: dict[str, Any], status: int = 0) -> str:
    """A program in place of the reference's Python that prints rows and ends."""
    path = folder / "python"
    lines = [f"import sys, json\nfor row in {rows!r}: print(json.dumps(row), flush=True)"]
    lines.append(f"print('Traceback\\nValueError: no such thing', file=sys.stderr)\nsys.exit({status})")
    path.write_text(f"#!{sys.executable}\n" + "\n".join(lines))
    path.chmod(0o755)
    return str(path)


STEP = {"loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "energy_mae": 3.0}
END = {"checkpoint": "there", "decaying": ["weight"]}


def test_rows_of_the_reference(tmp_path: Path) -> None:
    first: list[float] = []
    python = executable(tmp_path, {"graphs": {"edges": 5}}, STEP, STEP | {"loss": 1.5}, END)
    found = train_reference(python, settings(tmp_path), 0, 1, first.append)
    assert first == [2.0]
    assert [step["loss"] for step in found["steps"]] == [2.0, 1.5]
    assert (found["graphs"], found["checkpoint"]) == ({"edges": 5}, "there")


def test_a_reference_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    python = executable(tmp_path, STEP, status=1)
    with pytest.raises(BenchmarkError, match=r"reference_3 ended with status 1: ValueError: no such thing"):
        train_reference(python, settings(tmp_path), 3, 1, lambda loss: None)


def test_another_first_loss_ends_the_comparison(tmp_path: Path) -> None:
    wish = settings(tmp_path)
    ours = {"steps": [{"loss": 2.001, "grad_norm": 1.0, "next_lr": 0.1}], "checkpoint": "there"}
    (tmp_path / "equiformer2.json").write_text(json.dumps(ours))
    given = parse_arguments(["--reference-python", executable(tmp_path, STEP, END)])
    with pytest.raises(DifferentLossError, match=r"2\.0 and ours 2\.001"):
        make_curves(given, wish)
    assert not (tmp_path / "reference_0.json").exists()


def test_one_seed_is_no_band() -> None:
    with pytest.raises(InputError, match="--seeds at least 2"):
        compare_loss_curves.main(["--seeds", "1"])


def curve(losses: list[float], **more: Any) -> dict[str, Any]:
    steps = [{"loss": loss, "grad_norm": 150.0 if loss > 11 else 1.0} for loss in losses]
    for number, step in enumerate(steps):
        step |= {"lr": 0.1 / (number + 1), "next_lr": 0.1 / (number + 2)}
    return {"steps": steps, "decaying": [], **more}


@pytest.fixture
def record(prepared: tuple[CurveSettings, dict[str, Any]]) -> dict[str, Any]:
    graphs = {"structures": 4, "structures_differ": 1, "edges": 100, "edges_differ": 3, "widest_tie": 1e-6}
    curves = {
        "equiformer2": curve([10.0, 10.0] * 9 + [10.0, 9.0]),
        "reference_0": curve([10.0, 10.0] * 9 + [10.0, 9.6], graphs=graphs),
        "reference_1": curve([10.0, 10.001] * 9 + [10.0, 9.8]),
        "equiformer2_plain": curve([10.0, 12.0] + [10.0] * 18),
    }
    ways = dict.fromkeys(curves, 0.02)
    pairs = {"ours": [0.1, 0.2], "seeds": [0.1, 0.1], "plain": [0.01, 0.01]}
    distances = {"same_decay": True, **{kind: {"travelled": ways, **pairs} for kind in ("raw", "averaged")}}
    return {"command": "command", "commit": "abc", **summarize(prepared[1], curves, distances)}


def test_numbers_of_known_curves(record: dict[str, Any]) -> None:
    assert record["first_difference"] == 0.0
    assert record["largest_lr_difference"] < 1e-12
    assert [window["first"] for window in record["windows"]] == list(range(0, 20, 2))
    # 9.5 of ours against 9.8 and 9.9.
    last = record["windows"][-1]
    assert last["outside"] == pytest.approx(0.3 / 9.85)
    assert last["band"] == pytest.approx(0.1 / 9.85)
    assert record["largest_outside"] == last["outside"]
    assert record["windows"][0]["outside"] == 0.0
    # 1e-4 of reference_1 in step 1; above 1e-2 only in the last step.
    assert dict(zip(DEPARTURES, record["departures"]["ours"], strict=True)) == {
        1e-5: 1, 1e-4: 19, 1e-3: 19, 1e-2: 19,
    }  # fmt: skip
    assert record["departures"]["seeds"][-1] == 19
    assert record["clipped_steps"]["equiformer2_plain"] == 1
    assert record["final"]["reference_mean"] == pytest.approx(9.85)
    assert record["final"]["reference_deviation"] == pytest.approx(np.std([9.8, 9.9], ddof=1))


def test_page_and_figure(record: dict[str, Any]) -> None:
    page = markdown(record, "curves.png")
    assert "| 18 to 19 | 9.500 | 9.800 to 9.900 | 1 % | 3 % |" in page
    assert "otherwise, in 1 of 4 structures" in " ".join(page.split())
    assert draw(record).startswith(b"\x89PNG")


def test_page_is_what_the_results_say() -> None:
    folder = ROOT / "docs" / "results"
    content = json.loads((folder / "loss_curves.json").read_text(encoding="utf-8"))
    assert (folder / "loss_curves.md").read_text(encoding="utf-8") == markdown(content, "loss_curves.png")
