"""Mean compositions of structures, which the coefficients of experts depend on."""

from typing import Any

import torch
from ase.data import atomic_numbers as known_numbers
from ase.data import chemical_symbols
from ase.formula import Formula
from torch import Tensor

from equiformer2.checkpoint.expert_files import TaskInfo
from equiformer2.checkpoint.training_data import TrainingData
from equiformer2.errors import InputError
from equiformer2.graph import structure_index


def composition_of(data: Any, num_elements: int) -> Tensor:
    """Compute the share of every element among the atoms of each structure, a mean over atoms.

    A supercell has exactly the shares of its cell: both are the same quotient, rounded once.

    Args:
        data: one structure or a batch (`atomic_numbers [N]`, `natoms`).
        num_elements: Z; atomic numbers are below it.

    Returns:
        `[B, Z]` float64.

    Raises:
        InputError: an element is not below Z.
    """
    numbers = data.atomic_numbers.long()
    unknown = numbers[(numbers < 0) | (numbers >= num_elements)]
    if len(unknown):
        raise InputError(
            f"a structure holds atomic number {int(unknown[0])}, and the network knows those below "
            f"{num_elements}"
        )
    natoms = torch.as_tensor(data.natoms, device=numbers.device).reshape(-1)
    structure = structure_index(natoms, len(numbers))
    counts = torch.bincount(structure * num_elements + numbers, minlength=len(natoms) * num_elements)
    return counts.view(len(natoms), num_elements).double() / natoms.clamp(min=1)[:, None]


def composition_from_formula(text: str, num_elements: int) -> Tensor:
    """Compute the composition of a formula such as `Cu3Pt`, which may have an adsorbate in it.

    Args:
        text: chemical formula; only the shares of its elements count.
        num_elements: Z.

    Returns:
        `[Z]` float64.

    Raises:
        InputError: it is no formula, or an element is not below Z.
    """
    if not text.isascii() or len(text) > 1000:
        raise InputError(f"the composition {text[:40]!r} is no chemical formula such as Cu3Pt")
    try:
        counts = Formula(text).count()
    except Exception as error:  # the parser raises many kinds
        raise InputError(f"the composition {text!r} is no chemical formula such as Cu3Pt") from error
    atoms = sum(counts.values())
    if not atoms or min(counts.values()) < 0:
        raise InputError(f"the composition {text!r} names no atoms: give a formula such as Cu3Pt")
    shares = torch.zeros(num_elements, dtype=torch.float64)
    for symbol, count in counts.items():
        number = known_numbers.get(symbol, num_elements)
        if number >= num_elements or number < 1:
            raise InputError(
                f"the composition {text!r} holds {symbol}, which is no element that the network knows "
                f"(atomic numbers 1 to {num_elements - 1})"
            )
        shares[number] = count / atoms
    return shares


def shares_by_symbol(composition: Tensor) -> dict[str, float]:
    """List the elements of a composition `[Z]` by symbol, the largest share first."""
    present = composition.nonzero().flatten().tolist()
    found = {chemical_symbols[number]: float(composition[number]) for number in present}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def unseen_elements(info: TaskInfo, composition: Tensor) -> list[str]:
    """List the elements of a composition `[Z]` that no training structure of a task has, by symbol."""
    seen = info.composition > 0
    # The mean is over some frames of large data sets; the lists are of all.
    for symbol in TrainingData(info.provenance).elements or ():
        if known_numbers[symbol] < len(seen):
            seen[known_numbers[symbol]] = True
    return [chemical_symbols[number] for number in ((composition > 0) & ~seen).nonzero().flatten().tolist()]
