"""Try a plan on the full-size network by masks, or make the smaller network of it."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from equiformer2.errors import InputError
from equiformer2.model import EquiformerV2
from equiformer2.model.denoising import without_denoising
from equiformer2.model.folding import check_plain
from equiformer2.model.norm import make_norm
from equiformer2.pruning.structured.block_plan import BlockPlan
from equiformer2.pruning.structured.index_maps import IndexMaps, kept_state
from equiformer2.pruning.structured.plan import PruningPlan

#: Networks whose sphere channels are masked at present.
_MASKED_CHANNELS: WeakSet[EquiformerV2] = WeakSet()


def weight_masks(
    model: EquiformerV2, plan: PruningPlan, within: PruningPlan | None = None
) -> dict[str, Tensor]:
    """Return the kept entries of every parameter that `plan` cuts.

    Args:
        model: network of full size.
        plan: units to keep.
        within: plan with the same sphere channels whose masks are known: only parameters of the blocks and
            heads that `plan` cuts otherwise are returned.

    Returns:
        Name -> bool of the parameter's shape; parameters that stay whole are absent.

    Raises:
        InputError: `plan` does not fit the network, or weights are parametrized.
    """
    plan = plan.checked(model.config)
    if within is None:
        check_plain(model, "pruning")
        parameters = dict(model.named_parameters())
    else:
        whole, same = BlockPlan(), within.checked(model.config)
        pairs = zip(plan.blocks, same.blocks, strict=True)
        parts = [(f"blocks.{index}", cut, old) for index, (cut, old) in enumerate(pairs)]
        parts.append(("force_block", plan.force_head, same.force_head))
        parts.append(("energy_block", plan.energy_head, same.energy_head))
        parameters = {
            name: parameter
            for path, cut, old in parts
            if cut != old
            for name, parameter in model.get_submodule(path).named_parameters(prefix=path)
        }
        blocks = (whole if cut == old else cut for _, cut, old in parts[:-2])
        plan = dataclasses.replace(plan, blocks=tuple(blocks))
    maps = IndexMaps(model.config, plan)
    masks = {}
    for name, parameter in parameters.items():
        selection = maps.selection(name)
        if maps.is_removed(name):
            masks[name] = torch.zeros_like(parameter, dtype=torch.bool)
        elif selection is not None:
            mask = selection.mask(parameter)
            if not bool(mask.all()):
                masks[name] = mask
    return masks


@contextmanager
def masked(
    model: EquiformerV2, plan: PruningPlan, within: PruningPlan | None = None
) -> Iterator[EquiformerV2]:
    """Context in which `model`, at its full size, gives the outputs and gradients of `shrink(model, plan)`.

    Removed weights are zero inside, and so are their gradients; what is trained inside are the kept ones. On
    leaving, the removed weights have their former values again and the kept ones those that they have got.
    Where sphere channels are cut, norms take their statistics over the kept channels. Nothing is computed
    faster than in the full network: to measure time, `shrink`.

    An optimizer that carries momentum from before would move removed weights: give it no such state.

    Args:
        model: network of full size, with plain weights.
        plan: units to keep.
        within: plan of a `masked` context of this network around this one, of which `plan` cuts some blocks
            or heads further, but no sphere channels: nothing else is masked, which takes less time.

    Raises:
        InputError: `plan` does not fit the network, or cuts sphere channels inside another context that does
            or of a network with the backend `compile`. Or weights are parametrized.
    """
    plan = plan.checked(model.config)
    if within is not None and within.checked(model.config).sphere_channels != plan.sphere_channels:
        raise InputError("plans with other sphere channels cannot be masked one within the other")
    channels = plan.sphere_channels if within is None else None
    if channels is not None and (model.backend == "compile" or model in _MASKED_CHANNELS):
        raise InputError(
            "sphere channels are masked in the norms, which a compiled or already masked network "
            "does not allow: use shrink"
        )
    masks = weight_masks(model, plan, within)
    parameters = {name: model.get_parameter(name) for name in masks}
    removed = {name: parameters[name].detach()[~mask] for name, mask in masks.items()}
    with ExitStack() as cleanup:
        cleanup.callback(_restore, model, parameters, masks, removed)
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].masked_fill_(~mask, 0.0)
        for name, mask in masks.items():
            if parameters[name].requires_grad:
                cleanup.callback(
                    parameters[name]
                    .register_hook(lambda grad, mask=mask: grad.masked_fill(~mask, 0.0))
                    .remove
                )
        if channels is not None:
            kept = torch.tensor(channels, device=model.sphere_embedding.weight.device)
            block_norms = [norm for block in model.blocks for norm in (block.norm_1, block.norm_2)]
            for norm in (model.norm, *(norm for norm in block_norms if isinstance(norm, nn.Module))):
                hook = norm.register_forward_hook(_on_channels(norm, model, kept))
                cleanup.callback(hook.remove)
            _MASKED_CHANNELS.add(model)
            cleanup.callback(_MASKED_CHANNELS.discard, model)
        yield model


def _restore(
    model: EquiformerV2,
    parameters: dict[str, nn.Parameter],
    masks: dict[str, Tensor],
    removed: dict[str, Tensor],
) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name][~mask] = removed[name]


def _on_channels(norm: nn.Module, model: EquiformerV2, kept: Tensor) -> Callable[..., Tensor]:
    """A forward hook of `norm`: its output on the kept channels alone, zero on the others."""
    config, like = model.config, model.sphere_embedding.weight

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        # Of its own in every call: several threads may run the network.
        narrow = make_norm(config.norm_type, config.lmax, len(kept)).to(like)
        weights = {name: weight.index_select(-1, kept) for name, weight in norm.named_parameters()}
        out = torch.func.functional_call(narrow, weights, (x.index_select(2, kept),))
        return out.new_zeros(x.shape).index_copy(2, kept, out)

    return hook


def shrink(model: EquiformerV2, plan: PruningPlan) -> EquiformerV2:
    """Make the smaller network of `plan`, with weights of its own.

    Its outputs are those of `masked(model, plan)`, but for rounding.

    Args:
        model: network of full size; it is left as it is.
        plan: units to keep.

    Returns:
        The smaller network, on the device, in the precision and mode (training or evaluation) and with the
        backend of `model`; frozen parameters of `model` are frozen. It has no parts for denoising, which
        checkpoints do not have either.

    Raises:
        InputError: `plan` does not fit the network; block and field are named. Or weights are parametrized.
    """
    check_plain(model, "pruning")
    model = without_denoising(model)
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
