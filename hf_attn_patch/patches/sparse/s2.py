"""`s2`: per-KV-head strided shards of the context (S2-Attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...call.rules import StridedShards
from ...errors import ModelMismatchError
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

SHOWN_BLOCKS = 64  # size of the block grid whose density is told when a model is patched


def strides_of_heads(
    kv_heads: int, stride: int, step: int | None = None, offset: int = 0, dense_heads: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Residues per KV head by the official formula: block n is a stripe of head h iff ``(n + h step + offset) mod
    stride == 0``; the last `dense_heads` heads hold every residue. step None = ``max(1, stride // kv_heads)``."""
    step = max(1, stride // kv_heads) if step is None else step
    return tuple(
        tuple(range(stride)) if h >= kv_heads - dense_heads else ((-(h * step + offset)) % stride,)
        for h in range(kv_heads)
    )


def missing_residues(residues: tuple[tuple[int, ...], ...], stride: int) -> list[int]:
    """Residues that no head holds: behind the local windows their blocks are read by nobody (empty = the union over
    heads is complete)."""
    return sorted(set(range(stride)) - {r for own in residues for r in own})


def repaired(residues: tuple[tuple[int, ...], ...], stride: int) -> tuple[tuple[int, ...], ...]:
    """Every missing residue goes to the head that holds fewest so far (the first of equals)."""
    held = [list(own) for own in residues]
    for residue in missing_residues(residues, stride):
        counts = [len(own) for own in held]  # min(held, key=len) is traced as another list (torch 2.13)
        held[counts.index(min(counts))].append(residue)
    return tuple(tuple(sorted(own)) for own in held)


def block_density(rule: StridedShards, blocks: int) -> float:
    """Mean over heads of the share of causal (query block, key block) pairs that `rule` reads, for a sequence of
    `blocks` blocks."""
    at = torch.arange(blocks) * rule.block
    head = torch.arange(rule.heads).reshape(-1, 1, 1)
    seen = rule.visible(head, at.reshape(1, -1, 1), at.reshape(1, 1, -1)).tril()
    return int(seen.sum()) / (rule.heads * blocks * (blocks + 1) // 2)


@register_patch("s2")
@dataclass
class S2(Patch):
    """Strided shards: every KV head reads a local window and its own stripes of the context.

    Source: S2-Attention: Hardware-Aware Context Sharding Among Attention Heads (first version: Efficient LLM Training
    and Serving with Heterogeneous Context Sharding among Attention Heads), arXiv 2407.17678 (linxihui/dkernel 0d4e90e,
    mask function READ and RAN; its Triton kernels not run).

    Formula: with m, n the blocks of query and key (block tokens each), KV head h of Hkv:
    ``keep_h(m, n) = n <= m and (m - n < local_blocks or (n + h step + offset) mod stride == 0)``, causal by token
    inside the own block. A block that left the local window is read by all later queries of a head or by none. With
    queries q [B, H, L, D], query head i reads what its KV head ``h = i // (H / Hkv)`` reads.

    Neutral value: stride = 1 (also: local_blocks * block >= sequence length).

    Union completeness: the heads together read every key iff their stripes hit all residues mod `stride`. Where they
    do not (always when stride > Hkv) ``incomplete`` decides: "repair" gives heads several residues, "refuse" says
    so, "allow" leaves blocks that no head reads once they are behind the local window. Completeness and density at
    64 blocks are told as a note of the plan.

    Defaults: block 64, local_blocks 16, stride 8 are those of Phi-3-small (from onnxruntime's SparseAttention pull
    request and memory, UNVERIFIED); Phi-3-small also keeps every second layer dense (``dense_every=2``, READ in vllm).

    Differs from the original code: the step between heads is computed from the KV heads; the original takes the query
    heads, which leaves residues uncovered for few KV heads (``step=max(1, stride // H)`` gives its masks; ``step=0``
    is its ``homo_head``). Blocks count from the first real token, so left padding shifts nothing (the original counts
    columns). Causal layers only: the bidirectional pattern of the original has a relative stride, the same for all
    heads. The KV cache is kept whole. It is a *pre-training* method: on a dense checkpoint it is our
    extrapolation, expect loss without further training, least with dense layers.
    """

    counts = "rule"
    paper = "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads"
    arxiv = "2407.17678"
    parts = ("text", "decoder")
    default_part = "text"
    causal_only = True

    stride: int = option(8, help="distance of the stripes of one head, in blocks (1 = dense)")
    local_blocks: int = option(16, help="blocks of the local window, the query's own included")
    block: int = option(64, help="tokens per block")
    step: int | None = option(
        None, help="shift between KV heads, in blocks; None = max(1, stride // KV heads)"
    )
    offset: int = option(0, help="shift of all stripes, in blocks")
    dense_heads: int = option(0, help="the last so many KV heads read everything")
    dense_layers: tuple[int, ...] = option((), help="layers that stay dense")
    dense_every: int = option(0, help="n: every n-th layer also stays dense (Phi-3-small: 2); 0 = none")
    incomplete: Literal["repair", "refuse", "allow"] = option(
        "repair", help="what to do when the heads together do not read every key"
    )

    def validate(self) -> None:
        self.require(1 <= self.stride <= 4096, "stride", ">= 1 and <= 4096 (residues are listed one by one)")
        self.require(self.local_blocks >= 1, "local_blocks", ">= 1 (a query reads its own block)")
        self.require(self.block >= 1, "block", ">= 1")
        self.require(self.step is None or self.step >= 0, "step", ">= 0 or None")
        self.require(self.dense_heads >= 0, "dense_heads", ">= 0")
        self.require(all(l >= 0 for l in self.dense_layers), "dense_layers", "layer numbers >= 0")
        self.require(self.dense_every >= 0 and self.dense_every != 1, "dense_every", "0, or 2 and more")

    def stays_dense(self, layer: int) -> bool:
        """True for the dense layers of a hybrid."""
        return layer in self.dense_layers or bool(self.dense_every and (layer + 1) % self.dense_every == 0)

    def rule(self, kv_heads: int) -> StridedShards:
        """The layout for `kv_heads` KV heads, repaired where that is asked for."""
        residues = strides_of_heads(kv_heads, self.stride, self.step, self.offset, self.dense_heads)
        if self.incomplete == "repair":
            residues = repaired(residues, self.stride)
        return StridedShards(residues, self.stride, self.local_blocks, self.block)

    def check(self, site: Site) -> None:
        if self.stays_dense(site.layer):
            return
        heads = site.num_kv_heads
        if heads is None:
            raise ModelMismatchError(
                f"s2: the number of KV heads of {site.path} is unknown; see hap.sites.register_site_facts"
            )
        if self.dense_heads > heads:
            raise ModelMismatchError(
                f"s2: dense_heads={self.dense_heads}, but {site.path} has {heads} KV heads"
            )
        plain = strides_of_heads(heads, self.stride, self.step, self.offset, self.dense_heads)
        missing = missing_residues(plain, self.stride)
        if missing and self.incomplete == "refuse":
            raise ModelMismatchError(
                f"s2: the {heads} KV heads of {site.path} read {self.stride - len(missing)} of {self.stride} stripes; "
                f"blocks n with n % {self.stride} in {missing} are read by no head behind the local window. Use "
                f"stride <= {heads} with step=1, incomplete='repair' (heads read several stripes) or 'allow'"
            )
        if missing and self.incomplete == "repair" and heads == 1:
            raise ModelMismatchError(
                f"s2: {site.path} has one KV head, which would have to read every stripe: that is dense attention. "
                "Use incomplete='allow' (nobody reads the other stripes), or the streaming patch"
            )

    def check_model(self, model: Any, sites: list[Site]) -> list[str]:
        from ...model.sites import find_sites

        layers = 1 + max(s.layer for s in find_sites(model) if s.parts & set(self.parts))
        absent = [l for l in self.dense_layers if l >= layers]
        if absent:
            raise ModelMismatchError(
                f"s2: dense_layers names layer {absent[0]}, the model has {layers}, numbered 0 to {layers - 1}"
            )
        sparse = [s for s in sites if not self.stays_dense(s.layer)]
        if not sparse:
            raise ModelMismatchError(
                f"s2: dense_layers={self.dense_layers} and dense_every={self.dense_every} leave no chosen layer sparse"
            )
        if self.stride == 1:
            return []
        counts = sorted({s.num_kv_heads for s in sparse if s.num_kv_heads})
        return [self.note(heads, len(sparse), len(sites)) for heads in counts]

    def note(self, kv_heads: int, sparse: int, chosen: int) -> str:
        """Completeness and density for `kv_heads` KV heads, in one sentence."""
        rule = self.rule(kv_heads)
        plain = strides_of_heads(kv_heads, self.stride, self.step, self.offset, self.dense_heads)
        missing = missing_residues(rule.residues, self.stride)
        if missing:
            state = (
                f"INCOMPLETE, stripes {missing} of {self.stride} are read by no head behind the local window"
            )
        elif rule.residues != plain:
            state = f"complete after repair, heads read {sorted(map(len, rule.residues))} of {self.stride} stripes"
        else:
            state = "complete"
        density = block_density(rule, SHOWN_BLOCKS)
        return (
            f"{sparse} of {chosen} layers sparse, {kv_heads} KV heads, union {state}; they read {density:.1%} of the "
            f"causal blocks at {SHOWN_BLOCKS * self.block} tokens"
        )

    def edit(self, program: Program, call: Call) -> None:
        if not self.stays_dense(call.layer):
            program.restrict(self.rule(program.num_kv_heads), call.heads)

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any]:
        return {"stride": 1}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        from ...model.sites import find_sites

        heads = [s.num_kv_heads or 1 for s in find_sites(model) if s.causal and s.parts & set(cls.parts)]
        many = min(heads, default=1) > 1  # one KV head cannot be complete and sparse
        return [
            {"stride": 4, "local_blocks": 1, "block": 2, "incomplete": "repair" if many else "allow"},
            {
                "stride": 3,
                "local_blocks": 2,
                "block": 1,
                "offset": 1,
                "dense_layers": [1],
                "incomplete": "allow",
            },
        ]
