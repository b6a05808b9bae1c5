"""Weights wrapped with `torch.nn.utils.parametrize`, on every backend, with gradients and without."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from model_helpers import (
    batch_of,
    cluster,
    lone_atom,
    loss_of,
    random_model,
    small_config,
    trace_only,
    water,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_geometric.data import Batch

from equiformer2 import EquiformerV2
from equiformer2.checkpoint import Normalizer, Normalizers, load_checkpoint, save_checkpoint
from equiformer2.errors import InputError
from equiformer2.kernels import chunks
from equiformer2.kernels.cpu import library
from equiformer2.model.denoising import EncodedForces
from equiformer2.model.folding import Snapshot, plain_state
from equiformer2.pruning.structured.apply import masked, shrink
from equiformer2.pruning.structured.importance import magnitude_importance
from equiformer2.pruning.structured.plan import PruningPlan
from equiformer2.training.optim import update_average

F64 = torch.float64
SMALLEST = {"num_layers": 1, "grid_resolution": 6, "num_distance_basis": 8, "max_neighbors": 6}
#: Together they have every kind of weight; each name says what is special.
FLAVOURS = {
    "grid MLP, DeNS": {"dens": True},
    "gates, shared embeddings": {
        "use_gate_act": True,
        "use_grid_mlp": False,
        "share_atom_edge_embedding": True,
        "norm_type": "layer_norm",
    },
    "S2, no grid MLP": {"use_grid_mlp": False, "use_sep_s2_act": False, "use_attn_renorm": False},
    "separable S2, shared radial": {"use_grid_mlp": False, "use_m_share_rad": True},
    "V3": {
        "smooth_cutoff": True,
        "use_swiglu_s2_act": True,
        "norm_type": "rms_norm_sh",
        "use_m_share_rad": True,
    },
}


class LowRank(nn.Module):
    """W + strength * left @ right, of rank 2."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.left = nn.Parameter(0.1 * torch.randn(shape[:-1].numel(), 2))
        self.right = nn.Parameter(torch.randn(2, shape[-1]))
        self.strength = 1.0
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.strength * (self.left @ self.right).view_as(weight)


class Scaled(nn.Module):
    """gain * W * factors, with factors that are no parameters."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.1))
        self.register_buffer("factors", 1 + 0.1 * torch.randn(shape[-1]))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * weight * self.factors


def weights_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter of a plain network: its name, module and attribute."""
    for path, module in model.named_modules():
        for name in module._parameters:
            if module._parameters[name] is not None:
                yield f"{path}.{name}".removeprefix("."), module, name


def wrap(model: EquiformerV2) -> EquiformerV2:
    """`model` with both parametrizations on every weight."""
    torch.manual_seed(0)
    for _, module, name in list(weights_of(model)):
        shape, dtype = getattr(module, name).shape, getattr(module, name).dtype
        for kind in (LowRank, Scaled):
            parametrize.register_parametrization(module, name, kind(shape).to(dtype))
    return model.eval()


def wrapped(flavour: str, dtype: torch.dtype = F64) -> EquiformerV2:
    return wrap(random_model(small_config(**(SMALLEST | FLAVOURS[flavour])), dtype))


def plain(model: EquiformerV2) -> EquiformerV2:
    """A network without parametrizations that has the computed weights."""
    network = EquiformerV2(model.config).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for name, module, leaf in weights_of(network):
            path = name.rpartition(".")[0]
            getattr(module, leaf).copy_(getattr(model.get_submodule(path), leaf))
    network.backend = model.backend
    return network


def structures(dtype: torch.dtype = F64) -> Batch:
    return batch_of(water(dtype), lone_atom(dtype), cluster(dtype))


def answers(model: EquiformerV2, batch: Batch) -> dict[str, Tensor]:
    """All outputs; with DeNS, those of a batch with encoded forces."""
    if model.dens is None or model.backend == "compile":
        return model(batch)
    forces = torch.linspace(-1, 1, 3 * len(batch.pos)).view(-1, 3)
    return model(batch, dens=EncodedForces(forces, torch.arange(len(batch.pos)) % 2 == 0))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (ours[name] - value).abs().max() <= tolerance * scale, name


def use_backend(model: EquiformerV2, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpp" and library.Compiler.find() is None:
        pytest.skip(library.NO_COMPILER)
    if backend == "triton":
        pytest.importorskip("triton")
        if not torch.cuda.is_available():
            monkeypatch.setenv("TRITON_INTERPRET", "1")
    if backend == "compile":
        trace_only(monkeypatch)
    model.backend = backend


def test_flavours_have_every_kind_of_weight() -> None:
    """The switches that add weights, each on and off."""
    configs = [small_config(**(SMALLEST | changes)) for changes in FLAVOURS.values()]
    for switch in (
        *("use_grid_mlp", "use_gate_act", "use_sep_s2_act", "use_swiglu_s2_act", "use_attn_renorm"),
        *("use_m_share_rad", "share_atom_edge_embedding", "smooth_cutoff", "dens"),
    ):
        assert {getattr(config, switch) for config in configs} == {True, False}, switch
    assert {config.norm_type for config in configs} == {"layer_norm", "layer_norm_sh", "rms_norm_sh"}


@pytest.mark.parametrize(
    ("flavour", "backend"),
    [
        *((flavour, "torch") for flavour in FLAVOURS),
        ("grid MLP, DeNS", "cpp"),
        ("V3", "cpp"),
        pytest.param("grid MLP, DeNS", "triton", marks=pytest.mark.slow),
        pytest.param("V3", "triton", marks=pytest.mark.slow),
        pytest.param("gates, shared embeddings", "compile", marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients(flavour: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, tolerance = (F64, 1e-10) if backend in ("torch", "cpp") else (torch.float32, 5e-5)
    model = wrapped(flavour, dtype)
    use_backend(model, backend, monkeypatch)
    network = plain(model).double()
    network.backend = "torch"
    # Triton's interpreter is slow.
    batches = [batch_of(water(d)) if backend == "triton" else structures(d) for d in (dtype, F64)]
    outputs, expected = answers(model, batches[0]), answers(network, batches[1])
    assert_same(outputs, expected, tolerance)
    for out in (outputs, expected):
        (loss_of(out) + out.get("noise", out["forces"]).square().sum()).backward()
    reached = 0
    for name, module, leaf in weights_of(network):
        slope = getattr(module, leaf).grad
        parts = model.get_submodule(name.rpartition(".")[0]).parametrizations[leaf]
        inner = [parameter for parameter in parts.parameters() if parameter.requires_grad]
        if slope is None:
            assert all(p.grad is None or not p.grad.any() for p in inner), name
            continue
        reached += 1
        chain = torch.autograd.grad(parts(), inner, slope.to(dtype))
        for parameter, value in zip(inner, chain, strict=True):
            assert parameter.grad is not None, name
            scale = value.abs().max().clamp(min=1e-3)
            assert (parameter.grad - value).abs().max() <= 10 * tolerance * scale, name
    assert reached > 30


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("flavour", "backend"),
    [
        *((flavour, "torch") for flavour in FLAVOURS),
        ("grid MLP, DeNS", "cpp"),
        pytest.param("grid MLP, DeNS", "triton", marks=pytest.mark.slow),
        pytest.param("gates, shared embeddings", "compile", marks=pytest.mark.slow),
    ],
)
def test_folded_weights_follow_a_parametrization(
    flavour: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, tolerance = (F64, 1e-10) if backend in ("torch", "cpp") else (torch.float32, 5e-5)
    model, batch = wrapped(flavour, dtype), structures(dtype)
    use_backend(model, backend, monkeypatch)
    model.fold_weights()
    with torch.no_grad():
        for attribute in (None, "left", "factors", "original"):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if attribute is not None and name.endswith(f".{attribute}"):
                    tensor.mul_(1.2)
            network = plain(model).double()
            network.backend = "torch"
            expected = answers(network, structures())
            for _ in range(2):
                assert_same(answers(model, batch), expected, tolerance)


def change_attribute(model: EquiformerV2) -> None:
    for module in model.modules():
        if isinstance(module, LowRank):
            module.strength = 0.5


def fused_step(model: EquiformerV2) -> None:
    with torch.enable_grad():
        loss_of(model(structures())).backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    with torch.no_grad():
        model(structures())  # folded weights are those before the step
    optimizer.step()


def assign(model: EquiformerV2) -> None:
    for module in model.modules():
        if isinstance(module, LowRank):
            module.left = nn.Parameter(module.left.detach() * 1.3)


def write_twice(model: EquiformerV2) -> None:
    """The second write may get the memory that the first one freed."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
        parameter.data = parameter.data * 1.1


def remove(model: EquiformerV2) -> None:
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            if not isinstance(module, parametrize.ParametrizationList):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def add_one_more(model: EquiformerV2) -> None:
    for module in list(model.modules()):
        for name in getattr(module, "parametrizations", ()):
            shape = getattr(module, name).shape
            parametrize.register_parametrization(module, name, Scaled(shape).double())


CHANGES: dict[str, Callable[[EquiformerV2], object]] = {
    "an attribute": change_attribute,
    "a fused optimizer step": fused_step,
    "another parameter": assign,
    "writes through .data": write_twice,
    "loaded weights": lambda model: model.load_state_dict(
        {name: 1.05 * value for name, value in model.state_dict().items()}
    ),
    "assigned weights": lambda model: model.load_state_dict(
        {name: 1.05 * value for name, value in model.state_dict().items()}, assign=True
    ),
    "another precision and back": lambda model: model.float().double(),
    "one more parametrization": add_one_more,
    "no parametrizations": remove,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("change", CHANGES)
def test_folded_weights_follow_every_change(change: str) -> None:
    model, batch = wrapped("grid MLP, DeNS"), structures()
    model.fold_weights()
    with torch.no_grad():
        before = model(batch)
        CHANGES[change](model)
        network = plain(model)
        expected = network(batch)
        for _ in range(2):
            assert_same(model(batch), expected)
    same = change == "another precision and back" or change == "no parametrizations"
    assert same == bool((expected["forces"] - before["forces"]).abs().max() < 1e-4)
    with torch.no_grad():
        assert_same(copy.deepcopy(model)(batch), expected)


def test_wrapping_a_network_with_folded_weights() -> None:
    model, batch = random_model(small_config(**SMALLEST), F64), structures()
    model.fold_weights()
    with torch.no_grad():
        model(batch)
        wrap(model)
        assert_same(model(batch), plain(model)(batch))


def test_folded_weights_with_other_tensors_for_one_call() -> None:
    model, batch = wrapped("grid MLP, DeNS"), structures()
    model.fold_weights()
    with torch.no_grad():
        before = model(batch)
        others = {name: 1.2 * value for name, value in model.named_parameters()}
        once = torch.func.functional_call(model, others, (batch,))
        assert_same(model(batch), before)
        for parameter in model.parameters():
            parameter.mul_(1.2)
        assert_same(once, plain(model)(batch))


def test_a_cached_parametrization_is_not_folded() -> None:
    model, batch = wrapped("grid MLP, DeNS"), structures()
    model.fold_weights()
    with torch.no_grad():
        with parametrize.cached():
            model(batch)
            for parameter in model.parameters():
                parameter.mul_(1.2)
            model(batch)
        assert_same(model(batch), plain(model)(batch))


def test_weights_from_inference_mode() -> None:
    """They count no versions."""
    model, batch = wrapped("grid MLP, DeNS"), structures()
    with torch.inference_mode():
        model.load_state_dict({name: v.clone() for name, v in model.state_dict().items()}, assign=True)
        model.fold_weights()
        model(batch)
        for parameter in model.parameters():
            parameter.mul_(1.2)
        expected = plain(model)(batch)
        assert_same(model(batch), expected)
    with torch.no_grad():
        assert_same(model(batch), expected)


def test_a_parametrization_whose_state_cannot_be_compared_is_computed_each_time() -> None:
    class Mixture(nn.Module):
        """Coefficients in an object that others write to."""

        def __init__(self, coefficients: list[float]) -> None:
            super().__init__()
            self.coefficients = coefficients

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.coefficients[0]

    coefficients = [1.0]
    layer = random_model(small_config(**SMALLEST), F64).blocks[0].ga.proj
    parametrize.register_parametrization(layer, "weight", Mixture(coefficients))
    assert not Snapshot(layer).comparable


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_weight_is_computed_once_for_all_parts_of_the_edges(flavour: str) -> None:
    model, batch = wrapped(flavour), structures()
    calls: Counter[nn.Module] = Counter()
    for module in model.modules():
        if isinstance(module, LowRank):
            module.register_forward_pre_hook(lambda called, _: calls.update([called]))
    counts = []
    with torch.no_grad():
        for bytes_per_edge in (1, chunks.CPU_CHUNK_BYTES):  # one part; every atom is a part of its own
            model.bytes_per_edge = bytes_per_edge
            answers(model, batch)
            counts.append(dict(calls))
            calls.clear()
    assert counts[0] == counts[1]


def test_autocast_checkpointing_and_gradient_forces() -> None:
    batch = structures(torch.float32)
    model = wrapped("grid MLP, DeNS", torch.float32)
    network = plain(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        # Linear layers that are called as modules compute their parametrization in bfloat16, as torch does.
        assert_same(model(batch), network(batch), 0.03)
        model.fold_weights(torch.bfloat16)
        network.fold_weights(torch.bfloat16)
        assert_same(model(batch), network(batch), 0.03)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.activation_checkpointing = checkpointing
        loss_of(model(batch)).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))
    conservative = wrap(random_model(small_config(**SMALLEST, forces="gradient"), F64))
    with torch.no_grad():
        assert_same(conservative(structures()), plain(conservative)(structures()))


def test_names_of_the_parts_of_a_weight() -> None:
    model = wrapped("grid MLP, DeNS")
    skipped = model.no_weight_decay()
    for name in plain(model).no_weight_decay():
        path, _, leaf = name.rpartition(".")
        parts = f"{path}.parametrizations.{leaf}."
        inner = {name for name, _ in model.named_parameters() if name.startswith(parts)}
        assert len(inner) == 4
        assert inner <= skipped
        skipped -= inner
    assert not skipped


def test_a_checkpoint_holds_the_computed_weights(tmp_path: Path) -> None:
    model, batch = wrapped("S2, no grid MLP", torch.float32), structures(torch.float32)
    average = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("factors"))):
            tensor.mul_(1.1)
    update_average(average, model, 0.5)
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(average.buffers(), model.buffers(), strict=True)
        if mine.is_floating_point()
    )
    path = tmp_path / "model.pt"
    save_checkpoint(
        path,
        model=model,
        raw_state=model.state_dict(),
        averaged_state=average.state_dict(),
        normalizers=Normalizers(energy=Normalizer(0.0, 1.0), forces=Normalizer(0.0, 1.0)),
        energy_kind="adsorption",
        provenance={},
    )
    with torch.no_grad():
        assert_same(load_checkpoint(path, "raw").model(batch), model(batch), 1e-6)
        assert_same(load_checkpoint(path, "averaged").model(batch), average(batch), 1e-6)
    with pytest.raises(InputError, match=r"do not fit the parametrized network.*sphere_embedding"):
        plain_state(model, plain(model).state_dict())


def test_pruning_refuses_parametrized_weights() -> None:
    model = wrapped("S2, no grid MLP")
    plan = PruningPlan.keep_all(model.config).with_block(0, heads=(0,))
    refusals: list[Callable[[], object]] = [
        lambda: shrink(model, plan),
        lambda: masked(model, plan).__enter__(),
        lambda: magnitude_importance(model),
    ]
    for refusal in refusals:
        with pytest.raises(InputError, match=r"plain weights.*parametrized.*remove_parametrizations"):
            refusal()
