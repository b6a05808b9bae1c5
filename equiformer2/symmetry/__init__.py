"""Measure how well any model keeps the symmetries of physics; nothing here knows EquiformerV2."""

from equiformer2.symmetry.measure import (
    SYMMETRIES,
    SymmetryError,
    SymmetryReport,
    assert_symmetries,
    check_symmetries,
)

__all__ = ["SYMMETRIES", "SymmetryError", "SymmetryReport", "assert_symmetries", "check_symmetries"]
