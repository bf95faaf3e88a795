"""`moh`: every token uses the shared heads and the K routed heads that score best for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ModelMismatchError
from ...forward.needs import AttentionInput, AuxiliaryLosses, QueryBeforeNorm
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site


@dataclass(frozen=True)
class Split:
    """Heads of a site in units: one head each, or the query heads of one KV head (`align="group"`).

    The first `shared` units are always on; `chosen` of the other `routed` units are on per token.
    """

    size: int
    shared: int
    routed: int
    chosen: int

    @property
    def routes(self) -> bool:
        """False if every routed unit is on, or none."""
        return 0 < self.chosen < self.routed

    @property
    def share(self) -> float:
        """Active heads / all heads."""
        return (self.shared + self.chosen) / (self.shared + self.routed)


def best(scores: Tensor, count: int) -> Tensor:
    """bool like `scores`, True at the `count` largest of the last dimension; of equal ones the first win, so a token's
    heads never depend on its neighbours in the batch."""
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter(-1, order, True)


def balance(probabilities: Tensor, chosen: Tensor, real: Tensor | None = None) -> Tensor:
    """``n sum_i mean_t(p_ti) mean_t(M_ti)`` over n units: K when both are even, larger when few units take all.

    Args:
        probabilities: [B, L, n]. chosen: bool [B, L, n]. real: bool [B|1, L], tokens that count (None = all).
    """
    weight = torch.ones(probabilities.shape[:2], device=probabilities.device, dtype=probabilities.dtype)
    if real is not None:
        weight = weight * real
    weight = weight / weight.sum().clamp(min=1)
    mean = lambda x: torch.einsum("bl,bln->n", weight, x.to(weight.dtype))
    return probabilities.shape[-1] * (mean(probabilities) * mean(chosen)).sum()


def norm_scores(norms: Tensor) -> Tensor:
    """``softmax(n / std(n))`` over the last dimension (two units or more), with the unbiased std."""
    variance = norms.var(-1, keepdim=True)
    return (norms / (variance + 1e-20).sqrt()).softmax(
        -1
    )  # a token whose norms are all equal gets even scores


@register_patch("moh")
@dataclass
class MoH(Patch):
    """Mixture of heads: per token the first heads are always on, and the K best of the others.

    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842; formulas from SkyworkAI/MoH
    2cefd57 (READ: MoH-LLaMA3 modeling file, MoH-DiT models.py, MoH-ViT attention files; golden vectors RAN).

    Formula: Hs shared heads of H, Hr = H - Hs, M = the K best of the routed heads for the token,

        norm:     n_h = ||q_h||, M by n;  gate = [1 .. 1, M];  in training M + p - stop(p), p = softmax(n / std(n))
        learned:  p = softmax(W_r x), M by p;  r = K p M / sum(p M);  s = Hs softmax(W_s x)
                  (a1, a2) = 2 softmax(W_h x);  gate = [a1 s, a2 r];  x [B, L, C] enters the attention module
        both:     o_h <- gate_h o_h before the output projection
        balance:  Hr sum_i mean_t(p_i) mean_t(M_i), mean over layers, times `balance`, added to the loss in training

    Special cases of the source: Hs = 0: gate = r. K = 0: gate = [s, 0]. Hs = 1: s = 1. ``align="group"`` is ours: the
    unit is the query heads of one KV head (norms are summed, probabilities counted per group), so that decoding can
    leave out KV heads, which heads chosen one by one practically never allow.

    Neutral value: active=1.0 (norm: exactly the dense model, no gate is applied; learned: gates are 1 at the start).

    Differs from the original code: routers start at zero (Xavier there), so a converted model starts from gates of 1
    on the heads that are on; ties go to the first head; routers compute in float32 also under autocast; the loss
    counts real tokens only and is not kept in a list of the module; models that normalise queries are routed by the
    norms before that (found as a child q_norm or alike of the attention module; the norms behind it would be nearly
    equal); shares are rounded to heads: shared down, active to the nearest (there: both down). The released LLaMA code
    has no loss and no straight-through gradient (the paper describes one: UNVERIFIED); balance=0 trains without a loss.
    In training the norm router computes all heads, because closed heads get a gradient too.
    """

    paper = "MoH: Multi-Head Attention as Mixture-of-Head Attention"
    arxiv = "2410.11842"
    parts = ("text", "vision", "audio", "encoder", "decoder")
    needs = (AttentionInput(), QueryBeforeNorm(), AuxiliaryLosses())
    head_selectable = False
    trainable = True

    router: Literal["norm", "learned"] = option(
        "norm",
        help="norm: by the norms of the queries, no parameters; learned: three linear maps of the layer's input",
    )
    active: int | float = option(
        0.75, help="heads that are on per token, shared ones included: a share (0.75) or a number (6)"
    )
    shared: int | float = option(
        0.5, help="of these, the first heads, which are always on: a share of all heads or a number"
    )
    align: Literal["head", "group"] = option(
        "head",
        help="route single heads, or all query heads of a KV head together (decoding then skips KV heads)",
    )
    balance: float = option(0.01, help="weight of the load-balance loss in training; 0 = none")

    def validate(self) -> None:
        for name in ("active", "shared"):
            value = getattr(self, name)
            low = 0 if name == "shared" else 1
            ok = value >= low if isinstance(value, int) else (0 <= value <= 1 and (value > 0 or low == 0))
            self.require(ok, name, f"a number of heads >= {low}, or a share up to 1.0 (with a decimal point)")
        self.require(self.balance >= 0, "balance", ">= 0")

    def split(self, heads: int, kv_heads: int) -> Split:
        """Shared and routed units of a site with H and Hkv heads.

        Raises:
            ModelMismatchError: the numbers do not fit the heads.
        """
        size = heads // kv_heads if self.align == "group" else 1
        units = heads // size

        def count(name: str, half: float) -> int:
            value = getattr(self, name)
            if isinstance(value, float):
                return int(value * units + half)
            if value > heads or value % size:
                raise ModelMismatchError(
                    f"moh: {name}={value} heads, but there are {heads}"
                    + (
                        f" in groups of {size} per KV head (align='group'); use a multiple"
                        if size > 1
                        else ""
                    )
                )
            return value // size

        shared, active = count("shared", 1e-6), max(count("active", 0.5), 1)
        if active < shared:
            raise ModelMismatchError(
                f"moh: active={self.active} is {active * size} of {heads} heads, fewer than the {shared * size} that "
                f"shared={self.shared} keeps on. Lower shared (the published ratio is shared = 2/3 active)"
            )
        return Split(size, shared, units - shared, active - shared)

    def check(self, site: Site) -> None:
        if not site.num_heads or not site.num_kv_heads:
            raise ModelMismatchError(
                f"moh: the number of heads of {site.path} is unknown; see hap.sites.register_site_facts"
            )
        self.split(site.num_heads, site.num_kv_heads)
        if self.router == "learned":
            width(site)

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        notes = []
        for heads, kv in dict.fromkeys((s.num_heads, s.num_kv_heads) for s in sites):
            split = self.split(heads or 1, kv or 1)
            if split.chosen == 0 and split.routed:
                notes.append(
                    f"active = shared = {split.shared * split.size} of {heads} heads: nothing is routed"
                )
            if self.router == "learned" and split.routes and split.chosen == 1:
                notes.append(
                    "one routed unit per token: its weight is 1 whatever the router says, so the task gives the router "
                    f"no gradient, and it learns from the balance loss only (balance={self.balance})"
                )
        return notes

    def tensors(self, site: Site) -> dict[str, Tensor]:
        if self.router == "norm":
            return {}
        split, size = self.split(site.num_heads or 1, site.num_kv_heads or 1), width(site)
        rows = {
            "routed": split.routed if split.chosen else 0,
            "shared": split.shared * split.size if split.shared * split.size > 1 else 0,
            "stage": 2 if split.shared and split.chosen else 0,
        }
        return {name: nn.Parameter(torch.zeros(n, size)) for name, n in rows.items() if n}

    def edit(self, program: Program, call: Call) -> None:
        split = self.split(program.num_heads, program.num_kv_heads)
        if self.router == "learned":
            program.gate(self.learned(program, call, split).to(program.query.dtype), sparse=True)
        elif split.chosen < split.routed:
            gate, straight_through = self.by_norm(program, call, split)
            program.gate(gate.to(program.query.dtype), sparse=not straight_through)

    def by_norm(self, program: Program, call: Call, split: Split) -> tuple[Tensor, bool]:
        """(gate [B, L, H], whether it carries a straight-through gradient)."""
        query, heads = program.query, program.num_heads
        assert call.context is not None
        before = call.context.query_before_norm(call.path, heads, program.q_len)
        rows = query.transpose(1, 2) if before is None else before
        high = torch.promote_types(rows.dtype, torch.float32)
        routed = rows[:, :, split.shared * split.size :].to(high)
        norms = torch.linalg.vector_norm(routed, dim=-1).unflatten(-1, (split.routed, split.size)).sum(-1)
        chosen = best(norms, split.chosen)
        gate = chosen.to(high)
        learns = call.training and torch.is_grad_enabled() and norms.requires_grad and split.routes
        if call.training and split.routes:
            scores = norm_scores(norms)
            self._balance(program, call, scores, chosen)
            if learns:
                gate = gate + (scores - scores.detach())  # in this order: the value stays exactly 0 or 1
        return self._whole(gate, gate.new_ones(()), split), learns

    def learned(self, program: Program, call: Call, split: Split) -> Tensor:
        """gate [B, L, H] of the two-stage router, in float32 (float64 for float64 models)."""
        assert call.context is not None
        x = call.context.attention_input(call.path)
        if x.shape[:-1] != (program.batch, program.q_len):
            raise ModelMismatchError(
                f"moh: {call.path} takes hidden states {list(x.shape)} and attends with queries "
                f"{list(program.query.shape)}, so tokens cannot be told apart; use router='norm'"
            )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        held = dict(call.tensors.named_parameters(recurse=False))

        def softmax(name: str) -> Tensor:
            with torch.autocast(
                x.device.type, enabled=False
            ):  # a router rounded to bfloat16 flips its choice
                return F.linear(x, held[name].to(x.dtype)).softmax(-1)

        always = split.shared * split.size
        shared = always * softmax("shared") if "shared" in held else x.new_ones(*x.shape[:2], always)
        gate = x.new_zeros(*x.shape[:2], split.routed)
        if "routed" in held:
            scores = softmax("routed")
            chosen = best(scores, split.chosen)
            if call.training and split.routes:
                self._balance(program, call, scores, chosen)
            kept = scores * chosen
            gate = split.chosen * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).eps)
        if "stage" in held:
            stage = 2 * softmax("stage")
            shared, gate = shared * stage[..., :1], gate * stage[..., 1:]
        return self._whole(gate, shared, split)

    def _whole(self, routed: Tensor, shared: Tensor, split: Split) -> Tensor:
        """Gates of all heads from those of routed units [B, L, routed] and of shared heads."""
        shared = shared.expand(*routed.shape[:2], split.shared * split.size)
        return torch.cat([shared, routed.repeat_interleave(split.size, -1)], -1)

    def _balance(self, program: Program, call: Call, scores: Tensor, chosen: Tensor) -> None:
        if self.balance > 0:
            mask = program.mask
            real = None if mask.padding is None else mask.padding[:, mask.query_columns].to(scores.device)
            call.add_loss("balance", balance(scores, chosen, real), self.balance)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any]:
        return {"active": 1.0}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [
            {"active": 0.5, "shared": 0.25},
            {"active": 0.5, "shared": 0.25, "router": "learned"},
            {"active": 0.5, "shared": 0.0, "align": "group"},
        ]


def width(site: Site) -> int:
    """C, the width of what enters the attention module, from its query projection.

    Raises:
        ModelMismatchError: it has no linear query projection.
    """
    names = dict(site.projections)
    layer = getattr(site.module, names.get("query") or names.get("fused") or "", None)
    layer = getattr(layer, "base_layer", layer)  # LoRA wraps it
    for attribute in ("in_features", "nx"):
        if isinstance(size := getattr(layer, attribute, None), int):
            return size
    raise ModelMismatchError(
        f"moh: the width of what enters {site.path} cannot be read from a query projection; use router='norm'"
    )
