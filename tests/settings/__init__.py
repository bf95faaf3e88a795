"""Settings that patched models run in, each with the reference it must equal (table: `scripts/settings.py`)."""

from . import dtypes, generation, rows, serving, training, wrapping  # noqa: F401
from .base import SETTINGS, Bench, Outcome, Setting, judge

# what `tests/test_settings.py` runs: of every family of methods those that need most of a forward
QUICK = ("streaming", "moa", "head_gate", "pai", "var", "tcpa")

__all__ = ["QUICK", "SETTINGS", "Bench", "Outcome", "Setting", "judge"]
