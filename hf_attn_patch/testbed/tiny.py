"""Tiny random models of (nearly) every transformers family, for tests of patches. No network, seconds to build.

    model = tiny_model("qwen2_5_vl")
    inputs = tiny_inputs(model, batch=2, length=17, left_pad=[0, 5])
    model(**inputs)

Weights are seeded and ten times larger than transformers' own initialisation: with a standard deviation of 0.02 the
attention of a random model is uniform, every mask gives nearly the same output, and a wrong patch passes its test.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from hf_attn_patch.testbed import tiny_rules as rules
from hf_attn_patch.testbed.tiny_shrink import SpecialIds, merge, shrunken

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
        raise TinyError(
            f"tiny: transformers knows no family {model_type!r}. Near: {', '.join(near) or 'none'}."
        )
    config_class = CONFIG_MAPPING[model_type]
    parts = rules.PARTS.get(model_type, {})
    try:
        fields = shrunken(_default(config_class, bool(parts)), SpecialIds(), nested=False)
        fields.pop("model_type", None)
        for name, (family, changes) in parts.items():
            fields[name] = tiny_config(family, **changes).to_dict()
        merge(fields, overrides)
        config = config_class(**fields)
        if overrides:
            _check_names(config_class, overrides, bool(parts))
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
    classes = [
        c
        for c in classes
        if "PreTrained" not in c.__name__ and c.forward.__name__ != "_forward_unimplemented"
    ]
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
            if (
                id(weight) in seen
                or not weight.is_floating_point()
                or weight.numel() == 0
                or last in _LEFT_ALONE
            ):
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
        raise TinyError(
            f"tiny: left_pad={left_pad} must be {batch} numbers from 0 to {length - 1} (length - 1)"
        )
    return build_inputs(model, batch, length, pads, seed)


def _check_names(config_class: type, overrides: dict[str, Any], may_fail: bool) -> None:
    """Config classes keep any keyword argument as an attribute that nobody reads: a typo would pass unseen."""
    import transformers

    known = _default(config_class, may_fail)
    if not known:
        return
    default = config_class()
    unknown = [n for n in overrides if n not in _ALWAYS_TAKEN and not hasattr(default, n)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        raise TinyError(
            f"tiny: {config_class.__name__} has no field {unknown[0]!r}. Near: {', '.join(near) or 'none'}."
        )
    for name, value in overrides.items():
        part = getattr(default, name, None)
        if (
            isinstance(value, dict)
            and isinstance(part, transformers.PreTrainedConfig)
            and "model_type" not in value
        ):
            _check_names(type(part), value, True)


# read by models although not every config class declares them
_ALWAYS_TAKEN = {"attn_implementation", "dtype", "is_decoder", "add_cross_attention", "output_attentions"}


def _default(config_class: type, may_fail: bool) -> dict[str, Any]:
    """The family's default config as a dict; empty if it has none because its parts must be given."""
    try:
        return config_class().to_dict()
    except ValueError:
        if not may_fail:
            raise
        return {}
