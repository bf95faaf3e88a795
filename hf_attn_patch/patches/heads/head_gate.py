"""`head_gate`: per-layer, per-head multipliers on head outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ModelMismatchError
from ...forward.needs import HeadMask
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


@register_patch("head_gate")
@dataclass
class HeadGate(Patch):
    """Multiply head outputs by per-layer, per-head factors (the head mask transformers v5 removed).

    Source: Are Sixteen Heads Really Better than One?, arXiv 1905.10650 (gate definition; from the abstract and
    the removed ``head_mask`` of transformers v4, READ).

    Formula: ``o_h <- gate[layer, h] * o_h`` before the output projection; ``o_h`` is [B, L, Dv].

    Neutral value: 1.

    Differs from ``head_mask`` of transformers v4: it multiplied the attention probabilities, which is the same
    thing for a gate that is constant over keys, except under attention dropout. transformers v5 silently swallows
    ``head_mask=`` and computes as if it were not there; while this patch is active, passing it warns.
    """

    steady = True
    paper = "Are Sixteen Heads Really Better than One?"
    arxiv = "1905.10650"
    head_state = ("gate",)
    trainable = True
    needs = (HeadMask(),)

    gate: float | list = option(
        1.0, help="one factor for all heads, [heads] for every layer alike, or [[heads] per layer]"
    )
    trainable_gate: bool = option(
        False, help="keep the gates as parameters, so that a Trainer can learn them"
    )

    def validate(self) -> None:
        try:
            table = torch.as_tensor(self.gate, dtype=torch.float64)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"head_gate: gate must be a number or (nested) list of numbers: {error}"
            ) from error
        if table.ndim > 2 or table.numel() == 0:
            raise ConfigError(
                f"head_gate: gate has shape {list(table.shape)}, expected [], [heads] or [layers, heads]"
            )
        if not bool(torch.isfinite(table).all()):
            raise ConfigError("head_gate: gate holds NaN or infinity")

    def _row(self, layer: int) -> list[float] | float:
        if isinstance(self.gate, list) and self.gate and isinstance(self.gate[0], list):
            return self.gate[layer]
        return self.gate  # type: ignore[return-value]

    def check(self, site: Site) -> None:
        if isinstance(self.gate, list) and isinstance(self.gate[0], list) and site.layer >= len(self.gate):
            raise ModelMismatchError(
                f"head_gate: gate has {len(self.gate)} layers, {site.path} is layer {site.layer}"
            )
        row = self._row(site.layer)
        if isinstance(row, list):
            if site.num_heads is None:
                raise ModelMismatchError(f"head_gate: the number of heads of {site.path} is unknown")
            if len(row) != site.num_heads:
                raise ModelMismatchError(
                    f"head_gate: gate has {len(row)} heads, {site.path} has {site.num_heads} query heads"
                    + (f" ({site.num_kv_heads} KV heads)" if site.num_kv_heads != site.num_heads else "")
                )
        elif self.trainable_gate and site.num_heads is None:
            raise ModelMismatchError(f"head_gate: the number of heads of {site.path} is unknown")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        row = self._row(site.layer)
        gate = torch.tensor(
            row if isinstance(row, list) else [row] * (site.num_heads or 1), dtype=torch.float32
        )
        return {"gate": nn.Parameter(gate) if self.trainable_gate else gate}

    def edit(self, program: Program, call: Call) -> None:
        held: Tensor = call.tensors.gate  # type: ignore[assignment]
        gate = held if call.heads is None else held[list(call.heads)]
        program.gate(gate.to(program.query.dtype), call.heads)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any]:
        return {"gate": 1.0}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [{"gate": 0.5}, {"gate": 0.0}, {"gate": 0.7, "trainable_gate": True}]
