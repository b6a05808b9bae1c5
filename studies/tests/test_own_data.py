"""The study of fine-tuning on own data: its sets and its page."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets_oc20 import OC20Lmdb
from equiformer2.errors import InputError
from studies.own_data import BOTH, CASES, FASTER, PLAIN, REPLAY, SMALLER, about, emt_frames, report, run_name
from studies.results import Results


@pytest.mark.parametrize(
    ("name", "frames"), [("ch3_cu", (14, 8)), ("hfo2", (6, 4)), ("oxides", (245,)), ("oc20_later", None)]
)
def test_sets_have_the_frames_that_their_titles_say(name: str, frames: Any, tmp_path: Path) -> None:
    CASES[name].write(tmp_path)
    parts = [OC20Lmdb(tmp_path / file) for file in CASES[name].files]
    if frames is not None:
        assert tuple(len(part) for part in parts) == frames
        return
    last = {data.sid: data.fid for data in parts[0]}
    assert all(data.fid > last[data.sid] for data in parts[1])


def test_emt_frames_move_and_hold_their_lowest_layer() -> None:
    frames = emt_frames(metals=("Cu",), adsorbates=("O",))
    names = {frame.info["sid"] for frame in frames}
    assert len(names) == 4
    assert len(frames) > len(names)
    for frame in frames:
        fixed = frame.constraints[0].index
        assert len(fixed) == 9
        assert set(frame.get_tags()[fixed]) == {0}
        assert frame.get_tags()[-1] == 2
        assert frame.symbols[-1] == "O"
        assert np.isfinite(frame.get_potential_energy())


def test_networks_from_random_weights_and_curves_belong_to_plain_runs() -> None:
    alone, replayed = (CASES["emt"].about(way) for way in (PLAIN, REPLAY))
    assert alone == {"minutes": 96, "seeds": 3, "curve": True}
    assert replayed == {"minutes": 48, "seeds": 3, "curve": False}
    assert CASES["oxides"].about(PLAIN) == {"minutes": 20, "seeds": 1, "curve": False}
    faster = {"minutes": 10, "seeds": 1, "curve": False, "learning_rate": 1e-3}
    assert CASES["oxides"].about(FASTER) == faster
    assert CASES["oc20_other"].ways("oc20_small") == [PLAIN]
    assert CASES["oc20_other"].about(SMALLER)["batch_size"] == 2
    assert CASES["oc20_other"].ways("study_teacher") == [PLAIN, REPLAY, FASTER, SMALLER, BOTH]


def row(data: str, network: str, error: float | None) -> dict[str, Any]:
    per_atom = None if error is None else error / 10
    errors = {"energy_mae_eV": error, "energy_mae_eV_per_atom": per_atom, "force_mae_eV_A": error}
    return {"data": data, "network": network, **errors}


def test_the_page_of_what_is_there(tmp_path: Path) -> None:
    results, page = Results(tmp_path / "runs", about), tmp_path / "page"
    with pytest.raises(InputError, match="no finished run"):
        report(results, page)
    errors = {"before": None, "after": 0.1, "scratch": 0.2, "trivial": 0.4}
    table = [row("new", name, error) for name, error in errors.items()]
    table += [row("old", "before", 0.3), row("old", "after", 0.5)]
    points = [{"network": "after", "frames": n, "force_mae_eV_A": 1 / n, "seed": 0} for n in (2, 4)]
    content = {"table": table, "curve": {"points": points, "sentences": ["twice the frames halve it"]}}
    content["schedule"] = {"steps": 80, "wanted": 1200}
    results.keep(run_name("ch3_cu", "study_teacher", PLAIN), content)
    report(results, page)
    text = page.with_suffix(".md").read_text()
    assert "| plain | 80 of 1,200 | forces (eV/Å) | – | 0.100 | 0.200 | 0.400 | 0.300 → 0.500 |" in text
    assert "| energy per atom (eV) | – | 0.0100 | 0.0200 | 0.0400 | 0.0300 → 0.0500 |" in text
    assert "study_teacher: twice the frames halve it." in text
    assert page.with_suffix(".png").stat().st_size > 0
