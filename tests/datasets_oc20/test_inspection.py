"""Inspection of datasets: its numbers, and every kind of frame that is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_command
from matplotlib.image import imread
from oc20_files import dumps_pyg1, s2ef_fields, structure, write_lmdb
from torch_geometric.data import Data

from datasets_oc20 import DataError, LmdbWriter, OC20Lmdb
from datasets_oc20.inspection import PROBLEMS, Inspection, inspect_dataset
from datasets_oc20.inspection_figure import draw_inspection, element_position
from datasets_oc20.inspection_report import to_record, to_text
from datasets_oc20.preprocess import preprocess

ROOT = Path(__file__).parents[2]
GRID = torch.tensor([[0.0, 0, 0], [2.5, 0, 0], [0, 2.5, 0], [0, 0, 2.5]])


def good(seed: int = 0, energy: float = 0.5, **changes: Any) -> Data:
    """A frame that nothing is wrong with: two fixed atoms, one of the surface, one of the adsorbate."""
    shift = 0.01 * seed
    fields = {
        "pos": GRID + shift,
        "atomic_numbers": torch.tensor([29, 29, 29, 8]),
        "tags": torch.tensor([0, 0, 1, 2]),
        "fixed": torch.tensor([True, True, False, False]),
        "forces": torch.tensor([[90.0, 0, 0], [0, 0, 0], [0.3, 0.4, 0], [0, 0, 1.2]]),
    }
    return structure(natoms=4, seed=seed, energy=energy, **{**fields, **changes})


def inspect_frames(
    path: Path, frames: list[Data], kind: str | None = "adsorption", **options: Any
) -> Inspection:
    with LmdbWriter(path, kind) as writer:
        for data in frames:
            writer.write(data)
    return inspect_dataset(OC20Lmdb(path), **options)


def test_numbers_of_good_data(tmp_path: Path) -> None:
    frames = [good(seed, energy=seed - 1.0, sid=f"random{seed // 2}") for seed in range(5)]
    found = inspect_frames(tmp_path / "x.lmdb", frames)
    record = to_record(found, OC20Lmdb(tmp_path / "x.lmdb"))
    assert record["problems"] == {}
    assert record["suspicious_frames"] == 0
    assert (record["frames"], record["inspected"], record["readable"], record["systems"]) == (5, 5, 5, 3)
    assert record["frames_per_system"]["max"] == 2
    assert record["elements"] == {"Cu": 15, "O": 5}
    assert record["tags"] == {"0": 0.5, "1": 0.25, "2": 0.25}
    assert record["fixed"] == 0.5
    assert record["energy"] == pytest.approx({"min": -1, "median": 1, "max": 3, "mean": 1, "std": 2**0.5})
    assert record["max_force"]["max"] == pytest.approx(1.2)  # the 90 eV/Å act on a fixed atom
    assert record["forces_rms"] == pytest.approx(np.sqrt((0.09 + 0.16 + 1.44) / 6))
    assert "suspicious frames: 0" in to_text(record)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("large energy", {"energy": -10.5}),
        ("large force", {"forces": torch.tensor([[0.0] * 3] * 3 + [[40.0, 30.1, 0.0]])}),
        ("all fixed", {"fixed": torch.ones(4, dtype=torch.bool), "tags": torch.tensor([0, 0, 0, 2])}),
        ("no adsorbate", {"tags": torch.tensor([0, 0, 1, 1])}),
        ("tags and fixed differ", {"tags": torch.tensor([0, 1, 1, 2])}),
        ("close atoms", {"pos": GRID.clone().index_fill_(0, torch.tensor([3]), 0.28)}),
        (
            "close atoms",
            {"pos": torch.cat([GRID[:3], torch.tensor([[6.9, 0.0, 6.9]])])},
        ),  # through the cell's side
        ("spread", {"pos": GRID * 1e4, "pbc": torch.tensor([[True, True, False]])}),
        ("no energy", {"energy": None}),
        ("no forces", {"forces": None}),
    ],
)
def test_one_wrong_frame(tmp_path: Path, name: str, wrong: dict[str, Any]) -> None:
    bad = good(1, **{key: value for key, value in wrong.items() if value is not None})
    for key, value in wrong.items():
        if value is None:
            del bad[key]
    found = inspect_frames(tmp_path / "x.lmdb", [good(0), bad, good(2)])
    assert name in found.problems
    assert [one.index for one in found.problems[name]] == [1]
    assert set(found.problems) <= {name, "tags and fixed differ", "other pbc"}
    assert found.num_suspicious == 1
    text = to_text(to_record(found, OC20Lmdb(tmp_path / "x.lmdb")))
    assert f"{PROBLEMS[name]}; e.g. system1 frame 1 ({tmp_path / 'x.lmdb'}, key 1)" in text


def test_limits_are_those_of_oc20(tmp_path: Path) -> None:
    at_the_limit = good(0, energy=10.0, forces=torch.tensor([[0.0] * 3] * 3 + [[30.0, 40.0, 0.0]]))
    assert not inspect_frames(tmp_path / "x.lmdb", [at_the_limit]).problems
    total = inspect_frames(tmp_path / "y.lmdb", [good(0, energy=-300.0)], "total")
    assert not total.problems


def test_distances_in_cells_of_every_kind(tmp_path: Path) -> None:
    apart = {
        "pbc": torch.tensor([[True, True, False]]),
        "pos": torch.cat([GRID[:3], torch.tensor([[0, 0, 6.9]])]),
    }
    molecule = {"pbc": torch.zeros(1, 3, dtype=torch.bool), "cell": torch.zeros(1, 3, 3)}
    skewed = {"cell": torch.tensor([[[7.0, 0, 0], [6.5, 7, 0], [3, 3, 7]]])}
    # One lattice vector (6.5, 7, 0) and 0.3 Å from atom 0.
    image = {**skewed, "pos": torch.cat([GRID[:3], torch.tensor([[6.5, 7.3, 0.0]])])}
    frames = [good(0, **apart), good(1, **molecule), good(2, **skewed), good(3, **image)]
    found = inspect_frames(tmp_path / "x.lmdb", frames)
    assert {name: [one.index for one in ones] for name, ones in found.problems.items()} == {
        "other pbc": [0, 1],
        "close atoms": [3],
    }


def test_repeated_frames(tmp_path: Path) -> None:
    frames = [good(0), good(1), good(0, sid="other"), good(2, sid="system0", fid=0), good(0)]
    found = inspect_frames(tmp_path / "x.lmdb", frames)
    assert [one.index for one in found.problems["same structure"]] == [2, 4]
    assert [one.index for one in found.problems["same name"]] == [3, 4]
    assert found.num_suspicious == 3


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    records = [s2ef_fields(5, seed) for seed in range(5)]
    del records[1]["tags"]
    del records[2]["tags"], records[2]["fixed"]
    records[3]["force"][1, 2] = float("nan")
    path = write_lmdb(tmp_path / "x.lmdb", [dumps_pyg1(record) for record in records])
    dataset = OC20Lmdb(path, "adsorption")
    found = inspect_dataset(dataset)
    indices = {name: [one.index for one in ones] for name, ones in found.problems.items()}
    assert indices["no tags"] == [1, 2]
    assert indices["no fixed"] == [2]
    assert indices["unreadable"] == [3]
    record = to_record(found, dataset)
    assert (record["inspected"], record["readable"]) == (5, 2)
    assert "key 3: forces holds NaN or infinite values (atom 1)" in to_text(record)
    for broken in records:
        broken.pop("tags", None)
    path = write_lmdb(tmp_path / "y.lmdb", [dumps_pyg1(record) for record in records])
    nothing = inspect_dataset(OC20Lmdb(path))
    assert "no tags, which tell slab from adsorbate" in to_text(to_record(nothing, OC20Lmdb(path)))
    draw_inspection(nothing, "nothing", tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("declared", "energy", "sentence"),
    [
        ("adsorption", 0.5, "declared adsorption"),
        ("total", -300.0, "declared total"),
        (
            "adsorption",
            -300.0,
            "declared adsorption, which they CANNOT be by their size: training will refuse",
        ),
        ("total", 0.5, "declared total, which they CANNOT be by their size"),
        (None, 0.5, "of a kind that is not declared, by their size adsorption"),
        (None, -300.0, "of a kind that is not declared, by their size total"),
        (None, -5.0, "of a kind that is not declared"),
    ],
)
def test_kind_of_energy(tmp_path: Path, declared: str | None, energy: float, sentence: str) -> None:
    found = inspect_frames(tmp_path / "x.lmdb", [good(seed, energy=energy) for seed in range(3)], declared)
    line = to_text(to_record(found, OC20Lmdb(tmp_path / "x.lmdb"))).split("energy    ")[1].splitlines()[0]
    assert sentence in line
    if declared is None and energy == -5.0:
        assert line.endswith("not declared")


def test_a_sample_and_several_processes(tmp_path: Path) -> None:
    frames = [good(seed, energy=0.001 * seed) for seed in range(450)]
    whole = inspect_frames(tmp_path / "x.lmdb", frames)
    dataset = OC20Lmdb(tmp_path / "x.lmdb")
    assert to_record(inspect_dataset(dataset, num_workers=2), dataset) == to_record(whole, dataset)
    part = inspect_dataset(dataset, max_frames=8)
    assert part.energy == pytest.approx(np.linspace(0, 449, 8).astype(int) * 0.001, abs=1e-6)
    assert "450 frames, 8 of them inspected, evenly spread" in to_text(to_record(part, dataset))
    with pytest.raises(DataError, match="max_frames is -1; it must be at least 1"):
        inspect_dataset(dataset, max_frames=-1)


def test_the_figure(tmp_path: Path) -> None:
    found = inspect_frames(tmp_path / "x.lmdb", [good(0, energy=-20.0), good(1), good(0)])
    draw_inspection(found, "x", tmp_path / "x.png")
    image = imread(tmp_path / "x.png")
    assert image.shape[0] > 700
    assert image.shape[1] > 1200
    assert image[..., :3].std() > 0.05


def test_the_periodic_table() -> None:
    places = {z: element_position(z) for z in (1, 2, 3, 5, 18, 21, 30, 36, 46, 57, 71, 72, 86, 92)}
    assert places == {
        1: (1, 1), 2: (1, 18), 3: (2, 1), 5: (2, 13), 18: (3, 18), 21: (4, 3), 30: (4, 12), 36: (4, 18),
        46: (5, 10), 57: (8.5, 3), 71: (8.5, 17), 72: (6, 4), 86: (6, 18), 92: (9.5, 6),
    }  # fmt: skip
    assert len({element_position(z) for z in range(1, 119)}) == 118


def test_command_on_bundled_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "small.lmdb", tmp_path / "new" / "report"
    preprocess(ROOT / "data" / "oc20_trajs", data, systems=["random1447590"], num_workers=1)
    capsys.readouterr()
    assert run_command("data inspect", "--data", data, "--out", out, "--num-workers", 1) == 0
    printed = capsys.readouterr().out
    assert "1 file(s), 47 frames, all inspected" in printed
    assert "suspicious frames: 0" in printed
    assert sorted(path.name for path in out.iterdir()) == ["inspection.json", "inspection.png"]
    record = json.loads((out / "inspection.json").read_text())
    assert (record["frames"], record["systems"], record["energy_kind"]) == (47, 1, "adsorption")
    assert run_command("data inspect", "--data", "absent", "--out", out, "--overwrite") == 2
    assert "absent: no such file" in capsys.readouterr().err
