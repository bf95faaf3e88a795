"""Settings that patched models run in, each with the reference it must equal (table: `scripts/settings.py`)."""

from . import dtypes, generation, rows, serving, sharding, training, wrapping  # noqa: F401
from .base import SETTINGS, Bench, Outcome, Setting, judge

__all__ = ["SETTINGS", "Bench", "Outcome", "Setting", "judge"]
