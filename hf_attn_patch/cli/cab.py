"""``hf-attn-patch cab``: the four attention patterns. It takes no model: the models are made for the question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import AsJson, app, out


@app.command()
def cab(
    patch: Annotated[
        list[str],
        typer.Option("--patch", "-p", metavar="NAME:key=value,…", help="patch to look at (repeatable)"),
    ],
    patterns: Annotated[
        str, typer.Option(help="NS, CS (noncausal, causal self), NC, CC (cross)")
    ] = "NS,CS,NC,CC",
    sections: Annotated[
        str, typer.Option("--only", help="patterns (leak tests), tasks (training and index), efficiency")
    ] = "patterns,tasks,efficiency",
    steps: Annotated[int, typer.Option(help="training steps per task")] = 400,
    length: Annotated[int, typer.Option(help="tokens of a training row; a window should be shorter")] = 64,
    vocabulary: Annotated[int, typer.Option(help="token ids of the tasks, more than half the length")] = 64,
    width: Annotated[int, typer.Option(help="width of the models that are trained")] = 64,
    layers: Annotated[int, typer.Option(help="layers of the models that are trained")] = 2,
    seed: Annotated[int, typer.Option(help="of weights and rows")] = 0,
    lengths: Annotated[str, typer.Option(help="lengths whose cost is measured")] = "256,512,1024,2048",
    repeats: Annotated[int, typer.Option(help="measurements per length")] = 5,
    baseline: Annotated[str, typer.Option(help="what costs are compared with: eager or sdpa")] = "eager",
    device: Annotated[str, typer.Option(help="where costs are measured: cpu, cuda")] = "cpu",
    reference: Annotated[
        Path | None, typer.Option(help="result.json of an earlier run: its set for the index")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="folder for result.json")] = None,
    as_json: AsJson = False,
) -> None:
    """Which attention patterns a patch supports, what can be learned with it, and from which length on it pays."""
    from ..eval import cab as package
    from .progress import variant_progress

    names = [[piece.strip() for piece in text.split(",") if piece.strip()] for text in (patterns, sections)]
    shape = package.Shape(width=width, layers=layers, vocabulary=vocabulary, length=length)
    setting = package.Setting(lengths=_numbers(lengths), repeats=repeats, baseline=baseline, device=device)
    with variant_progress("cab", quiet=as_json) as progress:
        result = package.run(
            patch, patterns=names[0], sections=names[1], shape=shape, recipe=package.Recipe(steps=steps, seed=seed),
            setting=setting, reference=reference, out=folder, progress=progress,
        )  # fmt: skip
    if as_json:
        typer.echo(result.to_json())
        return
    out.print(result)
    if folder is not None:
        out.print(f"[dim]written: {folder / 'result.json'}[/dim]")


def _numbers(text: str) -> tuple[int, ...]:
    """``256,512`` as numbers."""
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdigit() for piece in pieces):
        raise typer.BadParameter(f"{text!r} are no lengths; write 256,512,1024")
    return tuple(map(int, pieces))
