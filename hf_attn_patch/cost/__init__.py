"""What attention costs before anything runs: pairs and tiles read, FLOPs, bytes, passes, time at the roofline."""

from __future__ import annotations

from .cascades import CASCADES, Cascade, Einsum, passes
from .devices import GPUS, Gpu, gpus
from .estimate import Cost, Variant, estimate
from .simulate import Simulation, simulate
from .tiles import Tiles, tiles_of

__all__ = [
    "CASCADES", "GPUS", "Cascade", "Cost", "Einsum", "Gpu", "Simulation", "Tiles", "Variant", "estimate",
    "gpus", "passes", "simulate", "tiles_of",
]  # fmt: skip
