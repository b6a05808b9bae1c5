"""Shared preparation of the loss curves: structures, their order, initial weights and settings.

`prepare` writes into one folder:

| file | content |
|---|---|
| `structures.lmdb` | the structures in OC20's own format: pickled `Data` with `y`, `force` and the edges |
| `weights.pt` | initial weights and normalizers, a native checkpoint |
| `shared.json` | the order of the structures, the network and all settings, for the reference's process |

The settings are those of a configuration file of this package with three changes: no dropout, no warm-up of
the average, which the reference has not, and the 600 Gaussians of the distance that it always uses.
"""

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from torch_geometric.data import Data
from tqdm import tqdm

from datasets_oc20 import OC20DataModule, OC20Lmdb
from datasets_oc20.sampler import BalancedBatchSampler
from equiformer2 import EquiformerV2, ModelConfig
from equiformer2.checkpoint import Normalizers, save_checkpoint
from equiformer2.checkpoint.normalizers import Normalizer
from equiformer2.checkpoint.reference import config_from_reference
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.graph import radius_graph
from equiformer2.training.configuration import parse
from equiformer2.training.run import RunConfig

# The reference ignores `num_distance_basis`.
REFERENCE_GAUSSIANS = 600
# Keys that mean the same in both configurations.
_SAME_NAME = (
    "max_neighbors", "max_radius", "max_num_elements", "num_layers", "sphere_channels",
    "attn_hidden_channels", "num_heads", "attn_alpha_channels", "attn_value_channels",
    "ffn_hidden_channels", "norm_type", "grid_resolution", "edge_channels", "use_atom_edge_embedding",
    "share_atom_edge_embedding", "use_m_share_rad", "use_attn_renorm", "use_gate_act", "use_grid_mlp",
    "use_sep_s2_act", "alpha_drop", "drop_path_rate", "proj_drop", "weight_init",
    "enforce_max_neighbors_strictly", "avg_num_nodes", "avg_degree",
)  # fmt: skip


@dataclass(frozen=True)
class CurveSettings:
    """Wish of the user.

    Attributes:
        data: LMDB of adsorption energies and forces that the structures are drawn from.
        config: configuration file of the training.
        steps: number of optimizer steps, the length of the schedule.
        batch_size: structures per step.
        folder: of the work.
    """

    data: str
    config: str
    steps: int
    batch_size: int
    folder: Path

    def words(self, name: str) -> list[str]:
        """Give the command line of our training of one curve."""
        structures = str(self.folder / "structures.lmdb")
        keys = {
            "data.train": structures,
            "data.val": structures,
            "data.energy_kind": "adsorption",
            "data.batch_size": self.batch_size,
            "model.num_distance_basis": REFERENCE_GAUSSIANS,
            "model.alpha_drop": 0.0,
            "model.drop_path_rate": 0.0,
            "model.proj_drop": 0.0,
            "task.ema_warmup": "false",
            "trainer.accelerator": "cpu",
            "trainer.max_epochs": 1,
            "trainer.limit_val_batches": 0,
            "trainer.log_every_n_steps": 1,
            "init_from": self.folder / "weights.pt",
            "runs_dir": self.folder,
            "name": name,
            "ckpt_path": "auto",
            "checkpoint_every_n_steps": 50,
        }
        return [f"--config={self.config}", *(f"--{key}={value}" for key, value in keys.items())]


def prepare(settings: CurveSettings) -> dict[str, Any]:
    """Write the shared files, unless they are there; give the content of `shared.json`.

    Raises:
        InputError: the folder holds curves of other settings, or the data are too few.
    """
    wish = {name: getattr(settings, name) for name in ("data", "config", "steps", "batch_size")}
    path = settings.folder / "shared.json"
    if path.exists():
        shared = read_json(path)
        if shared["wish"] != wish:
            raise InputError(f"{settings.folder} holds curves of {shared['wish']}: name another --work")
        return shared
    settings.folder.mkdir(parents=True, exist_ok=True)
    module = OC20DataModule(settings.data, settings.data, energy_kind="adsorption")
    module.setup()
    needed = settings.steps * settings.batch_size
    source = module.datasets["train"]
    if len(source) < needed:
        raise InputError(f"{settings.data} has {len(source)} structures, {needed} are needed: lower --steps")
    config = parse(settings.words("equiformer2"))
    chosen = np.sort(np.random.default_rng(config.run.seed).permutation(len(source))[:needed])
    write_structures(settings.folder / "structures.lmdb", source, chosen.tolist(), config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = EquiformerV2(config.model)
    normalizers = {"energy": module.normalizers["energy"], "forces": module.normalizers["forces"]}
    save_checkpoint(
        settings.folder / "weights.pt",
        model=model,
        raw_state=model.state_dict(),
        averaged_state=None,
        normalizers=Normalizers(
            energy=Normalizer(*normalizers["energy"]), forces=Normalizer(*normalizers["forces"])
        ),
        energy_kind="adsorption",
        provenance={},
    )
    sampler = BalancedBatchSampler(needed, settings.batch_size, shuffle=True, seed=config.run.seed)
    shared = {
        "wish": wish,
        "order": [index for batch in sampler for index in batch],
        "batch_size": settings.batch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "atoms": int(source.natoms[chosen].sum()),
        "model": reference_config(config.model),
        "normalizers": normalizers,
        **training_settings(config),
    }
    write_json(path, json.loads(json.dumps(shared)))
    return read_json(path)


def training_settings(config: RunConfig) -> dict[str, Any]:
    """Settings of loss, optimizer, schedule and average, under our names."""
    names = (
        "lr",
        "weight_decay",
        "betas",
        "warmup_epochs",
        "warmup_factor",
        "lr_min_factor",
        "clip_grad_norm",
    )
    return {
        "energy_coefficient": config.task.energy_coefficient,
        "force_coefficient": config.task.force_coefficient,
        "ema_decay": config.task.ema_decay,
        "optim": {name: getattr(config.optim, name) for name in names},
    }


def reference_config(model: ModelConfig) -> dict[str, Any]:
    """Translate a network to the reference's keys, with the stored graph.

    Raises:
        InputError: the reference has no such network.
    """
    keys = {name: getattr(model, name) for name in _SAME_NAME}
    keys |= {"lmax_list": [model.lmax], "mmax_list": [model.mmax], "regress_forces": True, "use_pbc": True}
    keys |= {"otf_graph": False, "attn_activation": "silu", "ffn_activation": "silu"}
    keys |= {"distance_function": "gaussian", "use_s2_act_attn": False}
    if config_from_reference(keys) != model:
        raise InputError(
            "the configuration's network is none that the reference can build: leave its switches off"
        )
    return keys


def write_structures(path: Path, source: OC20Lmdb, chosen: list[int], model: ModelConfig) -> None:
    """Write structures as OC20 did: float32, pickled, with the edges of our graph."""

    def records() -> Iterator[bytes]:
        for index in tqdm(chosen, desc="structures", disable=None):
            data = source[index]
            fields = {
                "pos": data.pos.float(),
                "cell": data.cell.float(),
                "atomic_numbers": data.atomic_numbers.float(),
                "natoms": data.natoms,
                "tags": data.tags,
                "fixed": data.fixed.float(),
                "y": data.energy.float(),
                "force": data.forces.float(),
                "sid": data.sid,
                "fid": data.fid,
                "pbc": data.pbc,
            }
            graph = radius_graph(
                fields["pos"].double(),
                fields["cell"].double(),
                data.pbc,
                data.natoms,
                max_radius=model.max_radius,
                max_neighbors=model.max_neighbors,
                strict=model.enforce_max_neighbors_strictly,
            )
            fields |= {"edge_index": graph.edge_index, "cell_offsets": graph.cell_offsets}
            yield pickle.dumps(Data(**fields), protocol=4)

    # A file without `shared.json`, which is written last, is of a preparation that was stopped.
    path.unlink(missing_ok=True)
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 32)
    with environment.begin(write=True) as transaction:
        for key, record in enumerate(records()):
            transaction.put(str(key).encode(), record)
        transaction.put(b"length", pickle.dumps(len(chosen)))
    environment.close()
