"""Geometry without parameters: derived constants, edge frames with their Wigner-D blocks, S2 grids."""

from equiformer2.model.so3.constants import DerivedConstants
from equiformer2.model.so3.frames import EdgeFrames
from equiformer2.model.so3.grid import S2Grid

__all__ = ["DerivedConstants", "EdgeFrames", "S2Grid"]
