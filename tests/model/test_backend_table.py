"""The table of docs/kernels.md says what `validate` refuses."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import small_config

from equiformer2.errors import InputError
from equiformer2.kernels import grid_mlp
from equiformer2.kernels.backend import BACKENDS, Features, validate
from equiformer2.kernels.cpu.library import NO_COMPILER, Compiler

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
FEATURES = {
    "derivatives with respect to positions": Features(position_gradients=True),
    "routers and masks of atoms and edges": Features(routing=True),
    "denoising (`model.dens`)": Features(denoising=True),
    "hooks of the modules inside: observing, masking of sphere channels": Features(observing=True),
    "passes that begin at a later block (`model.routing.Prefix`)": Features(partial=True),
}
OTHERS = {
    "gradients of the parameters",
    "forces as the gradient of the energy, second derivatives",
    "autocast to bfloat16",
    "parameters in float32, float64",
    "runs on a CPU",
    "runs on CUDA",
    "highest lmax",
}


def table() -> dict[str, dict[str, str]]:
    """Abilities, each with the cells of the backends."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| ability |"))
    names = [cell.strip().strip("`") for cell in lines[start].split("|")[2:-1]]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        ability, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        rows[ability] = dict(zip(names, cells, strict=True))
    return rows


def accepted(
    name: str,
    features: Features = Features(),  # noqa: B008
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> str:
    try:
        validate(name, small_config(**changes), torch.device(device), dtype, features)
    except InputError:
        return "no"
    return "yes"


@pytest.fixture(params=list(BACKENDS))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that runs here, `triton` in its interpreter."""
    if request.param in ("cpp", "compile") and Compiler.find() is None:
        pytest.skip(NO_COMPILER)
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


def test_rows() -> None:
    rows = table()
    assert set(rows) == set(FEATURES) | OTHERS
    assert all(list(cells) == list(BACKENDS) for cells in rows.values())


def test_abilities(name: str) -> None:
    rows = table()
    for ability, features in FEATURES.items():
        assert accepted(name, features) == rows[ability][name], ability
    gradient = "forces as the gradient of the energy, second derivatives"
    assert accepted(name, forces="gradient") == rows[gradient][name]
    for dtype in (torch.float32, torch.float64):
        assert accepted(name, dtype=dtype) == rows["parameters in float32, float64"][name]
    assert accepted(name, dtype=torch.bfloat16) == "no"
    limit = int(rows["highest lmax"][name])
    grids = {"mmax": 1, "grid_resolution": None}
    assert accepted(name, lmax=limit, **grids) == "yes"
    if limit < 11:  # the network itself goes no farther
        assert accepted(name, lmax=limit + 1, **grids) == "no"


@pytest.mark.parametrize("name", list(BACKENDS))
def test_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if name in ("cpp", "compile") and Compiler.find() is None:
        pytest.skip(NO_COMPILER)
    assert accepted(name) == table()["runs on a CPU"][name]
    if name == "triton" and not torch.cuda.is_available():
        return  # it asks the device for its properties
    if name != "compile" or find_spec("triton") is not None:
        assert accepted(name, device="cuda") == table()["runs on CUDA"][name]


def test_gradients_and_autocast(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, to_grid, from_grid, weight = (
        torch.randn(*shape, generator=generator) for shape in ((3, 4, 16), (16, 4), (4, 16), (16, 16))
    )
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = grid_mlp(x, to_grid, from_grid, weight, BACKENDS[name])
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), weight)[0].dtype == torch.float32
    assert table()["autocast to bfloat16"][name] == "yes"
    assert table()["gradients of the parameters"][name] == "yes"
