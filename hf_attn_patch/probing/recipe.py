"""`fit`: train a head on cached tokens of a frozen model, the same result for the same seed on the same machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import build, check
from .pool import Mean, Probe


@dataclass
class Fitted:
    """A trained head. accuracy: on what it was trained on, top-1 (multi-label: share of right decisions)."""

    name: str
    head: Any = field(repr=False)
    parameters: int
    accuracy: float
    loss: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.parameters:,} parameters, loss {self.loss:.4f} and accuracy {self.accuracy:.3f} "
            f"on the training features, {self.seconds:.1f} s"
        )

    @torch.no_grad()
    def logits(self, features: Tensor, batch: int = 256) -> Tensor:
        """Logits [n, classes] of tokens [n, N, C] (or vectors [n, C]), batch by batch."""
        return torch.cat([self.head(part.float()) for part in as_tokens(features).split(batch)])


def fit(
    features: Tensor,
    labels: Tensor,
    head: str = "ep",
    steps: int = 400,
    lr: float = 2e-3,
    *,
    batch: int = 64,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    seed: int = 0,
    classes: int | None = None,
    c: float = 1.0,
    **options: Any,
) -> Fitted:
    """Train `head` on frozen features.

    AdamW, linear warm-up, cosine to zero, batches from a seeded order. The published probes use LARS for 90 epochs of
    ImageNet at batch 4096 (arXiv 2506.10178); on a few hundred images AdamW reaches the same training loss in seconds.
    ``linear`` on single labels is scikit-learn's logistic regression instead (convex: no steps, no lr, no seed), on the
    mean of the tokens, standardised.

    Args:
        features: [n, N, C], or [n, C] for one vector per image. labels: int64 [n], or zeros and ones [n, classes] for
        several labels per image. steps, lr, batch, weight_decay, warmup (share of the steps): of AdamW. classes: None =
        as many as the labels show. c: inverse strength of the L2 penalty of ``linear``. options: of the head.

    Raises:
        ValueError: unknown head or option, features and labels that do not fit, labels outside the classes, not finite.
    """
    x = as_tokens(features).float()
    multi = labels.ndim == 2
    if len(x) != len(labels) or len(x) < 2:
        raise ValueError(
            f"fit: {len(x)} features for {len(labels)} labels; at least 2 of each, one per image"
        )
    if not torch.isfinite(x).all():
        raise ValueError("fit: some features are not finite; the model gave NaN or infinity for them")
    found = labels.shape[1] if multi else int(labels.max()) + 1
    classes = found if classes is None else classes
    if classes < found or (not multi and int(labels.min()) < 0) or (multi and classes != found):
        raise ValueError(f"fit: labels for {found} classes, asked for {classes}")
    check(head, x.shape[1:], **options)
    started = time.monotonic()
    if head == "linear" and not multi:
        model = logistic(x, labels, classes, c)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(head, x.shape[1:], classes, **options)
            descend(model, x, labels, steps, lr, batch, weight_decay, warmup)
    model.eval()
    with torch.no_grad():
        parts = list(zip(x.split(256), labels.split(256)))
        # the head's own loss, in eval mode: what is left of the mean over what it saw
        loss = sum(float(model.loss(a, b)) * len(a) for a, b in parts) / len(x)
        right = sum(float(_right(model(a), b).sum()) for a, b in parts) / (
            x.shape[0] * (classes if multi else 1)
        )
    count = sum(p.numel() for p in model.parameters())
    return Fitted(head, model, count, right, loss, time.monotonic() - started)


def descend(
    model: Any,
    x: Tensor,
    labels: Tensor,
    steps: int,
    lr: float,
    batch: int,
    weight_decay: float,
    warmup: float,
) -> None:
    """AdamW on `model.loss`, in place. Uses torch's generator for the order and whatever the head draws."""
    if steps < 1 or not lr > 0 or batch < 2:
        raise ValueError(f"fit: steps={steps} must be at least 1, lr={lr} above 0, batch={batch} at least 2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    rising = max(round(steps * warmup), 1)
    curve = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rising, 1.0, rising),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - rising, 1)),
        ],
        [rising],
    )
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < 2:  # batch norm needs two
            order = torch.randperm(len(x))
        chosen, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        model.loss(x[chosen], labels[chosen]).backward()
        optimizer.step()
        curve.step()


def logistic(x: Tensor, labels: Tensor, classes: int, c: float) -> Probe:
    """Multinomial logistic regression of scikit-learn on standardised mean tokens, as a `Probe`.

    Raises:
        ValueError: scikit-learn is missing, or all labels are the same.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ValueError(
            "the linear probe needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    kinds = labels.unique()
    if len(kinds) < 2:
        raise ValueError(
            f"linear: all {len(labels)} labels are {int(kinds[0])}; a classifier needs two classes"
        )
    model = Probe(Mean(x.shape[-1]), classes)
    mean = x.mean(1)
    model.norm.running_mean, model.norm.running_var = mean.mean(0), mean.var(0, unbiased=False)
    model.eval()
    with torch.no_grad():
        solved = LogisticRegression(C=c, max_iter=2000).fit(model.norm(mean).numpy(), labels.numpy())
        weight, bias = torch.from_numpy(solved.coef_).float(), torch.from_numpy(solved.intercept_).float()
        if len(kinds) == 2:  # two classes come as one row
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        model.classifier.weight.zero_()
        model.classifier.bias.fill_(-1e4)  # classes that were never seen are never answered
        model.classifier.weight[kinds] = weight
        model.classifier.bias[kinds] = bias
    return model


def as_tokens(features: Tensor) -> Tensor:
    """[n, N, C]; vectors [n, C] become one token each.

    Raises:
        ValueError: neither shape.
    """
    if features.ndim not in (2, 3):
        raise ValueError(f"features have shape {list(features.shape)}, expected [n, N, C] or [n, C]")
    return features[:, None] if features.ndim == 2 else features


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits > 0) == (labels > 0) if labels.ndim == 2 else logits.argmax(-1) == labels
