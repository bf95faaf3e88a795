"""The image-free pass: the prompt of a conversation once more, without its images, beside the real forward.

Methods that ask what an image changes compare the two. The pass runs in front of the first forward of a conversation
(nothing in the cache yet, image tokens in the prompt) through the same outermost model: image tokens and the
tokens that wrap them are taken out of the ids, rows are padded on the left again, pixel values and grids are left out,
and the output of every head of the sites that want it, in the row that predicts the answer, is kept in
`Context.memory`, so it lives as long as the cache and follows its copies.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...call.mask import Mask, first_true
from ...errors import ModelMismatchError, PatchError
from ..conversation import keep_rows, of_rows
from ..generating import generating
from .base import Given, Need, needs_of, wants
from .images import ImageKeys, image_token_ids

if TYPE_CHECKING:
    from ..context import Context
    from ..conversation import Conversation
    from ..running import Running

INPUTS = "image-free inputs"  # in the scratch space of a forward: what its joint passes run on
ROWS = "image-free rows"  # in the memory: where the prompt of each row ends, and whether it has an image
WRAPPERS = (
    "vision",
    "image",
    "video",
    "low_res_image",
)  # config fields {this}_{start,end,bos}_token_id, boi, eoi


@dataclass(frozen=True)
class ImageFreePass(Need):
    """How an image-free pass runs.

    branch: ``reference`` runs the model as if nothing were patched, once. ``joint`` runs it with its patches (those
        that edit image keys aside: there are none), once per site that asks, when it asks: so a method that
        goes through the layers one by one sees its own edits of earlier layers in both branches.
    wrappers: ids that are taken out with the image tokens, besides those the config names.
    """

    says: ClassVar[str] = (
        "head outputs of the same prompt without its images (one more forward per conversation)"
    )
    order: ClassVar[int] = 5

    branch: Literal["reference", "joint"] = "reference"
    wrappers: tuple[int, ...] = ()

    def begins(self, running: Running, given: Given) -> None:
        if not given.outermost or running.image_free_pass is not None or running.seen != 0:
            return
        ids = given.ids
        first = next(need for need in running.context.needs if isinstance(need, ImageFreePass))
        if first is self and isinstance(ids, Tensor) and "input_ids" in given:
            begin(running, given, ids)


ImageFree = ImageFreePass  # its name in version 0.1


class Pass:
    """One running image-free pass. memory: that of the real forward. only: the site it is for (None = all)."""

    def __init__(self, how: ImageFreePass, memory: Conversation, only: str | None = None):
        self.how, self.memory, self.only = how, memory, only
        self.kept: dict[str, Tensor] = {}

    def runs(self, patch: Any) -> bool:
        """Whether `patch` (of a site) edits this pass."""
        config = patch.entry.config
        return self.how.branch == "joint" and (wants(config, ImageFreePass) or not wants(config, ImageKeys))

    def keep(self, patches: list[Any], output: Tensor) -> None:
        """Keep the last row of `output` [B, L, H, Dv] of a site if one of its patches wants it."""
        for patch in patches:
            if self.only in (None, patch.path) and self.how in _wishes(patch):
                self.kept[patch.path] = output[:, -1].detach().clone()


def _wishes(patch: Any) -> list[ImageFreePass]:
    if not patch.entry.enabled:
        return []
    return [n for _, config in patch.variants for n in needs_of(config) if isinstance(n, ImageFreePass)]


def _all_wishes(context: Context) -> list[ImageFreePass]:
    paths = [p for need, where in context.needs.items() if isinstance(need, ImageFreePass) for p in where]
    wishes = [
        wish for path in dict.fromkeys(paths) for patch in context.patches_at(path) for wish in _wishes(patch)
    ]
    return list(dict.fromkeys(wishes))


def begin(running: Running, given: Given, ids: Tensor) -> None:
    """Called by the outermost model of a forward that begins a conversation, with its arguments `given`.

    ids: int64 [B, L]. Does nothing where no enabled patch asks, no row has an image, or the prompt goes on after
    this forward (`hap.prompt` says it is longer); where ``generate`` reads the prompt in parts, the whole prompt is
    read once beforehand, so that what is chosen is chosen as if it had come at once.

    Raises:
        PatchError: a row holds image tokens only, or the attention mask is not [B, L].
    """
    wishes = _all_wishes(running.context)
    length, image = running.prompt_length, running.image_keys
    if wishes and length is not None and length > ids.shape[1] and "length" not in running.override:
        _look_ahead(running, given)
        return
    if not wishes or length is None or length > ids.shape[1] or image is None:
        return
    real = _real_tokens(given.get("attention_mask"), ids)[:, :length]
    image = torch.nn.functional.pad(image, (0, max(length - image.shape[1], 0)))[:, :length]
    image = image.to(ids.device, torch.bool).expand(len(ids), -1)
    has = (image & real).any(1)
    if not bool(has.any()):
        return
    last = torch.where(real, torch.arange(length, device=ids.device), 0).amax(1)
    keep_rows(running.memory, ROWS, {"last": last, "has": has})
    for how in wishes:
        inputs = text_inputs(given.module, given.arguments, ids[:, :length], image, real, how.wrappers)
        if how.branch == "reference":
            found = run(running, given.module, inputs, how)
            _keep(running, how, found)
        else:
            running.scratch.setdefault(INPUTS, {})[how] = (given.module, inputs)


def _look_ahead(running: Running, given: Given) -> None:
    """Read the whole prompt of the running ``generate`` once without a cache; what was chosen for it is kept."""
    prompt = generating(running.context)
    if prompt is None:
        return
    inputs: dict[str, Any] = {
        name: value
        for name, value in prompt.inputs.items()
        if name in given.names and name not in ("past_key_values", "use_cache") and isinstance(value, Tensor)
    }
    if "logits_to_keep" in given.names:
        inputs["logits_to_keep"] = 1
    with running.context.aside(None, {"length": prompt.length}) as inner, torch.no_grad():
        given.module(**inputs, use_cache=False)
        found = inner.memory
    found.pop("image_keys", None)
    running.memory.update(found)
    running.memory.of_the_rows |= found.of_the_rows


def output_at(running: Running, path: str, how: ImageFreePass, batch: int | None = None) -> Tensor:
    """See `Running.image_free`."""
    key, memory = _key(how, path), running.memory
    if key not in memory and how in running.scratch.get(INPUTS, {}):
        module, inputs = running.scratch[INPUTS][how]
        found = run(running, module, inputs, how, path)
        _keep(running, how, found)
    output = memory.get(key)
    if output is None:
        raise PatchError(
            f"there was no image-free pass for {path}: it runs in front of the first forward of a conversation, and "
            "needs input_ids with image tokens. Start with a fresh cache, and pass input_ids"
        )
    return output if batch is None else of_rows(memory, key, batch)


def _keep(running: Running, how: ImageFreePass, found: dict[str, Tensor]) -> None:
    for path, output in found.items():
        keep_rows(running.memory, _key(how, path), output)


def run(
    running: Running, module: nn.Module, inputs: dict[str, Any], how: ImageFreePass, only: str | None = None
) -> dict[str, Tensor]:
    """Run `module` on `inputs` without gradients; returns path -> output of the heads there, [B, H, Dv]."""
    one = Pass(how, running.memory, only)
    with running.context.aside(one), torch.no_grad():
        module(**inputs)
    return one.kept


def text_inputs(
    module: nn.Module,
    given: dict[str, Any],
    ids: Tensor,
    image: Tensor,
    real: Tensor,
    wrappers: tuple[int, ...],
) -> dict[str, Any]:
    """Arguments of `module` for the same prompt without images.

    Tensors with one entry per token (token types) lose the same columns. Positions that the caller gave are counted
    anew from the one of the row's first token; where none were given the model counts, padding included, as it does
    for any padded batch.

    Args:
        given: arguments of the real forward. ids: int64 [B, L]. image, real: bool [B, L], image tokens, no padding.
        wrappers: ids to take out besides those that the config names.

    Raises:
        PatchError: a row without anything but images.
    """
    config = getattr(module, "config", None)
    around = {*wrapper_ids(config), *wrappers}
    drop = image | torch.isin(ids, torch.tensor(sorted(around), dtype=ids.dtype, device=ids.device))
    keep = real & ~drop
    count = keep.sum(1)
    empty = (count == 0) & real.any(1)
    if bool(empty.any()):
        raise PatchError(
            f"row {int(first_true(empty[None]))} of the batch holds nothing but its image, so no prompt is left "
            "without it; put text (a question, a BOS token) beside the image"
        )
    # False before True, each in its order: what is kept moves to the right end of its row
    order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -max(int(count.max()), 1) :]
    kept = keep.gather(1, order)
    special = {*image_token_ids(config), *around}
    padding = next(i for i in range(len(special) + 1) if i not in special)
    names = inspect.signature(type(module).forward).parameters
    inputs: dict[str, Any] = {
        "input_ids": ids.gather(1, order).masked_fill(~kept, padding),
        "attention_mask": kept.long(),
    }
    for name, value in given.items():
        if not isinstance(value, Tensor) or name in (*inputs, "labels", "shift_labels", "cache_position"):
            continue
        if name == "position_ids":
            begins = first_true(real).clamp(max=ids.shape[1] - 1)[:, None]
            value = value.expand(*value.shape[:-2], len(ids), -1)
            first = value.gather(-1, begins.expand(*value.shape[:-1], 1))
            inputs[name] = first + (kept.cumsum(1) - 1).clamp(min=0)
        elif value.shape == given["input_ids"].shape and not value.is_floating_point():
            inputs[name] = value[:, : ids.shape[1]].gather(1, order).masked_fill(~kept, 0)
    if "use_cache" in names or any(p.kind is p.VAR_KEYWORD for p in names.values()):
        inputs["use_cache"] = False
    if "logits_to_keep" in names:
        inputs["logits_to_keep"] = 1
    return inputs


def wrapper_ids(config: Any) -> list[int]:
    """Ids of the tokens that a config says stand around an image or video."""
    names = [f"{kind}_{end}_token_id" for kind in WRAPPERS for end in ("start", "end", "bos")]
    names += [f"{end}_token_{what}" for end in ("boi", "eoi") for what in ("id", "index")]
    found = [getattr(config, name, None) for name in names]
    return sorted({i for i in found if isinstance(i, int) and not isinstance(i, bool)})


def check_model(who: str, model: nn.Module) -> None:
    """Refuse a model that cannot run without its image.

    Raises:
        ModelMismatchError: its forward has no default for an argument besides the ids.
    """
    parameters = list(inspect.signature(inspect.unwrap(type(model).forward)).parameters.values())[1:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in variadic and p.name != "input_ids"
    ]
    if needed or "input_ids" not in [p.name for p in parameters]:
        what = f"it needs {', '.join(needed)}" if needed else "it takes no input_ids"
        raise ModelMismatchError(
            f"{who}: {type(model).__name__} cannot run on the prompt without its image ({what}), and {who} compares "
            "the two; take a method that does not"
        )


def _real_tokens(mask: Any, ids: Tensor) -> Tensor:
    """bool [B, L], True where there is no padding."""
    if (
        isinstance(mask, dict) and mask
    ):  # generate with a static cache makes the masks of all kinds of layers itself
        mask = next(iter(mask.values()))
    if isinstance(mask, Mask):
        mask = mask.padding
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < ids.shape[1]:
        found = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise PatchError(
            f"the prompt without its images needs an attention_mask [B, L] to be made from, got one {found}; pass the "
            "mask of the processor"
        )
    return mask[:, : ids.shape[1]].to(ids.device).bool().expand(len(ids), -1)


def _key(how: ImageFree, path: str) -> str:
    return f"image-free {how.branch} {how.wrappers} {path}"
