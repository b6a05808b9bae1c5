"""Using a trained network: predictor, ASE calculator, relaxation, adsorption energies."""

from equiformer2.inference.adsorption import AdsorptionResult, adsorption_energy
from equiformer2.inference.atoms import atoms_to_data, oc20_tags
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.inference.predictor import Predictor
from equiformer2.inference.prepare import PlacementOptions, SlabOptions, load_system, prepare_system
from equiformer2.inference.relaxation import RelaxationResult, relax

__all__ = [
    "AdsorptionResult",
    "EquiformerV2Calculator",
    "PlacementOptions",
    "Predictor",
    "RelaxationResult",
    "SlabOptions",
    "adsorption_energy",
    "atoms_to_data",
    "load_system",
    "oc20_tags",
    "prepare_system",
    "relax",
]
