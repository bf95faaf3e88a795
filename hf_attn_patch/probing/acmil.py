"""`acmil`: several attention branches over a bag of tokens, kept apart by a loss and by masking their favourites."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .pool import classification_loss

HIDDEN = -1e9


@dataclass
class Bag:
    """One forward of `Acmil`.

    raw, scores: [B, T, N], before and after masking. logits: [B, classes] of the whole bag; branches: [B, T, classes].
    """

    raw: Tensor
    scores: Tensor
    logits: Tensor
    branches: Tensor

    @property
    def maps(self) -> Tensor:
        """What each branch reads, [B, T, N]."""
        return self.scores.softmax(-1)


class Acmil(nn.Module):
    """T gated attention branches with a classifier each; the bag reads with the mean of their attentions.

    Source: Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification, arXiv 2311.07125;
    dazhangyu123/ACMIL e53d19c (READ; golden vectors RAN).

    Formula: h = relu(W x), s_t = w_t . (tanh(V h) * sigmoid(U h)) + b_t, branch t: softmax(s_t) h -> classifier t; bag:
    mean_t softmax(s_t) h -> bag classifier. In training, of the `hide` highest scores of every branch a random share
    `drop` is set to -1e9 (stochastic top-k instance masking), which the bag sees as well.

    Loss: CE(branches) + CE(bag) + mean pairwise cosine of the branches' attentions; with one branch only CE(bag).

    Differs from the original code: bags come in batches [B, N, C] (one bag there), so the cosine is a mean over bags
    too; multi-label targets give binary cross-entropy. The multi-head variant (ACMIL_MHA) is not here.

    Args:
        width: C of the tokens. classes: of the logits. branches: T. hide, drop: see above, 0 = no masking. inner, gate:
        widths of h and of the scorer.
    """

    def __init__(
        self, width: int, classes: int, branches: int = 5, hide: int = 10, drop: float = 0.6, inner: int = 128,
        gate: int = 64,
    ):  # fmt: skip
        super().__init__()
        if branches < 1 or hide < 0 or not 0 <= drop <= 1:
            raise ValueError(
                f"acmil: branches={branches} must be at least 1, hide={hide} at least 0, drop={drop} in 0 … 1"
            )
        self.hide, self.drop = hide, drop
        self.reduce = nn.Linear(width, inner, bias=False)
        self.tanh, self.sigmoid = nn.Linear(inner, gate), nn.Linear(inner, gate)
        self.scorer = nn.Linear(gate, branches)
        self.branches = nn.ModuleList(nn.Linear(inner, classes) for _ in range(branches))
        self.bag = nn.Linear(inner, classes)

    def run(self, x: Tensor, uniform: Tensor | None = None) -> Bag:
        """Everything about bags x [B, N, C].

        Args:
            uniform: numbers in 0 … 1 [B, T, min(hide, N)] that choose what is hidden (the smallest are); None: drawn
            from torch's generator. Only used in training mode.
        """
        h = self.reduce(x).relu()
        raw = self.scorer(self.tanh(h).tanh() * self.sigmoid(h).sigmoid()).transpose(1, 2)
        scores = raw
        if self.training and (hidden := self.hidden(raw, uniform)) is not None:
            scores = raw.scatter(-1, hidden, HIDDEN)
        attention = scores.softmax(-1)
        read = attention @ h
        branches = torch.stack([c(read[:, t]) for t, c in enumerate(self.branches)], 1)
        return Bag(raw, scores, self.bag((attention.mean(1, keepdim=True) @ h).squeeze(1)), branches)

    def hidden(self, raw: Tensor, uniform: Tensor | None = None) -> Tensor | None:
        """Tokens that a training step hides, int64 [B, T, m] with m = int(min(hide, N) * drop); None: m = 0."""
        top = min(self.hide, raw.shape[-1])
        count = int(top * self.drop)
        if not count:
            return None
        best = raw.topk(top, dim=-1).indices
        drawn = torch.rand(best.shape, device=raw.device) if uniform is None else uniform
        return best.gather(-1, drawn.argsort(dim=-1)[..., :count])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the bags."""
        return self.run(x).logits

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, classes], maps [B, T, N])."""
        bag = self.run(x)
        return bag.logits, bag.maps

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Sum of `losses`, a 0-d tensor."""
        return torch.stack(list(self.losses(self.run(x), labels).values())).sum()

    def losses(self, bag: Bag, labels: Tensor) -> dict[str, Tensor]:
        """``bag``, and with several branches ``branches`` and ``difference``; labels [B] or [B, classes]."""
        found = {"bag": classification_loss(bag.logits, labels)}
        count = bag.branches.shape[1]
        if count > 1:
            repeated = labels.repeat_interleave(count, 0)
            found["branches"] = classification_loss(bag.branches.flatten(0, 1), repeated)
            unit = nn.functional.normalize(bag.maps, dim=-1)
            first, second = torch.triu_indices(count, count, 1)
            found["difference"] = (unit[:, first] * unit[:, second]).sum(-1).mean()
        return found
