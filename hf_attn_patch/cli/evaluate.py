"""``hf-attn-patch eval``: one task, one model, dense and patched; result.json and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import AsJson, Dtype, app, out


@app.command("eval")
def evaluate(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="a task, see `tasks`, or TASK:key=value,key=value")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="hub id, local folder, testbed:NAME or tiny:FAMILY")
    ],
    patch: Annotated[
        list[str] | None,
        typer.Option("--patch", "-p", metavar="NAME:key=value,…", help="patch to measure (repeatable)"),
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:key=value,…",
            help="two-stream decoding to measure: vcd, icd, m3id, sid, pai, agla (repeatable)",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="folder that finetune wrote (patches and LoRA); part of every variant, dense too"),
    ] = None,
    compare: Annotated[
        str, typer.Option(help="what differences are taken from: dense, or the label of a patch")
    ] = "dense",
    lengths: Annotated[
        str | None, typer.Option(help="lengths in tokens, e.g. 1024,2048 (tasks that have lengths)")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="prompts per forward, padded on the left (tasks that have it)")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="only the first N items")] = None,
    seed: Annotated[int, typer.Option(help="seed of items and intervals")] = 0,
    dtype: Dtype = "float32",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, …; under accelerate launch, cuda is one GPU per process")
    ] = "cpu",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="folder for result.json, index.html and items.jsonl (resumes a killed run)"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model dense and patched, on the same items, with 95 % intervals of the differences."""
    from ..eval.harness import resolve, run
    from ..eval.team import is_main
    from .models import load_model
    from .progress import variant_progress

    job, choices = make_task(task, lengths, batch_size), list(patch or [])
    resolve(choices, decoding or [])  # a typo should not cost the loading of a model
    main = is_main()
    if folder is not None:
        _page_can_be_made()  # nor a missing package the run
    loaded, processor = load_model(model, dtype, job.takes)
    if adapter is not None:
        from ..training import load as load_adapters

        loaded = load_adapters(loaded, adapter).eval()
    move(loaded, device)
    with variant_progress(job.name, quiet=as_json or not main) as progress:
        result = run(job, loaded, processor, patches=choices, decodings=decoding or [], compare=compare, limit=limit,
                     seed=seed, out=folder, progress=progress)  # fmt: skip
    if not main:
        return
    if folder is not None:
        from ..eval.result import jsonable
        from ..report import evaluation

        evaluation.write(jsonable(result.to_dict()), folder / "index.html", result.attachments)
    if as_json:
        typer.echo(result.to_json())
        return
    out.print(result)
    if folder is not None:
        out.print(f"[dim]written: {folder / 'result.json'}, {folder / 'index.html'}[/dim]")


def make_task(text: str, lengths: str | None = None, batch_size: int | None = None) -> Any:
    """The task of a text with the options of the command line in it.

    Raises:
        SpecError: the task has no such option (its own are named), or it is given twice.
    """
    from ..eval import registry
    from ..eval.specs import SpecError, option_fields, split_spec, typed_options

    name, raw = split_spec(text)
    cls: Any = registry.get(name)
    fields = option_fields(cls)
    if lengths is not None and not lengths.startswith("["):
        lengths = f"[{lengths}]"
    for key, value in (("lengths", lengths), ("batch_size", batch_size)):
        if value is None:
            continue
        flag = f"--{key.replace('_', '-')}"
        if key not in fields:
            raise SpecError(f"{flag}: {name} has no {key}. Its options: {', '.join(fields) or 'none'}.")
        if key in raw:
            raise SpecError(f"{name}: {key} is given twice ({key}={raw[key]} and {flag} {value}).")
        raw[key] = str(value)
    return cls(**typed_options(name, cls, raw, {}))


def move(model: Any, device: str) -> None:
    """Put `model` on `device`; ``cuda`` is the GPU of this process where several were launched.

    Raises:
        ValueError: there is no such device.
    """
    import os

    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device}: {first}. Leave it out to stay on the CPU.") from error


def _page_can_be_made() -> None:
    from ..report.page import templates

    templates()
