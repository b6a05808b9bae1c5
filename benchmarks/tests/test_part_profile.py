"""Profile by part: operations find their part, and counts follow the shapes."""

import dataclasses

import pytest
import torch

from benchmarks import equiformer2_network as ours
from benchmarks import operation_counts as counting
from benchmarks.machine import precision
from benchmarks.network_sizes import SIZES
from benchmarks.operation_counts import count, gemm_shapes
from benchmarks.part_profile import part_of, profile_parts
from benchmarks.worker import Worker
from equiformer2 import ModelConfig
from equiformer2.checkpoint.reference import config_from_reference

ATTENTION = "in:blocks.0.ga"


@pytest.mark.parametrize(
    ("ranges", "operation", "part"),
    [
        (["in:build_graph"], "aten::sort", counting.GRAPH),
        (["in:._inputs", "in:._rotations"], "aten::mul", counting.FRAMES),
        (["in:blocks.0.norm_1"], "aten::mul", counting.NORM),
        (["in:norm"], "aten::mul", counting.NORM),
        ([ATTENTION, "in:blocks.0.ga.alpha_norm"], "aten::native_layer_norm", counting.SOFTMAX),
        ([ATTENTION, "in:convolve_edges", "_ConvolveEdges"], "aten::bmm", counting.ROTATE),
        ([ATTENTION, "in:convolve_edges", "_ConvolveEdges"], "aten::mm", counting.CONVOLVE_1),
        ([ATTENTION, "in:attend", "in:so2_linear"], "mkldnn::_linear_pointwise", counting.CONVOLVE_2),
        ([ATTENTION, "in:blocks.0.ga.so2_conv_2"], "aten::addmm", counting.CONVOLVE_2),
        ([ATTENTION, "in:attend", "in:blocks.0.ga.activation"], "aten::silu", counting.ACTIVATION),
        ([ATTENTION, "in:aggregate_messages"], "aten::bmm", counting.AGGREGATE),
        ([ATTENTION, "in:blocks.0.ga.so2_conv_1.rad_func.net.1"], "aten::add", counting.RADIAL),
        (["in:blocks.0.ffn", "in:grid_mlp"], "aten::bmm", counting.FEED_FORWARD),
        (["in:force_block", "in:convolve_edges"], "aten::mm", counting.HEADS),
        (["Optimizer.step#AdamW.step"], "aten::_foreach_add_", counting.OPTIMIZER),
        ([ATTENTION, "equiformer2::gather_rotate"], "aten::mm", counting.ROTATE),
        ([ATTENTION, "in:convolve_edges", "equiformer2::so2_gemm"], "aten::mm", counting.CONVOLVE_1),
        ([ATTENTION, "in:attend", "equiformer2::so2_gemm"], "aten::mm", counting.CONVOLVE_2),
        (["in:blocks.0"], "aten::add", counting.OTHER),
    ],
)
def test_operations_find_their_part(ranges: list[str], operation: str, part: str) -> None:
    assert part_of(ranges, operation, [[4, 8], [8, 16]], {99}) == part


def test_the_radial_layer_inside_the_convolution_is_known_by_its_width() -> None:
    ranges = [ATTENTION, "in:convolve_edges"]
    assert part_of(ranges, "aten::addmm", [[192], [4, 8], [8, 192]], {192}) == counting.RADIAL


def test_profile_adds_up_and_leaves_nothing_behind() -> None:
    worker = Worker(ours, "cpu")
    worker.build(SIZES["toy"], None, False, "atoms-16")
    before = {name: set(vars(module)) for name, module in worker.model.named_modules()}
    found = worker.breakdown("training_step", "float32")
    after = {name: set(vars(module)) for name, module in worker.model.named_modules()}
    assert after == before
    assert found["total"] == pytest.approx(sum(map(sum, found["parts"].values())))
    for part in (counting.ROTATE, counting.ACTIVATION, counting.FEED_FORWARD, counting.NORM, counting.HEADS):
        forward, backward = found["parts"][part]
        assert forward > 0
        assert backward > 0
    assert found["parts"][counting.OPTIMIZER][1] == 0
    assert found["parts"][counting.GRAPH][1] == 0
    # Inference has no backward pass.
    forward_only = profile_parts(worker.model, lambda: worker.run("forward"), "cpu")
    assert sum(backward for _, backward in forward_only["parts"].values()) == 0


def test_counts_by_hand() -> None:
    config = ModelConfig(
        num_layers=1,
        sphere_channels=2,
        attn_hidden_channels=3,
        num_heads=1,
        attn_alpha_channels=5,
        attn_value_channels=7,
        ffn_hidden_channels=4,
        lmax=1,
        mmax=1,
        grid_resolution=4,
        edge_channels=2,
        num_distance_basis=10,
        forces="none",
    )
    parts = {name: counted.flops for name, counted in count(config, atoms=1, edges=1).items()}
    # m = 0: two degrees of 2 C = 4 inputs; outputs 2 x 3 hidden, 5 for the attention, 3 gates.
    # m = 1: three products.
    assert parts[counting.CONVOLVE_1] == 2 * (8 * 14 + 3 * 4 * 3)
    assert parts[counting.CONVOLVE_2] == 2 * (6 * 14 + 3 * 3 * 7)
    # l = 0 is 1 x 1, l = 1 is 3 x 3.
    assert parts[counting.ROTATE] == 2 * 10 * 4
    assert parts[counting.AGGREGATE] == 2 * 10 * 7
    # Inputs of m = 0 and m = 1: 2 + 1 degrees of 4 channels.
    assert parts[counting.RADIAL] == 2 * (10 * 2 + 2 * 2 + 2 * 12)
    # 4 latitudes of 4 longitudes, 4 coefficients of 3 orders; there and back.
    assert parts[counting.ACTIVATION] == 2 * 2 * (4 * 4 + 16 * 3) * 3
    assert parts[counting.PROJECT] == 2 * 4 * 7 * 2
    on_coefficients, on_grid = 2 * 4 + 2 * 16 + 4 * 2, 2 * 4 * 4 + 16
    assert parts[counting.FEED_FORWARD] == 2 * 2 * 4 + 2 * 4 * on_coefficients + 2 * 16 * on_grid
    assert parts[counting.HEADS] == 2 * (2 * 4 + 4)
    products = sum(2 * m * k * n for m, k, n in gemm_shapes(config, edges=1))
    assert products == parts[counting.CONVOLVE_1] + parts[counting.CONVOLVE_2]


@pytest.mark.parametrize("size", ["31M", "83M", "153M", "small"])
def test_counts_grow_with_edges_and_layers(size: str) -> None:
    config = config_from_reference(SIZES[size])
    one, two = count(config, 10, 200), count(config, 20, 400)
    for name, part in one.items():
        assert two[name].flops == pytest.approx(2 * part.flops)
        assert part.bytes < two[name].bytes <= 2 * part.bytes
    deeper = dataclasses.replace(config, num_layers=2 * config.num_layers)
    assert count(deeper, 10, 200)[counting.CONVOLVE_1].flops == 2 * one[counting.CONVOLVE_1].flops


def test_grid_left_to_the_implementation_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match="grid resolution"):
        count(ModelConfig(grid_resolution=None), 1, 1)


def test_precision_is_put_back() -> None:
    with precision("bf16", "cpu"):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    before = torch.backends.cuda.matmul.allow_tf32
    with precision("tf32", "cpu"):
        assert torch.backends.cuda.matmul.allow_tf32
        assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.cuda.matmul.allow_tf32 == before
