"""What a patch reads, as small plain data for tables and pictures: spans per head, block grids, neighbourhoods.

The rules are those of the last real call of each site, not what a configuration promises.
"""

from __future__ import annotations

from typing import Any

import torch

from ..call.rules import Rule, intersect
from ..install.names import CHILD
from ..install.stack import PatchStack
from ..kernels.layout import layout_for


def rules_of(handle: Any) -> dict[int, tuple[Rule | None, dict[str, Any]]]:
    """Layer -> (rule, facts) of the last call of each site that `handle` patches."""
    found: dict[int, tuple[Rule | None, dict[str, Any]]] = {}
    for site in handle.sites:
        stack = next(s for s in site.module._modules[CHILD].modules() if isinstance(s, PatchStack))
        last: Any = stack.patches[handle._entry.key].last
        if last:
            found[site.layer] = (intersect(last["rules"]), last)
    return found


def language(handle: Any, length: int) -> dict[str, Any]:
    """Density, executor, keys read per layer and KV head by the last query, and the blocks of one layer.

    Call it right after a prefill of `length` tokens.
    """
    rules = rules_of(handle)
    spans: list[list[int]] = []
    kv_heads = handle.sites[0].num_kv_heads or 1
    for layer in sorted(rules):
        rule, _ = rules[layer]
        per_rule = keys_read(rule, length - 1, length) if rule is not None else [length]
        wide = max(kv_heads, len(per_rule))
        spans.append([per_rule[h * len(per_rule) // wide] for h in range(wide)])
    shown = _most_varied(spans)
    rule = rules[sorted(rules)[shown]][0]
    return {
        **_ran(handle),
        "length": length,
        "spans": spans,
        "layers": sorted(rules),
        "shown_layer": sorted(rules)[shown],
        "blocks": _blocks(rule, length),
    }


def keys_read(rule: Rule, query: int, length: int) -> list[int]:
    """Keys that each layout head lets the query at position `query` of a causal sequence read."""
    head = torch.arange(rule.heads).reshape(-1, 1, 1)
    q = torch.tensor([[[query]]])
    k = torch.arange(min(query + 1, length)).reshape(1, 1, -1)
    seen = rule.visible(head, q, k).expand(rule.heads, 1, k.shape[-1])
    return seen.sum((-1, -2)).tolist()


def vision(handle: Any, pixels: Any) -> dict[str, Any]:
    """Density, executor, and the patches that three queries read, over the first image of `pixels` [n, C, H, W]."""
    rules = rules_of(handle)
    rule, last = rules[min(rules)]
    out = {**_ran(handle)}
    grid = getattr(rule, "grid", None)
    if grid is None or len(grid) != 2:
        return out
    rows, columns = grid
    prefix = last["kv_len"] - rows * columns
    where = [(rows // 2, columns // 2), (0, 0), (rows // 2, columns - 2)]
    keys = torch.arange(prefix, last["kv_len"]).reshape(1, 1, -1)
    views = []
    for y, x in where:
        query = torch.tensor([[[prefix + y * columns + x]]])
        seen = rule.visible(torch.zeros(1, 1, 1, dtype=torch.long), query, keys)  # type: ignore[union-attr]
        views.append({"query": [y, x], "seen": seen.reshape(rows, columns).int().tolist()})
    shade = torch.nn.functional.adaptive_avg_pool2d(pixels[:1].float().mean(1, keepdim=True), (rows, columns))
    shade = (shade - shade.min()) / (shade.max() - shade.min()).clamp(min=1e-6)
    return {**out, "grid": [rows, columns], "prefix": prefix, "views": views,
            "image": [[round(v, 3) for v in line] for line in shade[0, 0].tolist()]}  # fmt: skip


def causal_blocks(length: int, block: int = 64) -> list[list[int]]:
    """The block grid of plain causal attention, in the numbers of `BlockLayout.picture`."""
    n = -(-length // block)
    return [[2 if k < q else 1 if k == q else 0 for k in range(n)] for q in range(n)]


def _blocks(rule: Rule | None, length: int) -> list[list[list[int]]]:
    """Per layout head, the grid of 64 x 64 blocks: 0 not read, 1 in part, 2 in full."""
    if rule is None:
        return [causal_blocks(length)]
    picture = layout_for(rule, length, length, causal=True).picture()
    return picture[0].tolist()


def _ran(handle: Any) -> dict[str, Any]:
    report = handle.report()
    first = report.sites[0]
    density = report.density
    return {
        "density": 1.0 if density is None else density,
        "executor": first.executor,
        "reason": first.reason,
    }


def _most_varied(spans: list[list[int]]) -> int:
    """Index of the layer whose heads differ most (the one worth a picture)."""
    return max(range(len(spans)), key=lambda i: (len(set(spans[i])), max(spans[i]) - min(spans[i])))
