"""The undo proof: outputs of the untouched model against those after everything has been taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import api
from ..harness import evaluating
from .common import Choice


class UndoProof:
    """Make it before the first patch, `check` it after the last."""

    def __init__(self, model: Any, inputs: Mapping[str, Any]):
        self.model, self.inputs = model, inputs
        with evaluating(model):
            self.before = self._outputs()
        self.keys = list(model.state_dict())
        self.attention = getattr(model.config, "_attn_implementation", None)
        self.hooks = count_hooks(model)

    def check(self, choice: Choice) -> dict[str, Any]:
        """Patch once more, look, remove, look: how far outputs were apart, and whether anything is left behind."""
        with evaluating(self.model):
            with api.patched(self.model, choice[0], **choice[1]):
                patched = self._outputs()
            after = self._outputs()
        attention = getattr(self.model.config, "_attn_implementation", None)
        proof = {
            "outputs": "logits" if "input_ids" in self.inputs else "features",
            "values": self.before.numel(),
            "while_patched": self._farthest(patched),
            "max_abs_difference": self._farthest(after),
            "bit_equal": bool((after == self.before).all()),
            "same_state_dict_keys": list(self.model.state_dict()) == self.keys,
            "same_attention_implementation": attention == self.attention,
            "hooks_left": count_hooks(self.model) - self.hooks,
        }
        return {**proof, "undone": holds(proof)}

    def _farthest(self, outputs: Any) -> float:
        return float((outputs - self.before).abs().max())

    def _outputs(self) -> Any:
        import torch

        with torch.inference_mode():
            out = self.model(**self.inputs)
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state).float()


def count_hooks(model: Any) -> int:
    """Forward and pre-forward hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def holds(proof: Mapping[str, Any]) -> bool:
    """True if nothing at all tells that the model was ever patched."""
    return bool(
        proof["max_abs_difference"] == 0.0
        and proof["bit_equal"]
        and proof["same_state_dict_keys"]
        and proof["same_attention_implementation"]
        and proof["hooks_left"] == 0
    )
