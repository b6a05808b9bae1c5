"""Fingerprints of networks."""

import dataclasses

import pytest
import torch

from equiformer2.checkpoint.fingerprints import fingerprint_of_weights
from equiformer2.model import EquiformerV2, ModelConfig
from equiformer2.pruning.structured.apply import shrink
from equiformer2.pruning.structured.plan import PruningPlan

TINY = ModelConfig(num_layers=1, sphere_channels=8, lmax=1, mmax=1, grid_resolution=4)


def network(config: ModelConfig = TINY) -> EquiformerV2:
    torch.manual_seed(0)
    return EquiformerV2(config)


def test_weights_and_options_count() -> None:
    first = fingerprint_of_weights(network())
    assert fingerprint_of_weights(network()) == first
    assert fingerprint_of_weights(network(dataclasses.replace(TINY, max_radius=7.0))) != first
    changed = network()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    assert fingerprint_of_weights(changed) != first


def test_a_pruned_network_has_its_own() -> None:
    model = network()
    plan = PruningPlan.keep_all(TINY).with_block(0, mmax=0)
    assert fingerprint_of_weights(shrink(model, plan)) != fingerprint_of_weights(model)


def test_an_option_that_a_later_version_adds_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search begun with one version goes on with the next."""
    model, today = network(), ModelConfig.to_dict
    first = fingerprint_of_weights(model)
    monkeypatch.setattr(ModelConfig, "to_dict", lambda config: {**today(config), "new_switch": False})
    assert fingerprint_of_weights(model) == first
