"""Adapter files: round trip, size, damage; adapters on a loaded network, and merged."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from ase import Atoms
from model_helpers import batch_of, cluster, water
from tiny_adapters import NEW_NORMALIZERS, fill, make_adapter, network, write_network

from equiformer2 import EquiformerV2, EquiformerV2Calculator, ModelConfig, Predictor, load_checkpoint
from equiformer2.adapters import AdapterSettings, adaptable_weights, prune_adapter
from equiformer2.adapters.attach import make_maps
from equiformer2.checkpoint.adapted import merge_adapters
from equiformer2.checkpoint.adapter_files import Adapter, Base, read_adapter, write_adapter
from equiformer2.errors import InputError

OF_ADAPTERS = ("base_sha256", "rank", "kept_share", "trainable_parameters", "energy_kind")
H2O = Atoms("OH2", [[0, 0, 0.1], [0.8, 0.6, 0], [-0.7, 0.6, 0.05]], cell=[9, 9, 9], pbc=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_network(tmp_path / "base.pt", network())


def written(folder: Path, name: str = "adapter.pt", **settings: object) -> Path:
    path = folder / name
    write_adapter(path, dataclasses.replace(make_adapter(network(), **settings), source=str(path)))
    return path


def outputs(predictor: Predictor) -> torch.Tensor:
    out = predictor.predict(H2O)
    return torch.cat([out["energy"].flatten(), out["forces"].double().flatten()])


def test_round_trip(tmp_path: Path) -> None:
    adapter = make_adapter(network(), rank=3)
    settings = AdapterSettings(rank=3, keep=0.25, method="random")
    prune_adapter(adapter.maps, settings, [], 0)
    write_adapter(tmp_path / "a.pt", adapter)
    read = read_adapter(tmp_path / "a.pt")
    for name, each in adapter.maps.items():
        mine = read.maps[name]
        for part in ("left", "right", "left_kept", "right_kept"):
            assert torch.equal(getattr(mine, part), getattr(each, part)), (name, part)
        assert mine.scale == each.scale
    assert read.base == adapter.base
    assert read.settings == adapter.settings
    assert (read.normalizers, read.energy_kind) == (NEW_NORMALIZERS, "total")
    assert read.describe() == adapter.describe()
    assert read.kept_share == pytest.approx(0.25, abs=1e-3)
    for name, tensor in adapter.replaced.items():
        assert torch.equal(read.replaced[name], tensor)


def test_a_file_of_the_31m_network_is_a_few_hundred_kilobytes(tmp_path: Path) -> None:
    """From its shapes alone, with the default settings."""
    model = EquiformerV2(ModelConfig.preset("31M"), device="meta")
    settings = AdapterSettings(rank=4, method="random")
    shapes = {name: weight.shape for name, weight in adaptable_weights(model).items()}
    maps = make_maps(shapes, settings, 0)
    prune_adapter(maps, settings, [], 0)
    parts = ("energy_block.so3_linear_2.weight", "force_block.proj.weight")
    adapter = Adapter(
        "a.pt", Base("0" * 16, "0" * 64, "base.pt", "averaged"), settings.to_dict(), maps,
        {name: torch.zeros(shapes[name]) for name in parts}, NEW_NORMALIZERS, "total", {},
    )  # fmt: skip
    write_adapter(tmp_path / "a.pt", adapter)
    kept = sum(each.kept for each in maps.values())
    assert kept == round(0.2 * sum(each.size for each in maps.values()))
    size = (tmp_path / "a.pt").stat().st_size
    assert 4 * kept < size < 4.8 * kept
    assert size < 700_000
    assert read_adapter(tmp_path / "a.pt").trainable_parameters == adapter.trainable_parameters


def test_an_adapter_changes_the_answers_and_their_meaning(base: Path, tmp_path: Path) -> None:
    path = written(tmp_path)
    plain, adapted = Predictor(base), Predictor(base, adapter=path)
    assert (plain.energy_kind, adapted.energy_kind) == ("adsorption", "total")
    assert adapted.checkpoint.normalizers == NEW_NORMALIZERS
    assert not torch.allclose(outputs(plain), outputs(adapted))


def test_adapters_are_exchanged_without_reloading(base: Path, tmp_path: Path) -> None:
    paths = [written(tmp_path, f"{seed}.pt", seed=seed, rank=seed + 1) for seed in (0, 1)]
    alone = [outputs(Predictor(base))] + [outputs(Predictor(base, adapter=path)) for path in paths]
    predictor = Predictor(base)
    for which in (0, 1, 2, 1, 0, 2):
        predictor.use_adapter(None if which == 0 else paths[which - 1])
        assert torch.equal(outputs(predictor), alone[which])
    other = tmp_path / "other.pt"
    write_adapter(other, make_adapter(network(seed=5)))
    with pytest.raises(InputError, match="of another network"):
        predictor.use_adapter(other)
    assert torch.equal(outputs(predictor), alone[2])


def test_a_calculator_answers_with_the_adapter_in_use(base: Path, tmp_path: Path) -> None:
    path = written(tmp_path)
    atoms = H2O.copy()
    calculator = EquiformerV2Calculator(base, adapter=path)
    atoms.calc = calculator
    adapted = atoms.get_potential_energy()
    assert calculator.energy_kind == "total"
    calculator.predictor.use_adapter(None)
    plain = atoms.get_potential_energy()
    assert calculator.energy_kind == calculator.parameters["energy_kind"] == "adsorption"
    assert plain == pytest.approx(float(Predictor(base).predict(H2O)["energy"]))
    assert adapted != pytest.approx(plain)
    for wrong in ([base, base], calculator.predictor):
        with pytest.raises(InputError, match="belongs to one network"):
            EquiformerV2Calculator(wrong, adapter=path)


def test_a_committee_answers_with_the_adapters_in_use(base: Path, tmp_path: Path) -> None:
    other = network(seed=1)
    paths = written(tmp_path), tmp_path / "other.pt"
    write_adapter(paths[1], make_adapter(other))
    members = [Predictor(base), Predictor(write_network(tmp_path / "second.pt", other))]
    calculator = EquiformerV2Calculator(members)
    atoms = H2O.copy()
    atoms.calc = calculator
    plain = atoms.get_potential_energy()
    members[1].use_adapter(paths[1])
    with pytest.raises(InputError, match="different kinds of energy: adsorption, total"):
        atoms.get_potential_energy()
    members[0].use_adapter(paths[0])
    energies = [float(member.predict(H2O)["energy"]) for member in members]
    assert atoms.get_potential_energy() == pytest.approx(sum(energies) / 2) != pytest.approx(plain)
    assert calculator.energy_kind == calculator.parameters["energy_kind"] == "total"


def test_copies_of_a_calculator_exchange_their_adapters_alone(base: Path, tmp_path: Path) -> None:
    calculator = EquiformerV2Calculator(base, adapter=written(tmp_path))
    plain, adapted = outputs(Predictor(base)), outputs(calculator.predictor)
    copied = copy.deepcopy(calculator)
    copied.predictor.use_adapter(None)
    torch.testing.assert_close(outputs(copied.predictor), plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(calculator.predictor), adapted)
    calculator.predictor.use_adapter(None)
    assert torch.equal(outputs(calculator.predictor), plain)


@pytest.mark.parametrize("given", [5, ["adapter.pt"]])
def test_something_else_in_place_of_an_adapter(base: Path, given: object) -> None:
    with pytest.raises(InputError, match="is no adapter: give the path"):
        EquiformerV2Calculator(base, adapter=given)
    with pytest.raises(InputError, match="is no adapter: give the path"):
        Predictor(base).use_adapter(given)


def test_merged_is_an_ordinary_checkpoint_with_equal_answers(base: Path, tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "merged.pt"
    summary = merge_adapters(base, [path], out)
    merged = load_checkpoint(out)
    assert merged.energy_kind == summary["energy_kind"] == "total"
    assert merged.normalizers == NEW_NORMALIZERS
    assert not any("parametrizations" in name for name in merged.model.state_dict())
    assert merged.provenance["merged_from"]["adapters"] == ["adapter.pt"]
    own = read_adapter(path).describe()
    assert {name: summary[name] for name in OF_ADAPTERS} == {name: own[name] for name in OF_ADAPTERS}
    assert summary["bytes"] == out.stat().st_size
    difference = outputs(Predictor(out)) - outputs(Predictor(base, adapter=path))
    assert difference.abs().max() < 1e-6
    batch = batch_of(water(), cluster())
    assert torch.equal(Predictor(out).predict(batch)["forces"], Predictor(merged).predict(batch)["forces"])


def test_an_adapter_that_was_not_trained_leaves_the_training_data(tmp_path: Path) -> None:
    """So that warnings of what the network has never seen stay."""
    seen = {"frames": 3, "systems": 1, "elements": {"O": 3}}
    base = write_network(tmp_path / "base.pt", network(), training_data=seen)
    path = written(tmp_path)
    merge_adapters(base, [path], tmp_path / "merged.pt")
    for predictor in (Predictor(base, adapter=path), Predictor(tmp_path / "merged.pt")):
        assert predictor.checkpoint.provenance["training_data"] == seen


def test_adapters_of_several_seeds_are_merged_into_their_mean(base: Path, tmp_path: Path) -> None:
    paths = [written(tmp_path, f"{seed}.pt", seed=seed) for seed in (0, 1)]
    singles = []
    for path in paths:
        merge_adapters(base, [path], tmp_path / "one.pt")
        singles.append(load_checkpoint(tmp_path / "one.pt").model.state_dict())
    merge_adapters(base, paths, tmp_path / "both.pt")
    for name, value in load_checkpoint(tmp_path / "both.pt").model.state_dict().items():
        torch.testing.assert_close(value, (singles[0][name] + singles[1][name]) / 2, atol=1e-6, rtol=1e-6)


def test_adapters_that_do_not_go_together(base: Path, tmp_path: Path) -> None:
    first = written(tmp_path, rank=2)
    other = make_adapter(network(seed=7), rank=2)
    write_adapter(tmp_path / "foreign.pt", dataclasses.replace(other, source=str(tmp_path / "foreign.pt")))
    narrow = make_adapter(network(), rank=2, weights=("blocks.*",))
    write_adapter(tmp_path / "narrow.pt", narrow)
    units = dataclasses.replace(make_adapter(network(), rank=2), energy_kind="adsorption")
    write_adapter(tmp_path / "units.pt", units)
    for name, message in (
        (written(tmp_path, "rank.pt", rank=3), "different ranks, 2 and 3"),
        (tmp_path / "foreign.pt", "different networks"),
        (tmp_path / "narrow.pt", "change different weights"),
        (tmp_path / "units.pt", "different kinds of energy"),
    ):
        with pytest.raises(InputError, match=message):
            merge_adapters(base, [first, name], tmp_path / "out.pt")
        assert not (tmp_path / "out.pt").exists()


def test_files_that_are_taken_for_each_other(base: Path, tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(InputError, match="is an adapter and no network"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="is a checkpoint of a whole network"):
        read_adapter(base)
    with pytest.raises(InputError, match="predicts total energies; adsorption"):
        Predictor(base, adapter=path, energy_kind="adsorption")
    with pytest.raises(FileNotFoundError):
        Predictor(base, adapter=tmp_path / "missing.pt")


NOT_FINITE = torch.tensor([float("nan")])
DAMAGE = {
    "a newer version": ({"format_version": 2}, "newer than"),
    "no version": ({"format_version": "1"}, "no valid format_version"),
    "an unknown part": ({"more": 1}, "unknown parts"),
    "a shorter bitmap": ({"kept": torch.zeros(3, dtype=torch.uint8)}, "the bitmap has 3 bytes"),
    "fewer values": ({"values": torch.zeros(5)}, "and 5 are there"),
    "another precision": ({"values": torch.zeros(5, dtype=torch.float16)}, "float32"),
    "a large shape": ({"maps": {"a": {"shape": [2**30, 2**30], "rank": 2**29, "scale": 1.0}}}, "bitmap"),
    "a large rank": ({"maps": {"a": {"shape": [4, 4], "rank": 5, "scale": 1.0}}}, "rank"),
    "one dimension": ({"maps": {"a": {"shape": [4], "rank": 1, "scale": 1.0}}}, "shape"),
    "a scale that is no number": ({"maps": {"a": {"shape": [4, 4], "rank": 1, "scale": "1"}}}, "scale"),
    "no map": ({"maps": {"a": [1, 2]}}, "must be a dictionary"),
    "a base without a fingerprint": ({"base": {"file": "a"}}, "base must hold"),
    "a replaced text": ({"replaced": {"a": "b"}}, "must be a tensor"),
    "a replaced number that is none": ({"replaced": {"a": NOT_FINITE}}, "finite"),
    "another kind of energy": ({"energy_kind": "free"}, "energy_kind"),
    "other units": ({"units": {"energy": "Ha"}}, "units"),
    "other normalizers": ({"normalizers": {"energy": 1}}, "normalizers"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case: str, tmp_path: Path) -> None:
    changes, message = DAMAGE[case]
    path = written(tmp_path)
    torch.save(torch.load(path, weights_only=True) | changes, path)
    with pytest.raises(InputError, match=message) as told:
        read_adapter(path)
    assert "\n" not in str(told.value)


def test_a_parameter_that_the_network_lacks(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(network())
    wrong = dataclasses.replace(adapter, replaced={"force_block.nothing": torch.zeros(1)})
    with pytest.raises(InputError, match="replaces force_block"):
        Predictor(base, adapter=wrong)


def test_pruned_entries_cost_nothing(tmp_path: Path) -> None:
    sizes = []
    for keep in (1.0, 0.2):
        adapter = make_adapter(network(), rank=4)
        prune_adapter(adapter.maps, AdapterSettings(rank=4, keep=keep, method="random"), [], 0)
        fill(dict(adapter.maps))
        write_adapter(tmp_path / "a.pt", adapter)
        sizes.append(len(torch.load(tmp_path / "a.pt", weights_only=True)["values"]))
    assert sizes[1] == round(0.2 * sizes[0])
