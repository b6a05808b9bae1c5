"""`rotate_aggregate` and `segment_softmax` against their dense twins."""

import gpu_twins as twins
import pytest
import torch
from gpu_twins import Random, assert_near, gradients

from equiformer2.kernels.gpu.aggregate import rotate_aggregate
from equiformer2.kernels.gpu.softmax import segment_softmax
from equiformer2.kernels.layout import OrderLayout

CASES = [
    # lmax of the blocks, lmax, mmax, mmax of the values, heads, channels per head, edges
    (1, 1, 0, 0, 1, 3, 5),
    (2, 2, 2, 2, 2, 4, 7),
    (4, 1, 2, 2, 8, 3, 7),
    (4, 4, 2, 0, None, 7, 3),
    (6, 6, 2, 2, 3, 16, 5),
    (3, 3, 3, 1, None, 130, 3),
    (8, 8, 1, 1, 1, 2, 3),
    (2, 2, 1, 1, 40, 8, 3),
    (2, 2, 1, 1, 2, 2, 0),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("blocks_lmax", "lmax", "mmax", "values_mmax", "heads", "width", "edges"), CASES)
def test_aggregation(
    blocks_lmax: int,
    lmax: int,
    mmax: int,
    values_mmax: int,
    heads: int | None,
    width: int,
    edges: int,
    device: torch.device,
) -> None:
    random = Random(device)
    graph = random.graph(4, edges)
    packed = random.packed(edges, blocks_lmax, mmax)
    values = random(edges, OrderLayout(lmax, values_mmax).num_rows, (heads or 1) * width).requires_grad_()
    alpha = None if heads is None else random(edges, heads).requires_grad_()
    scale = [1.0 + 0.5 * l for l in range(lmax + 1)]
    inputs = [values] if alpha is None else [values, alpha]
    sizes = lmax, mmax, values_mmax, scale
    ours = rotate_aggregate(values, alpha, packed, graph["target"], graph["target_ptr"], *sizes)
    theirs = twins.rotate_aggregate(values, alpha, packed, graph["target"], 4, *sizes)
    assert_near([ours], [theirs])
    assert not ours[3].any()
    assert_near(gradients(ours, inputs), gradients(theirs, inputs))


def test_values_may_be_a_slice_of_a_wider_tensor(device: torch.device) -> None:
    random = Random(device)
    graph = random.graph(3, 5)
    packed = random.packed(5, 1, 1)
    wide = random(5, 4 * 6 + 3)
    values = wide[:, 3:].unflatten(1, (4, 6))
    arguments = packed, graph["target"], graph["target_ptr"], 1, 1, 1, [1.0, 1.0]
    ours = rotate_aggregate(values, None, *arguments)
    assert torch.equal(ours, rotate_aggregate(values.contiguous(), None, *arguments))


@pytest.mark.parametrize(("heads", "edges"), [(1, 5), (3, 7), (8, 40), (2, 0)])
def test_softmax(heads: int, edges: int, device: torch.device) -> None:
    random = Random(device)
    # One atom's edges fill more than one block of the kernel in the case of 40.
    graph = random.graph(2 if edges == 40 else 4, edges)
    logits = (3 * random(edges, heads) + 100).requires_grad_()
    starts = graph["target_ptr"]
    ours = segment_softmax(logits, starts)
    theirs = twins.segment_softmax(logits, graph["target"], len(starts) - 1)
    assert_near([ours], [theirs])
    assert_near(gradients(ours, [logits]), gradients(theirs, [logits]))
