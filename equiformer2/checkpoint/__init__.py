"""The one-file native checkpoint, normalizers, and the import of OCP and fairchem v1 files."""

from equiformer2.checkpoint.checkpoint import Checkpoint, import_checkpoint, load_checkpoint, save_checkpoint
from equiformer2.checkpoint.normalizers import Normalizer, Normalizers
from equiformer2.checkpoint.reference import model_from_reference

__all__ = [
    "Checkpoint",
    "Normalizer",
    "Normalizers",
    "import_checkpoint",
    "load_checkpoint",
    "model_from_reference",
    "save_checkpoint",
]
