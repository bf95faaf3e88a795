"""`Setting`, `Bench` and `judge`: one method in one setting is right, refused, not applicable or WRONG.

A setting is a generator of (what, got, want): what came out under it, and what the same patched model gives without it
(one row at a time, one thread, a dynamic cache, unsharded). Models are in float64, so that two exact ways agree to
~1e-12 and nothing is tuned. Every setting is run without any patch too: where the model alone already fails or differs
the cell is not applicable, and where the patched reference is the dense one to the last bit the setting shows nothing.
"""

from __future__ import annotations

import copy
import functools
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.forward.needs.images import image_token_ids

from ..conformance.families import DECODERS, FAMILIES, Case, _model, cases, forward, inputs_of, media_end

EXACT = 1e-9  # float64; relative to the size of the output
# a cell of several cases shows the first of these
STATES = ("WRONG", "documented", "refused", "right", "n.a.")
CHUNKS = (
    "every piece of a prompt chooses its lines by its own last queries, so a prompt in pieces is read by other lines "
    "than at once (docstring of vertical_slash)"
)
# what differs and says so where the method is described: (setting, method) -> sentence
DOCUMENTED = {
    (name, "vertical_slash"): CHUNKS
    for name in (
        "prefill_chunk_size",
        "chunks by hand, length said",
        "chunks by hand, length unsaid",
        "copies of caches",
    )
}
PREFERRED = {
    "sparse": ("llama", "gemma3_text"),
    "heads": ("llama", "gemma3_text"),
    "grounding": ("llava",),
    "vision": ("dinov2", "vit", "llava"),
}

Pairs = Iterator[tuple[str, Any, Any]]


class NotApplicable(Exception):
    """This setting says nothing about this model or method; the message says why."""


class Wrong(AssertionError):
    """A check of a setting that is no comparison of tensors failed."""


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    says: what is run and what it must equal. decoder: it generates or reads a cache. text: language models only.
    cost: "slow" ones have one case per method in the full table.
    """

    name: str
    says: str
    run: Callable[[Bench], Pairs]
    decoder: bool = False
    text: bool = False
    slow: bool = False


SETTINGS: dict[str, Setting] = {}


def setting(name: str, says: str, **more: Any) -> Callable[[Callable[[Bench], Pairs]], Callable]:
    """Register a generator of (what, got, want) as a setting."""

    def add(run: Callable[[Bench], Pairs]) -> Callable:
        assert name not in SETTINGS, name
        SETTINGS[name] = Setting(name, says, run, **more)
        return run

    return add


class Bench:
    """One case (family, method, options) as a setting sees it. dense: nothing is patched (the control)."""

    def __init__(self, case: Case, dense: bool = False):
        self.case, self.family, self.dense = case, case.family, dense
        self.decoder = case.family in DECODERS

    @property
    def model(self) -> Any:
        """The float64 model, shared by all cells: leave it as it was."""
        return _model(self.family)

    def fresh(self, train: bool = False) -> Any:
        """A copy of it, with gradients if `train`."""
        model = copy.deepcopy(self.model).requires_grad_(train)
        return model.train() if train else model

    def patch(self, model: Any, **more: Any) -> Any:
        return None if self.dense else hap.patch(model, self.case.patch, **{**self.case.options, **more})

    @contextmanager
    def patched(self, model: Any, **more: Any) -> Iterator[Any]:
        if self.dense:
            yield None
            return
        with hap.patched(model, self.case.patch, **{**self.case.options, **more}) as handle:
            yield handle

    def prompt(self, model: Any, **facts: Any) -> AbstractContextManager[Any]:
        return nullcontext() if self.dense else hap.prompt(model, **facts)

    def inputs(self, batch: int = 2, length: int = 17, left_pad: Any = 0, seed: int = 0) -> dict[str, Any]:
        return inputs_of(self.family, batch=batch, length=length, left_pad=left_pad, seed=seed)

    def forward(self, model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
        return forward(model, inputs, **more)

    def prompt_end(self, inputs: dict[str, Any]) -> int:
        """Where a hand-written loop ends its prompt: no image is cut."""
        return max(6, media_end(inputs, self.model))

    def generate(self, model: Any, inputs: dict[str, Any], new: int = 5, **more: Any) -> Any:
        """Greedy ``generate``; its result with logits [B, new, V] in `.logits` (float32 by transformers)."""
        inputs = {k: v for k, v in inputs.items() if k != "position_ids"}
        settings = dict(
            max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, disable_compile=True,
            return_dict_in_generate=True, output_logits=True,
            suppress_tokens=image_token_ids(model.config) or None,  # a random model may write placeholders of images
        )  # fmt: skip
        with torch.no_grad():
            out = model.generate(**inputs, **{**settings, **more})
        if out.logits is not None:
            out.logits = torch.stack(out.logits, 1)
        return out

    def answer(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Everything the model says to these inputs: a forward, and what it generates."""
        one = self.forward(model, inputs)
        if not self.decoder:
            return one
        return torch.cat([one.flatten(), self.generate(model, inputs, 3).logits.flatten()])


@dataclass
class Outcome:
    """What became of a cell, and why."""

    state: str
    why: str = ""


def different(got: Any, want: Any) -> str:
    """How `got` differs from `want`; "" if it does not."""
    if not isinstance(want, Tensor):
        return "" if got == want else f"{got!r} instead of {want!r}"
    if got.shape != want.shape:
        return f"shape {list(got.shape)} instead of {list(want.shape)}"
    if not want.is_floating_point():
        return "" if torch.equal(got, want) else f"{int((got != want).sum())} of {want.numel()} differ"
    if not torch.isfinite(got).all():
        return "not finite"
    error = float((got - want).abs().max()) if got.numel() else 0.0
    scale = max(float(want.abs().max()), 1.0) if want.numel() else 1.0
    return "" if error <= EXACT * scale else f"{error:.3g} off at scale {scale:.3g}"


@functools.cache
def control(name: str, family: str) -> tuple[str, tuple[Any, ...]]:
    """The setting on the unpatched model: (what is wrong with it, the references)."""
    case = next(c for c in cases((family,)))
    wants = []
    try:
        for what, got, want in SETTINGS[name].run(Bench(case, dense=True)):
            wants.append(want)
            found = different(got, want)
            if found:
                return f"the unpatched model differs too: {what}: {found}", ()
    except NotApplicable as reason:
        return str(reason), ()
    except (Exception, KeyboardInterrupt) as error:
        return f"the unpatched model fails too: {one_line(error)}", ()
    return "", tuple(wants)


def judge(name: str, case: Case) -> Outcome:
    """Run one cell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _judge(name, case)
        model = _model(case.family)
        if hap.active(model):
            hap.unpatch(model)
            found = Outcome("WRONG", f"patches were left on the model ({found.state}: {found.why})")
    return found


def _judge(name: str, case: Case) -> Outcome:
    control(name, case.family)  # not in the middle of the generator below, which holds a patch
    wants = []
    try:
        torch.manual_seed(0)
        for what, got, want in SETTINGS[name].run(Bench(case)):
            wants.append(want)
            found = different(got, want)
            if found:
                return _unless_dense(name, case, f"{what}: {found}")
    except NotApplicable as reason:
        return Outcome("n.a.", str(reason))
    except hap.PatchError as refusal:
        return Outcome("refused", one_line(refusal, False))
    except (Exception, KeyboardInterrupt) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return _unless_dense(name, case, f"{one_line(error)} ({last.filename.split('/')[-1]}:{last.lineno})")
    _, dense = control(name, case.family)
    if len(dense) == len(wants) and all(_same(a, b) for a, b in zip(wants, dense)):
        return Outcome("n.a.", "the method edits nothing in what this setting runs")
    return Outcome("right")


def _unless_dense(name: str, case: Case, fault: str) -> Outcome:
    without, _ = control(name, case.family)
    if not without and (name, case.patch) in DOCUMENTED and " off at scale " in fault:
        return Outcome("documented", DOCUMENTED[name, case.patch])
    return Outcome("n.a.", without) if without else Outcome("WRONG", f"{case}: {fault}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


def one_line(error: BaseException, named: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if named else text[:400]


def group(method: str) -> str:
    """Family of a method: the folder it lives in."""
    return registry.get(method).__module__.split(".")[-2]


def cases_for(name: str, method: str, most: int | None = None) -> list[Case]:
    """The cases of a cell: examples of the method on the families it is tried on (`PREFERRED`), at most `most`."""
    one = SETTINGS[name]
    kind = group(method)
    order = PREFERRED.get(kind, FAMILIES)
    order = (*order, *(f for f in FAMILIES if f not in order))
    wanted = 2 if kind in ("sparse", "heads") else 1
    found: list[Case] = []
    used: list[str] = []
    for family in order:
        if one.decoder and family not in DECODERS or one.text and family not in TEXT:
            continue
        here = [c for c in cases((family,)) if c.patch == method]
        if here and len(used) < wanted:
            used.append(family)
            found += here
        if one.slow and found:
            found = found[:1]
            break
    return found if most is None else found[:most]


TEXT = ("llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "gpt_oss")
