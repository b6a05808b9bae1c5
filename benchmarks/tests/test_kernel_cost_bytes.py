"""Counted bytes are those of the real tensors; counted FLOPs those of the blocks that are not zero."""

import pytest
import torch

from benchmarks import kernel_costs as cost
from equiformer2.kernels.gpu.aggregate import rotate_aggregate
from equiformer2.kernels.gpu.rotate import gather_rotate
from equiformer2.kernels.layout import OrderLayout
from tests.kernels.gpu.gpu_twins import Random

pytest.importorskip("triton")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edges(dtype: torch.dtype, device: torch.device) -> None:
    random = Random(device, dtype)
    atoms, edges, lmax, mmax, channels, heads = 4, 5, 2, 1, 6, 3
    graph = random.graph(atoms, edges)
    packed, x = random.packed(edges, lmax, mmax), random(atoms, 9, channels)
    radial = random.radial(edges, lmax, mmax, channels, False)
    csr = graph["source_order"], graph["source_ptr"], graph["target_ptr"]
    edge_index = graph["source"], graph["target"]
    rotated = gather_rotate(x, packed, *edge_index, radial, lmax, mmax, False, *csr)
    found = cost.gather_rotate(atoms, edges, lmax, mmax, channels, False, dtype.itemsize)
    assert found.bytes == size(x, packed, radial, rotated, *edge_index)
    # Blocks of 1, 3 x 3 and 3 x 5 entries; 7 rows.
    assert found.flops == edges * 2 * channels * (2 * (1 + 9 + 15) + 7)
    assert found.plain_bytes > 3 * found.bytes

    values, alpha = (
        random(edges, OrderLayout(lmax, mmax).num_rows, 6),
        random(edges, heads, dtype=torch.float32),
    )
    out = rotate_aggregate(values, alpha, packed, graph["target"], graph["target_ptr"], 2, 1, 1, [1.0] * 3)
    found = cost.rotate_aggregate(atoms, edges, lmax, mmax, mmax, 6, heads, dtype.itemsize)
    assert found.bytes == size(values, alpha, packed, out) + 2 * size(graph["target_ptr"])


def test_grid_costs_no_memory() -> None:
    found = cost.separable_s2_activation(100, 29, 29, 64, 324, True)
    assert found.bytes < 4 * 100 * 64 * (2 * 29 + 1) + 4 * 2 * 29 * 324 + 1
    assert found.plain_bytes - found.bytes > 4 * 100 * 324 * 64 * 4
    assert found.flops == 100 * 64 * 2 * 324 * (29 + 29)


def test_roofline_is_the_slowest_part() -> None:
    part = cost.Cost(flops=10**12, exponentials=10**10, bytes=10**9, plain_bytes=10**10)
    assert part.intensity == 1000
    assert part.seconds(1000, 100) == pytest.approx(1e-2)
    assert part.seconds(10, 100) == pytest.approx(0.1)
    assert part.seconds(1000, 100, 0.1) == pytest.approx(0.1)
    assert (part + part).bytes == 2 * 10**9


def test_backward_counts_more_work_than_forward() -> None:
    for function, sizes in (
        (cost.gather_rotate, (10, 200, 6, 2, 128, False)),
        (cost.rotate_aggregate, (10, 200, 6, 2, 2, 128, 8)),
        (cost.segment_softmax, (10, 200, 8)),
        (cost.separable_s2_activation, (200, 29, 29, 64, 324, True)),
        (cost.grid_mlp, (10, 49, 128, 128, 324)),
    ):
        forward, backward = function(*sizes), function(*sizes, backward=True)
        assert forward.bytes < backward.bytes < backward.plain_bytes
        assert forward.flops < backward.flops
