"""`separable_s2_activation` and `grid_mlp` against their dense twins."""

import gpu_twins as twins
import pytest
import torch
from gpu_twins import Random, assert_near, gradients

from equiformer2.kernels.gpu import sphere_mlp
from equiformer2.kernels.gpu.s2_activation import separable_s2_activation
from equiformer2.kernels.gpu.sphere_mlp import grid_mlp

CASES = [
    # B, R, S, C, G, gates
    (5, 4, 4, 3, 18, True),
    (3, 9, 9, 8, 30, False),
    (7, 29, 29, 16, 70, True),
    (5, 29, 19, 40, 130, True),
    (2, 81, 4, 5, 180, True),
    (0, 4, 4, 3, 18, True),
]


@pytest.mark.parametrize(("batch", "rows", "out_rows", "channels", "points", "gated"), CASES)
def test_s2_activation(
    batch: int, rows: int, out_rows: int, channels: int, points: int, gated: bool, device: torch.device
) -> None:
    random = Random(device)
    x = random(batch, rows, channels).requires_grad_()
    gates = random(batch, channels).requires_grad_() if gated else None
    to_grid, from_grid = random(points, rows) / rows**0.5, random(out_rows, points) / points
    ours = separable_s2_activation(x, gates, to_grid, from_grid)
    theirs = twins.separable_s2_activation(x, gates, to_grid, from_grid)
    assert_near([ours], [theirs])
    inputs = [x] if gates is None else [x, gates]
    assert_near(gradients(ours, inputs), gradients(theirs, inputs))


def test_s2_activation_of_slices_of_a_wider_tensor(device: torch.device) -> None:
    random = Random(device)
    wide, to_grid, from_grid = random(5, 5 + 4 * 6), random(20, 4), random(4, 20)
    x, gates = wide[:, 5:].unflatten(1, (4, 6)), random(5, 9)[:, 2:8]
    ours = separable_s2_activation(x, gates, to_grid, from_grid)
    copied = separable_s2_activation(x.contiguous(), gates.contiguous(), to_grid, from_grid)
    assert torch.equal(ours, copied)


@pytest.mark.parametrize("chunk_bytes", [1, 2**24])
@pytest.mark.parametrize(
    ("batch", "rows", "channels", "hidden", "points"),
    [(3, 4, 5, 7, 18), (5, 25, 16, 24, 100), (2, 49, 33, 8, 70), (0, 4, 3, 3, 18)],
)
def test_grid_mlp(
    batch: int,
    rows: int,
    channels: int,
    hidden: int,
    points: int,
    chunk_bytes: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One byte: every atom is a chunk of its own.
    monkeypatch.setattr(sphere_mlp, "_CHUNK_BYTES", chunk_bytes)
    random = Random(device)
    x = random(batch, rows, channels).requires_grad_()
    weight = (random(hidden, channels) / channels**0.5).requires_grad_()
    to_grid, from_grid = random(points, rows) / rows**0.5, random(rows, points) / points
    ours = grid_mlp(x, to_grid, from_grid, weight)
    theirs = twins.grid_mlp(x, to_grid, from_grid, weight)
    assert_near([ours], [theirs])
    assert_near(gradients(ours, [x, weight]), gradients(theirs, [x, weight]))
