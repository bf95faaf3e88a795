"""Mask rules of transformers, read: causal, window, packed sequences; what else they say stays a rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def rule_parts(rule: Callable) -> list[Callable]:
    """Flatten transformers' ``and_masks(f, g, ...)`` into its parts (its closure is the only place they live)."""
    if getattr(rule, "__qualname__", "").startswith("and_masks."):
        parts = inspect.getclosurevars(rule).nonlocals["mask_functions"]
        return [leaf for part in parts for leaf in rule_parts(part)]
    return [rule]


def remapped(part: Callable) -> Callable:
    """The rule that transformers applies to positions within packed sequences."""
    inside = inspect.getclosurevars(part).nonlocals.values()
    return next(value for value in inside if callable(value))


def is_packed(rule: Callable | None) -> bool:
    """True if a transformers rule separates sequences packed into one row."""
    return rule is not None and any(
        getattr(part, "__qualname__", "").startswith("packed_sequence_mask_function.")
        for part in rule_parts(rule)
    )


def facts_of(rule: Callable | None) -> tuple[bool, int | None, bool]:
    """(causal, window, opaque) of a transformers mask rule; opaque = not fully described by the first two."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if rule is None or rule is bidirectional_mask_function:
        return False, None, False
    if rule is causal_mask_function:  # by identity: under torch.compile functions have no qualified name
        return True, None, False
    causal, window, opaque = False, None, False
    for part in rule_parts(rule):
        name = getattr(part, "__qualname__", "")
        if name == "causal_mask_function":
            causal = True
        elif name == "bidirectional_mask_function":
            pass
        elif name.startswith("sliding_window_overlay."):
            size = inspect.getclosurevars(part).nonlocals["sliding_window"]
            window = int(size) if window is None else min(window, int(size))
        elif name.startswith("remap_positions_for_packed_sequence."):
            # positions within a sequence grow as columns do, so "causal" and a window mean the same by columns
            inner = facts_of(remapped(part))
            causal, opaque = causal or inner[0], True
            window = inner[1] if window is None else min(window, inner[1] or window)
        else:
            opaque = True
    return causal, window, opaque
