"""Which keys are image tokens and which rows come behind them: what the image-token edits share (no method itself)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ModelMismatchError, PatchError
from ...forward.needs.images import image_token_ids
from ...model.sites import find_sites

if TYPE_CHECKING:
    from ...call.program import Program
    from ...forward.running import Running
    from ...install.stack import Call
    from ...model.sites import Site

OTHER, IMAGE = 0, 1  # key classes; a method numbers its own further classes from 2 on


def validate_range(patch: Any) -> None:
    """Check the options `first_layer` and `last_layer` (None = the last) of `patch`. Raises `ConfigError`."""
    first, last = patch.first_layer, patch.last_layer
    patch.require(first >= 0, "first_layer", ">= 0")
    patch.require(last is None or last >= first, "last_layer", ">= first_layer")


def in_range(patch: Any, layer: int) -> bool:
    """Whether `layer` is one of first_layer..last_layer, both included."""
    return patch.first_layer <= layer and (patch.last_layer is None or layer <= patch.last_layer)


def depth(model: Any, sites: list[Site]) -> int:
    """Layers of the text part of `model`."""
    told = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return told or max(s.layer for s in sites) + 1


def depth_in(context: Running) -> int:
    """`depth` of the model whose forward runs, looked up once per forward."""
    if "depth" not in context.scratch:
        config: Any = context.config
        context.scratch["depth"] = config.get_text_config().num_hidden_layers
    return context.scratch["depth"]


def check_model(
    name: str,
    model: Any,
    sites: list[Site],
    first: int = 0,
    last: int | None = None,
    published: tuple[int, int] | None = None,
) -> list[str]:
    """Warnings about the layer range first..last (inclusive, None = the last layer) on `model`.

    published: the range that the paper gives for models of 32 layers, if it is a range in the middle.

    Raises:
        ModelMismatchError: the model has no image tokens, or its text layers read the image by cross-attention.
    """
    if not image_token_ids(model.config):
        raise ModelMismatchError(
            f"{name}: the config of {type(model).__name__} names no image token (image_token_id); it is for "
            "vision-language models"
        )
    own = {layers_of(site.path) for site in sites}
    cross = next((s for s in find_sites(model) if s.part == "cross" and layers_of(s.path) in own), None)
    if cross is not None:
        raise ModelMismatchError(
            f"{name}: {type(model).__name__} reads its image by cross-attention ({cross.path}); its image token is a "
            "placeholder without content, and the keys of self-attention hold no image to edit"
        )
    layers = depth(model, sites)
    end = layers - 1 if last is None else last
    if not any(first <= s.layer <= end for s in sites):
        return [
            f"{name} edits layers {first} to {end}, and none of them is among those chosen (the model has {layers} "
            "layers): nothing will be edited. Set first_layer= and last_layer="
        ]
    if published == (first, end) and layers != 32:
        return [
            f"{name}: layers {first} to {end} were published for models of 32 layers, this one has {layers}; set "
            "first_layer= and last_layer= to its middle"
        ]
    return []


def layers_of(path: str) -> str:
    """Path of the list of layers that holds a site: "model.layers" of "model.layers.3.self_attn"."""
    names = path.split(".")
    numbers = [i for i, n in enumerate(names) if n.isdigit()]
    return ".".join(names[: numbers[-1]]) if numbers else path


def image_columns(name: str, program: Program, call: Call) -> Tensor:
    """bool [B, columns], True on image tokens; as long as the keys of `program` reach (static caches are longer than
    what was seen).

    Raises:
        ModelMismatchError: no input ids in this forward, so image tokens are unknown.
        PatchError: the prompt holds no image token in any row.
    """
    context = call.context
    assert context is not None
    total = program.mask.kv_offset + program.mask.kv_len
    return once(call, ("image columns", total), lambda: _image_columns(name, program, call, total))


def _image_columns(name: str, program: Program, call: Call, total: int) -> Tensor:
    context = call.context
    assert context is not None
    image = context.image_keys
    if image is None:
        raise ModelMismatchError(
            f"{name}: this forward had no input_ids, so image tokens are unknown; pass them, or name the image keys "
            "with hap.prompt(model, image_keys=...)"
        )
    # looked at once per prompt: it waits for the device. Who names the keys may say that there are none.
    if context.override.get("image_keys") is None and not context.memory.get("has image"):
        if torch.compiler.is_compiling():  # nobody can look: the compiled forward fails when it runs
            torch._assert_async(image.any(), f"{name}: the prompt holds no image token")
        elif not bool(image.any()):
            raise PatchError(
                f"{name}: the prompt holds no image token, so there is nothing to look at. Put the image into the "
                "prompt (apply_chat_template and the processor write its placeholders), run text inside "
                "handle.disabled(), or, where the image comes in a later part of the prompt, say so with "
                "hap.prompt(model, image_keys=...)"
            )
        context.memory["has image"] = True
    end = program.mask.q_offset + program.mask.q_len
    image = image[:, : min(end, total)].to(program.query.device, torch.bool)
    if program.batch % image.shape[0]:
        raise PatchError(
            f"{name}: image_keys names {image.shape[0]} rows, the batch has {program.batch}; give one row per sample, "
            "or one for all"
        )
    if image.shape[0] != program.batch:  # beams: rows of one item share their prompt
        image = image.repeat_interleave(program.batch // image.shape[0], 0)
    if image.shape[1] < total:  # what came after the prompt holds no image tokens
        image = torch.nn.functional.pad(image, (0, total - image.shape[1]))
    return image


def image_class(name: str, program: Program, call: Call) -> Tensor:
    """Key classes int8 [B, columns]: IMAGE on image tokens, OTHER elsewhere. Errors: as `image_columns`."""
    image = image_columns(name, program, call)
    return once(call, ("image class", image.shape[1]), lambda: image.to(torch.int8))


def behind_image(image: Tensor, program: Program, call: Call) -> Tensor:
    """bool [B, L]: rows that are no image token themselves and have one before them.

    For one image these are the rows behind it; the rule asks nothing about later tokens, so a prompt read in parts
    and one read at once agree.
    """
    mask = program.mask
    rows = slice(mask.q_offset, mask.q_offset + mask.q_len)

    def compute() -> Tensor:
        before = image.any(1, keepdim=True) if mask.q_len == 1 else image.cumsum(1)[:, rows] > 0
        return before & ~image[:, rows]

    return once(call, ("behind image", mask.q_offset, mask.q_len), compute)


def answering_rows(program: Program, call: Call) -> tuple[bool, Tensor | None]:
    """(any at all, bool [B, L] or None = every row): the rows that predict the answer.

    The original codes edit the last row of every call, which is the last one of the prompt, then each generated
    one. These are columns >= prompt length - 1, with and without a cache; where a row is padded on the right and
    its prompt was read at once, columns from its last real token on.
    """
    context, mask = call.context, program.mask
    assert context is not None
    end = mask.q_offset + mask.q_len
    length = end if context.prompt_length is None else context.prompt_length
    if end < length:
        return False, None
    if mask.q_offset >= length - 1:
        return True, None

    def compute() -> Tensor:
        columns = mask.query_columns.to(program.query.device)
        if mask.padding is None:
            return (columns >= length - 1)[None]
        real = mask.padding[:, :length].to(columns.device)
        last = torch.where(real, torch.arange(real.shape[1], device=columns.device), 0).amax(1, keepdim=True)
        return columns >= last

    return True, once(call, ("answering rows", mask.q_offset, mask.q_len), compute)


def classify(program: Program, classes: Tensor) -> None:
    """Set the key classes of `program`; a second time (heads with other options) they must be the same ones."""
    if program.key_class is not classes:
        program.classify(classes)


def once(call: Call, key: Any, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()` for the first layer of a forward, the same tensor for the others."""
    assert call.context is not None
    scratch = call.context.scratch
    if key not in scratch:
        scratch[key] = compute()
    return scratch[key]
