"""The fitted last layer of the energy head."""

from pathlib import Path

import numpy as np
import pytest
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint import load_checkpoint
from equiformer2.finetuning.energy_head import fit_last_layer


def test_energies_that_the_layer_can_express_are_found_again(
    frames: list[Data], adsorption_checkpoint: Path
) -> None:
    model = load_checkpoint(adsorption_checkpoint).model
    batch = Batch.from_data_list(frames)
    wanted = model(batch)["energy"].detach().double().numpy()
    wanted *= 1 / np.abs(wanted).mean()
    zero, fitted = fit_last_layer(model, frames, wanted, [frame.sid for frame in frames])
    assert zero == pytest.approx(1.0)
    assert fitted < 0.2
    assert np.abs(model(batch)["energy"].detach().numpy() - wanted).mean() < 0.1


def test_noise_leaves_the_layer_at_zero(frames: list[Data], adsorption_checkpoint: Path) -> None:
    model = load_checkpoint(adsorption_checkpoint).model
    noise = np.random.default_rng(0).normal(size=6)
    before, after = fit_last_layer(model, frames[:6], noise, ["one"] * 6)
    assert after == before == pytest.approx(np.abs(noise).mean())
    assert not model.energy_block.so3_linear_2.weight.any()
    assert not model.energy_block.so3_linear_2.bias.any()
