"""From a family's default config to a tiny one, by the tables of `tiny_rules`."""

from __future__ import annotations

import copy
import re
from typing import Any

from hf_attn_patch.testbed import tiny_rules as rules

KEEP = rules.KEEP


class SpecialIds:
    """Hands out small token ids, the same one for the same field name in all sub-configs."""

    LOW = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "unk": 3, "sep": 2, "cls": 1, "eod": 2}
    MEDIA = ("image", "img", "video", "audio", "vision", "boi", "eoi", "boa", "eoa", "speech", "media", "vid")

    def __init__(self) -> None:
        self.given: dict[str, int] = {}

    def small(self, name: str, value: Any) -> Any:
        """The id to use for the field `name` whose default is `value`."""
        if isinstance(value, (list, tuple)):
            return [self.small(name, value[0])] if value else list(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return value
        stem = re.sub(r"_(token_)?(id|ids|index)$", "", name)
        if not any(word in stem.split("_") for word in self.MEDIA):
            if value < rules.FIRST_SPECIAL_ID:
                return value
            low = next((i for key, i in self.LOW.items() if stem.endswith(key)), None)
            if low is not None:
                return low
        return self.given.setdefault(stem, rules.FIRST_SPECIAL_ID + len(self.given))


def shrunken(default: dict[str, Any], ids: SpecialIds, nested: bool) -> dict[str, Any]:
    """Keyword arguments for the config class: only the fields that change, so that the rest is derived anew.

    A nested config also passes what its owner set differently from the nested class' own defaults.
    """
    return _Shrinker(default, ids).fields(_class_default(default.get("model_type", "")) if nested else {})


class _Shrinker:
    """One config; sub-configs get a shrinker of their own.

    count: the field that counts its layers. picks: indices of the layers that are kept. hierarchical: stages of
    different widths (Swin), which hang together and are left alone: such models are small once they are shallow.
    """

    def __init__(self, default: dict[str, Any], ids: SpecialIds) -> None:
        self.default, self.ids = default, ids
        self.hierarchical = any(
            isinstance(value, (list, tuple))
            and (name in ("num_heads", "num_attention_heads", "depths") or name.endswith("_per_stage"))
            for name, value in default.items()
        )
        self.count = next(
            (k for k in rules.LAYER_COUNTS if isinstance(default.get(k), int) and default[k] > 0), None
        )
        self.stages = 0 if self.hierarchical else self._stages()
        self.picks = list(range(self.stages)) if self.stages else self._picks()

    def fields(self, own: dict[str, Any]) -> dict[str, Any]:
        kind = self.default.get("model_type", "")
        override = rules.OVERRIDES.get(kind, {})
        fixed = {
            k: v for key, more in rules.ALONG_WITH.items() if self.default.get(key) for k, v in more.items()
        }
        fields: dict[str, Any] = {"model_type": kind} if kind else {}
        if self.stages:
            fields["out_features"] = [f"stage{i + 1}" for i in self.picks]
        for name, value in self.default.items():
            if name in override or name in fields or name in rules.DERIVED:
                continue
            if name in fixed:
                new = fixed[name]
            elif value is None and name in rules.NOT_NONE:
                new = rules.NOT_NONE[name]
            else:
                new = self.field(name, value)
            if new is not KEEP:
                fields[name] = new
            elif name in own and own[name] != value:
                fields[name] = value
        merge(fields, {k: v for k, v in override.items() if v is not KEEP})
        return fields

    def field(self, name: str, value: Any) -> Any:
        if name in rules.VALUES:
            return rules.VALUES[name] if value is not None else KEEP
        if isinstance(value, dict):
            if "model_type" in value:
                return shrunken(value, self.ids, nested=True)
            return _rope(value) if name in ("rope_parameters", "rope_scaling") else KEEP
        if re.search(r"_token_(id|ids|index)$", name) or name.endswith("_token"):
            return self.ids.small(name, value)
        if isinstance(value, (list, tuple)):
            return self.sequence(name, list(value))
        if isinstance(value, bool) or not isinstance(value, int):
            return KEEP
        if name == self.count:
            return len(self.picks)
        small = next((small for pattern, small in rules.INTEGERS if re.fullmatch(pattern, name)), KEEP)
        if small is KEEP or small >= value:
            return KEEP
        return KEEP if self.hierarchical and small in (rules.WIDTH, rules.FFN, rules.HEADS) else small

    def sequence(self, name: str, value: list[Any]) -> Any:
        numbers = bool(value) and all(isinstance(v, int) for v in value)
        if name in ("image_size", "img_size") and numbers:
            return [rules.IMAGE] * len(value)
        if name == "patch_size" and numbers:
            return [*value[:-2], *(min(rules.PATCH, v) for v in value[-2:])]
        if name == "depths" and numbers:
            return [
                min(2, v) for v in value
            ]  # two, because the second block of a Swin stage is the shifted one
        layers = len(self.picks) or rules.LAYERS
        if numbers and re.fullmatch(rules.LAYER_INDICES, name):
            return list(dict.fromkeys(max(-layers, min(v, layers - 1)) for v in value))
        if self.count and len(value) == self.default[self.count] > rules.LAYERS:
            return [value[i] for i in self.picks]
        return KEEP

    def _stages(self) -> int:
        """Layers of a plain backbone: one per feature map that its owner reads, so that all of them differ."""
        maps, names = self.default.get("out_features"), self.default.get("stage_names")
        if (
            not self.count
            or not maps
            or not names
            or len(names) != self.default[self.count] + 1
            or maps == names[-1:]
        ):
            return 0
        return max(rules.LAYERS, len(maps))

    def _picks(self) -> list[int]:
        """Indices of the layers to keep: the first of each kind, at most four, at least two."""
        count = self.default[self.count] if self.count else 0
        if count <= rules.LAYERS:
            return list(range(count))
        per_layer = [v for v in self.default.values() if isinstance(v, list) and len(v) == count]
        kinds = list(zip(*[[str(x) for x in v] for v in per_layer])) if per_layer else [()] * count
        picks = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:4]
        picks += [i for i in range(count) if i not in picks][: max(0, rules.LAYERS - len(picks))]
        return sorted(picks)


def _class_default(kind: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind]().to_dict()
    except Exception:  # a part without a class of its own, or without defaults: nothing to compare with
        return {}


def _rope(value: dict[str, Any]) -> Any:
    """M-RoPE sections sum to half the rotated dimensions; everything else about RoPE scales by itself."""
    nested = {k: v for k, v in value.items() if isinstance(v, dict)}
    if nested:
        changed = {k: _rope(v) for k, v in nested.items()}
        if all(v is KEEP for v in changed.values()):
            return KEEP
        return {**value, **{k: value[k] if v is KEEP else v for k, v in changed.items()}}
    section = value.get("mrope_section")
    if not section:
        return KEEP
    half = int(rules.HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
    small = [max(1, round(s * half / sum(section))) for s in section]
    small[-1] += half - sum(small)
    return {**value, "mrope_section": small}


def merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    """Replaces fields; a dict for a sub-config changes only the fields it names, unless it is of another family."""
    for name, value in changes.items():
        old = fields.get(name)
        part = isinstance(value, dict) and isinstance(old, dict) and "model_type" in old
        if part and value.get("model_type", old["model_type"]) == old["model_type"]:
            merge(old, value)
        else:
            fields[name] = copy.deepcopy(value)
