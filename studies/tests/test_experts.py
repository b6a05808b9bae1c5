"""The study of experts: its tasks, every part at the smallest size, and verdicts from given rows."""

from pathlib import Path
from typing import Any

import pytest
from teacher_folders import LARGE, copy_systems

from datasets_oc20 import OC20Lmdb
from equiformer2.errors import InputError
from equiformer2.files import read_json
from studies import expert_page
from studies.expert_tasks import GROUPS, TASKS, Sources, choose_held_out, group_of, prepare, task_file
from studies.experts import PARTS, main

SMALL = ("--model.num_layers=1", "--model.sphere_channels=8", "--model.attn_hidden_channels=8")
SMALL += ("--model.num_heads=2", "--model.attn_alpha_channels=4", "--model.attn_value_channels=4")
SMALL += ("--model.ffn_hidden_channels=8", "--model.lmax=2", "--model.grid_resolution=6")
SMALL += ("--model.edge_channels=8", "--model.num_distance_basis=8", "--model.max_neighbors=6")
SMALL += ("--model.max_radius=4", "--data.batch_size=2")
OWN = ("dft-coinage", "teacher-coinage")
SYSTEMS = ["tm300170", "tm300131", "tn900044", "tn1000077"]


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slabs of two coinage metals, which stand for both kinds of labels."""
    folder = tmp_path_factory.mktemp("frames") / "systems"
    assert LARGE.exists()
    return copy_systems(folder, SYSTEMS, "train")


def test_groups_share_elements_and_fit_any_slab() -> None:
    assert len(TASKS) == 10
    cases = {"Cu S": "chalcogens", "Cu": "coinage", "Cu Al": "tetrels", "Pt": "others", "Cu P": "pnictogens"}
    for text, group in cases.items():
        assert group_of(frozenset(text.split())) == group
    assert list(GROUPS)[-1] == "others"


@pytest.mark.parametrize(
    ("slabs", "possible"),
    [
        (["Cu", "Cu-Pt", "Au"], {"Cu"}),
        (["Au-Na", "Au-Cu", "Cl-Cu"], {"Au-Cu"}),
        (["Sb-Zr", "Sb-Ti", "Pd-Sb"], set()),
        (["Cu"], set()),
    ],
)
def test_held_out_slabs_hold_no_element_that_is_not_learned(slabs: list[str], possible: set[str]) -> None:
    held = choose_held_out(slabs)
    assert set(held) <= possible
    assert bool(held) == bool(possible)


def test_learned_and_judged_frames(frames: Path, tmp_path: Path) -> None:
    sources = Sources(frames, frames, 4, 2, OWN)
    prepare(tmp_path, sources)
    listing = read_json(tmp_path / "tasks.json")["tasks"]
    for task in OWN:
        assert listing[task]["held_out_slabs"] == ["Cu"]
        assert listing[task]["frames"] == {"train": 4, "test": 2}
        test = OC20Lmdb(task_file(tmp_path, task, "test"))
        assert {str(test[row].sid) for row in range(2)} == {"tn1000077"}
    with pytest.raises(InputError, match="other data or numbers of frames"):
        prepare(tmp_path, Sources(frames, frames, 5, 2, OWN))
    with pytest.raises(InputError, match="no slab of the group tetrels"):
        prepare(tmp_path / "more", Sources(frames, frames, 4, 2, ("dft-tetrels",)))
    only = copy_systems(tmp_path / "gold", ["tn900044"], "train")
    prepare(tmp_path / "later", Sources(only, only, 9, 9, ("dft-coinage",)))
    parts = [OC20Lmdb(task_file(tmp_path / "later", "dft-coinage", part)) for part in ("train", "test")]
    ends = [[int(part[row].fid) for row in range(len(part))] for part in parts]
    assert max(ends[0]) < min(ends[1])


@pytest.mark.slow
def test_all_parts_are_continued(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", *OWN, "--minutes", "0.001", "--seeds", "0", "--experts", "4", "--frames", "4"]
    words += ["--test-frames", "2", "--keep", "0.5", "--dft", str(frames), "--teacher", str(frames)]
    words += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "page")]
    with pytest.raises(InputError, match="no finished run"):
        main([*words, "--collect"])
    with pytest.raises(InputError, match="run --part joint first"):
        main([*words, "--part", "prune", "--", *SMALL])
    main([*words, "--", *SMALL])
    files = {path.name.partition(".")[0]: path for path in (tmp_path / "runs").glob("*.result.json")}
    assert {name.partition("-")[0] for name in files} == set(PARTS)
    assert len(files) == 1 + 2 + 1 + 2 + 1
    pruned = read_json(files["prune-0-dft-coinage"])
    assert {entry["method"] for entry in pruned["entries"]} == {"tcess", "frequency", "reap", "random"}
    assert all(entry["weight_change"] <= entry["bound"] for entry in pruned["entries"])
    retrieved = read_json(files["retrieve-0"])
    assert retrieved["bytes_read"] < retrieved["bytes_of_all_experts"]
    assert retrieved["parameter_bytes_merged"] < retrieved["parameter_bytes_full"]
    page = (tmp_path / "page.md").read_text()
    for title in ("## Training", "## Pruning", "## Retrieval", "the bound of the change of weights is never"):
        assert title in page
    assert (tmp_path / "page.png").stat().st_size > 1000
    times = {path: path.stat().st_mtime_ns for path in files.values()}
    main([*words, "--", *SMALL])
    assert {path: path.stat().st_mtime_ns for path in files.values()} == times
    capsys.readouterr()
    with pytest.raises(InputError, match="with other settings"):
        main([*words, "--keep", "0.25", "--", *SMALL])
    main([*words, "--seeds", "1", "--hours", "0", "--", *SMALL])
    assert "rows are left" in capsys.readouterr().err
    # A run that was stopped before its row was there keeps its number of steps, and no other run takes it.
    for path in [*files.values(), tmp_path / "page.json"]:
        path.unlink()
    with pytest.raises(InputError, match=r"joint-0.steps.json is of a run with other settings"):
        main([*words, "--minutes", "0.002", "--part", "joint", "--", *SMALL])


def trained(part: str, seed: int, value: float) -> dict[str, Any]:
    errors = {"force_mae_eV_A": value, "energy_mae_eV": 1.0, "zero_force_mae_eV_A": 0.5, "frames": 3}
    return {"part": part, "seed": seed, "errors": dict.fromkeys(OWN, errors), "parameters": 10}


def entry(method: str, change: float, ratio: float) -> dict[str, Any]:
    share = {"own": {"bound": 0.1, "any": 0.2}, "others": {"bound": 0.9, "any": 1.0}}
    return {
        **{"method": method, "keep": 0.5, "measured_change_eV_A": change, "force_mae_ratio": ratio},
        **{"weight_change": 1.0, "bound": 2.0, "flagged": share},
    }


def test_verdicts_of_given_rows() -> None:
    rows = [trained("joint", 0, 0.2), trained("single", 0, 0.3), trained("two_stage", 0, 0.1)]
    given = [entry("tcess", 0.01, 1.01), entry("random", 0.05, 1.2), entry("reap", 0.005, 1.0)]
    rows += [
        {"part": "prune", "seed": 0, "task": OWN[1], "entries": [*given, entry("frequency", 0.02, 1.05)]},
        {"part": "prune", "seed": 0, "task": OWN[0], "entries": [entry("tcess", 0.01, 1.05)]},
    ]
    top1 = [
        {"per": "task", "labels_given": given, "by_composition": plain, "share": 0.9 if plain else 0.96}
        for given in (True, False)
        for plain in (True, False)
    ]
    rows.append({"part": "retrieve", "top1": top1, "bytes_read": 1, "bytes_of_all_experts": 2})
    found = {verdict.question: verdict.holds for verdict in expert_page.verdicts(rows)}
    assert found["dft frames: better than a network per task in equal time (force MAE, eV/Å)"]
    assert not found["teacher frames: better than two stages in equal time (force MAE, eV/Å)"]
    question = "frames, half of the experts: force MAE at most 2 % worse"
    assert (found[f"teacher {question}"], found[f"dft {question}"]) == (True, False)
    assert found["half of the experts: TCESS changes forces less than random"]
    assert not found["half of the experts: TCESS changes forces less than reap"]
    assert found["the bound of the change of weights is never violated"]
    assert found["retrieval, a set per task, kind of labels given: top-1 at least 95%"]
    assert expert_page.verdicts([]) == []


def test_a_seed_with_some_of_the_networks_per_task_is_not_judged() -> None:
    """The page is written whenever the time is over."""
    rows = [trained("joint", 0, 0.2), trained("single", 0, 0.3)]
    rows[1]["errors"].pop(OWN[1])
    assert expert_page.verdicts(rows) == []
    assert "| – |" in expert_page.markdown(rows, [], "x.png")
