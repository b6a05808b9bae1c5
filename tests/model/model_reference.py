"""The reference implementation's networks and answers (tests/fixtures/model/README.md)."""

import functools
import io
import lzma
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from equiformer2 import EquiformerV2
from equiformer2.checkpoint.reference import config_from_reference
from equiformer2.graph import RadiusGraph
from equiformer2.model.so3 import EdgeFrames

FIXTURES = Path(__file__).parents[1] / "fixtures" / "model"
LAYOUTS = sorted(path.name.removesuffix(".pt.xz") for path in FIXTURES.glob("parity_*.pt.xz"))
# Only names and shapes are kept of this one.
NETWORKS = [name for name in LAYOUTS if name != "parity_b_l4m2_lnsh_g18"]


@functools.cache
def load(name: str) -> dict[str, Any]:
    with lzma.open(FIXTURES / f"{name}.pt.xz") as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


@functools.cache
def parameters(name: str) -> dict[str, Tensor]:
    """The reference's parameters; their bytes are stored plane by plane, which packs better."""
    stored = load(name)
    state = dict(parameters(f"parity_{stored['base']}")) if stored["base"] else {}
    flat = stored["planes"].t().flatten().view(torch.float32)
    start = 0
    for key in stored["parameters"]:
        shape = stored["shapes"][key]
        size = torch.Size(shape).numel()
        state[key] = flat[start : start + size].view(shape)
        start += size
    return {key: state[key] for key in stored["shapes"]}


def network(name: str, dtype: torch.dtype = torch.float32) -> EquiformerV2:
    """The network with the reference's weights, in evaluation mode."""
    model = EquiformerV2(config_from_reference(load(name)["config"])).to(dtype).eval()
    model.load_state_dict(parameters(name))
    return model


def graphs(name: str) -> dict[str, dict[str, Tensor]]:
    """Structures and edges of the systems that this network was run on."""
    stored = load(name)
    systems = load("systems")[stored["graphs"]]
    return {system: systems[system] for system in stored["answers"]}


def structure(system: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Data:
    natoms = system["natoms"]
    return Data(
        pos=system["pos"].to(dtype),
        cell=system["cell"].to(dtype),
        pbc=system["pbc"].bool().expand(len(natoms), 3),
        atomic_numbers=system["numbers"].long(),
        natoms=natoms,
    )


def by_target(system: dict[str, Tensor]) -> Tensor:
    return torch.argsort(system["edge_index"][1].long(), stable=True)


def edges(system: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> RadiusGraph:
    """The reference's edges, sorted by target; vectors in `dtype` from the float32 positions."""
    order = by_target(system)
    source, target = system["edge_index"].long()[:, order]
    offsets = system["cell_offsets"].long()[order]
    pos, cell = system["pos"].to(dtype), system["cell"].to(dtype)
    structure_of = torch.repeat_interleave(system["natoms"])
    lattice = torch.einsum("ea,eax->ex", offsets.to(dtype), cell[structure_of[target]])
    vectors = pos[source] - pos[target] + lattice
    return RadiusGraph(torch.stack((source, target)), offsets, vectors, vectors.norm(dim=1))


def frames(system: dict[str, Tensor], model: EquiformerV2, dtype: torch.dtype = torch.float64) -> EdgeFrames:
    """The edge frames that the reference drew at random in the run with stored float64 answers."""
    rotations = system["rotations"][by_target(system)].to(dtype)
    return EdgeFrames.from_rotations(rotations, model.config.lmax, model.config.mmax)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest deviation over the largest entry."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()
