"""Which part of a model an attention module belongs to: told by structure first, by words (``data/parts.json``) last.

``text`` is the language model and nothing else. What translates between towers, or runs behind the language model with
weights of its own (resamplers, Q-formers, perceivers, talkers, action experts), is a ``bridge``: no method edits it
unless it is asked to. ``cross`` reads keys of another sequence than its queries'.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from importlib import resources
from typing import Any

from torch import nn

PARTS = ("text", "vision", "audio", "encoder", "decoder", "cross", "bridge")


@functools.lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    return json.loads(resources.files("hf_attn_patch.model").joinpath("data/parts.json").read_text())


def _named(kind: str, names: list[str]) -> str | None:
    """First part of table `kind` one of whose words is in one of `names` ("dit" stands for a whole word only)."""
    for part, words in _data()[kind].items():
        for name in names:
            pieces = name.split("_")
            if any(word in pieces or (len(word) > 3 and word in name) for word in words):
                return part
    return None


def _modality(model: Any) -> str:
    name = getattr(model, "main_input_name", "input_ids")
    name = name if isinstance(name, str) else (name or ["input_ids"])[0]
    if name.startswith(("pixel", "flattened_patches")):
        return "vision"
    return "audio" if name in ("input_features", "input_values", "audio_values") else "text"


def has_cross_words(path: str, module: nn.Module) -> bool:
    """True if `module` is cross-attention, by its own word or by the name of the place it sits in.

    Only the last two names count: a self-attention in ``cross_modal_layers`` is none.
    """
    told = getattr(module, "is_cross_attention", None)
    if isinstance(told, bool):
        return told
    names = [n for n in path.lower().split(".") if not n.isdigit()][-2:]
    return any(word in name for word in _data()["cross"] for name in names)


def is_merged(module: nn.Module) -> bool:
    """True if the keys of one call are the layer's own tokens followed by an encoder's (T5Gemma2's decoder)."""
    forward = inspect.unwrap(type(module).forward)
    return any(name.startswith("merged_") for name in inspect.signature(forward).parameters)


class Parts:
    """The parts of one transformers model, read once.

    configs: part that each (nested) sub-config describes, by identity. language: path of the language model, of a model
    that has other towers too and says which of its modules it is. owners: path -> transformers model inside.
    """

    def __init__(self, model: Any):
        from transformers import PreTrainedModel

        self.model = model
        self.configs = _config_parts(model.config)
        self.owners = {p: m for p, m in model.named_modules() if isinstance(m, PreTrainedModel)}
        self.language = self._language()

    def _language(self) -> str | None:
        """Path of the language model, or None where the model is one, or does not say."""
        try:
            text = self.model.config.get_text_config(decoder=True)
            found = self.model.get_decoder()
        except Exception:  # models without a text side refuse in ways of their own
            return None
        if text is self.model.config or found is self.model or not isinstance(found, nn.Module):
            return None
        path = next((p for p, m in self.model.named_modules() if m is found), None)
        # a decoder that has towers inside does not tell text from the rest
        other = set(self.configs.values()) - {"text"}
        inside = {self.configs.get(id(getattr(m, "config", None))) for m in found.modules()}
        return path if path and not inside & other else None

    def of(self, path: str, module: nn.Module) -> tuple[str, frozenset[str]]:
        """(part that numbers its layer, every part that selects it) of the attention module at `path`."""
        names = path.lower().split(".")
        cross = has_cross_words(path, module)
        modality = self._modality_of(path, names, module)
        side = self._side(names, module, modality)
        if modality == "text" and side is None and self._beside_the_language_model(path):
            modality = "bridge"
        if modality == "bridge":
            if cross and any(word in type(self.model).__name__ for word in _data()["classes"]["bridge"]):
                return "cross", frozenset(
                    {"cross", "bridge"}
                )  # the model is the bridge: there is nothing beside it
            return "bridge", frozenset({"bridge", "cross"} if cross else {"bridge"})
        if cross:
            return "cross", frozenset({"cross"})
        if side is not None:
            reads = modality if side == "encoder" else self._decodes(modality)
            return side, frozenset({side, reads})
        return modality, frozenset({modality})

    def _modality_of(self, path: str, names: list[str], module: nn.Module) -> str:
        config = getattr(module, "config", None)
        kind = type(module).__name__
        if _named("words", names) == "bridge" or any(w in kind for w in _data()["classes"]["bridge"]):
            return "bridge"
        if (by_config := self.configs.get(id(config))) is not None:
            return by_config
        if (by_word := _named("words", names)) is not None:
            return by_word
        for part, endings in _data()["classes"].items():
            if re.search(
                rf"[A-Za-z]({'|'.join(endings)})$", type(config).__name__
            ):  # Speech2TextConfig is no text config
                return part
        for end in range(len(names), 0, -1):  # the nearest model around it says what it reads
            owner = self.owners.get(".".join(path.split(".")[:end]))
            if owner is not None and (found := _modality(owner)) != "text":
                return found
        return _modality(self.model)

    def _side(self, names: list[str], module: nn.Module, modality: str) -> str | None:
        """ "encoder" or "decoder" of an encoder-decoder; towers of another modality inside one are neither."""
        config = getattr(module, "config", None)
        both = any(getattr(c, "is_encoder_decoder", False) for c in (self.model.config, config))
        told = self.configs.get(id(config))
        if not both or modality == "bridge" or told not in (None, "text"):
            return None
        for name in names:
            if (word := name.split("_")[-1]) in ("encoder", "decoder"):
                return word
            if _named("words", [name]) and not getattr(config, "is_encoder_decoder", False):
                return None  # a tower that has an encoder of its own
        return None

    def _decodes(self, modality: str) -> str:
        """A decoder writes text if there is a vocabulary; that of a detector does not."""
        try:
            text = self.model.config.get_text_config(decoder=True)
        except Exception:
            return modality
        sources = (text, *(getattr(text, key, None) for key in getattr(text, "sub_configs", {}) or {}))
        return "text" if any(getattr(c, "vocab_size", None) for c in sources) else modality

    def _beside_the_language_model(self, path: str) -> bool:
        if self.language is None or f"{path}.".startswith(f"{self.language}."):
            return False
        return not set(_data()["language_models"]) & set(path.split("."))


def _config_parts(config: Any) -> dict[int, str]:
    """Which part each (nested) sub-config describes, by identity of the config object."""
    found: dict[int, str] = {}

    def visit(config: Any, inherited: str | None) -> None:
        for key in getattr(config, "sub_configs", {}) or {}:
            child = getattr(config, key, None)
            if child is None or isinstance(child, dict):
                continue
            part = _named("configs", [key.removesuffix("_config")]) or inherited
            if part:
                found.setdefault(id(child), part)
            visit(child, part)

    visit(config, None)
    return found
