"""Apply a trained network: predictor, ASE calculator, relaxation."""

from equiformer2.inference.atoms import atoms_to_data, oc20_tags
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.inference.predictor import Predictor
from equiformer2.inference.relaxation import RelaxationResult, relax

__all__ = [
    "EquiformerV2Calculator",
    "Predictor",
    "RelaxationResult",
    "atoms_to_data",
    "oc20_tags",
    "relax",
]
