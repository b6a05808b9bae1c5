"""The S2EF training loss: energy L1 plus force L2, both on normalised targets.

EquiformerV2 paper, appendix D; the averages are those of the reference trainer (`mae` and `l2mae` of
fairchem-core 1.10): energies over every structure of the global batch, forces over every free atom of the
global batch, whichever process holds it.
"""

import torch
from torch import Tensor
from torch import distributed as dist


def global_mean(values: Tensor) -> Tensor:
    """Mean of `values` [n] over all processes, scaled for DDP's averaging of gradients.

    Processes hold different numbers of atoms, so the mean of their means would weigh atoms unequally.
    Each returns `sum * world_size / global_n`: averaged over processes (which is what DDP does with
    the gradients), that is the mean over all values. An empty tensor gives 0. Nothing waits for the device.
    """
    count = torch.tensor(float(values.numel()), device=values.device)
    world_size = 1
    if dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size()
        dist.all_reduce(count)
    return values.sum() * world_size / count.clamp(min=1.0)


def energy_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over the structures of the global batch; both [B], normalised units."""
    return global_mean((prediction.float() - target.float()).abs())


def force_l2(prediction: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """Mean Euclidean norm of the force error over the free atoms of the global batch (`l2mae`).

    `prediction`, `target` [N, 3] in normalised units, `free` [N] bool: atoms that the relaxation may move.
    Forces on fixed atoms are not part of OC20's task.
    """
    error = (prediction.float() - target.float())[free]
    return global_mean(torch.linalg.vector_norm(error, dim=-1))
