"""`SecondStream`: a pass over a changed prompt, token by token beside ``generate``, with a KV cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

_MODE = ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer")


class SecondStream:
    """Logits of `model` for another prompt, continued with the tokens that the main stream chose.

    ``generate`` itself prepares the prompt (positions, masks, encoded images), through its documented hook for custom
    loops; later tokens take the same three steps as in transformers' own loops. Nothing is shared with the main
    stream: the cache is new at every `begin`, and what a model keeps on its modules meanwhile (rope deltas) is put
    back.

    around: makes the context manager entered around every forward.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        around: Callable[[SecondStream], AbstractContextManager[Any]],
    ):
        self.model, self.inputs, self.around = model, inputs, around
        self.kwargs: dict[str, Any] = {}

    def begin(self, copies: int) -> Tensor:
        """Read the prompt into a fresh cache; logits [B * copies, V] of the first token, items kept together."""
        from transformers import DynamicCache

        model = self.model
        held: dict[str, Any] = {}

        def hold(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
            held.update({k: v for k, v in kwargs.items() if k not in _MODE}, input_ids=input_ids)
            return input_ids

        with self.around(self), unnoticed(model):
            model.generate(
                **self.inputs,
                custom_generate=hold,
                past_key_values=DynamicCache(config=model.config.get_text_config(decoder=True)),
                use_cache=True,
                num_beams=1,
                num_return_sequences=1,
                max_new_tokens=1,
                logits_to_keep=1,
            )
            ids = held.pop("input_ids")
            made = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **held)
            out = model(**made, return_dict=True)
        held = {k: v for k, v in held.items() if not k.startswith(("pixel_values", "mm_encoder"))}
        self.kwargs = model._update_model_kwargs_for_generation(out, held, is_encoder_decoder=False)
        logits = out.logits[:, -1].float()
        if copies > 1:
            rows = logits.shape[0]
            self.kwargs["past_key_values"].batch_repeat_interleave(copies)
            self.kwargs = {k: _repeated(k, v, rows, copies) for k, v in self.kwargs.items()}
            logits = logits.repeat_interleave(copies, 0)
        return logits

    def step(self, tokens: Tensor, order: Tensor | None) -> Tensor:
        """Feed one token per row, int64 [R, 1]; logits [R, V]. order: int64 [R], the row each row goes on from."""
        model, kwargs = self.model, self.kwargs
        if order is not None:
            kwargs["past_key_values"].reorder_cache(order)
        with self.around(self):
            made = model.prepare_inputs_for_generation(tokens, next_sequence_length=1, **kwargs)
            out = model(**made, return_dict=True)
        self.kwargs = model._update_model_kwargs_for_generation(out, kwargs, is_encoder_decoder=False)
        return out.logits[:, -1].float()


def _repeated(name: str, value: Any, rows: int, copies: int) -> Any:
    """A prepared input with every row `copies` times (positions of several axes have their rows second to last)."""
    if not isinstance(value, Tensor):
        return value
    axis = -2 if name == "position_ids" else 0
    return value.repeat_interleave(copies, axis) if value.ndim and value.shape[axis] == rows else value


@contextmanager
def unnoticed(model: Any) -> Iterator[None]:
    """What modules keep as plain attributes between forwards (Qwen's ``rope_deltas``) is put back afterwards."""
    kept = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if value is None or isinstance(value, torch.Tensor)
    ]
    try:
        yield
    finally:
        for module, name, value in kept:
            if vars(module).get(name) is not value:
                setattr(module, name, value)
