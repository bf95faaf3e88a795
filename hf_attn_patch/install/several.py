"""One handle for a wrapper that holds several independent models (a policy beside its reference): all are patched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..model.sites import Site
from .handle import PatchHandle
from .report import PatchReport


class SeveralHandle(PatchHandle):
    """As `PatchHandle`, for the same patch on every model of a wrapper.

    Attributes:
        handles: one per model, in module order.
    """

    def __init__(self, model: Any, handles: list[PatchHandle]):
        super().__init__(model, handles[0]._entry)
        self.handles = handles

    @property
    def sites(self) -> list[Site]:
        return [site for handle in self.handles for site in handle.sites]

    @property
    def is_active(self) -> bool:
        return any(handle.is_active for handle in self.handles)

    def remove(self) -> None:
        for handle in reversed(self.handles):
            handle.remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in self.handles:
                stack.enter_context(handle.disabled())
            yield

    def report(self) -> PatchReport:
        reports = [handle.report() for handle in self.handles]
        notes = list(dict.fromkeys(note for report in reports for note in report.notes))
        return replace(reports[0], sites=[site for report in reports for site in report.sites], notes=notes)

    def save(self, directory: str | Path) -> Path:
        raise AdapterError(
            f"this handle is on {len(self.handles)} models; an adapter belongs to one. Save handle.handles[0] "
            "and the others, each to a folder of its own"
        )

    def __repr__(self) -> str:
        return f"<{len(self.handles)} models: {', '.join(map(repr, self.handles))}>"
