"""`gather_rotate` against its dense twin."""

import gpu_twins as twins
import pytest
import torch
from gpu_twins import Random, assert_near, gradients

from equiformer2.kernels.gpu.rotate import gather_rotate

CASES = [
    # lmax, mmax, channels, edges, shared radial weights
    (1, 0, 3, 5, False),
    (2, 2, 5, 7, True),
    (4, 2, 33, 3, False),
    (3, 3, 4, 1, True),
    (6, 2, 8, 3, False),
    (8, 1, 2, 1, True),
    (2, 1, 130, 3, False),
    (2, 1, 4, 0, False),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("lmax", "mmax", "channels", "edges", "shared"), CASES)
def test_values_and_gradients(
    lmax: int, mmax: int, channels: int, edges: int, shared: bool, device: torch.device
) -> None:
    random = Random(device)
    graph = random.graph(4, edges)
    x = random(4, (lmax + 1) ** 2, channels).requires_grad_()
    packed = random.packed(edges, lmax, mmax)
    radial = random.radial(edges, lmax, mmax, channels, shared).requires_grad_()
    ours = gather_rotate(
        x,
        packed,
        graph["source"],
        graph["target"],
        radial,
        lmax,
        mmax,
        shared,
        graph["source_order"],
        graph["source_ptr"],
        graph["target_ptr"],
    )
    theirs = twins.gather_rotate(x, packed, graph, radial, lmax, mmax, shared)
    assert_near([ours], [theirs])
    assert_near(gradients(ours, [x, radial]), gradients(theirs, [x, radial]))


def test_radial_weights_decide_the_output_type(device: torch.device) -> None:
    """As under autocast: features in float32, radial weights and GEMM inputs in bfloat16."""
    random = Random(device)
    graph = random.graph(4, 5)
    csr = graph["source_order"], graph["source_ptr"], graph["target_ptr"]
    x, packed = random(4, 9, 6).requires_grad_(), random.packed(5, 2, 1)
    radial = random.radial(5, 2, 1, 6, False).to(torch.bfloat16).requires_grad_()
    ours = gather_rotate(x, packed, graph["source"], graph["target"], radial, 2, 1, False, *csr)
    theirs = twins.gather_rotate(x, packed, graph, radial, 2, 1, False)
    assert ours.dtype == torch.bfloat16
    assert_near([ours], [theirs], 0.01)
    grads = gradients(ours, [x, radial])
    assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]
    assert_near(grads, gradients(theirs.to(torch.bfloat16), [x, radial]), 0.01)
