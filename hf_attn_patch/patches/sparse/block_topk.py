"""`block_topk` and `moba`: every query reads the blocks of keys that score best for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...call.rules import ChosenBlocks
from ...errors import CacheError
from ...forward.needs import PromptLength
from ...kernels.block_scores import antidiagonal_scores, pooled_scores
from ...kernels.block_selection import select_threshold, select_topk
from ...registry import Patch, option, register_patch

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call

SCORES = ("mean", "minmax", "antidiagonal")


@register_patch("block_topk")
@dataclass
class BlockTopK(Patch):
    """Every query (or block of queries) reads the key blocks that score best for it: dynamic block sparsity.

    Source: MoBA, arXiv 2502.13189 (MoonshotAI/MoBA, READ and RAN); Quest, arXiv 2406.10774 (READ in part); XAttention,
    arXiv 2503.16428 (READ).

    Formula: keys are cut into blocks of `block` tokens by position. Scores of a block: ``mean`` q . mean(k) for every
    query (MoBA); ``minmax`` sum_d max(q_d min_d, q_d max_d) for every query, a bound that no q . k of the block exceeds
    (Quest's page bound); ``antidiagonal`` the estimated attention mass of a block of queries and a block of keys from
    sums along anti-diagonals of stride `stride` (XAttention). The first `sinks` blocks and the last `recent` blocks up
    to the query's own are always read. The others: the best ``topk`` minus those, or with ``threshold`` (topk=0) the
    fewest that hold this share of the softmax mass of their scores (antidiagonal: that hold, with the blocks that are
    read anyway, this share of the estimated mass).
    Causality applies inside blocks as ever. ``prompt="dense"``: rows of the prompt read everything.

    Neutral value: ``topk`` at least the number of blocks.

    Differs from the original code: batches, left padding (blocks count from the first real token), GQA, chunked
    prefill and decoding with a cache (the original MoBA decodes with full attention). The choice per query does not
    depend on later tokens, so decoding equals one forward; ``antidiagonal`` chooses per block of queries, as XAttention
    does, and leaves decoding dense. Layers with a sliding window stay as they are. All keys stay in
    the cache. No gradient flows through the choice.
    """

    counts = "edit"
    paper = "MoBA: Mixture of Block Attention for Long-Context LLMs"
    arxiv = "2502.13189"
    head_state = ()
    parts = ("text", "decoder")
    default_part = "text"
    causal_only = True
    needs = (PromptLength(),)

    block: int = option(64, help="tokens per block of keys (antidiagonal: of queries too)")
    topk: int = option(16, help="blocks that are read per row, forced ones included; 0 = use threshold")
    threshold: float = option(0.9, help="with topk=0: share of the score mass to read")
    score: str = option("mean", help=f"one of {', '.join(SCORES)}")
    sinks: int = option(1, help="first blocks that are always read")
    recent: int = option(1, help="last blocks that are always read, the query's own included")
    stride: int = option(8, help="antidiagonal: tokens per group, divides block")
    prompt: Literal["sparse", "dense"] = option("sparse", help="whether rows of the prompt choose blocks too")

    def validate(self) -> None:
        self.require(self.block >= 1, "block", ">= 1")
        self.require(self.topk >= 0, "topk", ">= 0")
        self.require(0 < self.threshold <= 1, "threshold", "in (0, 1]")
        self.require(self.score in SCORES, "score", f"one of {', '.join(SCORES)}")
        self.require(self.sinks >= 0, "sinks", ">= 0")
        self.require(self.recent >= 1, "recent", ">= 1 (the own block is always read)")
        if self.score == "antidiagonal":
            self.require(self.prompt == "sparse", "prompt", "sparse (antidiagonal leaves decoding dense)")
            self.require(
                self.stride >= 1 and self.block % self.stride == 0,
                "stride",
                f"a divisor of block={self.block}",
            )

    def edit(self, program: Program, call: Call) -> None:
        mask = program.mask
        if mask.window is not None or (self.score == "antidiagonal" and program.q_len == 1):
            return
        dense = 0
        if self.prompt == "dense":
            length = None if call.context is None else call.context.prompt_length
            dense = mask.q_offset + program.q_len if length is None else length
            if mask.q_offset + program.q_len <= dense:
                return
        if not isinstance(program.key, Tensor) or mask.kv_offset:
            raise CacheError(
                f"{self.name}: this cache has dropped tokens, so blocks cannot be chosen among all keys. Patch the "
                "method that freed them with cache='keep', and start with a fresh cache"
            )
        if (
            mask.kv_len <= self.block
        ):  # one block, which every query reads: nothing is padded to the size of a block
            return
        block = self._block(mask.kv_len)
        scores, per_row, origin = self._scores(program, block)
        kept = self._kept(scores, per_row, origin, block)
        possible = scores > -torch.inf
        if not mask.causal:  # a mask that lets some tokens see later ones (images in gemma3): its business
            kept = kept | ~possible
        if dense:
            first = mask.q_offset + torch.arange(kept.shape[2], device=kept.device) * per_row
            kept = kept | (first < dense)[:, None]
        program.share = (kept & possible).sum() / possible.sum().clamp(min=1)
        program.restrict(ChosenBlocks(kept, per_row, block, origin), call.heads)

    def _block(self, tokens: int) -> int:
        """Tokens of a block, at most those there are: one block that holds all of them is padded to no more."""
        stride = self.stride if self.score == "antidiagonal" else 1
        return min(self.block, -(-tokens // stride) * stride)

    def _scores(self, program: Program, block: int) -> tuple[Tensor, int, Tensor]:
        """(scores [B, H, rows, blocks], queries per row, position of the first query of row 0 [B])."""
        mask, key = program.mask, program.key
        starts = mask.start.int() if mask.padding is not None else None
        origin = mask.q_offset - mask.start.to(program.query.device)
        given: dict[str, Any] = dict(scale=program.scale, q_offset=mask.q_offset, starts=starts)
        if self.score == "antidiagonal":
            masses = antidiagonal_scores(program.query, key, block=block, stride=self.stride, **given)  # type: ignore[arg-type]
            origin = origin.clamp(min=0)
            last = origin[:, None] + (torch.arange(masses.shape[2], device=key.device) + 1) * block - 1
            begin = torch.arange(masses.shape[3], device=key.device) * block
            future = begin > last[:, :, None]
            return masses.masked_fill(future[:, None], -torch.inf), block, origin
        scores = pooled_scores(
            program.query, key, block_q=block, block_k=block, reduce="none", pool=self.score, **given  # type: ignore[arg-type]
        )  # fmt: skip
        return scores, 1, origin

    def _kept(self, scores: Tensor, per_row: int, origin: Tensor, block: int) -> Tensor:
        """bool like scores: forced blocks, and the best of the others."""
        rows, blocks = scores.shape[2:]
        n = torch.arange(blocks, device=scores.device)
        first = origin[:, None] + torch.arange(rows, device=scores.device) * per_row  # differs per batch row
        own = (first + per_row - 1).div(block, rounding_mode="floor")[..., None]
        oldest = first.div(block, rounding_mode="floor")[..., None] - self.recent
        forced = ((n <= own) & (n > oldest)) | (n < self.sinks)
        allowed = scores > -torch.inf
        forced = forced[:, None] & allowed
        if self.topk:
            ranked = scores.masked_fill(forced, torch.inf)
            return _as_mask(select_topk(ranked, self.topk), blocks) & allowed | forced
        if self.score == "antidiagonal":
            return _as_mask(select_threshold(scores, self.threshold, always=forced), blocks)
        # the score of a block that is not full yet knows its later tokens; left out, decoding equals one forward
        others = scores.masked_fill(forced, -torch.inf)
        return _as_mask(select_threshold(others, self.threshold, masses="softmax"), blocks) & allowed | forced

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return {"block": 4, "topk": 1 << 20}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [
            {"block": 4, "topk": 2, "sinks": 0},
            {"block": 2, "topk": 3, "score": "minmax", "recent": 2},
            {"block": 3, "topk": 0, "threshold": 0.6},
        ]


def _as_mask(indices: Tensor, blocks: int) -> Tensor:
    """Indices [..., K] (-1 = none) as bool [..., blocks]."""
    found = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return found.scatter(-1, torch.where(indices < 0, blocks, indices).long(), True)[..., :-1]


@register_patch("moba")
@dataclass
class MoBA(BlockTopK):
    """Mixture of block attention: every query reads its own block and the best `topk` - 1 blocks before it.

    Source: MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189 (MoonshotAI/MoBA 61e456b, READ and
    RAN). `block_topk` with mean-pooled keys, no sink blocks, and the paper's scaling-law setting: blocks of 512, topk
    3 (Llama-3.1-8B-1M: ``block=4096, topk=12, layers=":-3"``).

    Formula: ``s_tn = q_t . mean_{j in block n} k_j`` (after RoPE), blocks in the future excluded, the own block always
    read, then the best ``topk - 1``. Softmax over the tokens of those blocks, causal inside the own one.

    Neutral value: ``topk`` at least the number of blocks.

    Differs from the original code: see `block_topk`. The original is meant for continued pre-training and is no
    drop-in for a pretrained model; its efficient implementation runs full attention at topk=1 (READ), ours is
    block-diagonal as its naive one.
    """

    block: int = option(512, help="tokens per block")
    topk: int = option(3, help="blocks that are read per query, the own one included; 0 = use threshold")
    sinks: int = option(0, help="first blocks that are always read")

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [{"block": 4, "topk": 2}, {"block": 3, "topk": 1}]


@register_patch("quest")
@dataclass
class Quest(BlockTopK):
    """Decoding reads the pages of keys whose bound on q . k is highest; the prompt is dense.

    Source: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774 (mit-han-lab/Quest,
    READ in part). `block_topk` with pages of 16 tokens, the bound ``sum_d max(q_d min_d, q_d max_d)`` of a page, and a
    budget of ``topk`` pages (64 = 1024 tokens). The published setting leaves the first two layers dense
    (``layers="2:"``).

    Formula: rows after the prompt read the ``topk`` pages with the highest bound, the own one included, causal inside
    it; rows of the prompt read everything.

    Neutral value: ``topk`` at least the number of pages.

    Differs from the original code: see `block_topk`; any batch, GQA (a choice per query head, as its emulation does;
    its dense layers are a constant 32 there). The own page is always read. The whole KV cache is kept, as there.
    """

    paper = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference"
    arxiv = "2406.10774"

    block: int = option(16, help="tokens per page")
    topk: int = option(64, help="pages that are read per query, the own one included")
    score: str = option("minmax", help=f"one of {', '.join(SCORES)}")
    sinks: int = option(0, help="first pages that are always read")
    prompt: Literal["sparse", "dense"] = option("dense", help="whether rows of the prompt choose pages too")

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        return [
            {"block": 2, "topk": 2, "prompt": "sparse"}
        ]  # a forward over a prompt alone would show nothing


@register_patch("xattention")
@dataclass
class XAttention(BlockTopK):
    """Blocks of queries read the blocks of keys that hold most of the attention mass estimated along anti-diagonals.

    Source: XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv 2503.16428 (mit-han-lab/x-attention,
    READ). `block_topk` with ``score="antidiagonal"``, blocks of 128, stride 16 and a threshold of 0.9; the first and
    the own block are always read and count.

    Formula: with queries and keys grouped by `stride`, the score of a block pair is its share of the softmax over sums
    of q . k along anti-diagonals; a row of blocks keeps the fewest that hold `threshold`.

    Neutral value: ``topk`` at least the number of blocks.

    Differs from the original code: see `block_topk`. One threshold for all heads (its search for thresholds per head
    is not released). Decoding is dense, as there. Its ``keep_sink`` marks query row 0; here key block 0 is kept.
    """

    paper = "XAttention: Block Sparse Attention with Antidiagonal Scoring"
    arxiv = "2503.16428"

    block: int = option(128, help="tokens per block of keys and of queries")
    topk: int = option(0, help="blocks that are read per row, forced ones included; 0 = use threshold")
    score: str = option("antidiagonal", help=f"one of {', '.join(SCORES)}")
    stride: int = option(16, help="tokens per group, divides block")

    @classmethod
    def neutral(cls, model: Any) -> dict[str, Any] | None:
        return {"block": 4, "stride": 2, "topk": 1 << 20}

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        # choices for blocks of queries depend on where a prompt is cut, which the contracts do not allow: those are in
        # tests/test_block_topk.py, here are the other options of this preset
        return [{"block": 4, "topk": 2, "score": "mean"}]
