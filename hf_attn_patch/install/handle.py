"""`PatchHandle`: one `patch()` call on a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import AdapterError, PatchError
from ..model.sites import Site, find_sites
from .found import patches_in, state_on
from .report import PatchReport, build_report
from .state import Entry
from .undo import carry_through, remove, remove_all


class PatchHandle:
    """One `patch()` call on a model: undo it, switch it off for a while, report, save.

    Attributes:
        config: the options. sites: the `Site`s it changed. model: the model it was called with.
    """

    def __init__(self, model: Any, entry: Entry, before: list[Entry] | None = None):
        self.model = model
        self._entry = entry
        self._before = before  # patches that were there when this one was made; None = not known

    @property
    def name(self) -> str:
        return self._entry.config.name

    @property
    def config(self) -> registry.Patch:
        return self._entry.config

    @property
    def sites(self) -> list[Site]:
        paths = set(self._entry.paths)
        return [s for s in find_sites(self._entry.model) if s.path in paths]

    @property
    def is_active(self) -> bool:
        """False after `remove`."""
        state = state_on(self._entry.model)
        return state is not None and self._entry in state.entries

    def remove(self) -> None:
        """Undo: afterwards the model computes, saves and prints as before. A second call does nothing.

        Raises:
            CompositionError: a later patch is still active on the model; undo goes in reverse order.
        """
        remove(self._entry)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this patch inside the ``with`` block (for dense-against-patched comparisons)."""
        self._require_active("disabled()")
        before = self._entry.enabled
        self._entry.enabled = False
        try:
            yield
        finally:
            self._entry.enabled = before

    def report(self) -> PatchReport:
        """What is patched where, which executor ran the last call and why, and how dense each site is."""
        self._require_active("report()")
        state = state_on(self._entry.model)
        return build_report(self, state.cache_note if state else "")

    def save(self, directory: str | Path) -> Path:
        """Write ``attn_patch_config.json`` (and ``attn_patch.safetensors`` if there are tensors) to a folder."""
        from .adapters import save

        self._require_active("save()")
        here = [s.slice for s in self.sites if s.slice is not None and s.path in self._holding]
        if here:
            raise AdapterError(
                f"{self.name}: its tensors are of {here[0].start}-{here[0].stop - 1}, the heads of one rank, "
                "and an adapter is for the whole model. Save it from a model that was loaded without tp_plan"
            )
        return save(self, directory)

    @property
    def _holding(self) -> set[str]:
        """Paths of the sites whose patch holds tensors."""
        return {p.path for p in patches_in(self._entry.model) if p.entry is self._entry and p.state_dict()}

    def _require_active(self, what: str) -> None:
        if not self.is_active:
            raise PatchError(f"{what} on a removed {self.name} patch; call hap.patch again")

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.undo_block()

    def undo_block(self) -> None:
        """The end of a ``with`` block: undo this patch, and before it those that were made inside the block and
        are still there, in reverse order."""
        if self._before is None or not self.is_active:
            self.remove()
        else:
            carry_through(lambda: remove_all(self.model, but=self._before))

    def __repr__(self) -> str:
        if not self.is_active:
            return f"<removed patch {self.name}>"
        layers = sorted({s.layer for s in self.sites})
        state = "" if self._entry.enabled else ", disabled"
        return (
            f"<patch {self.config} on {len(self._entry.paths)} sites of {type(self._entry.model).__name__}, "
            f"layers {_ranges(layers)}, impl={self._entry.impl}{state}>"
        )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
