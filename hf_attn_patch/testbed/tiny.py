"""Tiny random models of (nearly) every transformers family, for tests of patches. No network, seconds to build.

    model = tiny_model("qwen2_5_vl")
    inputs = tiny_inputs(model, batch=2, length=17, left_pad=[0, 5])
    model(**inputs)

Weights are seeded and ten times larger than transformers' own initialisation: with a standard deviation of 0.02 the
attention of a random model is uniform, every mask gives nearly the same output, and a wrong patch passes its test.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import re
from typing import Any

from hf_attn_patch.testbed import tiny_rules as rules

__all__ = ["TinyError", "families", "model_class", "tiny_config", "tiny_inputs", "tiny_model"]

STD = 0.2  # of weights whose fan-in is WIDTH; wider layers get less, so that activations keep their scale


class TinyError(ValueError):
    """A tiny model of this family cannot be made; the message says which and why."""


def families() -> list[str]:
    """Every `model_type` that `AutoConfig` knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A shrunken config: about 2 layers, 4 heads (2 KV heads) of size 16, vocabulary 128, images of 32 x 32 pixels.

    A family with several kinds of layers (sliding and full attention, dense and sparse MLP) keeps one of each kind.
    `overrides` replace fields afterwards, a dict for a sub-config: `tiny_config("llava", text_config={"head_dim": 8})`.

    Raises:
        TinyError: unknown family, unknown field, or a combination that the config class refuses.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, families(), n=3)
        raise TinyError(f"tiny: transformers knows no family {model_type!r}. Near: {', '.join(near) or 'none'}.")
    config_class = CONFIG_MAPPING[model_type]
    parts = rules.PARTS.get(model_type, {})
    try:
        if parts:
            fields = {name: tiny_config(family).to_dict() for name, family in parts.items()}
        else:
            fields = _shrunken(config_class().to_dict(), _SpecialIds(), nested=False)
        _merge(fields, rules.OVERRIDES.get(model_type, {}))
        for name, value in overrides.items():
            _merge(fields, {name: value})
        config = config_class(**fields)
    except TinyError:
        raise
    except Exception as error:  # config classes raise whatever they like
        raise TinyError(f"tiny: no tiny config of {model_type!r}: {type(error).__name__}: {error}") from error
    return config


def model_class(config: Any) -> type:
    """The class that `tiny_model` builds: ForConditionalGeneration for VLMs and seq2seq, ForCausalLM for decoders,
    the base model for encoders (BERT, ViT, CLIP).

    Raises:
        TinyError: transformers has no model for this config.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    preference = _PREFERENCE
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        preference = tuple(m for m in preference if m != "FOR_CAUSAL_LM_MAPPING")
    for mapping in preference:
        names = getattr(auto, f"MODEL_{mapping}_NAMES").get(kind)
        if names:
            import transformers

            for name in [names] if isinstance(names, str) else names:
                found = getattr(transformers, name, None)
                if found is not None:
                    return found
    return _class_by_config(config)


# without ForCausalLM for families that do masked language modelling: BERT & co are used as encoders
_PREFERENCE = (
    "FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "FOR_CAUSAL_LM_MAPPING",
    "MAPPING",
    "FOR_MULTIMODAL_LM_MAPPING",
    "FOR_BACKBONE_MAPPING",
)


def _class_by_config(config: Any) -> type:
    """Sub-models that no Auto class knows (towers, decoders): looked up beside their config."""
    from transformers import PreTrainedModel

    home = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        raise TinyError(f"tiny: {config.model_type!r} has no modeling file {home} ({error})") from error
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.config_class is type(config)
    ]
    classes = [c for c in classes if "PreTrained" not in c.__name__ and c.forward.__name__ != "_forward_unimplemented"]
    if not classes:
        raise TinyError(f"tiny: no model class in {home} takes {type(config).__name__}")
    return next((c for c in classes if c.__name__.endswith("Model")), classes[0])


def tiny_model(model_type: str, seed: int = 0, **config_overrides: Any) -> Any:
    """A tiny model of the family on the CPU, float32, eval mode; equal seeds give equal weights.

    Raises:
        TinyError: no tiny config, no model class, or the class cannot be built from it.
    """
    import torch

    config = tiny_config(model_type, **config_overrides)
    found = model_class(config)
    if found.config_class is not None and not isinstance(config, found.config_class):
        found = _class_by_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = found._from_config(config, dtype=torch.float32)
        except Exception as error:
            raise TinyError(
                f"tiny: {found.__name__} cannot be built from the tiny config of {model_type!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        _reinitialise(model)
    return model.eval()


def _reinitialise(model: Any) -> None:
    """Weights ~ N(0, STD) scaled by fan-in, biases and zero tables made visible, norms left alone."""
    import torch

    seen = set()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if id(weight) in seen or not weight.is_floating_point() or weight.numel() == 0 or last in _LEFT_ALONE:
                continue
            seen.add(id(weight))
            constant = bool((weight == weight.flatten()[0]).all())
            if constant and weight.flatten()[0] != 0:
                continue  # norms and gates that start at one
            if weight.ndim >= 2:
                fan_in = weight[0].numel() if weight.ndim < 4 or "conv" in name else weight.shape[-1]
                weight.normal_(0.0, STD * min(1.0, (rules.WIDTH / max(fan_in, 1)) ** 0.5))
            elif last.endswith("bias"):
                weight.normal_(0.0, 0.1)
            elif constant and "gate" in last:
                weight.fill_(0.5)  # a gate of zero would hide the whole block (mllama's cross-attention)


_LEFT_ALONE = {"A_log", "dt_bias", "D", "dt_proj", "e_score_correction_bias", "logit_scale"}


def tiny_inputs(
    model: Any, batch: int = 2, length: int = 17, left_pad: int | list[int] = 0, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for `model(**inputs)` that fit the family, seeded.

    Args:
        batch: number of rows B.
        length: tokens per row L, padding included. Rows of a VLM grow by their image tokens: one image each, its
            placeholder tokens after the first text token, in the number that the model's own vision tower returns.
        left_pad: padded positions at the start of each row, one number or one per row (`attention_mask` is 0 there).

    Returns:
        `input_ids` and `attention_mask` [B, L], `pixel_values`, `input_features`, `decoder_input_ids`, ... as needed.

    Raises:
        TinyError: `left_pad` does not fit, or no input of the family is known.
    """
    from hf_attn_patch.testbed.tiny_inputs import build_inputs

    pads = [left_pad] * batch if isinstance(left_pad, int) else list(left_pad)
    if len(pads) != batch or any(not 0 <= pad < length for pad in pads):
        raise TinyError(f"tiny: left_pad={left_pad} must be {batch} numbers from 0 to {length - 1} (length - 1)")
    return build_inputs(model, batch, length, pads, seed)


# --- shrinking a config ----------------------------------------------------------------------------------------------


class _SpecialIds:
    """Hands out small token ids, the same one for the same field name in all sub-configs."""

    LOW = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "unk": 3, "sep": 2, "cls": 1, "eod": 2}
    MEDIA = ("image", "img", "video", "audio", "vision", "boi", "eoi", "boa", "eoa", "speech", "media", "vid")

    def __init__(self) -> None:
        self.given: dict[str, int] = {}

    def small(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self.small(name, value[0])] if value else list(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return value
        stem = re.sub(r"_(token_)?(id|ids|index)$", "", name)
        if not any(word in stem.split("_") for word in self.MEDIA):
            low = next((i for key, i in self.LOW.items() if stem.endswith(key)), None)
            if value < rules.FIRST_SPECIAL_ID:
                return value
            if low is not None:
                return low
        return self.given.setdefault(stem, rules.FIRST_SPECIAL_ID + len(self.given))


def _shrunken(default: dict[str, Any], ids: _SpecialIds, nested: bool) -> dict[str, Any]:
    """Keyword arguments for the config class: only the fields that change, so that the rest is derived anew.

    A nested config also passes what its owner set differently from the nested class' own defaults.
    """
    kind = default.get("model_type", "")
    override = rules.OVERRIDES.get(kind, {})
    own = _class_default(kind) if nested else {}
    hierarchical = any(isinstance(default.get(k), list) for k in ("num_heads", "num_attention_heads", "depths"))
    fields: dict[str, Any] = {}
    picks = None
    count = next((k for k in rules.LAYER_COUNTS if isinstance(default.get(k), int) and default[k] > 0), None)
    if count:
        picks = _layer_picks(default, default[count])
    for name, value in default.items():
        if name in override:
            continue
        new = _shrunken_field(name, value, default, ids, picks, count, hierarchical)
        if new is not rules.KEEP:
            fields[name] = new
        elif name in own and own[name] != value:
            fields[name] = value
    if kind:
        fields["model_type"] = kind
    _merge(fields, {k: v for k, v in override.items() if not isinstance(v, str) or v != rules.KEEP})
    return fields


def _class_default(kind: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind]().to_dict()
    except Exception:  # a part without a class of its own, or without defaults: nothing to compare with
        return {}


def _shrunken_field(
    name: str, value: Any, default: dict[str, Any], ids: _SpecialIds, picks: Any, count: Any, hierarchical: bool
) -> Any:
    if name in rules.VALUES:
        return rules.VALUES[name] if value is not None else rules.KEEP
    if isinstance(value, dict):
        if "model_type" in value:
            return _shrunken(value, ids, nested=True)
        return _rope(value) if name in ("rope_parameters", "rope_scaling") else rules.KEEP
    if re.search(r"_token_(id|ids|index)$", name) or name.endswith("_token"):
        return ids.small(name, value)
    if isinstance(value, (list, tuple)):
        return _shrunken_list(name, list(value), default, picks, count)
    if isinstance(value, bool) or not isinstance(value, int):
        return rules.KEEP
    if name == count and picks is not None:
        return len(picks)
    for pattern, small in rules.INTEGERS:
        if re.fullmatch(pattern, name):
            if hierarchical and small in (rules.WIDTH, rules.FFN, rules.HEADS) and not isinstance(small, str):
                return rules.KEEP  # widths of all stages hang together; these models are small once they are shallow
            return rules.KEEP if isinstance(small, str) or small >= value else small
    return rules.KEEP


def _shrunken_list(name: str, value: list[Any], default: dict[str, Any], picks: Any, count: Any) -> Any:
    layers = len(picks) if picks else rules.LAYERS
    if name in ("image_size", "img_size") and value and all(isinstance(v, int) for v in value):
        return [rules.IMAGE] * len(value)
    if name == "patch_size" and all(isinstance(v, int) for v in value):
        return [*value[:-2], *(min(rules.PATCH, v) for v in value[-2:])]
    if name == "depths":
        return [min(2, v) for v in value]  # two, because the second block of a Swin stage is the shifted one
    if re.fullmatch(rules.LAYER_INDICES, name) and all(isinstance(v, int) for v in value):
        return list(dict.fromkeys(max(-layers, min(v, layers - 1)) for v in value))
    if count and picks and len(value) == default[count] and len(value) > rules.LAYERS:
        return [value[i] for i in picks]
    return rules.KEEP


def _layer_picks(default: dict[str, Any], count: int) -> list[int]:
    """Indices of the layers to keep: the first of each kind, at most four, at least two."""
    lists = [v for k, v in default.items() if isinstance(v, list) and len(v) == count and count > rules.LAYERS]
    if count <= rules.LAYERS:
        return list(range(count))
    kinds = list(zip(*[[str(x) for x in v] for v in lists])) if lists else [()] * count
    picks = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:4]
    extra = (i for i in range(count) if i not in picks)
    while len(picks) < rules.LAYERS:
        picks.append(next(extra))
    return sorted(picks)


def _rope(value: dict[str, Any]) -> Any:
    """M-RoPE sections sum to half the rotated dimensions; everything else about RoPE scales by itself."""
    nested = {k: v for k, v in value.items() if isinstance(v, dict)}
    if nested:
        changed = {k: _rope(v) for k, v in nested.items()}
        if all(v is rules.KEEP for v in changed.values()):
            return rules.KEEP
        return {**value, **{k: value[k] if v is rules.KEEP else v for k, v in changed.items()}}
    section = value.get("mrope_section")
    if not section:
        return rules.KEEP
    half = int(rules.HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
    small = [max(1, round(s * half / sum(section))) for s in section]
    small[-1] += half - sum(small)
    return {**value, "mrope_section": small}


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    """Deep update; a string KEEP removes the field, so that the class default applies."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict) and "model_type" in fields[name]:
            _merge(fields[name], value)
        elif isinstance(value, str) and value == rules.KEEP:
            fields.pop(name, None)
        else:
            fields[name] = copy.deepcopy(value)
