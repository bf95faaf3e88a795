"""``hf-attn-patch calibrate NAME --model M -o plan.json``: a model and some data become a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .app import AsJson, Dtype, app, out, plain_table, print_json


@app.command()
def calibrate(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="a calibrator, or NAME:key=value,…; none = list all"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="hub id, local folder, testbed:NAME or tiny:FAMILY")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="JSONL (prompt, answer) or text; default: needles in prose"),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--out", "-o", help="plan file; an interrupted run goes on from FILE.work")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="folder of finished pieces, e.g. to share between densities")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="option of the calibrator (repeatable)"),
    ] = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Find the plan of a method for a model: spans per head, gates, patterns, head scores."""
    from ..calibration import calibrator as base
    from ..eval.specs import format_spec
    from .models import load_model
    from .progress import Steps

    if name is None:
        list_calibrators(as_json)
        return
    if model is None:
        import inspect

        out.print(escape(inspect.getdoc(base.get(name.partition(":")[0])) or ""), soft_wrap=True)
        raise base.CalibrationError(f"{name}: which model? Give --model (hub id, folder, testbed:NAME)")
    text = ",".join(option or [])
    job = base.build(f"{name}{',' if ':' in name else ':'}{text}" if text else name, {})
    if data is not None and not data.is_file():
        raise base.CalibrationError(f"--data {data}: no such file")
    target = file or Path(f"{job.name}-plan.json")
    loaded, processor = load_model(model, dtype, job.takes)
    with Steps(Console(stderr=True, quiet=as_json)) as steps:
        found = base.run(job, loaded, processor, data=data, out=target, work=work, progress=steps.step)
    if as_json:
        print_json({"name": found.name, "patch": found.patch, "seconds": found.seconds, "report": found.report,
                    "file": str(target)})  # fmt: skip
        return
    out.print(escape(str(found)), soft_wrap=True)
    out.print(f"\n[dim]written: {target}, its report and {len(found.pictures)} pictures beside it[/dim]")
    key = next((k for k, v in found.options.items() if v is found.plan), None)
    if key is not None:
        rest = {k: v for k, v in found.options.items() if k != key}
        spec = format_spec(found.patch, {key: str(target), **rest})
        out.print(
            f"[dim]hf-attn-patch eval {job.task} --model {escape(model)} --patch {escape(spec)}[/dim]",
            soft_wrap=True,
        )


def list_calibrators(as_json: bool) -> None:
    """Names, what they find, and their options."""
    import dataclasses

    from ..calibration import calibrator as base

    rows: list[dict[str, Any]] = []
    for entry in base.available().values():
        try:
            fields: Any = dataclasses.fields(entry.load())  # type: ignore[arg-type]
        except base.CalibrationError as problem:  # somebody else's
            rows.append({"name": entry.name, "summary": f"cannot be used: {problem}", "options": {}})
            continue
        options = {
            f.name: f.default if f.default is not dataclasses.MISSING else None for f in fields if f.init
        }
        rows.append(
            {"name": entry.name, "summary": entry.summary or entry.load().summary, "options": options}
        )
    if as_json:
        print_json(rows)
        return
    table = plain_table("calibrator", "what it finds", "options")
    for r in rows:
        shown = ", ".join(f"{k}={json.dumps(v)}" for k, v in r["options"].items())
        table.add_row(f"[bold cyan]{r['name']}[/]", escape(r["summary"]), escape(shown))
    out.print(table)
