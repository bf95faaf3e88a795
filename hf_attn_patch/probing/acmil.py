"""`acmil`: several attention branches over a bag of tokens, kept apart by a loss and by masking their favourites.

`Branches` is what the gated form here and the multi-head form (`acmil_mha`) share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .pool import classification_loss

HIDDEN = -1e9


@dataclass
class Bag:
    """One forward of `Branches`.

    raw, scores: [B, T, N], or [B, H, T, N] where a branch has heads, before and after masking. logits: [B, classes] of
    the whole bag; branches: [B, T, classes].
    """

    raw: Tensor
    scores: Tensor
    logits: Tensor
    branches: Tensor

    @property
    def maps(self) -> Tensor:
        """What each branch reads, in the shape of the scores."""
        return self.scores.softmax(-1)


class Branches(nn.Module):
    """T branches that read a bag, each with a classifier, and one for the bag: masking and loss of arXiv 2311.07125.

    Args: as in `Acmil`. A subclass makes its attention, then calls `classifiers`.
    """

    branches: nn.ModuleList
    bag: nn.Linear

    def __init__(self, branches: int, hide: int, drop: float):
        super().__init__()
        if branches < 1 or hide < 0 or not 0 <= drop <= 1:
            raise ValueError(
                f"{type(self).__name__.lower()}: branches={branches} must be at least 1, hide={hide} at least 0, "
                f"drop={drop} in 0 … 1"
            )
        self.hide, self.drop = hide, drop

    def classifiers(self, features: int, classes: int, branches: int) -> None:
        """One for each branch and one for the bag, on vectors of width `features`."""
        self.branches = nn.ModuleList(nn.Linear(features, classes) for _ in range(branches))
        self.bag = nn.Linear(features, classes)

    def run(self, x: Tensor, uniform: Tensor | None = None) -> Bag:
        """Everything about bags x [B, N, C].

        Args:
            uniform: numbers in 0 … 1 […, min(hide, N)], else shaped like the scores, that choose what is hidden (the
            smallest are); None: drawn from torch's generator. Only used in training mode.
        """
        raise NotImplementedError

    def masked(self, raw: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Scores […, N] with those of `hidden` at -1e9, in training; else as they are."""
        if not self.training or (hidden := self.hidden(raw, uniform)) is None:
            return raw
        return raw.scatter(-1, hidden, HIDDEN)

    def answers(self, read: Tensor) -> Tensor:
        """Logits [B, T, classes] of what the branches read [B, T, features]."""
        return torch.stack([c(read[:, t]) for t, c in enumerate(self.branches)], 1)

    def hidden(self, raw: Tensor, uniform: Tensor | None = None) -> Tensor | None:
        """Tokens that a training step hides, int64 […, m] with m = int(min(hide, N) * drop); None: m = 0."""
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
        """(logits [B, classes], maps [B, T, N]; [B, H * T, N], head by head, where branches have heads)."""
        bag = self.run(x)
        return bag.logits, bag.maps.flatten(1, -2)

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
            found["difference"] = (unit[..., first, :] * unit[..., second, :]).sum(-1).mean()
        return found


class Acmil(Branches):
    """T gated attention branches with a classifier each; the bag reads with the mean of their attentions.

    Source: Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification, arXiv 2311.07125;
    dazhangyu123/ACMIL e53d19c (READ; golden vectors RAN).

    Formula: h = relu(W x), s_t = w_t . (tanh(V h) * sigmoid(U h)) + b_t, branch t: softmax(s_t) h -> classifier t; bag:
    mean_t softmax(s_t) h -> bag classifier. In training, of the `hide` highest scores of every branch a random share
    `drop` is set to -1e9 (stochastic top-k instance masking), which the bag sees as well.

    Loss: CE(branches) + CE(bag) + mean pairwise cosine of the branches' attentions; with one branch only CE(bag).

    Differs from the original code: bags come in batches [B, N, C] (one bag there), so the cosine is a mean over bags
    too; multi-label targets give binary cross-entropy.

    Args:
        width: C of the tokens. classes: of the logits. branches: T. hide, drop: see above, 0 = no masking. inner, gate:
        widths of h and of the scorer.
    """

    def __init__(
        self, width: int, classes: int, branches: int = 5, hide: int = 10, drop: float = 0.6, inner: int = 128,
        gate: int = 64,
    ):  # fmt: skip
        super().__init__(branches, hide, drop)
        self.reduce = nn.Linear(width, inner, bias=False)
        self.tanh, self.sigmoid = nn.Linear(inner, gate), nn.Linear(inner, gate)
        self.scorer = nn.Linear(gate, branches)
        self.classifiers(inner, classes, branches)

    def run(self, x: Tensor, uniform: Tensor | None = None) -> Bag:
        h = self.reduce(x).relu()
        raw = self.scorer(self.tanh(h).tanh() * self.sigmoid(h).sigmoid()).transpose(1, 2)
        scores = self.masked(raw, uniform)
        attention = scores.softmax(-1)
        bag = (attention.mean(1, keepdim=True) @ h).squeeze(1)
        return Bag(raw, scores, self.bag(bag), self.answers(attention @ h))
