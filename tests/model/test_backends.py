"""The network gives the same answers whichever backend runs it."""

import copy

import pytest
import torch
from model_helpers import batch_of, cluster, lone_atom, loss_of, random_model, small_config, trace_only, water
from torch import Tensor
from torch_geometric.data import Batch

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError
from equiformer2.kernels.backend import CPP, TORCH
from equiformer2.kernels.cpu import library

SMALLEST = {"num_layers": 1, "grid_resolution": 6, "num_distance_basis": 8, "max_neighbors": 6}
VARIANTS = [
    {},
    {"use_sep_s2_act": False, "use_m_share_rad": True},
    {"smooth_cutoff": True, "use_swiglu_s2_act": True, "norm_type": "rms_norm_sh", "use_m_share_rad": True},
    pytest.param({"use_gate_act": True}, marks=pytest.mark.slow),
    pytest.param({"use_grid_mlp": False, "share_atom_edge_embedding": True}, marks=pytest.mark.slow),
]


def with_gradients(model: EquiformerV2, batch: Batch) -> dict[str, Tensor]:
    """Outputs and the gradients of all parameters."""
    out = model(batch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss_of(out), list(trained.values()))
    return {name: value.detach() for name, value in (out | dict(zip(trained, grads, strict=True))).items()}


def structures() -> Batch:
    return batch_of(water(), lone_atom(), cluster())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
# Minutes of compilation and interpretation; faster tests of both are in test_compiled and test_parametrized.
@pytest.mark.parametrize(
    "backend",
    ["cpp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("compile", "triton"))],
)
def test_same_answers_and_gradients(
    changes: dict[str, object], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        interpreter(monkeypatch)
    elif backend == "cpp":
        cpp_compiler()
    else:
        trace_only(monkeypatch)
    model, batch = random_model(small_config(**(SMALLEST | changes))), structures()
    # In float32 the plain path itself is up to 2.3e-5 away from float64.
    exact, same_batch = copy.deepcopy(model).double(), structures()
    same_batch.pos, same_batch.cell = same_batch.pos.double(), same_batch.cell.double()
    exact.backend = "torch"
    expected = {name: value.float() for name, value in with_gradients(exact, same_batch).items()}
    model.backend = backend
    found = with_gradients(model, batch)
    with torch.no_grad():
        inference = model(batch)
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (found[name] - value).abs().max() <= 5e-5 * scale, name
    for name, value in inference.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def cpp_compiler() -> None:
    if library.Compiler.find() is None:
        pytest.skip(library.NO_COMPILER)


def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.slow
def test_derivatives_with_respect_to_positions_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)
    model, batch = random_model(small_config(**SMALLEST)), batch_of(cluster())
    batch.pos.requires_grad_()
    (expected,) = torch.autograd.grad(model(batch)["energy"].sum(), batch.pos)
    model.backend = "compile"
    (found,) = torch.autograd.grad(model(batch)["energy"].sum(), batch.pos)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    model, batch = random_model(), structures()
    model.backend = "fast"
    with pytest.raises(InputError, match=r"'fast'.*auto, torch, cpp, compile, triton"):
        model(batch)
    model.backend = "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="need a CUDA device, not cpu"):
        model(batch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    batch.pos.requires_grad_()
    with pytest.raises(InputError, match="edge frames"):
        model(batch)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    model.backend = "compile"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"'compile' cannot be used: no C\+\+ compiler was found"):
        model.check_backend()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equal_bits_on_a_gpu(backend: str) -> None:
    """Nothing is added atomically, neither forwards nor backwards."""
    model, batch = random_model().cuda(), structures().to("cuda")
    model.backend = backend

    def answer() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(batch)
        (out["energy"].square().sum() + out["forces"].square().sum()).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [out["energy"].detach(), out["forces"].detach(), *grads]

    for first, second in zip(answer(), answer(), strict=True):
        assert torch.equal(first, second)


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = random_model(), structures()
    assert model.backend == "auto"
    if library.Compiler.find() is not None:
        assert model.resolve_backend() is CPP
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="slower 'torch'"):
        assert model.resolve_backend() is TORCH
    model(batch)
    model.backend = "cpp"
    with pytest.raises(InputError, match=r"'cpp' cannot be used: no C\+\+ compiler was found"):
        model(batch)


def test_checkpointed_blocks_run_the_same_kernels_again() -> None:
    """Equal bits: the second forward pass of a checkpointed block must not take other kernels."""
    cpp_compiler()
    model, batch = random_model(small_config(**SMALLEST)), structures()
    expected = with_gradients(model, batch)
    model.activation_checkpointing = True
    found = with_gradients(model, batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
