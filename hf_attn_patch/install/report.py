"""`handle.report()`: what is patched where, which executor ran and why, how much is read and kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..model.sites import Site, left_alone
from .names import EAGER_NAME, NAME
from .stack import SitePatch, stacks_of

if TYPE_CHECKING:
    from .handle import PatchHandle


@dataclass
class SiteReport:
    """One site. `executor` and `reason` are those of the last call ("" before the first one).

    density: share of the visible (query, key) pairs that is read in the last prefill-like call, None if the
    method reads everything. block_density: the same in blocks, which is what an executor can skip.
    """

    path: str
    layer: int
    part: str
    heads: int | None
    kv_heads: int | None
    executor: str
    reason: str
    density: float | None
    block_density: float | None
    q_len: int | None
    kv_len: int | None
    slots: list[tuple[tuple[int, ...], int]] | None = None


@dataclass
class PatchReport:
    """Report of one patch; ``str()`` is a table, ``to_dict()`` is JSON data."""

    method: str
    config: dict[str, Any]
    impl: str
    enabled: bool
    sites: list[SiteReport]
    notes: list[str] = field(default_factory=list)

    @property
    def density(self) -> float | None:
        """Mean density over the sites that restrict what is read."""
        known = [s.density for s in self.sites if s.density is not None]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {**asdict(self), "density": self.density}

    def __str__(self) -> str:
        options = ", ".join(f"{k}={_short(v)}" for k, v in self.config.items())
        head = f"{self.method}({options}) impl={self.impl}" + ("" if self.enabled else " [disabled]")
        lines = [f"{head}: {len(self.sites)} sites"]
        groups: dict[tuple, list[SiteReport]] = {}
        for s in self.sites:
            density = None if s.density is None else round(s.density, 4)
            groups.setdefault((s.part, s.executor, s.reason, density, s.q_len, s.kv_len), []).append(s)
        for (part, executor, reason, density, q_len, kv_len), members in groups.items():
            layers = (
                f"layer {members[0].layer}"
                if len(members) == 1
                else f"{len(members)} layers from {members[0].layer}"
            )
            ran = f"{executor} ({reason})" if executor else "not run yet"
            size = f", L={q_len} S={kv_len}" if q_len is not None else ""
            read = "" if density is None else f", reads {density:.1%}"
            blocks = {s.block_density for s in members if s.density is None and s.block_density is not None}
            read += f", reads {sum(blocks) / len(blocks):.1%} of blocks" if blocks else ""
            lines.append(f"  {part} {layers}: {ran}{size}{read}")
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def densities(last: dict[str, Any]) -> tuple[float | None, float | None]:
    """(element, block) density of the rules of a call, relative to what the mask would let it see."""
    from ..call.rules import intersect
    from ..kernels.layout import layout_for

    rule = intersect(last["rules"])
    if rule is None:
        return None, None
    layout = layout_for(
        rule,
        last["q_len"],
        last["kv_len"],
        q_offset=last["q_offset"],
        causal=last["causal"],
        window=last["window"],
    )
    return layout.density()


def _about(sites: list[Site]) -> list[str]:
    """What a reader of the table should know about its sites."""
    notes = []
    if merged := [s for s in sites if s.merged]:
        notes.append(
            f"{len(merged)} sites attend to their own tokens and an encoder's in one call, first {merged[0].path}"
        )
    if (part := next((s.slice for s in sites if s.slice), None)) is not None:
        notes.append(f"tensor parallel: query heads {part.start}-{part.stop - 1} are computed by this rank")
    return notes


def build_report(handle: PatchHandle, note: str) -> PatchReport:
    """Assemble the report of `handle` from the last call of each of its sites."""
    entry = handle._entry
    rows: list[SiteReport] = []
    known: dict[Any, tuple[float | None, float | None]] = {}
    for site in handle.sites:
        last: dict[str, Any] = {}
        for stack in stacks_of(site.module):  # where PEFT keeps copies, only one of them runs
            patch = stack.patches[entry.key]
            assert isinstance(patch, SitePatch)
            last = patch.last or last
        density: tuple[float | None, float | None] = (None, None)
        if last and last.get("share") is not None:
            density = (None, float(last["share"]))
        elif last and last["rules"] and last["q_len"] > 1:
            key = (tuple(last["rules"]), last["q_len"], last["kv_len"], last["q_offset"], last["causal"])
            if key not in known:
                known[key] = densities(last)
            density = known[key]
        rows.append(
            SiteReport(
                path=site.path,
                layer=site.layer,
                part=site.part,
                heads=site.num_heads,
                kv_heads=site.num_kv_heads,
                executor=last.get("executor", ""),
                reason=last.get("reason", ""),
                density=density[0],
                block_density=density[1],
                q_len=last.get("q_len"),
                kv_len=last.get("kv_len"),
                slots=last.get("slots"),
            )
        )
    notes = [note] if note else []
    chosen = {getattr(site.module.config, "_attn_implementation", None) for site in handle.sites}
    for other in sorted(str(name) for name in chosen - {NAME, EAGER_NAME}):
        notes.append(
            f"the attention implementation was set to {other!r} after patching, so the patch is not reached; remove it "
            "and patch again"
        )
    notes += _about(handle.sites)
    notes += [f"left alone: {one}, which has no dispatch" for one in left_alone(entry.model)]
    return PatchReport(entry.config.name, entry.config.to_dict(), entry.impl, entry.enabled, rows, notes)
