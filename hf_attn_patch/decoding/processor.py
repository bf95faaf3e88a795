"""`TwoStream`: two-stream decoding as a ``LogitsProcessor``; `two_stream`, `decoded`, `processors`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from .. import api
from ..errors import PatchError
from ..model.sites import base_model
from . import prompts
from .base import Decoding, Given, build
from .stream import SecondStream

ACTIVE = "_attn_patch_decoding"


class TwoStream(LogitsProcessor):
    """Changes the logits of ``model.generate(**inputs, logits_processor=[this])`` by those of further streams.

    Beams, several sequences per prompt, batches with left padding and ``use_cache=False`` work: rows are recognised
    by the tokens they start with. A call with the prompt begins anew, so one object serves any number of calls. With
    several rows per prompt the result is normalised (log-softmax), because beams add such numbers up.

    Attributes:
        method: the options. streams: the `SecondStream` s of the prompt.
    """

    def __init__(self, model: Any, method: Decoding, given: Given):
        self.model, self.method, self.given = base_model(model), method, given
        self.streams: list[SecondStream] = []
        self._prompt: Tensor | None = None
        self._ids: Tensor | None = None

    def prompt(self, inputs: Mapping[str, Any], **given: Any) -> TwoStream:
        """Get ready for the prompt `inputs` (what ``generate`` will be called with); returns itself.

        Raises:
            PatchError: no ``input_ids``, no image token in them, or no pixels where the method changes them.
        """
        for name, value in given.items():
            setattr(self.given, name, value)
        inputs, name = dict(inputs), self.method.name
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise PatchError(
                f"{name}: the inputs hold {', '.join(inputs) or 'nothing'}, but no input_ids; a second prompt is made "
                "from tokens. Pass what the processor returned, or the second prompt itself with second="
            )
        if not bool(prompts.image_columns(self.model.config, ids).any()):
            raise PatchError(
                f"{name}: the prompt holds no image token, so there is no image to look at twice. Put the image into "
                "the prompt (apply_chat_template and the processor write its placeholders), or generate without "
                f"{name}"
            )
        streams: list[dict[str, Any]] = []
        if self.given.second is not None:
            second = self.given.second
            streams = [dict(second)] if isinstance(second, Mapping) else [dict(s) for s in second]
        elif self.method.streams_needed:
            if self.method.pixels and not prompts.pixel_names(inputs):
                raise PatchError(
                    f"{name}: the inputs hold {', '.join(inputs)}, but no pixel_values, and {name} changes "
                    "the picture. Pass what the processor returned"
                )
            streams = self.method.second(self.model, inputs, self.given)
        self.streams = [SecondStream(self.model, s, self._around) for s in streams]
        self._prompt, self._ids = ids, None
        return self

    @contextmanager
    def _around(self, stream: SecondStream) -> Iterator[None]:
        with ExitStack() as stack:
            if not self.method.patched:
                for handle in api.active(self.model):
                    stack.enter_context(handle.disabled())
            stack.enter_context(self.method.around(self.model, stream))
            yield

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self._prompt is None:
            raise PatchError(
                f"{self.method.name}: no prompt yet; call .prompt(inputs) with the inputs of generate"
            )
        rows, length = input_ids.shape
        items, begin = self._prompt.shape
        copies = rows // items
        whole = self._prompt.to(input_ids.device).repeat_interleave(max(copies, 1), 0)
        if rows % items or length < begin or not torch.equal(input_ids[:, :begin], whole):
            raise PatchError(
                f"{self.method.name}: generate runs on {rows} rows of {length} tokens that do not start with the "
                f"prompt this processor was made for ({items} rows of {begin}). Call .prompt(inputs) with the inputs "
                "of this generate"
            )
        main = scores.float()
        if length == begin:
            others = [s.begin(copies) for s in self.streams]
        else:
            order = self._order(input_ids, copies)
            others = [s.step(input_ids[:, -1:], order) for s in self.streams]
        self._ids = input_ids.clone()
        made = self.method.combine(main, [o.to(main.device) for o in others], length - begin + 1)
        return (made.log_softmax(-1) if copies > 1 else made).to(scores.dtype)

    def _order(self, input_ids: Tensor, copies: int) -> Tensor | None:
        """int64 [R]: the row of the last step that each row goes on from; None if each from itself."""
        before = self._ids
        if (
            before is None
            or before.shape[0] != input_ids.shape[0]
            or before.shape[1] != input_ids.shape[1] - 1
        ):
            seen = "nothing" if before is None else f"{before.shape[1]} tokens"
            raise PatchError(
                f"{self.method.name}: generate goes on at {input_ids.shape[1]} tokens, the second stream has read "
                f"{seen}. It needs one call per token from the prompt on: no assisted or prompt-lookup decoding, and "
                "no cache that holds part of the answer already"
            )
        if torch.equal(input_ids[:, :-1], before):
            return None
        now = input_ids[:, :-1].reshape(-1, copies, 1, before.shape[1])
        same = (now == before.reshape(-1, 1, copies, before.shape[1])).all(
            -1
        )  # [items, copies, copies before]
        if not bool(same.any(-1).all()):
            raise PatchError(
                f"{self.method.name}: a row goes on from tokens that no row had at the last step, so the second stream "
                "cannot follow. Use one processor object for one generate call at a time"
            )
        first = torch.arange(same.shape[0], device=same.device)[:, None] * copies
        return (same.to(torch.int8).argmax(-1) + first).flatten()

    def __repr__(self) -> str:
        streams = len(self.streams) or ("none needed" if self._prompt is not None else "no prompt yet")
        return f"TwoStream({self.method}, further streams: {streams})"


def two_stream(
    model: Any,
    name_or_config: str | Decoding,
    *,
    inputs: Mapping[str, Any] | None = None,
    processor: Any = None,
    images: Any = None,
    texts: Any = None,
    matcher: Any = None,
    second: Any = None,
    **options: Any,
) -> TwoStream:
    """A ``LogitsProcessor`` that decodes with a second stream: ``generate(**inputs, logits_processor=[it])``.

    Args:
        model: a decoder-only vision-language model; it is not changed. name_or_config: a method (`decoding.available`).
        inputs: what ``generate`` will be called with; later prompts with ``.prompt(inputs)``.
        processor, images, texts, matcher: see `decoding.Given`; only what the method asks for.
        second: the inputs of the second stream, instead of those the method would make.
        options: fields of the method's config.

    Raises:
        PatchError: one of its subclasses; nothing has run.
    """
    method = build(name_or_config, options)
    method.check_model(model)
    made = TwoStream(model, method, Given(processor, images, texts, matcher, second))
    return made if inputs is None else made.prompt(inputs)


@contextmanager
def decoded(model: Any, name_or_config: str | Decoding, **options: Any) -> Iterator[Decoding]:
    """Inside, `processors` gives this method for `model`: how an evaluation decodes with a method it does not know.

    Raises:
        PatchError: the method refuses the model.
    """
    base, method = base_model(model), build(name_or_config, options)
    method.check_model(model)
    before = base.__dict__.get(ACTIVE)
    base.__dict__[ACTIVE] = method
    try:
        yield method
    finally:
        base.__dict__.pop(ACTIVE)
        if before is not None:
            base.__dict__[ACTIVE] = before


def processors(model: Any, inputs: Mapping[str, Any], **given: Any) -> LogitsProcessorList:
    """What to pass as ``logits_processor`` for the prompt `inputs`: empty unless `model` is inside `decoded`.

    given: processor, images, texts, … as for `two_stream`.
    """
    modules = (
        model.modules() if isinstance(model, torch.nn.Module) else ()
    )  # whatever else generates has none
    method = next((vars(m)[ACTIVE] for m in modules if ACTIVE in vars(m)), None)
    return LogitsProcessorList([] if method is None else [two_stream(model, method, inputs=inputs, **given)])
