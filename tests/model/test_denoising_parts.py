"""Force encoding and denoising head (DeNS)."""

import dataclasses

import pytest
import torch
from model_helpers import batch_of, cluster, random_model, slab, small_config, water
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError
from equiformer2.kernels.backend import BACKENDS
from equiformer2.model.denoising import EncodedForces, ForceEmbedding, without_denoising

WHOLE_SHELLS = {"max_neighbors": 20, "enforce_max_neighbors_strictly": False}
# No sphere grid: only rounding is left.
EXACT = small_config(lmax=3, mmax=2, use_gate_act=True, use_grid_mlp=False, dens=True, **WHOLE_SHELLS)
FINE_GRID = small_config(grid_resolution=40, dens=True, **WHOLE_SHELLS)
ROUNDING = {torch.float32: 3e-5, torch.float64: 1e-11}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def corrupted(dtype: torch.dtype) -> tuple[Batch, EncodedForces]:
    """A slab and a molecule with forces, some of whose atoms are displaced."""
    batch = batch_of(slab(dtype), cluster(dtype), water(dtype))
    generator = torch.Generator().manual_seed(11)
    shape = batch.pos.shape
    forces = 3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    atoms = torch.rand(shape[0], generator=generator) < 0.5
    noise = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    batch.pos = batch.pos + noise * atoms[:, None]
    return batch, EncodedForces(forces, atoms)


def some_rotation() -> Tensor:
    random = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rotation = torch.linalg.qr(random)[0]
    return rotation * torch.linalg.det(rotation)


def turned(batch: Batch, encoded: EncodedForces, rotation: Tensor) -> tuple[Batch, EncodedForces]:
    other = batch.clone()
    other.pos, other.cell = batch.pos @ rotation.T, batch.cell @ rotation.T
    return other, encoded._replace(forces=encoded.forces @ rotation.T)


@dtypes
@pytest.mark.parametrize("config", [EXACT, FINE_GRID], ids=["no grid", "separable S2"])
def test_noise_turns_with_the_structure(config, dtype: torch.dtype) -> None:
    model = random_model(config, dtype)
    batch, encoded = corrupted(dtype)
    rotation = some_rotation().to(dtype)
    tolerance = ROUNDING[dtype] if config is EXACT else max(1e-6, ROUNDING[dtype])
    with torch.no_grad():
        out = model(batch, dens=encoded)
        other_batch, other_encoded = turned(batch, encoded, rotation)
        other = model(other_batch, dens=other_encoded)
        unaware = model(other_batch, dens=encoded)
    scale = out["noise"].abs().max()
    assert (other["noise"] - out["noise"] @ rotation.T).abs().max() < tolerance * scale
    torch.testing.assert_close(other["energy"], out["energy"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        other["forces"],
        out["forces"] @ rotation.T,
        rtol=tolerance,
        atol=tolerance * out["forces"].abs().max(),
    )
    # The forces matter: structure turned and forces not is another input.
    assert (unaware["noise"] - out["noise"] @ rotation.T).abs().max() > 1e-3 * scale
    assert (unaware["energy"] - out["energy"]).abs().max() > 1e-4 * out["energy"].abs().max()


def test_structures_that_are_not_corrupted_are_as_without_encoding() -> None:
    model = random_model(EXACT)
    batch, encoded = corrupted(torch.float32)
    only_slab = encoded._replace(atoms=encoded.atoms & (batch.batch == 0))
    with torch.no_grad():
        plain = model(batch)
        none = model(batch, dens=encoded._replace(atoms=torch.zeros_like(encoded.atoms)))
        zero = model(batch, dens=encoded._replace(forces=torch.zeros_like(encoded.forces)))
        partly = model(batch, dens=only_slab)
    assert set(plain) == {"energy", "forces"}
    assert set(none) == {"energy", "forces", "noise"}
    for out in (none, zero):
        assert torch.equal(out["energy"], plain["energy"])
        assert torch.equal(out["forces"], plain["forces"])
    others = batch.batch > 0
    assert torch.equal(partly["energy"][1:], plain["energy"][1:])
    assert torch.equal(partly["forces"][others], plain["forces"][others])
    assert not torch.equal(partly["energy"][0], plain["energy"][0])


def test_encoded_values() -> None:
    """Degree 1 holds the force itself; what is not displaced, or has no force, gets zero."""
    embedding = ForceEmbedding(channels=2, lmax=3).double()
    forces = torch.tensor([[1.0, 2.0, -2.0], [0.0, 0.0, 0.0], [4.0, 0.0, 3.0]], dtype=torch.float64)
    out = embedding(EncodedForces(forces, torch.tensor([True, True, False])))
    torch.testing.assert_close(out[0, 1:4], forces[0, :, None] * embedding.weight[1])
    torch.testing.assert_close(out[0, 0], 3.0 / 3**0.5 * embedding.weight[0])
    norms = torch.linalg.vector_norm(out[0, 4:9], dim=0)
    torch.testing.assert_close(norms, 3.0 * (5 / 3) ** 0.5 * embedding.weight[2].abs())
    assert not out[1:].any()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_backends_agree(backend: str) -> None:
    model = random_model(small_config(dens=True), torch.float32)
    reason = BACKENDS[backend].unavailable_reason(torch.device("cpu"), torch.float32, 2, 1)
    if reason is not None:
        pytest.skip(reason)
    batch, encoded = corrupted(torch.float32)
    outputs, gradients = [], []
    for name in ("torch", backend):
        model.backend = name
        model.zero_grad()
        out = model(batch, dens=encoded)
        (out["noise"].square().sum() + out["energy"].sum()).backward()
        outputs.append(out)
        gradients.append(model.dens.force_embedding.weight.grad.clone())
    for name in ("energy", "forces", "noise"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_without_its_parts_the_network_is_the_usual_one() -> None:
    torch.manual_seed(0)
    trained = EquiformerV2(small_config(dens=True)).eval()
    torch.manual_seed(0)
    usual = EquiformerV2(small_config()).eval()
    plain = without_denoising(trained)
    assert plain.config == usual.config
    assert "dens" not in str(list(plain.state_dict()))
    assert trained.dens is not None  # which keeps its parts
    for name, value in usual.state_dict().items():  # made before the parts for denoising
        assert torch.equal(plain.state_dict()[name], value)
    batch, encoded = corrupted(torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(batch)["forces"], trained(batch)["forces"])
    assert without_denoising(usual) is usual
    with pytest.raises(InputError, match="no parts for denoising"):
        plain(batch, dens=encoded)


def test_what_cannot_be_is_refused() -> None:
    batch, encoded = corrupted(torch.float32)
    model = random_model(small_config(dens=True))
    with pytest.raises(InputError, match=r"must be \[24, 3\] with a mask \[24\]"):
        model(batch, dens=encoded._replace(atoms=encoded.atoms[:3]))
    model.backend = "compile"
    with pytest.raises(InputError, match="'compile' encodes no forces"):
        model(batch, dens=encoded)
    for forces in ("none", "gradient"):
        with pytest.raises(InputError, match=r"model\.dens needs model\.forces: direct"):
            dataclasses.replace(small_config(dens=True), forces=forces)
