"""``hf-attn-patch cost``: FLOPs, bytes, passes and roofline time of attention, dense and patched."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .app import AsJson, Model, app, image_size, out, plain_table, print_json

if TYPE_CHECKING:
    from ..cost import Cost, Gpu

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@app.command()
def cost(
    model: Model,
    patch: Annotated[
        list[str] | None,
        typer.Option("--patch", "-p", metavar="NAME:key=value,…", help="patch to estimate (repeatable)"),
    ] = None,
    lengths: Annotated[str, typer.Option(help="tokens of a text, e.g. 4096,16384")] = "4096",
    sizes: Annotated[
        str | None,
        typer.Option("--image-size", help="pixels, e.g. 224,518x896; default: the configured size"),
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="one token behind a cache of that length")] = False,
    gpu: Annotated[str, typer.Option(help="GPUs, e.g. A100,H100,H200,MI300X")] = "A100,H100,H200,MI300X",
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32 (matrix products in TF32)")
    ] = "bfloat16",
    part: Annotated[
        str | None, typer.Option(help="text, vision, …; default: where the first patch belongs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate attention before it runs: pairs, FLOPs, bytes, passes over the keys, and time at a GPU's roofline."""
    from ..cost import Variant, estimate, gpus
    from ..errors import ConfigError
    from ..eval.specs import parse_patch_spec
    from .models import load_model

    cards = gpus(name.strip() for name in gpu.split(","))
    specs = [parse_patch_spec(text) for text in patch or []]
    variants = [Variant(s.name, s.options) for s in specs]
    numbers = [piece.strip() for piece in lengths.split(",")]
    if not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise ConfigError(f"cost: --lengths {lengths!r} are no token counts; write 4096,16384")
    loaded, _ = load_model(model)
    pictures = [image_size(text) for text in sizes.split(",")] if sizes else [None]
    first = estimate(
        loaded, variants, length=int(numbers[0]), image=pictures[0], decode=decode, dtype=dtype, part=part
    )
    vision = first[0].part == "vision"
    runs = [first]
    for number, image in (
        [(numbers[0], i) for i in pictures[1:]] if vision else [(n, None) for n in numbers[1:]]
    ):
        runs.append(
            estimate(loaded, variants, length=int(number), image=image, decode=decode, dtype=dtype, part=part)
        )
    if as_json:
        print_json(
            {
                "model": model,
                "gpus": [asdict(g) for g in cards],
                "runs": [[_row(c, cards) for c in r] for r in runs],
            }
        )
        return
    for run in runs:
        _print(model, run, cards)


def _row(cost: Cost, cards: list[Gpu]) -> dict[str, Any]:
    times = {g.name: dict(zip(("seconds", "bound"), cost.seconds(g))) for g in cards}
    return {**asdict(cost), "intensity": cost.intensity, "roofline": times}


def _print(model: str, run: list[Cost], cards: list[Gpu]) -> None:
    dense = run[1]
    size = f"{dense.queries} x {dense.keys} tokens, batch 1, {dense.dtype}"
    title = f"{model}: attention of the {dense.part} part, {size}"
    columns = ["variant", "pairs read", "in tiles", "FLOP", "own", "exp", "bytes", "passes", "FLOP/B"]
    table = plain_table(*columns, *(g.name for g in cards), title=escape(title))
    for cost in run:
        times = []
        for g in cards:
            seconds, bound = cost.seconds(g)
            faster = dense.seconds(g)[0] / seconds
            times.append(f"{seconds * 1e3:.3g} ms {bound}" + ("" if cost is dense else f"\nx{faster:.2f}"))
        cells = [
            cost.label, f"{cost.read / cost.dense:.1%}", f"{cost.pairs / cost.dense:.1%}", short(cost.flops),
            short(cost.own_flops) if cost.own_flops else "-", short(cost.exps), short(cost.bytes), str(cost.passes),
            f"{cost.intensity:.3g}", *times,
        ]  # fmt: skip
        table.add_row(*map(escape, cells))
    out.print(table)
    for cost in run:
        for note in cost.notes:
            out.print(f"[dim]{escape(cost.label)}: {escape(note)}[/]")
    out.print(
        "[dim]in tiles: pairs of the 64-token tiles that are visited, against the pairs of dense attention. Times are "
        "lower bounds at peak figures, nothing was run; x: against dense, 1-pass[/]\n"
    )


def short(value: float) -> str:
    """1.23e9 -> 1.23 G."""
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
