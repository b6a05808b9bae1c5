"""Parts of a structure that the training data of a checkpoint do not hold are named."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.io import write
from command_line import run_command

from datasets_oc20 import LmdbWriter, OC20Lmdb
from equiformer2.checkpoint import load_checkpoint
from equiformer2.checkpoint.checkpoint import read_contents, with_seen_data
from equiformer2.checkpoint.native import write_native
from equiformer2.checkpoint.surroundings import Surroundings, SurroundingsFit
from equiformer2.checkpoint.training_data import KEY, count_contents
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor, atoms_to_data, relax
from equiformer2.inference.familiarity import KINDS, combined
from equiformer2.inference.record import model_record
from equiformer2.inference.seen_data import (
    fit_surroundings,
    judge_dataset,
    see_data,
)

LMDB = Path(__file__).parents[1] / "fixtures/datasets_oc20/s2ef_val_20.lmdb"
MakeCheckpoint = Callable[..., Path]


def rattled(atoms: Atoms, seeds: range) -> list[Atoms]:
    """Copies with small displacements."""
    found = []
    for seed in seeds:
        copy = atoms.copy()
        copy.rattle(0.05, seed=seed)
        found.append(copy)
    return found


@pytest.fixture
def informed(checkpoint: Path, oxygen_on_copper: Atoms, tmp_path: Path) -> Path:
    """A checkpoint that tells that it was trained on O/Cu(111)."""
    predictor = Predictor(checkpoint)
    training = [atoms_to_data(atoms, notify=False) for atoms in rattled(oxygen_on_copper, range(12))]
    held_out = [atoms_to_data(atoms, notify=False) for atoms in rattled(oxygen_on_copper, range(20, 26))]
    for structure in (*training, *held_out):
        structure.sid = "O on Cu"
    surroundings = fit_surroundings(predictor, training, held_out, description={"data": ["slabs"]})
    contents = read_contents(checkpoint)
    provenance = contents.provenance | {KEY: {**count_contents(training), "earlier": []}}
    path = tmp_path / "informed.pt"
    write_native(path, dataclasses.replace(contents, provenance=provenance, surroundings=surroundings))
    return path


def changed(atoms: Atoms, **changes: object) -> Atoms:
    """A copy with other elements or a shifted oxygen."""
    copy = atoms.copy()
    for index, symbol in changes.get("symbols", {}).items():  # type: ignore[attr-defined]
        copy.symbols[index] = symbol
    copy.positions[-1] += changes.get("shift", 0.0)
    return copy


def test_a_structure_of_the_training_set_is_familiar(informed: Path, oxygen_on_copper: Atoms) -> None:
    predictor = Predictor(informed)
    assert predictor.familiarity.known == KINDS
    (judgement,) = predictor.judge(oxygen_on_copper)
    assert judgement.familiar
    assert judgement.sentences() == []
    assert judgement.distance is not None
    assert judgement.limit is not None
    assert 0.0 < judgement.distance < judgement.limit


def test_what_is_new_is_named(informed: Path, oxygen_on_copper: Atoms) -> None:
    predictor = Predictor(informed)
    element = changed(oxygen_on_copper, symbols={0: "Pt"})
    adsorbate = changed(oxygen_on_copper, symbols={12: "Cu"})
    pair = oxygen_on_copper + Atoms("O", [oxygen_on_copper.positions[-1] + [0, 0, 1.3]], tags=[2])
    squeezed = changed(oxygen_on_copper, shift=-0.9)
    judged = predictor.judge([element, adsorbate, pair, squeezed])
    assert [item.elements for item in judged] == [("Pt",), (), (), ()]
    assert [item.pairs for item in judged] == [(), (), ("O-O",), ()]
    assert [item.adsorbates for item in judged] == [(), ("*Cu",), ("*O2",), ()]
    assert 12 in judged[3].atoms
    assert all(not item.familiar for item in judged)
    text = "; ".join(judged[2].sentences())
    assert "no neighbours O-O" in text
    assert "no adsorbate *O2" in text
    assert "the surroundings of atom" in judged[3].sentences()[0]
    assert judged[3].percentile == 100.0
    both = combined(judged[:3])
    assert (both.elements, both.pairs, both.adsorbates) == (("Pt",), ("O-O",), ("*Cu", "*O2"))
    assert json.loads(json.dumps(both.record()))["unseen_pairs"] == ["O-O"]


def test_a_substrate_of_known_elements_and_pairs_is_named(
    checkpoint: Path, oxygen_on_copper: Atoms, tmp_path: Path
) -> None:
    """Trained on O on a Cu-Pt alloy, asked for O on either metal alone."""
    alloy = changed(oxygen_on_copper, symbols=dict.fromkeys(range(6), "Pt"))
    training = atoms_to_data(alloy, notify=False)
    training.sid = "alloy"
    contents = read_contents(checkpoint)
    stage = {**count_contents([training]), "frames": 1, "earlier": []}
    write_native(
        tmp_path / "alloy.pt",
        dataclasses.replace(contents, provenance={**contents.provenance, KEY: stage}),
    )
    predictor = Predictor(tmp_path / "alloy.pt")
    seen, new = predictor.judge([alloy, oxygen_on_copper])
    assert (seen.substrates, seen.familiar) == ((), True)
    assert (new.pairs, new.substrates) == ((), ("Cu",))
    assert new.sentences() == ["the checkpoint's training data hold no substrate of Cu alone"]
    assert judge_dataset(predictor, [atoms_to_data(oxygen_on_copper, notify=False)])["sentences"] == [
        "of 1 structures looked at, the checkpoint's training data hold no substrate of Cu alone (in 1)"
    ]
    # An element that is new says more than that its substrate is.
    (third,) = predictor.judge(changed(oxygen_on_copper, symbols={0: "Au"}))
    assert (third.elements, third.substrates) == (("Au",), ())


def test_the_shipped_network_names_co_on_platinum() -> None:
    """Its bulks all hold copper or are OC20's few: it is ten times worse than zero forces there."""
    slab = fcc111("Pt", (2, 2, 4), vacuum=8.0, periodic=True)
    add_adsorbate(slab, molecule("CO"), 1.85, "ontop", mol_index=1)
    slab.set_tags([0] * 12 + [1] * 4 + [2] * 2)
    (judgement,) = Predictor("oc20_small").judge(slab)
    assert (judgement.adsorbates, judgement.substrates) == (("*CO",), ("Pt",))


def test_a_checkpoint_that_tells_nothing_judges_nothing(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    predictor = Predictor(checkpoint)
    (judgement,) = predictor.judge(oxygen_on_copper)
    assert (judgement.known, judgement.distance, judgement.familiar) == ((), None, True)
    assert "it is not known whether this structure is like that" in judgement.record()["sentences"][0]
    record = judge_dataset(predictor, [atoms_to_data(oxygen_on_copper, notify=False)])
    assert record["compared"] == []
    assert "does not tell what it was trained on" in record["sentences"][0]


def test_the_calculator_says_it_once(
    informed: Path, oxygen_on_copper: Atoms, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("equiformer2").propagate = True
    calculator = EquiformerV2Calculator(informed)
    odd = oxygen_on_copper + Atoms("O", [oxygen_on_copper.positions[-1] + [0, 0, 1.3]], tags=[2])
    for atoms in (oxygen_on_copper, odd, odd, oxygen_on_copper, changed(odd, symbols={0: "Pt"})):
        copy = atoms.copy()
        copy.calc = calculator
        copy.get_forces()
    said = [entry.getMessage() for entry in caplog.records if "training data hold no" in entry.getMessage()]
    assert len(said) == 2
    assert "no neighbours O-O" in said[0]
    assert "*O2" in said[0]
    assert "no Pt:" in said[1]


def test_a_dataset_is_counted(informed: Path, oxygen_on_copper: Atoms) -> None:
    structures = [
        atoms_to_data(atoms, notify=False)
        for atoms in (oxygen_on_copper, changed(oxygen_on_copper, symbols={0: "Pt"}), bulk("Cu", cubic=True))
    ]
    record = judge_dataset(Predictor(informed), structures)
    assert (record["structures_looked_at"], record["unseen_elements"]) == (3, {"Pt": 1})
    assert record["structures_named"] >= 1
    assert record["sentences"][0] == (
        "of 3 structures looked at, the checkpoint's training data hold no Pt (in 1)"
    )
    assert judge_dataset(Predictor(informed), structures, most=1)["structures_looked_at"] == 1


def test_distances_do_not_depend_on_the_frame_or_the_batch(informed: Path, oxygen_on_copper: Atoms) -> None:
    predictor = Predictor(informed)
    turned = oxygen_on_copper.copy()
    turned.rotate(37.0, (1.0, 2.0, 3.0), rotate_cell=True)
    together = [item.distance for item in predictor.judge([oxygen_on_copper, turned])]
    alone = [predictor.judge(atoms)[0].distance for atoms in (oxygen_on_copper, turned)]
    assert together == pytest.approx(alone, rel=1e-4)
    assert alone[0] == pytest.approx(alone[1], rel=1e-3)


def test_other_weights_and_rewritten_files(informed: Path, make_checkpoint: MakeCheckpoint) -> None:
    """Other weights see the same atoms differently: the file's surroundings are not theirs."""
    surroundings = read_contents(informed).surroundings
    assert surroundings is not None
    both = read_contents(make_checkpoint(averaged=True))
    path = informed.with_name("both.pt")
    write_native(path, dataclasses.replace(both, surroundings=surroundings))
    assert load_checkpoint(path).surroundings is None  # the averaged weights
    assert load_checkpoint(path, weights="raw").surroundings is not None


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("means", torch.zeros(2, 3)),
        ("means", torch.full((2, 16), torch.nan)),
        ("elements", torch.tensor([29, 8])),
        ("elements", "Cu"),
        ("whitening", torch.zeros(16, 16, dtype=torch.float64)),
        ("quantiles", torch.arange(101, 0, -1).double()),
        ("weights", "mine"),
        ("description", 3),
        ("more", 1),
    ],
)
def test_malformed_surroundings_are_refused(informed: Path, part: str, value: object) -> None:
    file = torch.load(informed, weights_only=True)
    file["surroundings"][part] = value
    torch.save(file, informed)
    with pytest.raises(InputError, match=r"informed\.pt: surroundings"):
        load_checkpoint(informed)


def test_distances_of_known_numbers() -> None:
    """Two elements with unit spread around different means; one that training lacks goes to the nearest."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20_000, 2, generator=generator)
    features[10_000:] += torch.tensor([10.0, 0.0])
    numbers = torch.tensor([1] * 10_000 + [6] * 10_000)
    fit = SurroundingsFit(2)
    fit.add(features[:15_000], numbers[:15_000])
    fit.add(features[15_000:], numbers[15_000:])
    surroundings: Surroundings = fit.finish("raw", {})
    points = torch.tensor([[0.0, 3.0], [0.0, 3.0], [10.0, 4.0]])
    found = surroundings.distances(points, torch.tensor([1, 6, 8]))
    expected = torch.tensor([3.0, 109.0**0.5, 4.0]).double() / 1.05**0.5
    assert torch.allclose(found, expected, rtol=0.05)


def test_held_out_data_must_fit(checkpoint: Path, oxygen_on_copper: Atoms) -> None:
    predictor = Predictor(checkpoint)
    training = [atoms_to_data(oxygen_on_copper, notify=False)]
    with pytest.raises(InputError, match="no training structures"):
        fit_surroundings(predictor, [], training)
    other = [atoms_to_data(bulk("Pt"), notify=False)]
    with pytest.raises(InputError, match="no held-out structure"):
        fit_surroundings(predictor, training, other)


def test_a_checkpoint_is_told_what_it_was_trained_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a command; then predictions and evaluations of data unlike that say so."""
    out = tmp_path / "knowing.pt"
    arguments = ["--checkpoint", checkpoint, "--out", out, "--structures", "10"]
    assert run_command("checkpoint import", *arguments, "--familiarity", LMDB, "--held-out", LMDB) == 0
    assert "of 10 training structures, calibrated on 10 held-out" in capsys.readouterr().out
    summary = json.loads(Path(f"{out}.json").read_text())
    assert summary["training_data"]["frames"] == 20
    assert summary["surroundings"]["training"] == [LMDB.name]
    assert out.stat().st_size - checkpoint.stat().st_size < 20_000
    told = Predictor(out).familiarity
    assert told.known == KINDS

    data = OC20Lmdb(LMDB)
    foreign = tmp_path / "foreign.lmdb"
    with LmdbWriter(foreign, "adsorption") as writer:
        for index in range(3):
            record = data[index]
            record.atomic_numbers[record.tags == 0] = 52
            writer.write(record)
    for path, names in ((LMDB, {}), (foreign, {"Te": 3})):
        arguments = ["--checkpoint", out, "--data", path, "--out", tmp_path / f"{path.stem}.npz"]
        assert run_command("predict", *arguments, "--json") == 0
        assert json.loads(capsys.readouterr().out)["familiarity"]["unseen_elements"] == names
    assert run_command("evaluate", "--checkpoint", out, "--data", foreign, "--out", tmp_path / "e.json") == 0
    assert "WARNING: of 3 structures looked at, the checkpoint's training data hold no Te (in 3)" in (
        capsys.readouterr().out
    )
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["familiarity"][str(foreign)]["structures_named"] == 3

    # One set of weights is kept with what belongs to it; what is told once is not told anew.
    again = tmp_path / "again.pt"
    assert run_command("checkpoint import", "--checkpoint", out, "--weights", "raw", "--out", again) == 0
    assert Predictor(again).familiarity.known == KINDS
    assert load_checkpoint(again).provenance[KEY]["frames"] == 20
    assert run_command("checkpoint import", "--checkpoint", out, "--out", again, "--familiarity", LMDB) == 2
    assert "--held-out" in capsys.readouterr().err


def test_own_files_tell_what_a_checkpoint_was_trained_on(
    checkpoint: Path, oxygen_on_copper: Atoms, tmp_path: Path
) -> None:
    frames = []
    for seed in range(4):
        frames.append(oxygen_on_copper.copy())
        frames[-1].rattle(0.05, seed=seed)
    own, out = tmp_path / "own.extxyz", tmp_path / "knowing.pt"
    write(own, frames)
    words = ["--checkpoint", checkpoint, "--out", out, "--familiarity", own, "--held-out", own]
    assert run_command("checkpoint import", *words) == 0
    assert Predictor(out).familiarity.known == KINDS


def test_a_force_error_above_the_threshold_is_named(
    checkpoint: Path, oxygen_on_copper: Atoms, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("equiformer2").propagate = True
    contents = read_contents(checkpoint)
    path = tmp_path / "validated.pt"
    validation = {"forces_mae": 0.174, "energy_mae": "unknown"}
    write_native(path, dataclasses.replace(contents, provenance={"validation": validation}))
    relax(oxygen_on_copper, path, fmax=0.5, steps=0)
    assert not [entry for entry in caplog.records if "force error" in entry.getMessage()]
    relax(oxygen_on_copper, path, fmax=0.05, steps=0)
    said = [entry.getMessage() for entry in caplog.records if "force error" in entry.getMessage()]
    assert len(said) == 1
    assert "0.17 eV/Å per component, above fmax 0.05" in said[0]
    assert model_record(Predictor(path), path)["validation"] == {"forces_mae_eV_A": 0.174}


def test_data_seen_are_stored(checkpoint: Path, oxygen_on_copper: Atoms, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    slabs = [atoms_to_data(atoms, notify=False) for atoms in rattled(oxygen_on_copper, range(4))]
    for slab in slabs:
        slab.sid = "O on Cu"
    seen = see_data(Predictor(checkpoint), slabs[:2], slabs[2:], description={"source": "slabs"})
    write_native(path, with_seen_data(read_contents(checkpoint), seen))
    predictor = Predictor(path)
    assert predictor.familiarity.known == KINDS
    assert predictor.familiarity.surroundings is not None
    assert predictor.familiarity.surroundings.description["source"] == "slabs"
