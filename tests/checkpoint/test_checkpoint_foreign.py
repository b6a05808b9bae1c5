"""OCP and fairchem v1 files: the answers of fairchem's own calculator, and what is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import FIXTURES, load_file
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import Checkpoint, import_checkpoint, load_checkpoint
from equiformer2.errors import InputError

EXPECTED = load_file("ckpt_expected.pt")["results"]


def batch_of(system: dict[str, Any]) -> Batch:
    data = Data(
        pos=system["positions"].float(),
        atomic_numbers=system["numbers"],
        cell=system["cell"].float().view(1, 3, 3),
        pbc=system["pbc"].view(1, 3),
        natoms=len(system["numbers"]),
    )
    return Batch.from_data_list([data])


def check_answers(checkpoint: Checkpoint, expected: str) -> None:
    """Against fairchem's calculator, in eV and eV/Å.

    The reference draws its edge frames at random; `seedspread` is the largest deviation among six draws, so
    that another frame may deviate by a few of them. The energy's floor is some float32 roundings of 1 eV.
    """
    for name, system in EXPECTED[expected]["systems"].items():
        batch = batch_of(system)
        with torch.no_grad():
            found = checkpoint.normalizers.denormalize(checkpoint.model(batch), batch)
        energy_error = abs(found["energy"].item() - system["energy"])
        force_error = (found["forces"] - system["forces"]).abs().max().item()
        assert energy_error <= 4 * system["energy_seedspread"] + 1e-6, (name, energy_error)
        assert force_error <= 4 * system["forces_seedspread"], (name, force_error)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("file", "weights", "expected", "source_format"),
    [
        ("ckpt_v0_ocp_checkpoint.pt", "raw", "ckpt_v0_ocp_checkpoint", "ocp-v0"),
        # The run's best_checkpoint.pt was written at the last step: its answers are those of the average.
        ("ckpt_v0_ocp_checkpoint.pt", "averaged", "ckpt_v1_flat_best", "ocp-v0"),
        ("ckpt_v0_ocp_best.pt", "averaged", "ckpt_v0_ocp_best", "ocp-v0"),
        ("ckpt_v1_flat_best.pt", "averaged", "ckpt_v1_flat_best", "fairchem-v1-flat"),
        ("ckpt_v1_hydra_best.pt", "averaged", "ckpt_v1_hydra_best", "fairchem-v1-hydra"),
    ],
)
def test_answers_equal_fairchems_calculator(
    file: str, weights: str, expected: str, source_format: str
) -> None:
    checkpoint = load_checkpoint(FIXTURES / file, weights=weights)
    assert checkpoint.source_format == source_format
    assert checkpoint.energy_kind == "adsorption"
    check_answers(checkpoint, expected)


def as_flat_checkpoint(file: dict[str, Any]) -> dict[str, Any]:
    """The v0 file of a whole training state in fairchem v1's flat layout."""
    config = dict(file["config"])
    config["model"] = {"name": config["model"], **config.pop("model_attributes")}
    normalizers = {
        new: {"mean": file["normalizers"][old]["mean"], "rmsd": file["normalizers"][old]["std"]}
        for old, new in (("target", "energy"), ("grad_target", "forces"))
    }
    state = {key.removeprefix("module.module."): value for key, value in file["state_dict"].items()}
    return {**file, "config": config, "normalizers": normalizers, "state_dict": state, "elementrefs": {}}


def as_hydra_checkpoint(file: dict[str, Any]) -> dict[str, Any]:
    """The same with a backbone and heads, named as fairchem's converter names them."""
    file = as_flat_checkpoint(file)
    backbone = {key: value for key, value in file["config"]["model"].items() if key != "name"}
    heads = {
        "energy": {"module": "equiformer_v2_energy_head"},
        "forces": {"module": "equiformer_v2_force_head"},
    }
    file["config"]["model"] = {
        "name": "hydra",
        "backbone": {**backbone, "model": "equiformer_v2_backbone"},
        "heads": heads,
        "otf_graph": True,
    }
    state = {}
    for key, value in file["state_dict"].items():
        prefix = {"energy_block": "output_heads.energy.", "force_block": "output_heads.forces."}
        state["module." + prefix.get(key.split(".")[0], "backbone.") + key] = value
    file["state_dict"] = state
    return file


@pytest.fixture(scope="module")
def training_state() -> dict[str, Any]:
    return load_file("ckpt_v0_ocp_checkpoint.pt")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [as_flat_checkpoint, as_hydra_checkpoint])
@pytest.mark.parametrize("weights", ["raw", "averaged"])
def test_training_states_of_v1_layouts(
    tmp_path: Path, training_state: dict[str, Any], layout: Callable[..., dict[str, Any]], weights: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(layout(training_state), path)
    checkpoint = load_checkpoint(path, weights=weights)
    expected = "ckpt_v1_flat_checkpoint" if weights == "raw" else "ckpt_v1_flat_best"
    check_answers(checkpoint, expected)


def test_the_average_is_the_default_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="equiformer2")
    checkpoint = load_checkpoint(FIXTURES / "ckpt_v0_ocp_checkpoint.pt")
    assert checkpoint.weights == "averaged"
    assert checkpoint.available_weights == ("raw", "averaged")
    assert "(ocp-v0): using the averaged weights; the file also holds the raw weights" in caplog.text


def test_a_best_checkpoint_holds_the_average_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="equiformer2")
    assert load_checkpoint(FIXTURES / "ckpt_v1_flat_best.pt").available_weights == ("averaged",)
    assert "using the averaged weights; the file also holds no others" in caplog.text
    with pytest.raises(InputError, match="does not hold raw weights, only averaged ones"):
        load_checkpoint(FIXTURES / "ckpt_v1_flat_best.pt", weights="raw")


def test_the_training_configuration_is_kept() -> None:
    provenance = load_checkpoint(FIXTURES / "ckpt_v0_ocp_checkpoint.pt").provenance
    assert provenance["training_config"]["dataset"]["src"] == "datasets/oc20/s2ef/all_md/train/"
    assert provenance["step"] == 250000
    assert "OC20's for adsorption energies" in provenance["energy_kind_from"]


class Edited:
    """A foreign file with changes, written and loaded."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.file = load_file(name)

    def load(self, **options: Any) -> Checkpoint:
        torch.save(self.file, self.path)
        return load_checkpoint(self.path, **options)


@pytest.fixture
def v0(tmp_path: Path) -> Edited:
    return Edited(tmp_path / "edited.pt", "ckpt_v0_ocp_checkpoint.pt")


@pytest.fixture
def flat(tmp_path: Path) -> Edited:
    return Edited(tmp_path / "edited.pt", "ckpt_v1_flat_best.pt")


@pytest.fixture
def hydra(tmp_path: Path) -> Edited:
    return Edited(tmp_path / "edited.pt", "ckpt_v1_hydra_best.pt")


def test_without_an_average_in_training_the_best_file_is_raw(flat: Edited) -> None:
    del flat.file["config"]["optim"]["ema_decay"]
    assert flat.load().available_weights == ("raw",)


def test_a_training_state_without_average_is_raw(v0: Edited) -> None:
    v0.file["ema"] = None
    assert v0.load().available_weights == ("raw",)


def test_an_average_that_does_not_fit_is_refused(v0: Edited) -> None:
    shadow = v0.file["ema"]["shadow_params"]
    shadow[0], shadow[1] = shadow[1], shadow[0]
    with pytest.raises(InputError, match=r"first other shape at sphere_embedding\.weight"):
        v0.load()
    v0.file["ema"]["shadow_params"] = shadow[2:]
    with pytest.raises(InputError, match="128 tensors for 130 parameters"):
        v0.load()
    v0.file["ema"] = {"decay": 0.9}
    with pytest.raises(InputError, match="not a list of tensors"):
        v0.load()


def test_a_frozen_backbone_has_no_average(hydra: Edited) -> None:
    names = [key for key in hydra.file["state_dict"] if "output_heads" in key]
    names = [key for key in names if key.rsplit(".", 1)[1] in ("weight", "bias", "alpha_dot")]
    hydra.file["config"]["model"]["freeze_backbone"] = True
    state = hydra.file["state_dict"]
    hydra.file["ema"] = {"shadow_params": [2 * state[key] for key in names]}
    model = hydra.load(weights="averaged").model.state_dict()
    for name in ("blocks.0.ga.alpha_dot", "sphere_embedding.weight"):
        assert torch.equal(model[name], state[f"backbone.{name}"])
    name = "force_block.alpha_dot"
    assert torch.equal(model[name], 2 * state[f"output_heads.forces.{name}"])


def test_the_kind_of_energy_is_never_guessed(flat: Edited) -> None:
    flat.file["normalizers"]["energy"]["mean"] = torch.tensor(0.5)
    with pytest.raises(InputError, match=r"edited\.pt .*energy_kind="):
        flat.load()
    assert flat.load(energy_kind="total").energy_kind == "total"
    assert flat.load(energy_kind="total").provenance["energy_kind_from"] == "given on import"
    flat.file["config"]["dataset"]["total_energy"] = True
    assert flat.load().energy_kind == "total"
    with pytest.raises(InputError, match="'adsorption' or 'total', not 'relaxed'"):
        flat.load(energy_kind="relaxed")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("known_from", ["normalizer", "total_energy", "element references"])
def test_the_kind_that_a_file_shows_cannot_be_overridden(flat: Edited, known_from: str) -> None:
    if known_from == "total_energy":
        flat.file["config"]["dataset"]["total_energy"] = True
    elif known_from == "element references":
        flat.file["elementrefs"] = {"energy": {"element_references": torch.linspace(-5.0, 5.0, 119)}}
    shown, other = ("adsorption", "total") if known_from == "normalizer" else ("total", "adsorption")
    checkpoint = flat.load(energy_kind=shown)
    assert checkpoint.energy_kind == shown
    assert checkpoint.provenance["energy_kind_from"] != "given on import"
    message = rf"edited\.pt predicts {shown} energies \(known from .*\); {other} energies were asked for"
    with pytest.raises(InputError, match=message):
        flat.load(energy_kind=other)
    with pytest.raises(InputError, match=message):
        import_checkpoint(flat.path, flat.path.with_name("native.pt"), energy_kind=other)
    assert not flat.path.with_name("native.pt").exists()


def test_element_references_become_linear_references(flat: Edited) -> None:
    references = torch.linspace(-5.0, 5.0, 119)
    flat.file["elementrefs"] = {"energy": {"element_references": references}}
    checkpoint = flat.load()
    assert checkpoint.energy_kind == "total"
    system = EXPECTED["ckpt_v1_flat_best"]["systems"]["skewed"]
    batch = batch_of(system)
    with torch.no_grad():
        energy = checkpoint.normalizers.denormalize(checkpoint.model(batch), batch)["energy"].item()
    assert energy == pytest.approx(system["energy"] + references[system["numbers"]].sum().item(), abs=1e-5)


def test_references_that_the_file_does_not_hold_are_refused(flat: Edited) -> None:
    """fairchem can subtract them while it reads its data; then only the table's path is in the file."""
    flat.file["config"]["dataset"] |= {"total_energy": True, "lin_ref": "/data/oc22_linfit_coeffs.npz"}
    message = r"edited\.pt was trained on energies less .*oc22_linfit_coeffs.*, which the file does not hold"
    with pytest.raises(InputError, match=message):
        flat.load(energy_kind="total")
    flat.file["elementrefs"] = {"energy": {"element_references": torch.linspace(-5.0, 5.0, 119)}}
    assert flat.load().energy_kind == "total"


def test_linear_references_in_the_network_are_scaled(v0: Edited) -> None:
    """The reference adds `energy_lin_ref` before it multiplies with the standard deviation."""
    references = torch.linspace(-1.0, 1.0, 90)
    v0.file["state_dict"]["module.module.energy_lin_ref"] = references
    v0.file["config"]["model_attributes"] |= {"use_energy_lin_ref": True, "load_energy_lin_ref": True}
    checkpoint = v0.load(weights="raw")
    assert checkpoint.energy_kind == "total"
    system = EXPECTED["ckpt_v0_ocp_checkpoint"]["systems"]["ethanol_box"]
    batch = batch_of(system)
    with torch.no_grad():
        energy = checkpoint.normalizers.denormalize(checkpoint.model(batch), batch)["energy"].item()
    shift = 2.887317180633545 * references[system["numbers"]].double().sum().item()
    assert energy == pytest.approx(system["energy"] + shift, abs=1e-5)


def test_missing_normalizers_mean_eV(flat: Edited) -> None:
    flat.file["normalizers"] = {}
    normalizers = flat.load(energy_kind="adsorption").normalizers
    assert (normalizers.energy.mean, normalizers.energy.std, normalizers.forces.std) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stress": {"mean": torch.tensor(0.0), "rmsd": torch.tensor(1.0)}}, "not supported: stress"),
        ({"energy": {"mean": torch.tensor(0.0)}}, "normalizer energy needs one mean and one std"),
        ({"energy": {"mean": torch.zeros(2), "rmsd": torch.ones(2)}}, "normalizer energy needs one mean"),
        ({"forces": {"mean": torch.tensor(0.5), "rmsd": torch.tensor(1.0)}}, "must have mean 0"),
        ({"target": {"mean": torch.tensor(0.0), "std": torch.tensor(1.0)}}, "not supported: target"),
    ],
)
def test_normalizers_are_checked(flat: Edited, values: dict, message: str) -> None:
    flat.file["normalizers"] |= values
    with pytest.raises(InputError, match=message):
        flat.load()


def test_checkpoints_of_other_models_are_named(v0: Edited, flat: Edited, hydra: Edited) -> None:
    v0.file["config"]["model"] = "gemnet_oc"
    with pytest.raises(InputError, match=r"edited\.pt: .*'gemnet_oc'"):
        v0.load()
    flat.file["config"]["model"]["name"] = "escn"
    with pytest.raises(InputError, match="called 'escn'"):
        flat.load()
    hydra.file["config"]["model"]["backbone"]["model"] = "equiformer_v2_dens_backbone"
    with pytest.raises(InputError, match="called 'equiformer_v2_dens_backbone'"):
        hydra.load()


def test_heads_are_checked(hydra: Edited) -> None:
    heads = hydra.file["config"]["model"]["heads"]
    heads["stress"] = {"module": "rank2_symmetric_head"}
    with pytest.raises(InputError, match=r"head 'stress' .*'rank2_symmetric_head'"):
        hydra.load()
    del heads["stress"]
    heads["energy"] = {"module": "equiformerV2_scalar_head", "reduce": "mean", "output_name": "energy"}
    with pytest.raises(InputError, match=r"head 'energy' .*: reduce"):
        hydra.load()
    del heads["energy"]
    with pytest.raises(InputError, match=r"one energy head .*\['forces'\]"):
        hydra.load()


def test_a_hydra_without_force_head_has_no_forces(hydra: Edited) -> None:
    del hydra.file["config"]["model"]["heads"]["forces"]
    with pytest.raises(InputError, match=r"25 unknown: force_block\.alpha_dot"):
        hydra.load()
    state = hydra.file["state_dict"]
    hydra.file["state_dict"] = {key: value for key, value in state.items() if "force_block" not in key}
    checkpoint = hydra.load()
    assert not checkpoint.config.regress_forces
    assert set(checkpoint.model(batch_of(EXPECTED["ckpt_v1_hydra_best"]["systems"]["nacl_prim"]))) == {
        "energy"
    }


def test_unknown_parts_are_listed(flat: Edited) -> None:
    flat.file["scale_dict"] = {"a": 1.0}
    with pytest.raises(InputError, match="scale_dict"):
        flat.load()


def test_the_layout_must_be_stated(v0: Edited, flat: Edited) -> None:
    del v0.file["config"]["model_attributes"]
    with pytest.raises(InputError, match=r"config\['model_attributes'\] is missing"):
        v0.load()
    del flat.file["config"]["model"]
    with pytest.raises(InputError, match=r"config\['model'\] is missing"):
        flat.load()
