"""`tcpa`: prompts in a frozen ViT of which CLS and patches read different ones, each token those that fit it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...call.program import MassEdit
from ...forward.needs import AddedTokens, AuxiliaryLosses, LayerInput, TokenGrid
from ...forward.needs.added_tokens import CLASS_WEIGHT, drawn, is_last, takes_pixels, width
from ...registry import option, register_patch
from ..adds_tokens import AddsTokens
from ..on_grid import call_grid

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

POOLS = ("cls", "image")


@register_patch("tcpa")
@dataclass
class Tcpa(AddsTokens):
    """Token-coordinated prompts: CLS reads its `topk` of one pool of prompts, every patch its own of another.

    Source: Token Coordinated Prompt Attention is Needed for Visual Prompting, arXiv 2505.02406;
    zhoujiahuan1991/ICML2025-TCPA dce8b3a (READ; golden vectors RAN with sizes substituted).

    Formula: per layer two pools of M keys kappa [M, C] and M prompts [M, length, C]. The prompts stand before the
    tokens [N, C] of the layer, so they pass its norm, key and value projections; their own rows are dropped. A token x
    that enters the layer (before its norm) chooses the prompts with the largest cos(x, kappa): CLS in the CLS pool,
    patches in the image pool. ``A = softmax(scale q k^T) * mask``, mask 1 on tokens and chosen prompts, without
    renormalising: what the other prompts draw is lost. Loss: `pull` * [mean(1 - cos) of CLS + mean(1 - cos) of
    patches], over the chosen keys, mean over layers.

    With ``classes`` the model answers with W LN(CLS) + b of its own last norm (``logits``, and ``loss`` given labels).
    Neutral value: none; prompts take a part of the attention.

    Differs from the original code: losses are averaged over layers, there summed (lambda 0.01 there = pull 0.12 for 12
    layers); all prefix tokens (registers) choose from the CLS pool; prompts are chosen by the keys from the first step
    (at random in the first epochs there); keys and prompts are drawn from a seed. fourier=true: real part of the 2-D
    FFT over all prompts and channels (VFPT), which mixes the two pools as there. Prompts with an affine map of their
    values (ADVP) are not here. renormalise=true divides by the mass that is left, as hiding before softmax would.
    """

    paper = "Token Coordinated Prompt Attention is Needed for Visual Prompting"
    arxiv = "2505.02406"
    needs = (AddedTokens(), LayerInput(), TokenGrid(), AuxiliaryLosses())
    exclusive = frozenset({"added tokens", "key classes", "token order"})

    prompts: int | tuple[int, ...] = option(
        18, help="M, prompts per layer and pool, or [CLS pool, image pool]"
    )
    topk: int | tuple[int, ...] = option(
        10, help="prompts that a token reads, or [CLS, patch]; M = all of its pool (role split only)"
    )
    length: int = option(1, help="tokens per prompt")
    pull: float = option(0.12, help="weight of the loss that pulls chosen keys to their tokens; 0 = none")
    classes: int = option(0, help="classes of a head of its own on CLS; 0 = the model's own head")
    fourier: bool = option(False, help="real part of the 2-D FFT of all prompts (VFPT)")
    renormalise: bool = option(False, help="rows sum to one again after prompts are hidden")
    seed: int = option(0, help="of the first values of keys, prompts and head")

    def validate(self) -> None:
        for name in ("prompts", "topk"):
            value = getattr(self, name)
            pair = isinstance(value, tuple)
            self.require(not pair or len(value) == 2, name, "one number, or [CLS pool, image pool]")
        sizes, most = self.pair("prompts"), 126  # every prompt is a key class, in 7 bits
        self.require(
            min(sizes) >= 1 and sum(sizes) <= most, "prompts", f"at least 1, both pools at most {most}"
        )
        fits = all(1 <= k <= m for k, m in zip(self.pair("topk"), sizes))
        self.require(fits, "topk", f"1 to prompts={self.prompts}")
        self.require(self.length >= 1, "length", ">= 1")
        self.require(self.pull >= 0, "pull", ">= 0")
        self.require(self.classes >= 0, "classes", ">= 0")

    def pair(self, name: str) -> tuple[int, int]:
        """(CLS pool, image pool) of an option."""
        value = getattr(self, name)
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    def tensors(self, site: Site) -> dict[str, Tensor]:
        channels = width(site) or 0
        found: dict[str, Tensor] = {}
        for number, pool in enumerate(POOLS):
            count = self.pair("prompts")[number]
            keys = drawn(self.seed, site, 2 * number, count, channels)
            values = drawn(self.seed, site, 2 * number + 1, count, self.length, channels)
            # 0.02 is the size of a learned position; keys only have a direction
            found |= {f"{pool}_keys": nn.Parameter(keys), f"{pool}_prompts": nn.Parameter(0.02 * values)}
        if self.classes and is_last(site):
            scale = channels**-0.5
            found[CLASS_WEIGHT] = nn.Parameter(scale * drawn(self.seed, site, 4, self.classes, channels))
            found["class_bias"] = nn.Parameter(torch.zeros(self.classes))
        return found

    def added_tokens(self, tensors: nn.Module, training: bool) -> Tensor:
        both = torch.cat([tensors.get_parameter(f"{pool}_prompts").flatten(0, 1) for pool in POOLS])
        return (
            torch.fft.fft2(both.to(torch.promote_types(both.dtype, torch.float32))).real
            if self.fourier
            else both
        )

    def class_tokens(self, hidden: Tensor, added: int) -> Tensor:
        return hidden[:, added]

    def class_logits(self, tokens: Tensor, tensors: nn.Module) -> Tensor:
        weight, bias = (tensors.get_parameter(name).to(tokens.dtype) for name in (CLASS_WEIGHT, "class_bias"))
        return F.linear(tokens, weight, bias)

    def edit(self, program: Program, call: Call) -> None:
        assert call.context is not None
        tokens = call.context.layer_input(call.path)
        _, before = call_grid(
            self.name, None, program, call
        )  # tokens before the patches, added ones included
        sizes = self.pair("prompts")
        added = sum(sizes) * self.length
        prefix = before - added
        # class 0: tokens of the model; class 1 + m: prompt m, those of the CLS pool first
        number = torch.arange(1, 1 + sum(sizes), dtype=torch.int8, device=tokens.device)
        number = number.repeat_interleave(self.length)
        classes = torch.cat([number, number.new_zeros(tokens.shape[1])]).expand(len(tokens), -1)
        read = tokens.new_zeros(len(tokens), program.q_len, 1 + sum(sizes))
        read[..., 0] = 1
        lost = []
        for pool, rows, at, first, count, topk in zip(
            POOLS,
            (tokens[:, :prefix], tokens[:, prefix:]),
            (added, before),
            (1, 1 + sizes[0]),
            sizes,
            self.pair("topk"),
        ):
            near, chosen = choose(rows, call.tensors.get_parameter(f"{pool}_keys"), topk)
            read[:, at : at + rows.shape[1], first : first + count] = chosen.to(read.dtype)
            if rows.shape[1]:
                lost.append((1 - near).mean())
        program.classify(classes)
        program.mass_edits.append(MassEdit(_Hides(read, self.renormalise), 1 + sum(sizes)))
        if self.pull:
            call.add_loss("pull", torch.stack(lost).sum(), self.pull)

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        if not takes_pixels(model):
            return []
        return [
            # rows that sum to one, which every other method keeps
            {"prompts": 4, "topk": 2, "renormalise": True},
            {"prompts": 3, "topk": 3, "length": 2, "classes": 3, "renormalise": True},
        ]


def choose(tokens: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(cosine with the chosen keys [B, n, topk], which are chosen bool [B, n, M]) for tokens [B, n, C], keys [M, C]."""
    high = torch.promote_types(tokens.dtype, torch.float32)
    cosine = F.normalize(tokens.to(high), dim=-1) @ F.normalize(keys.to(high), dim=-1).mT
    best = cosine.topk(topk, -1)
    return best.values, torch.zeros_like(cosine, dtype=torch.bool).scatter(-1, best.indices, True)


class _Hides:
    """Factors [B, H, L, classes] of a mass edit from what every row reads [B, L, classes]."""

    def __init__(self, read: Tensor, renormalise: bool):
        self.read, self.renormalise = read, renormalise

    def __call__(self, masses: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
        factors = self.read[:, columns].unsqueeze(1).to(masses.dtype).expand(masses.shape)
        if self.renormalise:
            left = (masses * factors).sum(-1, keepdim=True)
            factors = factors / left.clamp(min=torch.finfo(masses.dtype).tiny)
        return factors
