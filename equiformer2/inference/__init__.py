"""Apply a trained network: predictor, ASE calculator, relaxations of one structure and of many."""

from equiformer2.inference.atoms import atoms_to_data, oc20_tags
from equiformer2.inference.calculator import EquiformerV2Calculator
from equiformer2.inference.engines import Engine, open_engine
from equiformer2.inference.many import Relaxation, predict, relax_draft_and_verify, relax_many
from equiformer2.inference.predictor import Predictor
from equiformer2.inference.relaxation import RelaxationResult, relax
from equiformer2.inference.relaxation_store import RelaxationStore

__all__ = [
    "Engine",
    "EquiformerV2Calculator",
    "Predictor",
    "Relaxation",
    "RelaxationResult",
    "RelaxationStore",
    "atoms_to_data",
    "oc20_tags",
    "open_engine",
    "predict",
    "relax",
    "relax_draft_and_verify",
    "relax_many",
]
