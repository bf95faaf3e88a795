"""Calibration: a model and some data become the options of a patch (a plan, gates, head scores).

>>> found = hap.calibrate(model, "moa", tokenizer=tokenizer, density=0.5)
>>> found.save("plan.json")
>>> hap.patch(model, "moa", **found.options)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibrator import Calibration, Calibrator, Progress


def calibrate(
    model: Any,
    name: str | Calibrator,
    *,
    tokenizer: Any = None,
    data: Any = None,
    out: str | Path | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Calibration:
    """Find the options of a patch for `model`, which is left as it was.

    Args:
        model: a transformers model without patches. name: a calibrator (see `available`), ``name:key=value,…``, or a
            configured object. tokenizer: of the model.
        data: what to calibrate on: a path to JSONL (``prompt`` and ``answer``) or text, a list of such records, or
            None = needles in prose, generated for this tokenizer (see `calibration.data`).
        out: file to write the plan to. work: folder for finished pieces, from which an interrupted calibration goes
            on (default ``<out>.work``); several goals (densities of `moa`) may share one.
        progress: called as (step, done, in all).
        options: fields of the calibrator.

    Raises:
        CalibrationError: unknown name, option or data, or a goal that cannot be met; the nearest one is named.
        PatchError: the model is patched, or has no site for the method.
    """
    from . import calibrator as base

    job = base.build(name, options)
    return base.run(job, model, tokenizer, data=data, out=out, work=work, progress=progress)


def available() -> dict[str, Any]:
    """Name -> entry of every calibrator; imports none."""
    from .calibrator import available as entries

    return entries()
