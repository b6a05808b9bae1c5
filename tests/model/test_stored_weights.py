"""Weights stored as bfloat16 or as integers with a scale per row."""

import copy
import pickle

import pytest
import torch
from model_helpers import batch_of, cluster, random_model, small_config, trace_only, water
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equiformer2 import EquiformerV2
from equiformer2.errors import InputError
from equiformer2.model.folding import Snapshot, plain_state, read, resident_bytes
from equiformer2.model.parametrizations import (
    STORED_KINDS,
    IntegerRows,
    form_of,
    rounded,
    store,
    stored_kinds,
)


def stored(model: EquiformerV2, kind: str) -> EquiformerV2:
    """A copy with every matrix stored."""
    network = copy.deepcopy(model)
    for module in list(network.modules()):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2:
            store(module, "weight", kind)
    return network


@pytest.fixture(scope="module")
def model() -> EquiformerV2:
    return random_model(small_config(num_layers=1, use_grid_mlp=True))


def forces(model: EquiformerV2) -> Tensor:
    with torch.no_grad():
        return model(batch_of(water(), cluster()))["forces"]


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (1, 1), (3, 2, 7), (4, 9)])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_come_back_as_they_were(shape: tuple[int, ...], bits: int):
    largest = {8: 127, 4: 7}[bits]
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    integers[..., 0] = largest  # so that the scale is the one below
    weight = integers * 0.25
    form = IntegerRows(shape, bits)
    tensors = form.right_inverse(weight)
    assert [(t.shape, t.dtype) for t in tensors] == form.stored_shapes()
    assert torch.equal(form(*tensors), weight)


@pytest.mark.parametrize(("kind", "error"), [("bf16", 1 / 256), ("int8", 1 / 254), ("int4", 0.41)])
def test_rounding_errors_are_bounded_by_the_largest_entry_of_the_row(kind: str, error: float):
    weight = torch.randn(6, 33, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    weight[3] *= 1e-30
    change = (rounded(weight, kind) - weight).abs()
    assert bool((change <= error * weight.abs().amax(1, keepdim=True)).all())
    assert torch.equal(rounded(weight, kind)[2], torch.zeros(33))


def test_four_bits_have_less_squared_error_than_the_scale_of_the_largest_entry_gives():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    scale = weight.abs().amax(1, keepdim=True) / 7
    plain = (weight / scale).round() * scale
    assert (rounded(weight, "int4") - weight).square().sum() < 0.95 * (plain - weight).square().sum()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", STORED_KINDS)
def test_numbers_that_are_not_finite_are_refused(kind: str, number: float):
    weight = torch.zeros(2, 3)
    weight[1, 2] = number
    with pytest.raises(InputError, match="not finite"):
        rounded(weight, kind)


def test_unknown_forms_and_vectors_are_refused():
    with pytest.raises(InputError, match="int3"):
        form_of("int3", (2, 2))
    with pytest.raises(InputError, match="no rows"):
        form_of("int8", (5,))


@pytest.mark.parametrize("kind", STORED_KINDS)
def test_a_stored_network_answers_as_a_plain_one_with_the_rounded_weights(model: EquiformerV2, kind: str):
    network = stored(model, kind)
    assert set(stored_kinds(network).values()) == {kind}
    plain = EquiformerV2(model.config)
    plain.load_state_dict(plain_state(network, network.state_dict()))
    assert torch.equal(forces(network), forces(plain))
    network.fold_weights()
    plain.fold_weights()
    assert torch.allclose(forces(network), forces(plain), atol=1e-5)
    assert not torch.equal(forces(network), forces(model))


@pytest.mark.parametrize("backend", ["torch", "compile"])
def test_every_backend_reads_stored_weights(
    model: EquiformerV2, backend: str, monkeypatch: pytest.MonkeyPatch
):
    trace_only(monkeypatch)
    network = stored(model, "int4")
    expected = forces(network)
    network.backend = backend
    network.fold_weights()
    assert torch.allclose(forces(network), expected, atol=1e-5)


def test_nothing_is_kept_of_stored_weights_between_calls(model: EquiformerV2):
    sizes = {}
    for kind in ("float32", *STORED_KINDS):
        network = copy.deepcopy(model) if kind == "float32" else stored(model, kind)
        network.fold_weights()
        before = resident_bytes(network)
        forces(network)
        sizes[kind] = resident_bytes(network)
        assert (sizes[kind] > before) == (kind == "float32")
    assert sizes["float32"] > sizes["bf16"] > sizes["int8"] > sizes["int4"]


def test_stored_numbers_get_no_gradients_and_a_map_on_top_does(model: EquiformerV2):
    class Added(nn.Module):
        def __init__(self, shape: torch.Size) -> None:
            super().__init__()
            self.change = nn.Parameter(torch.zeros(shape))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.change

    network = stored(model, "int4").requires_grad_(False)
    layer = network.blocks[0].ga.proj
    shape = read(layer).shape
    before = forces(network)
    parametrize.register_parametrization(layer, "weight", Added(shape))
    assert torch.equal(forces(network), before)
    network.train()
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained == ["blocks.0.ga.proj.parametrizations.weight.1.change"]
    network(batch_of(water()))["forces"].square().sum().backward()
    assert bool(layer.parametrizations.weight[1].change.grad.abs().sum() > 0)
    network.eval()
    snapshot = Snapshot(layer)
    assert snapshot.comparable
    assert snapshot.is_current()
    with torch.no_grad():
        layer.parametrizations.weight[1].change.add_(0.1)
    assert not snapshot.is_current()


@pytest.mark.parametrize("kind", STORED_KINDS)
def test_a_stored_network_can_be_copied_and_cast(model: EquiformerV2, kind: str):
    network = stored(model, kind)
    expected = forces(network)
    assert torch.equal(forces(copy.deepcopy(network)), expected)
    wide = copy.deepcopy(network).double()
    with torch.no_grad():
        found = wide(batch_of(water(torch.float64), cluster(torch.float64)))["forces"]
    assert torch.allclose(found.float(), expected, atol=1e-3)


def test_a_pickled_network_keeps_its_forms(model: EquiformerV2) -> None:
    compact = stored(model, "int8")
    again = pickle.loads(pickle.dumps(compact))
    assert stored_kinds(again) == stored_kinds(compact)
    torch.testing.assert_close(forces(again), forces(compact), rtol=0, atol=0)
