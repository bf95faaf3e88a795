"""Head sets: which heads of which layers, with the score that chose them; the file methods and calibration share.

    {"model": "HuggingFaceTB/SmolLM2-135M", "objective": "retrieval", "kind": "q",
     "heads": [{"layer": 16, "head": 19, "score": 0.94}, ...]}

An entry may carry ``kind`` (q: a query head, kv: a KV head, that is all query heads of its group), ``model`` and
``objective`` of its own. A bare list of entries, ``{layer: [heads]}`` (PASTA) and ``{"layer-head": score or
[scores]}`` (Retrieval_Head; scores are averaged) are read too.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, ModelMismatchError
from ..options import option_file, short
from .sites import Site

KINDS = ("q", "kv")


@dataclass(frozen=True)
class Head:
    """One head of a set: `kind` "q" counts query heads, "kv" KV heads. score: None = not scored."""

    layer: int
    head: int
    kind: str = "q"
    score: float | None = None

    def __str__(self) -> str:
        return f"layer {self.layer} {'KV' if self.kind == 'kv' else 'query'} head {self.head}"


@dataclass(frozen=True)
class HeadSet:
    """Heads in the order of their source; models and objectives that the source names."""

    heads: tuple[Head, ...]
    models: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()

    def top(self, count: int, who: str) -> HeadSet:
        """The `count` heads of the highest score (ties: in order of the source).

        Raises:
            ConfigError: fewer heads than that, or heads without a score.
        """
        if count > len(self.heads):
            raise ConfigError(f"{who}: top={count}, but the head set holds {len(self.heads)} heads")
        unscored = [h for h in self.heads if h.score is None]
        if unscored:
            raise ConfigError(
                f"{who}: top={count} needs a score for every head, {unscored[0]} has none; leave top out to take all"
            )
        if len(self.objectives) > 1:
            raise ConfigError(
                f"{who}: the head set mixes scores of {', '.join(self.objectives)}; top=K compares one objective"
            )
        best = sorted(self.heads, key=lambda h: -(h.score or 0.0))[:count]
        return HeadSet(tuple(best), self.models, self.objectives)

    def of_layer(self, layer: int, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Sorted query heads of one layer; a KV head stands for its group."""
        group = num_heads // num_kv_heads
        found: set[int] = set()
        for h in self.heads:
            if h.layer == layer:
                found.update([h.head] if h.kind == "q" else range(h.head * group, (h.head + 1) * group))
        return tuple(sorted(found))

    def check(self, site: Site, who: str) -> None:
        """Refuse heads that the layer of `site` does not have.

        Raises:
            ModelMismatchError: names the head, its kind and what is there.
        """
        own = [h for h in self.heads if h.layer == site.layer]
        if own and (site.num_heads is None or site.num_kv_heads is None):
            raise ModelMismatchError(
                f"{who}: the number of heads of {site.path} is unknown; see hap.sites.register_site_facts"
            )
        for h in own:
            size = site.num_heads if h.kind == "q" else site.num_kv_heads
            if size is not None and h.head >= size:
                raise ModelMismatchError(
                    f"{who}: {h} does not exist, {site.path} has {site.num_heads} query heads and "
                    f"{site.num_kv_heads} KV heads"
                )

    def check_model(self, model: Any, sites: list[Site], who: str) -> list[str]:
        """Notes on how the set and the chosen `sites` of `model` fit.

        Raises:
            ModelMismatchError: a layer that the model does not have, or no head on the chosen layers.
        """
        from .sites import find_sites

        parts = {s.part for s in sites}
        layers = 1 + max(s.layer for s in find_sites(model) if s.part in parts)
        wrong = [h for h in self.heads if h.layer >= layers]
        if wrong:
            raise ModelMismatchError(
                f"{who}: {wrong[0]} does not exist, the model has {layers} layers ({'/'.join(sorted(parts))}), "
                f"numbered 0 to {layers - 1}; was the head set made for another model?"
            )
        chosen = {s.layer for s in sites}
        outside = [h for h in self.heads if h.layer not in chosen]
        if self.heads and len(outside) == len(self.heads):
            raise ModelMismatchError(
                f"{who}: none of the {len(self.heads)} heads of the set is on a chosen layer (first: {outside[0]})"
            )
        notes = [f"{len(outside)} heads of the set are on layers that were not chosen"] if outside else []
        name = getattr(model.config, "_name_or_path", "") or ""
        for other in self.models:
            if name and name.rstrip("/").split("/")[-1] != other.rstrip("/").split("/")[-1]:
                notes.append(f"the head set was made for {other}, this model is {name}")
        return notes


def plain(source: Any, who: str, option_name: str = "head_set") -> Any:
    """The JSON data of a head set given as a path or as data (keys become text, as JSON has no others).

    Raises:
        ConfigError: no such file, or not JSON. AdapterError: an adapter names a file.
    """
    if isinstance(source, str):
        try:
            return json.loads(option_file(who, option_name, source, "head-set file"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{who}: head-set file {source} is not valid JSON: {error}") from error
    try:
        return json.loads(json.dumps(source))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{who}: the head set is not JSON data: {error}") from error


def read(data: Any, who: str) -> HeadSet:
    """A head set from JSON data in one of the formats above.

    Raises:
        ConfigError: what is wrong with which entry.
    """
    common: dict[str, Any] = {}
    if isinstance(data, dict) and "heads" in data:
        common = {k: v for k, v in data.items() if k != "heads"}
        data = data["heads"]
    if isinstance(data, dict):
        data = [entry for key, value in data.items() for entry in _of_key(key, value, who)]
    if not isinstance(data, list):
        raise ConfigError(
            f"{who}: a head set is {{layer: [heads]}} or {{'heads': [{{'layer', 'head', 'score', ...}}]}}, "
            f"got {type(data).__name__}"
        )
    heads, models, objectives = [], [], []
    for entry in data:
        if not isinstance(entry, dict):
            raise ConfigError(f"{who}: head-set entry {short(entry)} is no object with 'layer' and 'head'")
        entry = {**common, **entry}
        for name in ("layer", "head"):
            value = entry.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(
                    f"{who}: head-set entry {short(entry)} has {name}={short(value)}, expected a number >= 0"
                )
        kind, score = entry.get("kind", "q"), entry.get("score")
        if kind not in KINDS:
            raise ConfigError(
                f"{who}: head-set entry {short(entry)} has kind={short(kind)}, expected 'q' or 'kv'"
            )
        if score is not None and (
            not isinstance(score, (int, float)) or isinstance(score, bool) or not math.isfinite(score)
        ):
            raise ConfigError(
                f"{who}: head-set entry {short(entry)} has score={short(score)}, expected a finite number"
            )
        heads.append(Head(entry["layer"], entry["head"], kind, None if score is None else float(score)))
        models.append(entry.get("model"))
        objectives.append(entry.get("objective"))
    known = lambda names: tuple(dict.fromkeys(n for n in names if isinstance(n, str) and n))
    seen: set[tuple[int, int, str]] = set()
    for h in heads:
        if (h.layer, h.head, h.kind) in seen:
            raise ConfigError(f"{who}: {h} is in the head set twice")
        seen.add((h.layer, h.head, h.kind))
    return HeadSet(tuple(heads), known(models), known(objectives))


def _of_key(key: str, value: Any, who: str) -> list[dict[str, Any]]:
    """Entries of ``layer: [heads]`` or ``"layer-head": score(s)``."""
    if match := re.fullmatch(r"(\d+)-(\d+)", key):
        scores = value if isinstance(value, list) else [value]
        if not scores or not all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in scores):
            raise ConfigError(
                f"{who}: head {short(key)} maps to {short(value)}, expected a score or a list of scores"
            )
        return [{"layer": int(match[1]), "head": int(match[2]), "score": sum(scores) / len(scores)}]
    if not re.fullmatch(r"\d+", key):
        raise ConfigError(f"{who}: {short(key)} is no layer number (nor 'layer-head')")
    if not isinstance(value, list):
        raise ConfigError(f"{who}: layer {key} maps to {short(value)}, expected a list of query heads")
    return [{"layer": int(key), "head": head} for head in value]
