"""The speed part of the study: what is timed, with how many threads, and when it is timed again."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.pruning.structured.plan import PruningPlan
from studies import force_call_times as speed
from studies.campaign import Campaign, Part, Speed
from tests.observed import Call, observed
from tests.pruning.search_helpers import save_tiny, slabs, tiny_model, write_lmdb

REPEATS = 4


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """One network, one plan that was found for it."""
    model = tiny_model()
    plan = PruningPlan.keep_all(model.config).with_block(1, attention=False, feed_forward=False)
    results = tmp_path / "cuts" / "results"
    results.mkdir(parents=True)
    record = {"method": "block", "plan": plan.to_dict(), "keep": 0.5, "macs": 0.51, "seed": 0}
    (results / "block_0.json").write_text(json.dumps(record))
    return Campaign(
        models={"tiny": str(save_tiny(tmp_path / "tiny.pt"))},
        calibration=(),
        held_out={"unseen": str(write_lmdb(tmp_path / "unseen.lmdb", slabs()))},
        studies={"cuts": Part("tiny", ("block",), (0.5,))},
        seeds=(0,),
        held_out_structures=2,
        structures=1,
        tries=1,
        router={},
        distill_config="",
        distill_val="",
        speed=Speed(repeats=REPEATS, threads=1),
    )


@pytest.fixture
def calls() -> Iterator[list[tuple[str, int]]]:
    """Network and number of threads of every call; calls of the dense one take 0.05 s more."""
    made: list[tuple[str, int]] = []

    def note(observed_calls: list[Call]) -> None:
        blocks = observed_calls[-1].arguments["self"].predictor.model.blocks
        dense = all(block.ga is not None for block in blocks)
        made.append(("dense" if dense else "pruned", torch.get_num_threads()))
        if dense:
            time.sleep(0.05)

    with observed(speed.EquiformerV2Calculator.calculate, on_call=note):
        yield made


def measure(campaign: Campaign, folder: Path, **settings: Any) -> dict[str, Any]:
    changed = dataclasses.replace(campaign.speed, **settings)
    speed.measure_calls(dataclasses.replace(campaign, speed=changed), folder, folder / "speed")
    (path,) = (folder / "speed").iterdir()
    assert path.name == "tiny_block.json"
    return json.loads(path.read_text())


def test_dense_and_pruned_take_turns(campaign: Campaign, calls: list[Any], tmp_path: Path) -> None:
    record = measure(campaign, tmp_path)
    names = [name for name, _ in calls]
    assert names[:4] == ["pruned", "dense"] * 2
    assert names[4:12] == ["dense", "pruned", "pruned", "dense"] * 2
    assert names[12:] == ["pruned", "dense"]  # what they hold at their peaks
    found = record.pop("latency")
    assert found["dense_seconds"] > 0.05
    assert 0 < found["seconds"] < found["dense_seconds"]
    assert found["low"] <= found["ratio"] <= found["high"] < 1
    assert found["repeats"] == REPEATS
    model = fingerprint_of_weights(tiny_model())
    assert 0 < record.pop("peak_bytes") <= record.pop("dense_peak_bytes")
    assert record == {"model": model, "atoms": 4, "threads": 1, "macs": 0.51}


def test_threads_are_those_asked_for_and_given_back(
    campaign: Campaign, calls: list[Any], tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    assert measure(campaign, tmp_path, threads=before + 1)["threads"] == before + 1
    assert {threads for _, threads in calls} == {before + 1}
    assert torch.get_num_threads() == before


def test_what_is_there_is_kept(campaign: Campaign, calls: list[Any], tmp_path: Path, capsys: Any) -> None:
    first = measure(campaign, tmp_path)
    made = len(calls)
    capsys.readouterr()
    assert measure(campaign, tmp_path) == first
    assert len(calls) == made
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("settings", [{"repeats": REPEATS + 1}, {"threads": 2}], ids=str)
def test_other_settings_are_measured_again(
    settings: dict[str, int], campaign: Campaign, calls: list[Any], tmp_path: Path, capsys: Any
) -> None:
    measure(campaign, tmp_path)
    record = measure(campaign, tmp_path, **settings)
    assert record["latency"]["repeats"] == settings.get("repeats", REPEATS)
    assert record["threads"] == settings.get("threads", 1)
    assert "tiny_block.json was measured with other settings: measuring again" in capsys.readouterr().out


def test_other_weights_at_the_same_path_are_measured_again(
    campaign: Campaign, calls: list[Any], tmp_path: Path, capsys: Any
) -> None:
    measure(campaign, tmp_path)
    made = len(calls)
    save_tiny(Path(campaign.models["tiny"]), seed=1)
    capsys.readouterr()
    assert measure(campaign, tmp_path)["model"] == fingerprint_of_weights(tiny_model(1))
    assert len(calls) == 2 * made
    assert "tiny_block.json was measured with other weights: measuring again" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"atoms": 4, "thr', "[]", "null", '{"atoms": 4}', "\x00\x00"])
def test_broken_files_are_measured_again(
    text: str, campaign: Campaign, calls: list[Any], tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "speed" / "tiny_block.json"
    path.parent.mkdir()
    path.write_text(text)
    assert measure(campaign, tmp_path)["threads"] == 1
    assert "tiny_block.json is broken: measuring again" in capsys.readouterr().out


def test_savings_are_kept_too(campaign: Campaign, tmp_path: Path, capsys: Any) -> None:
    few = dataclasses.replace(campaign, speed=Speed(repeats=1, threads=1))
    path = tmp_path / "tiny.json"
    speed.measure_lossless(few, tmp_path)
    first = json.loads(path.read_text())
    assert first["threads"] == 1
    assert first["savings"]
    capsys.readouterr()
    speed.measure_lossless(few, tmp_path)
    assert capsys.readouterr().out == ""
    save_tiny(Path(campaign.models["tiny"]), seed=1)
    speed.measure_lossless(few, tmp_path)
    assert "tiny.json was measured with other weights: measuring again" in capsys.readouterr().out
    assert json.loads(path.read_text())["model"] != first["model"]
    path.write_text("{")
    speed.measure_lossless(few, tmp_path)
    assert "tiny.json is broken: measuring again" in capsys.readouterr().out
    assert json.loads(path.read_text())["threads"] == 1
