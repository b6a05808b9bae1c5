"""Checkpoints, configurations, plans, routers and states from elsewhere: one sentence, soon, or the value."""

import collections
import copy
import io
import json
import math
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch_geometric.data import Batch, Data

from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.reference import config_from_reference
from equiformer2.checkpoint.tensor_files import plain
from equiformer2.devices import usable_device
from equiformer2.errors import InputError
from equiformer2.inference import EquiformerV2Calculator, Predictor
from equiformer2.model.block_config import BlockConfig
from equiformer2.model.grid_resolution import GridResolution
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.cost.time_table import TimeTable
from equiformer2.pruning.routing import load_router
from equiformer2.pruning.routing.router_state import RoutingState
from equiformer2.pruning.routing.schedule_objective import Measurement
from equiformer2.pruning.structured.search import SearchState

SMALL: dict[str, Any] = {
    "num_layers": 1,
    "sphere_channels": 4,
    "attn_hidden_channels": 4,
    "num_heads": 1,
    "attn_alpha_channels": 2,
    "attn_value_channels": 2,
    "ffn_hidden_channels": 4,
    "edge_channels": 4,
    "lmax": 1,
    "mmax": 1,
    "grid_resolution": 6,
    "num_distance_basis": 8,
    "max_num_elements": 32,
    "max_radius": 4.0,
    "avg_num_nodes": 1.0,
}
CHECKPOINT_FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoint"
SOON = 10.0
"""Seconds, on a busy machine; the hangs that are meant take minutes or for ever."""


@pytest.fixture(scope="module")
def network() -> EquiformerV2:
    return EquiformerV2(ModelConfig(**SMALL))


@pytest.fixture(scope="module")
def native(network: EquiformerV2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "model.pt"
    save_checkpoint(
        path,
        model=network,
        raw_state=network.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(Normalizer(0.5, 2.0), Normalizer(0.0, 1.5)),
        energy_kind="adsorption",
        provenance={},
    )
    return path


@contextmanager
def soon() -> Iterator[None]:
    before = time.monotonic()
    yield
    assert time.monotonic() - before < SOON


def co(distance: float = 1.2) -> Data:
    return Data(
        pos=torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.4, distance]]),
        atomic_numbers=torch.tensor([6, 8]),
        cell=torch.zeros(1, 3, 3),
        pbc=torch.zeros(1, 3, dtype=torch.bool),
        natoms=2,
    )


# ---- ModelConfig: type, range and size of every field

WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("smooth_cutoff", "false", "true or false"),
    ("use_gate_act", "False", "true or false"),
    ("use_grid_mlp", 0, "true or false"),
    ("use_attn_renorm", 1.0, "true or false"),
    ("stress", None, "true or false"),
    ("enforce_max_neighbors_strictly", [True], "true or false"),
    ("avg_degree", math.inf, "at most"),
    ("avg_degree", "23.4", "must be a number"),
    ("avg_num_nodes", math.nan, "finite"),
    ("avg_num_nodes", True, "must be a number"),
    ("avg_num_nodes", 1e-300, "at least"),
    ("max_radius", 1e9, "at most"),
    ("max_radius", 10**400, "at most"),
    ("max_radius", 1e-200, "at least"),
    ("max_radius", 12 + 0j, "must be a number"),
    ("max_neighbors", 20.5, "whole number"),
    ("max_neighbors", 10**30, "at most"),
    ("num_layers", 10**9, "at most 256"),
    ("num_layers", 3.0, r"whole number \(write 3\)"),
    ("num_layers", np.float64(3.0), r"whole number \(write 3\)"),
    ("num_layers", True, "whole number"),
    ("num_layers", "3", "whole number"),
    ("num_layers", torch.tensor(3), "whole number"),
    ("lmax", 1000, "at most 11"),
    ("mmax", -1, "at least 0"),
    ("num_heads", -8, "at least 1"),
    ("sphere_channels", 10**12, "at most"),
    ("sphere_channels", [128], "whole number"),
    ("num_distance_basis", 10**7, "at most"),
    ("max_num_elements", 10**6, "at most"),
    ("grid_resolution", 10**5, "at most"),
    ("grid_resolution", "18", "whole number"),
    ("grid_resolution", {"attn": (6, 7.0), "ffn": (6, 7)}, "whole number"),
    ("grid_resolution", {"attn": (6, True), "ffn": (6, 7)}, "whole number"),
    ("grid_resolution", {"attn": "67", "ffn": (6, 7)}, "two whole numbers"),
    ("norm_type", ["layer_norm"], "must be one of"),
    ("weight_init", 1, "must be one of"),
    ("forces", None, "must be one of"),
    ("alpha_drop", -0.1, "at least 0"),
    ("alpha_drop", np.bool_(True), "must be a number"),
    ("drop_path_rate", 1.0, "below 1"),
    ("proj_drop", "0", "must be a number"),
    ("blocks", "ab", "must be a list"),
    ("blocks", [None], "dictionary"),
    ("blocks", [{}] * 300, "at most 256"),
    ("blocks", [{"num_heads": 2.0}], "whole number"),
    ("blocks", [{"attention": "no"}], "true or false"),
    ("blocks", [BlockConfig(lmax="x")], "whole number"),  # type: ignore[arg-type]
    ("force_head", {"mmax": 99}, "at most"),
    ("energy_head", {3: 1}, "keys must be text"),
    ("force_head", [1], "dictionary"),
]


@pytest.mark.parametrize(("key", "value", "rule"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_a_field_is_refused_by_name(key: str, value: Any, rule: str) -> None:
    with soon(), pytest.raises(InputError, match=rf"model\.{key}.*{rule}"):
        ModelConfig(**(SMALL | {key: value}))


EXACT_VALUES: list[tuple[str, Any, Any]] = [
    ("num_layers", np.int64(2), 2),
    ("max_radius", 5, 5.0),
    ("max_radius", np.float32(5.5), 5.5),
    ("smooth_cutoff", np.bool_(True), True),
    ("norm_type", np.str_("layer_norm"), "layer_norm"),
    ("max_neighbors", 10**9, 10**9),
    ("grid_resolution", {"attn": [np.int32(6), 7], "ffn": [6, 7]}, GridResolution((6, 7), (6, 7))),
    ("blocks", [{"num_heads": np.int64(1)}], (BlockConfig(num_heads=1),)),
]


@pytest.mark.parametrize(("key", "value", "expected"), EXACT_VALUES, ids=lambda value: str(value)[:30])
def test_a_field_becomes_a_plain_value(key: str, value: Any, expected: Any) -> None:
    found = getattr(ModelConfig(**(SMALL | {key: value})), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("key", ModelConfig.__dataclass_fields__)
def test_every_field_is_checked(key: str) -> None:
    with pytest.raises(InputError, match=rf"model\.{key}"):
        ModelConfig(**(SMALL | {key: object()}))


FOREIGN_VALUES: list[tuple[str, Any, str]] = [
    ("regress_forces", "False", "regress_forces.*true or false"),
    ("use_grid_mlp", "true", "use_grid_mlp.*true or false"),
    ("use_gate_act", None, "use_gate_act.*true or false"),
    ("share_atom_edge_embedding", 1, "share_atom_edge_embedding.*true or false"),
    ("lmax_list", [4.0], "lmax.*whole number"),
    ("lmax_list", [1000], "lmax.*at most"),
    ("lmax_list", torch.tensor([2, 3]), "one resolution"),
    ("num_layers", 10**9, "num_layers.*at most"),
    ("max_radius", torch.ones(3), "max_radius.*number"),
    ("use_pbc", "True", "use_pbc='True'"),
    ("name", ["equiformer_v2"], "model called"),
    ("heads", {"energy": 3}, "hydra keys"),
    ("avg_degree", math.inf, "avg_degree"),
    ("nested", [[[[[[]]]]]], "does not know"),
]


@pytest.mark.parametrize(("key", "value", "rule"), FOREIGN_VALUES, ids=lambda value: str(value)[:30])
def test_a_foreign_configuration_is_refused_by_key(key: str, value: Any, rule: str) -> None:
    with soon(), pytest.raises(InputError, match=rule):
        config_from_reference({"name": "equiformer_v2", "max_radius": 5.0, key: value})


def test_a_network_larger_than_the_memory_is_not_begun() -> None:
    config = ModelConfig(num_layers=256, sphere_channels=2**14, attn_hidden_channels=2**14)
    with soon(), pytest.raises(InputError, match="GiB of memory"):
        EquiformerV2(config)


# ---- native checkpoints with other contents

Change = Callable[[dict[str, Any]], Any]


def put(*keys: Any) -> Change:
    """A change that puts the last of `keys` at the place that the others lead to."""

    def change(content: dict[str, Any]) -> None:
        *path, last, value = keys
        for key in path:
            content = content[key]
        content[last] = value

    return change


def weight(make: Callable[[torch.Tensor], Any]) -> Change:
    def change(content: dict[str, Any]) -> None:
        raw = content["weights"]["raw"]
        raw["norm.affine_weight"] = make(raw["norm.affine_weight"])

    return change


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def many_references() -> list[Any]:
    value: list[Any] = [0]
    for _ in range(30):
        value = [value, value, value]
    return value


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def highest_degree(content: dict[str, Any]) -> None:
    content["model_config"] |= {"lmax": 11, "grid_resolution": None}


def without_ema(content: dict[str, Any]) -> None:
    content["config"]["optim"] = {"ema_decay": "0"}


def all_layers(content: dict[str, Any]) -> None:
    content["model_config"] |= {"num_layers": 256}


NATIVE: list[tuple[str, Change, str]] = [
    ("text for a switch", put("model_config", "smooth_cutoff", "false"), r"model\.smooth_cutoff"),
    ("infinite average", put("model_config", "avg_degree", math.inf), r"model\.avg_degree"),
    ("1e9 layers", put("model_config", "num_layers", 10**9), r"model\.num_layers"),
    ("256 layers", all_layers, "num_layers is 256"),
    ("degree 11", highest_degree, "degrees in the norm"),
    ("wide", put("model_config", "sphere_channels", 2**14), "numbers"),
    ("many basis functions", put("model_config", "num_distance_basis", 2**14), "of another shape|numbers"),
    ("key of another type", lambda c: c["model_config"].update({3: 4}), "key 3: keys must be text"),
    ("meta", weight(lambda t: torch.empty_like(t, device="meta")), "norm.affine_weight.* meta tensor"),
    ("sparse", weight(lambda t: t.to_sparse()), "norm.affine_weight.* sparse"),
    ("sparse rows", weight(lambda t: t.to_sparse_csr()), "norm.affine_weight.* sparse"),
    ("quantised", weight(quantised), "norm.affine_weight.* quantised"),
    ("float8", weight(lambda t: t.to(torch.float8_e4m3fn)), "precision.* norm.affine_weight float8"),
    ("complex", weight(lambda t: t.to(torch.complex64)), "not floating point: norm.affine_weight"),
    ("whole numbers", weight(lambda t: t.long()), "not floating point: norm.affine_weight"),
    ("switches", weight(lambda t: t.bool()), "not floating point: norm.affine_weight"),
    ("NaN", weight(lambda t: t * math.nan), "not finite: norm.affine_weight"),
    ("beyond float32", weight(lambda t: t.double() * 1e300), "not finite: norm.affine_weight"),
    ("expanded", weight(lambda t: torch.zeros(1).expand(10**9, 10**3)), "repeats 4 bytes"),
    ("expanded, right shape", weight(lambda t: torch.ones(1).expand(t.shape)), "repeats 4 bytes"),
    ("transposed", weight(lambda t: torch.ones(5, 7)), "degrees in the norm"),
    ("scalar", weight(lambda t: torch.ones(())), "another shape: norm.affine_weight"),
    ("a list of numbers", weight(lambda t: t.tolist()), "norm.affine_weight is a list"),
    ("weights by number", lambda c: c["weights"]["raw"].update({7: torch.ones(1)}), "keys must be text"),
    ("no weights", put("weights", {}), "holds no weights"),
    ("weights of another kind", put("weights", {("a", "b"): {}}), "keys must be text|unknown kind"),
    ("references: text", put("normalizers", "linear_references", "none"), "linear_references"),
    ("references: dictionary", put("normalizers", "linear_references", {1: 2.0}), "linear_references"),
    ("references: NaN", put("normalizers", "linear_references", torch.tensor([0, math.nan])), "not finite"),
    ("references: whole", put("normalizers", "linear_references", torch.arange(90)), "linear_references"),
    (
        "references: complex",
        put("normalizers", "linear_references", torch.ones(90) * 1j),
        "linear_references",
    ),
    ("references: table", put("normalizers", "linear_references", torch.ones(9, 2)), r"shape \(9, 2\)"),
    ("references: empty", put("normalizers", "linear_references", torch.ones(0)), r"shape \(0,\)"),
    ("references: long", put("normalizers", "linear_references", torch.ones(9999)), r"shape \(9999,\)"),
    ("references: text in a list", put("normalizers", "linear_references", ["1"]), r"linear_references\[0\]"),
    ("references: a number", put("normalizers", "linear_references", 3.0), "linear_references"),
    ("mean: text", put("normalizers", "energy", "mean", "0.5"), r"normalizers\.energy.*mean = '0.5'"),
    ("mean: switch", put("normalizers", "energy", "mean", True), r"normalizers\.energy.*mean"),
    ("mean: NaN", put("normalizers", "energy", "mean", math.nan), r"normalizers\.energy.*mean = nan"),
    ("std: zero", put("normalizers", "energy", "std", 0.0), r"normalizers\.energy.*std = 0"),
    ("std: negative", put("normalizers", "forces", "std", -1.0), r"normalizers\.forces.*std = -1"),
    ("std: infinite", put("normalizers", "forces", "std", math.inf), r"normalizers\.forces.*std = inf"),
    ("std: huge", put("normalizers", "forces", "std", 10**400), r"normalizers\.forces.*401 digits"),
    ("std: None", put("normalizers", "forces", "std", None), r"normalizers\.forces.*std = None"),
    ("forces' mean", put("normalizers", "forces", "mean", 0.1), "must have mean 0"),
    ("a normalizer too many", put("normalizers", "stress", {}), "normalizers must hold"),
    ("normalizer: list", put("normalizers", "energy", [0.0, 1.0]), r"normalizers\.energy must be a dict"),
    ("kind: list", put("energy_kind", ["total"]), "energy_kind must be"),
    ("units", put("units", "energy", torch.ones(2)), "is in units"),
    ("version: huge", put("format_version", 10**60), "61 digits, newer than"),
    ("version: switch", put("format_version", True), "format_version"),
    ("deep provenance", put("provenance", "log", deep(150)), "nested more than"),
    ("a provenance of 3^30 values", put("provenance", "log", many_references()), "holds more than"),
    ("part by number", lambda c: c.update({1: 2}), r"unknown parts \['1'\]"),
    ("provenance: list", put("provenance", []), "provenance must be a dictionary"),
]


@pytest.mark.parametrize(("change", "sentence"), [case[1:] for case in NATIVE], ids=[c[0] for c in NATIVE])
def test_a_changed_native_file_is_refused(
    change: Change, sentence: str, native: Path, tmp_path: Path
) -> None:
    content = torch.load(native, weights_only=True)
    change(content)
    path = tmp_path / "changed.pt"
    torch.save(content, path)
    with soon(), pytest.raises(InputError, match=sentence) as caught:
        load_checkpoint(path)
    assert "changed.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_provenance_is_made_of_what_json_holds(native: Path, tmp_path: Path) -> None:
    content = torch.load(native, weights_only=True)
    content["provenance"] = {
        "loss": math.nan,
        "seed": 10**60,
        "name": "half \ud800 pair",
        "tensor": torch.ones(2),
        ("a", 1): {1, 2},
    }
    torch.save(content, tmp_path / "model.pt")
    provenance = load_checkpoint(tmp_path / "model.pt").provenance
    assert json.loads(json.dumps(provenance, allow_nan=False).encode()) == provenance
    assert provenance["loss"] == "nan"
    assert provenance["tensor"] == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_weights_are_read_as_float32(dtype: torch.dtype, native: Path, tmp_path: Path) -> None:
    content = torch.load(native, weights_only=True)
    raw = content["weights"]["raw"]
    content["weights"]["raw"] = {name: value.to(dtype) for name, value in raw.items()}
    torch.save(content, tmp_path / "model.pt")
    state = load_checkpoint(tmp_path / "model.pt").model.state_dict()
    assert all(torch.equal(state[name], value.to(dtype).float()) for name, value in raw.items())


# ---- foreign checkpoints with other contents

FOREIGN: list[tuple[str, Change, str]] = [
    ("config: list of names", put("config", "model", ["equiformer_v2"]), "model"),
    ("switch as text", put("config", "model", "use_grid_mlp", "False"), "use_grid_mlp"),
    ("1e9 layers", put("config", "model", "num_layers", 10**9), "num_layers"),
    ("optim: text", put("config", "optim", "adam"), "optim"),
    (
        "ema_decay: text",
        lambda c: (c.pop("ema", None), c["config"].update(optim={"ema_decay": "0"})),
        "ema_decay",
    ),
    ("ema: a list", put("ema", [1]), "shadow_params"),
    ("ema: numbers", put("ema", {"shadow_params": [1.0]}), "shadow_params"),
    ("normalizer: text", put("normalizers", "energy", "mean", "0"), "energy needs one mean"),
    ("normalizer: vector", put("normalizers", "energy", "mean", torch.ones(3)), "energy needs one mean"),
    (
        "normalizer: complex",
        put("normalizers", "energy", "mean", torch.ones(1) * 1j),
        "energy needs one mean",
    ),
    ("normalizer: a list", put("normalizers", "energy", [1]), "normalizer energy must be a dictionary"),
    ("normalizer by number", put("normalizers", 3, {}), "not supported: 3"),
    ("references: list", put("elementrefs", [1]), "elementrefs"),
    ("references: number", put("elementrefs", {"energy": 3}), "elementrefs"),
    (
        "references: vectors",
        put("elementrefs", {"energy": {"element_references": torch.ones(3, 3)}}),
        "shape",
    ),
    ("state: text", put("state_dict", "x", "y"), "x is not a tensor"),
    ("state: by number", put("state_dict", 3, torch.ones(1)), "3"),
    ("sparse", put("state_dict", "x", torch.ones(3).to_sparse()), "x.* sparse"),
    ("part by number", lambda c: c.update({1: 2}), "parts that no OCP"),
    ("freeze_backbone: text", put("config", "model", "freeze_backbone", "no"), "freeze_backbone"),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("change", "sentence"), [case[1:] for case in FOREIGN], ids=[c[0] for c in FOREIGN])
def test_a_changed_foreign_file_is_refused(change: Change, sentence: str, tmp_path: Path) -> None:
    content = torch.load(CHECKPOINT_FIXTURES / "ckpt_v1_flat_best.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.pt")
    with soon(), pytest.raises(InputError, match=sentence):
        load_checkpoint(tmp_path / "changed.pt", energy_kind="adsorption")


# ---- files


def rezipped(source: Path, target: Path, **changes: Any) -> None:
    """A copy of a checkpoint's archive with another compression or other records."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", changes.get("how", 0)) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record.filename))
        for name, content in changes.get("more", ()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new.writestr(name, content)


def zip_bomb(source: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new, zipfile.ZipFile(source) as old:
        root = old.namelist()[0].split("/")[0]
        new.writestr(f"{root}/data.pkl", old.read(f"{root}/data.pkl"))
        with new.open(f"{root}/data/0", "w", force_zip64=True) as record:
            for _ in range(4):
                record.write(bytes(1 << 24))


def holding(content: bytes) -> Callable[[Path, Path], Any]:
    return lambda _, target: target.write_bytes(content)


def saved(content: Any) -> Callable[[Path, Path], Any]:
    return lambda _, target: torch.save(content, target)


DEEP_PICKLE = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
LONG_TEXT = b"\x80\x04\x8d" + (2**62).to_bytes(8, "little")
LIGHTNING = {"pytorch-lightning_version": "2", "state_dict": {}}


def fifo(_: Path, target: Path) -> None:
    os.mkfifo(target)


def circle(_: Path, target: Path) -> None:
    target.symlink_to(target)


FILES: list[tuple[str, Callable[[Path, Path], Any], str]] = [
    ("compressed", lambda s, t: rezipped(s, t, how=zipfile.ZIP_DEFLATED), "is compressed"),
    ("64 MiB of zeros", zip_bomb, "is compressed"),
    (
        "two records of a name",
        lambda s, t: rezipped(s, t, more=[("model/data.pkl", b"")]),
        "two records|damaged",
    ),
    ("a named pipe", fifo, "named pipe"),
    ("a link to itself", circle, "circle"),
    ("a folder", lambda s, t: t.mkdir(), "is a folder"),
    ("a pickle of a deep list", holding(DEEP_PICKLE), "changed.pt"),
    ("a claimed text of 2^62 bytes", holding(LONG_TEXT), "changed.pt"),
    ("an empty archive", holding(b"PK\x05\x06" + bytes(18)), "changed.pt"),
    ("a state of Lightning", saved(LIGHTNING), "resum"),
    ("a counter", saved(collections.Counter("ab")), "Counter|holds|no equiformer2"),
    ("a tensor", saved(torch.ones(3)), "holds a Tensor"),
    ("nothing", holding(b""), "is empty"),
]


@pytest.mark.parametrize(("make", "sentence"), [case[1:] for case in FILES], ids=[c[0] for c in FILES])
def test_a_file_that_is_no_checkpoint_is_refused_soon(
    make: Callable[[Path, Path], Any], sentence: str, native: Path, tmp_path: Path
) -> None:
    path = tmp_path / "changed.pt"
    make(native, path)
    with soon(), pytest.raises(InputError, match=sentence):
        load_checkpoint(path)


def test_a_nul_in_the_path_is_one_sentence() -> None:
    with pytest.raises(InputError, match="not a possible file name"):
        load_checkpoint("model\0.pt")


@pytest.mark.slow
def test_changed_bytes_raise_nothing_but_input_errors(native: Path, tmp_path: Path) -> None:
    """A short fuzz of the pickle in the archive, with right checksums."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(native) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (each for each in records if each.endswith("data.pkl"))
    end, refused = time.monotonic() + 5, 0
    while time.monotonic() < end:
        content = bytearray(records[name])
        for _ in range(random.integers(1, 4)):
            content[random.integers(len(content))] = random.integers(256)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for other, value in records.items():
                archive.writestr(other, bytes(content) if other == name else value)
        (tmp_path / "fuzz.pt").write_bytes(buffer.getvalue())
        try:
            load_checkpoint(tmp_path / "fuzz.pt")
        except InputError:
            refused += 1
    assert refused > 0


# ---- devices, torch's defaults, modes

DEVICES = ["meta", "cuda:99", "xpu", "privateuseone", "cpu:1", "", "gpu", None, 3.5, "hpu", "mkldnn"]


@pytest.mark.filterwarnings("ignore:'mkldnn'")
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_device_that_is_not_there_is_one_sentence(device: Any, native: Path) -> None:
    for use in (usable_device, lambda d: load_checkpoint(native, device=d), lambda d: Predictor(native, d)):
        with pytest.raises(InputError, match=r"the device .*cpu") as caught:
            use(device)
        assert "\n" not in str(caught.value)


@contextmanager
def torch_defaults(dtype: torch.dtype = torch.float32, device: str | None = None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DEFAULTS: list[dict[str, Any]] = [
    {"dtype": torch.float64},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"device": "meta"},
    {"device": "meta", "dtype": torch.float64},
]


def answers(native: Path) -> list[torch.Tensor]:
    torch.manual_seed(3)
    built = EquiformerV2(ModelConfig(**SMALL))
    atoms = Atoms("COCu", [[0, 0, 0], [0, 0.2, 1.2], [1.9, 0.1, 0]], cell=[6, 6, 9], pbc=True)
    atoms.calc = EquiformerV2Calculator(native)
    calculated = np.append(atoms.get_forces().ravel(), atoms.get_potential_energy())
    loaded = load_checkpoint(native)
    gradient = EquiformerV2(ModelConfig(**SMALL, forces="gradient"))
    found = [*built.state_dict().values(), *loaded.model.state_dict().values()]
    for network in (built, loaded.model, gradient):
        found += network(BATCH).values()
    found += Predictor(native).predict(BATCH).values()
    out = built(BATCH)
    (out["energy"].sum() + out["forces"].sum()).backward()
    found += [parameter.grad for parameter in built.parameters() if parameter.grad is not None]
    return [*found, torch.from_numpy(calculated)]


BATCH = Batch.from_data_list([co(), co(1.4)])


@pytest.mark.parametrize(
    "defaults",
    [*(pytest.param(each, marks=pytest.mark.slow) for each in DEFAULTS[:-1]), DEFAULTS[-1]],
    ids=str,
)
def test_answers_do_not_depend_on_torchs_defaults(defaults: dict[str, Any], native: Path) -> None:
    expected = answers(native)
    with torch_defaults(**defaults):
        found = answers(native)
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(map(torch.equal, found, expected))


def test_networks_come_in_evaluation_mode(native: Path) -> None:
    config = ModelConfig(**SMALL, alpha_drop=0.5, drop_path_rate=0.5)
    for network in (EquiformerV2(config), load_checkpoint(native).model):
        assert not any(module.training for module in network.modules())
        first, second = network(BATCH), network(BATCH)
        assert torch.equal(first["energy"], second["energy"])


# ---- plans, routers, tables of times, states of searches

PLANS: list[tuple[str, str, str]] = [
    ("deep", "[" * 100_000 + "]" * 100_000, "nested"),
    ("twice", '{"format": "equiformer2.pruning_plan", "format": 1}', "duplicate"),
    ("infinite", '{"format": "equiformer2.pruning_plan", "version": Infinity}', "Infinity"),
    ("switch for the version", '{"format": "equiformer2.pruning_plan", "version": true}', "version"),
    ("blocks: number", '{"format": "equiformer2.pruning_plan", "version": 1, "blocks": 3}', "blocks"),
    ("heads: huge", "heads:1e3", "no index"),
    ("heads: 10^30", f"heads:{10**30}", "no index"),
    ("heads: switch", "heads:true", "no index"),
    ("heads: text", 'heads:"01"', "no index"),
    ("lmax: 1.0", "lmax:1.0", "lmax"),
    ("attention: text", 'attention:"yes"', "attention"),
    ("values: text", 'value_channels:"01"', "value_channels"),
    ("digits", '{"format": ' + "9" * 5000 + "}", "JSON"),
    (
        "100,000 blocks",
        '{"format": "equiformer2.pruning_plan", "version": 1, "blocks": [' + "{}, " * 99_999 + "{}]}",
        "100000 blocks; a network has at most 256",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), [case[1:] for case in PLANS], ids=[c[0] for c in PLANS])
def test_a_wrong_plan_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    if not text.startswith(("{", "[")):
        key, value = text.split(":", 1)
        value = f"[{value}]" if key == "heads" else value
        text = f'{{"format": "equiformer2.pruning_plan", "version": 1, "blocks": [{{"{key}": {value}}}]}}'
    path = tmp_path / "plan.json"
    path.write_text(text)
    with soon(), pytest.raises(InputError, match=rf"plan\.json.*{sentence}"):
        PruningPlan.load(path)


STATIC = {"levels": 0.5}
ROUTERS: list[tuple[str, Any, str]] = [
    ("kind: list", {"kind": [], "settings": {}}, "kind of router"),
    ("kind: unknown", {"kind": "Router", "settings": {}}, "not known"),
    ("settings: list", {"kind": "StaticRouter", "settings": []}, "settings"),
    ("unknown setting", {"kind": "StaticRouter", "settings": STATIC | {"speed": 1}}, "speed"),
    ("levels: switch", {"kind": "StaticRouter", "settings": {"levels": True}}, "levels"),
    ("levels: huge", {"kind": "StaticRouter", "settings": {"levels": [10**400]}}, "a level"),
    ("levels: nested", {"kind": "StaticRouter", "settings": {"levels": [[0.5]]}}, "a level"),
    ("width: text", {"kind": "StaticRouter", "settings": STATIC | {"width": "0.1"}}, "width"),
    ("width: switch", {"kind": "StaticRouter", "settings": STATIC | {"width": True}}, "width"),
    (
        "protect: text",
        {"kind": "StaticRouter", "settings": STATIC | {"protect_ends": "false"}},
        "protect_ends",
    ),
    ("keep: number", {"kind": "StaticRouter", "settings": STATIC | {"keep_free": 1}}, "keep_free"),
    ("hysteresis: text", {"kind": "DegreeRouter", "settings": STATIC | {"hysteresis": "x"}}, "hysteresis"),
    ("mode: list", {"kind": "StaticRouter", "settings": STATIC | {"mode": ["topk"]}}, "mode"),
    ("seed: huge", {"kind": "RandomRouter", "settings": STATIC | {"seed": 10**30}}, "seed"),
    ("seed: 1.5", {"kind": "RandomRouter", "settings": STATIC | {"seed": 1.5}}, "seed"),
    ("iterations: 1e9", {"kind": "AtomPruner", "settings": STATIC | {"iterations": 10**9}}, "iterations"),
    ("damping: 2", {"kind": "AtomPruner", "settings": STATIC | {"damping": 2}}, "damping"),
    ("heads: text", {"kind": "AtomPruner", "settings": STATIC | {"heads": [["a"]]}}, r"heads\[0\]\[0\]"),
    ("heads: number", {"kind": "AtomPruner", "settings": STATIC | {"heads": 3}}, "heads"),
    ("cut: text", {"kind": "FTPRouter", "settings": STATIC | {"cut": "0.5"}}, "cut"),
    ("weights: list", {"kind": "FTPRouter", "settings": STATIC | {"weights": [1]}}, "weights"),
    ("weights: text", {"kind": "FTPRouter", "settings": STATIC | {"weights": {"0.weight": "a"}}}, "weights"),
    (
        "weights: ragged",
        {"kind": "FTPRouter", "settings": STATIC | {"weights": {"0.bias": [[1], 2]}}},
        "weights",
    ),
    ("a plan of text", {"kind": "FrozenPlan", "settings": {"router": "x"}}, "router"),
    ("replan: 1.5", {"kind": "FrozenPlan", "settings": {"replan_every": 1.5, "router": None}}, "router"),
    ("mode of a region", {"kind": "ActiveRegion", "settings": {"mode": 3}}, "mode 3"),
    ("a list", [], "not a router"),
]


@pytest.mark.parametrize(("record", "sentence"), [case[1:] for case in ROUTERS], ids=[c[0] for c in ROUTERS])
def test_a_wrong_router_is_refused(record: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    path.write_text(json.dumps(record))
    with soon(), pytest.raises(InputError, match=rf"router\.json.*{sentence}"):
        load_router(path)


def test_routers_in_routers_end_somewhere(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    inside = '{"kind": "FrozenPlan", "settings": {"router": '
    path.write_text(inside * 20_000 + "{}" + "}}" * 20_000)
    with soon(), pytest.raises(InputError, match=r"router\.json.*nested"):
        load_router(path)


STATES: list[tuple[str, Any]] = [
    ("loss", "x"),
    ("loss", True),
    ("steps", [{"cut": 1}]),
    ("steps", 3),
    ("damages", {"a": "b"}),
    ("ratios", {"a": 3}),
    ("ratios", {"a": [None]}),
    ("stage", 1e9),
    ("done", "false"),
    ("fingerprint", []),
    ("plan", {}),
]


@pytest.mark.parametrize(("key", "value"), STATES, ids=str)
def test_a_wrong_state_of_a_search_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    SearchState({}, PruningPlan.keep_all(ModelConfig(**SMALL))).save(path)
    SearchState.load(path, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with soon(), pytest.raises(InputError, match=rf"state\.json is no state .*{key}"):
        SearchState.load(path, {})


SHARES = ['{"a": "1"}', '{"a": true}', '{"a": NaN}', '{"a": 1e9}', "[]", '{"a": [1]}', '{"a": 1, "a": 2}']


@pytest.mark.parametrize("shares", SHARES)
def test_a_wrong_table_of_times_is_refused(shares: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    head = '{"format": "equiformer2.time_table", "version": 1, "facts": {}, "shares": '
    path.write_text(head + shares + "}")
    with soon(), pytest.raises(InputError, match=r"times\.json is no table"):
        TimeTable(ModelConfig(**SMALL), lambda part, other: 1.0, path)


ATTEMPTS: list[Any] = [
    3,
    {"a": 3},
    {"a": [1]},
    {"a": [[["x"], 0, [0.1, 0.5, 1.0, 2.0]]]},
    {"a": [[[0.5], -1, [0.1, 0.5, 1.0, 2.0]]]},
    {"a": [[[0.5], 0, [0.1, 0.5]]]},
    {"a": [[[0.5], 0, [math.nan, 0.5, 1.0, 2.0]]]},
]


@pytest.mark.parametrize("tried", ATTEMPTS, ids=str)
def test_a_wrong_state_of_a_router_is_refused(tried: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    content = {"format": "equiformer2.routing_state/2", "fingerprint": {}, "tried": tried, "training": None}
    torch.save(content, path)
    with soon(), pytest.raises(InputError, match=r"state\.pt is no state of a router"):
        RoutingState(path, {})


def test_a_state_of_a_router_with_a_network_that_broke_down_is_read(tmp_path: Path) -> None:
    state = RoutingState(tmp_path / "state.pt", {"a": 1})
    state.tried["s"] = {((0.25, 0.0), 1): Measurement(math.inf, 0.5, 1.0, 2.0)}
    state.save()
    again = RoutingState(tmp_path / "state.pt", {"a": 1})
    assert again.tried == state.tried


def test_plain_leaves_what_it_is_given() -> None:
    value = {"a": [1, 2.5, "x", None, True]}
    assert plain(copy.deepcopy(value)) == value
