"""Take the kept part of a network out."""

import torch

from equiformer2.model import EquiformerV2
from equiformer2.pruning.index_maps import kept_state
from equiformer2.pruning.plan import PruningPlan


def shrink(model: EquiformerV2, plan: PruningPlan) -> EquiformerV2:
    """The smaller network of `plan`, with weights of its own; `model` is left as it is.

    It gives what `masked(model, plan)` gives, but for rounding. It is where `model` is, in its precision and
    mode (training or evaluation), with its backend, and what is frozen there is frozen here.

    Raises:
        InputError: `plan` does not fit the network; block and field are named.
    """
    config = plan.applied_to(model.config)
    parameters = dict(model.named_parameters())
    like = model.sphere_embedding.weight
    with torch.random.fork_rng(devices=[]):
        small = EquiformerV2(config)
    small.to(device=like.device, dtype=like.dtype)
    with torch.no_grad():
        small.load_state_dict(kept_state(parameters, model.config, plan))
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(parameters[name].requires_grad)
    small.backend = model.backend
    small.activation_checkpointing = model.activation_checkpointing
    return small.train(model.training)
