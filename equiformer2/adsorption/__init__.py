"""Compute adsorption energies, from a slab and a molecule to a checked result."""

from equiformer2.adsorption.energy import AdsorptionResult, adsorption_energy
from equiformer2.adsorption.find import FoundEnergy, find_adsorption_energy
from equiformer2.adsorption.prepare import PlacementOptions, SlabOptions, load_system, prepare_system

__all__ = [
    "AdsorptionResult",
    "FoundEnergy",
    "PlacementOptions",
    "SlabOptions",
    "adsorption_energy",
    "find_adsorption_energy",
    "load_system",
    "prepare_system",
]
