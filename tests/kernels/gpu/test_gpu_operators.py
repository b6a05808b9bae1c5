"""Properties that all operations share: data types, determinism, torch.compile, refusals."""

import importlib
import sys
from types import SimpleNamespace

import gpu_calls
import pytest
import torch
from gpu_twins import Random, assert_near

import equiformer2.kernels
from equiformer2.errors import InputError
from equiformer2.kernels import gpu

NAMES = list(gpu_calls.calls(torch.device("cpu"), torch.float32, 1, 1, 4))
operations = pytest.mark.parametrize("name", NAMES)
# lmax, mmax, channels, of few coefficients: these tests are not about the shapes.
SIZES = 2, 1, 6


@pytest.mark.one_in(3)
@operations
def test_twice_the_same_bits(name: str, device: torch.device) -> None:
    call = gpu_calls.calls(device, torch.float32, *SIZES)[name]
    for first, second in zip(gpu_calls.gradients_of(call), gpu_calls.gradients_of(call), strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
@operations
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])
def test_other_data_types(name: str, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    calls = gpu_calls.calls(device, dtype, *SIZES)
    function, arguments = calls[name]
    # The same numbers, already rounded, in float32: only the arithmetic differs.
    as_float32 = [
        a.detach().float().requires_grad_(a.requires_grad) if _is_float(a) else a for a in arguments
    ]
    ours = gpu_calls.gradients_of((function, arguments))
    expected = gpu_calls.gradients_of((function, tuple(as_float32)))
    # Like every autograd function: gradients in the data type of their inputs.
    for gradient, leaf in zip(ours[1:], (a for a in arguments if _wants_gradient(a)), strict=True):
        assert gradient.dtype == leaf.dtype
    assert_near([t.float() for t in ours], expected, tolerance)


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _wants_gradient(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


@pytest.mark.slow
@operations
def test_compiles_without_graph_breaks(name: str, device: torch.device) -> None:
    function, arguments = gpu_calls.calls(device, torch.float32, *SIZES)[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    ours, expected = (gpu_calls.gradients_of((f, arguments)) for f in (compiled, function))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gather_rotate shared=True", marks=pytest.mark.slow),
        "rotate_aggregate",
        "separable_s2_activation",
    ],
)
def test_operators_are_registered_as_torch_wants_them(name: str, device: torch.device) -> None:
    operator, arguments = gpu_calls.operator(*gpu_calls.calls(device, torch.float32, 1, 1, 4)[name])
    torch.library.opcheck(operator, arguments)


@operations
def test_second_derivatives_are_refused(name: str, device: torch.device) -> None:
    function, arguments = gpu_calls.calls(device, torch.float32, 1, 1, 4)[name]
    leaf = next(a for a in arguments if _wants_gradient(a))
    (gradient,) = torch.autograd.grad((function(*arguments) ** 2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), leaf)


def test_wrong_shapes_are_refused(device: torch.device) -> None:
    random = Random(device)
    with pytest.raises(InputError, match="gates"):
        gpu.separable_s2_activation(random(3, 4, 5), random(3, 4), random(9, 4), random(4, 9))
    with pytest.raises(InputError, match="weight"):
        gpu.grid_mlp(random(3, 4, 5), random(9, 4), random(4, 9), random(5, 6))
    graph = random.graph(3, 4)
    target = graph["target"], graph["target_ptr"]
    with pytest.raises(InputError, match="packed"):
        gpu.rotate_aggregate(random(4, 4, 6), None, random.packed(4, 1, 0), *target, 1, 1, 1, [1.0, 1.0])
    with pytest.raises(InputError, match="radial"):
        gpu.gather_rotate(
            random(3, 4, 6),
            random.packed(4, 1, 1),
            graph["source"],
            graph["target"],
            random(4, 6),
            1,
            1,
            False,
            graph["source_order"],
            graph["source_ptr"],
            graph["target_ptr"],
        )


def test_support(device: torch.device) -> None:
    possible = dict(lmax=6, mmax=2, frames_need_grad=False)
    assert gpu.supports(device, torch.bfloat16, **possible) is None
    for change, reason in (
        ({"lmax": 9}, "lmax"),
        ({"mmax": 7}, "mmax"),
        ({"frames_need_grad": True}, "edge frames"),
    ):
        assert reason in (gpu.supports(device, torch.float32, **(possible | change)) or "")
    assert "float16" in (gpu.supports(device, torch.float16, **possible) or "")


@pytest.mark.parametrize(
    ("major", "shared", "supported"), [(7, 96, False), (8, 99, False), (8, 163, True), (9, 227, True)]
)
def test_gpus(major: int, shared: int, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="GPU", major=major, shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    reason = gpu.supports(torch.device("cuda"), torch.bfloat16, 6, 2, False)
    assert (reason is None) == supported


def test_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = gpu.supports(torch.device("cpu"), torch.float32, 6, 2, False)
    assert reason is not None
    assert "CUDA" in reason


def test_triton_is_imported_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("equiformer2.kernels.gpu")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(equiformer2.kernels, "gpu", gpu)
    fresh = importlib.import_module("equiformer2.kernels.gpu")
    with pytest.raises(InputError, match="needs the package triton"):
        fresh.gather_rotate  # noqa: B018
    with pytest.raises(AttributeError):
        fresh.gather_rotates  # noqa: B018
