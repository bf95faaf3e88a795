"""The small transformers models that `cab` looks at: one body or more per attention pattern, none of them our own.

Four patterns (CAB, arXiv 2210.07661): NS = noncausal self (an encoder), CS = causal self (a decoder), NC = noncausal
cross (a set of queries reads a source that has no order), CC = causal cross (a decoder reads the source of an
encoder-decoder). Patches for text and patches for token grids need different bodies, so NS has two: a row each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import SelectionError

if TYPE_CHECKING:
    from ..harness import Choice

PATTERNS = {
    "NS": "noncausal self",
    "CS": "causal self",
    "NC": "noncausal cross",
    "CC": "causal cross",
}
MASK, START, FIRST = (
    1,
    2,
    3,
)  # token ids: the mask, the first token of a decoder, the first token with content


@dataclass(frozen=True)
class Body:
    """One model for one pattern.

    row: its row in tables, ``NS`` or ``NS grid``. family: as transformers calls it. part: where patches are put.
    """

    row: str
    family: str
    part: str

    @property
    def pattern(self) -> str:
        """NS, CS, NC or CC."""
        return self.row.split()[0]

    def place(self, choice: Choice) -> Choice:
        """`choice` on this body's part: without it, a method for self-attention would go to the self-attention of a
        body that was chosen for its cross-attention.

        Raises:
            SelectionError: the choice names another part.
        """
        asked = choice.options.get("part", self.part)
        if asked != self.part:
            raise SelectionError(
                f"asked for part={asked!r}, {self.row} is the part {self.part!r} of {self.family}"
            )
        return replace(choice, options={**choice.options, "part": self.part})

    def __str__(self) -> str:
        return f"{self.family} ({self.part})"


LEARNERS = (
    Body("NS", "eurobert", "text"),
    Body("NS grid", "vit", "vision"),
    Body("CS", "llama", "text"),
    Body("NC", "blip_2_qformer", "cross"),
    Body("CC", "bart", "cross"),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a body. width: of the residual stream; vocabulary: token ids; length: most tokens of a row."""

    width: int = 64
    heads: int = 4
    layers: int = 2
    vocabulary: int = 64
    length: int = 64

    def __post_init__(self) -> None:
        small = {k: v for k, v in vars(self).items() if v < 1}
        if small:
            raise ValueError(f"cab: {small} must be at least 1")
        if self.width % (2 * self.heads):  # rotary embeddings turn pairs
            raise ValueError(
                f"cab: width={self.width} is no multiple of 2 * heads={2 * self.heads}. Give e.g. "
                f"width={2 * self.heads * max(self.width // (2 * self.heads), 1)}."
            )


def config(body: Body, shape: Shape) -> Any:
    """The config of a body, without dropout."""
    from ...testbed.tiny import tiny_config

    width, heads, layers = shape.width, shape.heads, shape.layers
    plain = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }
    decoder = {"num_key_value_heads": heads, "head_dim": width // heads, "vocab_size": shape.vocabulary}
    own: dict[str, dict[str, Any]] = {
        "eurobert": {**plain, **decoder, "mask_token_id": MASK},
        "llama": {**plain, **decoder},
        "vit": {**plain, "image_size": [1, shape.length], "patch_size": 1, "num_channels": shape.vocabulary},
        "blip_2_qformer": {
            **plain,
            "encoder_hidden_size": width,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "bart": {
            "d_model": width,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": shape.length + 2,
            "dropout": 0.0,
            **{f"{side}_layers": layers for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": heads for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 2 * width for side in ("encoder", "decoder")},
        },
    }
    return tiny_config(body.family, **own[body.family])


def learner(body: Body, shape: Shape, seed: int, attention: str = "sdpa") -> nn.Module:
    """A new model of `body` with transformers' own initialisation: ``model(**inputs)`` gives logits [B, L, vocabulary].

    attention: what the unpatched model computes with, ``eager`` or ``sdpa``.
    """
    import transformers

    made = config(body, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if body.family == "vit":
            return Strip(
                transformers.ViTModel._from_config(made, attn_implementation=attention), shape.vocabulary
            )
        if body.family == "blip_2_qformer":
            return SetReader(
                transformers.Blip2QFormerModel._from_config(made, attn_implementation=attention),
                shape.vocabulary,
            )
        kind = {
            "eurobert": "EuroBertForMaskedLM",
            "llama": "LlamaForCausalLM",
            "bart": "BartForConditionalGeneration",
        }
        found = getattr(transformers, kind[body.family])._from_config(made, attn_implementation=attention)
        return Logits(found)


class Logits(nn.Module):
    """A model of transformers, reduced to its logits."""

    def __init__(self, body: Any):
        super().__init__()
        self.body = body

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.body(**inputs, use_cache=False).logits


class Strip(nn.Module):
    """A ViT on an image one pixel high: every token is a pixel with one channel per token id."""

    def __init__(self, body: Any, vocabulary: int):
        super().__init__()
        self.body, self.vocabulary = body, vocabulary
        self.head = nn.Linear(body.config.hidden_size, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        pixels = nn.functional.one_hot(input_ids, self.vocabulary).to(dtype).transpose(1, 2)[:, :, None]
        return self.head(self.body(pixel_values=pixels).last_hidden_state[:, 1:])


class SetReader(nn.Module):
    """A Q-Former: queries [B, L] read a source [B, S] of (key, value) pairs that carry no position."""

    def __init__(self, body: Any, vocabulary: int):
        super().__init__()
        self.body = body
        width = body.config.hidden_size
        self.keys, self.values = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, asked: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        source = self.keys(keys) + self.values(values)
        read = self.body(query_embeds=self.keys(asked), encoder_hidden_states=source)
        return self.head(read.last_hidden_state)


def random_inputs(body: Body, shape: Shape, rows: int, seed: int) -> dict[str, Tensor]:
    """Inputs of `learner` with random tokens, `shape.length` of them in the target and in the source."""
    generator = torch.Generator().manual_seed(seed)
    names = {"NC": ("asked", "keys", "values"), "CC": ("input_ids", "decoder_input_ids")}
    return {
        name: torch.randint(
            min(FIRST, shape.vocabulary - 1), shape.vocabulary, (rows, shape.length), generator=generator
        )
        for name in names.get(body.pattern, ("input_ids",))
    }
