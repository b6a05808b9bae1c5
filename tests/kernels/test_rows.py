"""Gathering and summing rows: each other's derivative, with one order of additions."""

import torch

from equiformer2.kernels.rows import gather_rows, sum_rows


def test_derivatives() -> None:
    x, index = torch.randn(5, 3, 2, dtype=torch.float64), torch.tensor([4, 0, 0, 3, 4, 4, 1])
    rows = torch.randn(7, 3, 2, dtype=torch.float64)
    assert torch.equal(gather_rows(x, index), x[index])
    total = sum_rows(rows, index, 5)
    torch.testing.assert_close(total[4], rows[0] + rows[4] + rows[5])
    assert not total[2].any()
    assert torch.autograd.gradgradcheck(lambda x: gather_rows(x, index).sin(), x.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: sum_rows(x, index, 5).sin(), rows.requires_grad_())


def test_sums_have_one_order_of_additions_on_several_threads() -> None:
    """Enough numbers for torch to share the derivative among threads, few rows that many of them go to."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    table, index = torch.randn(3, 64, requires_grad=True), torch.randint(3, (20_000,))
    grad = torch.randn(20_000, 64)
    try:
        torch.set_num_threads(1)
        (alone,) = torch.autograd.grad(gather_rows(table, index), table, grad)
        torch.set_num_threads(4)
        for _ in range(5):
            (shared,) = torch.autograd.grad(gather_rows(table, index), table, grad)
            assert torch.equal(shared, alone)
    finally:
        torch.set_num_threads(threads)
