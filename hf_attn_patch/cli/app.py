"""The commands. Each is a few lines: parse, call the library, print."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    name="hf-attn-patch",
    help="Make a loaded Hugging Face model attend differently: patch, measure, undo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# piped output has no width of its own; 80 columns would break paths in the middle
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

REQUIRED = "required"  # shown for an option without a default
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="hub id, local folder, testbed:NAME or tiny:FAMILY")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="option of the method (repeatable)"),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]


def image_size(text: str | None) -> tuple[int, int] | None:
    """``224`` or ``224x448`` (height x width) as two numbers."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(s.isdigit() and int(s) > 0 for s in sides):
        raise typer.BadParameter(f"{text!r} is no image size; write 224 or 224x448 (height x width)")
    return int(sides[0]), int(sides[-1])


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="show tracebacks (works anywhere on the line)")
    ] = False,
) -> None:
    """Make a loaded Hugging Face model attend differently: patch, measure, undo."""


def print_json(value: Any) -> None:
    from ..eval.result import jsonable

    typer.echo(json.dumps(jsonable(value), indent=1, ensure_ascii=False))


def plain_table(*columns: str, title: str | None = None) -> Table:
    """The look of all tables here."""
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


@app.command("list")
def list_patches(as_json: AsJson = False) -> None:
    """List the methods."""
    from ..registry import available, problems

    entries = available()
    if as_json:
        keys = ("name", "summary", "paper", "arxiv", "parts", "origin", "problem", "shadowed")
        print_json([{k: getattr(e, k) for k in keys} for e in entries.values()])
        return
    table = plain_table("method", "what it does", "parts", "arXiv")
    for e in entries.values():
        said = "cannot be used, see below" if e.problem else escape(e.summary)
        table.add_row(f"[bold cyan]{escape(e.name)}[/]", said, ", ".join(e.parts), e.arxiv)
    out.print(table)
    for problem in problems():
        out.print(f"[yellow]plug-in:[/] {escape(problem)}", soft_wrap=True)
    out.print("\n[dim]hf-attn-patch info NAME shows formula, options and source of one method[/dim]")


@app.command()
def info(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a method, see list")], as_json: AsJson = False
) -> None:
    """Show one method: what it computes, its options with defaults, its paper."""
    import inspect

    from .. import registry

    cls = registry.get(name)
    entry = registry.available()[name]
    rows = registry.options_table(cls)
    if as_json:
        about = {k: getattr(entry, k) for k in ("name", "summary", "paper", "arxiv", "parts", "origin")}
        print_json({**about, "doc": inspect.getdoc(cls), "options": rows})
        return
    out.print(f"[bold cyan]{name}[/]  [dim]{escape(entry.origin)}[/dim]\n")
    out.print(escape(inspect.getdoc(cls) or "no description"), soft_wrap=True)
    out.print()
    table = plain_table("option", "type", "default", "help")
    for row in rows:
        table.add_row(
            f"[bold]{row['name']}[/]", escape(row["type"]), escape(row["default"]), escape(row["help"])
        )
    out.print(table if rows else "no options")
    out.print(f"\nparts  {', '.join(entry.parts)}")
    if entry.paper:
        out.print(
            f"paper  {escape(entry.paper)}"
            + (f"  https://arxiv.org/abs/{entry.arxiv}" if entry.arxiv else "")
        )
    needed = [f" -o {r['name']}=…" for r in rows if r["default"] == "required"]
    shown = [f" -o {r['name']}={r['default']}" for r in rows if r["default"] not in ("required", "null")]
    out.print(f"\n[dim]hf-attn-patch plan MODEL {name}{''.join([*needed, *shown][:2])}[/dim]")


@app.command()
def sites(model: Model, as_json: AsJson = False) -> None:
    """List the attention modules a patch can reach in a model."""
    from ..model.sites import attention_classes, find_sites
    from .models import load_model

    loaded, _ = load_model(model)
    found = find_sites(loaded)
    keys = (
        "path",
        "part",
        "layer",
        "causal",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "window",
        "class_name",
    )
    rows = [{k: getattr(s, k) for k in keys} for s in found]
    if as_json:
        print_json({"model": model, "class": type(loaded).__name__, "sites": rows})
        return
    if not found:
        classes = ", ".join(attention_classes(loaded)) or "none found"
        why = "do not use the attention interface of transformers, so nothing can be hooked"
        out.print(f"{type(loaded).__name__}: no site. Its attention modules ({escape(classes)}) {why}.")
        return
    table = plain_table("layer", "part", "path", "heads", "KV", "dim", "causal", "window", "class",
                        title=f"{type(loaded).__name__}: {len(found)} sites")  # fmt: skip
    for r in rows:
        cells = [
            r["layer"],
            r["part"],
            r["path"],
            r["num_heads"],
            r["num_kv_heads"],
            r["head_dim"],
            r["causal"],
        ]
        show = ["?" if c is None else str(c) for c in cells] + [
            "-" if r["window"] is None else str(r["window"])
        ]
        table.add_row(*map(escape, show), r["class_name"])
    out.print(table)


@app.command()
def plan(
    model: Model,
    name: Annotated[str, typer.Argument(metavar="NAME", help="a method, or NAME:key=value,key=value")],
    option: Options = None,
    layers: Annotated[str | None, typer.Option(help='layers, e.g. "0-3,-2:"')] = None,
    heads: Annotated[str | None, typer.Option(help='query heads, e.g. "0,4-8"')] = None,
    part: Annotated[str | None, typer.Option(help="text, vision, audio, encoder, decoder or cross")] = None,
    impl: Annotated[str, typer.Option(help="auto, reference, torch or triton")] = "auto",
    length: Annotated[int, typer.Option(help="tokens for which the tiles it visits are counted")] = 4096,
    image: Annotated[str | None, typer.Option("--image-size", help="224 or 224x448 pixels")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a patch would do to a model, and what it could save; changes nothing."""
    from .. import api, cost
    from ..errors import PatchError
    from ..eval.specs import SpecError, parse_patch_spec
    from .models import load_model

    text = ",".join(option or [])
    spec = parse_patch_spec(f"{name}{',' if ':' in name else ':'}{text}" if text else name)
    asked = {"layers": layers, "heads": heads, "part": part, "impl": impl if impl != "auto" else None}
    scope = {k: v for k, v in asked.items() if v is not None}
    twice = sorted(set(scope) & set(spec.options))
    if twice:
        raise SpecError(
            f"{spec.name}: {', '.join(twice)} is given twice. Give it as an option of the command only."
        )
    loaded, _ = load_model(model)
    made = api.plan(loaded, spec.name, **{**spec.options, **scope})
    try:
        saved: Any = cost.simulate(loaded, made, length, image_size(image))
    except PatchError as error:  # a part without a length or a grid: the plan itself stands
        saved = None
        note = f"what it saves is not known: {error}"
    if as_json:
        print_json({**made.to_dict(), "simulation": None if saved is None else saved.to_dict()})
    else:
        out.print(escape(f"{made}\n{note if saved is None else saved}"), soft_wrap=True)


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the evaluation tasks and their options."""
    from ..eval import registry
    from ..eval.specs import option_fields

    rows: list[dict[str, Any]] = []
    for entry in registry.available().values():
        summary, options = entry.summary, {}
        try:
            fields = option_fields(entry.load())
            options = {
                k: REQUIRED if f.default is dataclasses.MISSING else f.default for k, f in fields.items()
            }
        except registry.TaskError as problem:  # somebody else's
            summary = f"cannot be used: {problem}"
        rows.append({"name": entry.name, "summary": summary, "origin": entry.origin, "options": options})
    if as_json:
        print_json(rows)
        return
    table = plain_table("task", "what it measures", "options")
    for r in rows:
        shown = ", ".join(f"{k}={v if v == REQUIRED else json.dumps(v)}" for k, v in r["options"].items())
        table.add_row(f"[bold cyan]{r['name']}[/]", escape(r["summary"]), escape(shown))
    out.print(table)


@app.command()
def testbed(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="fetch this item; none = list all")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the small real models, or fetch one into the cache folder."""
    from .. import testbed as bed

    if name is not None:
        folder = bed.path(name)
        facts = {**bed.describe(name), "folder": str(folder)}
        print_json(facts) if as_json else out.print(f"{escape(facts['summary'])}\n{folder}")
        return
    rows = [bed.describe(n) for n in bed.names()]
    if as_json:
        print_json(rows)
        return
    table = plain_table("name", "state", "model", "licence", "from")
    for r in rows:
        state = (
            "[green]here[/]"
            if r["cached"]
            else f"{r['megabytes']} MB to fetch"
            if r["megabytes"]
            else "to be built"
        )
        table.add_row(
            f"[bold cyan]{r['name']}[/]", state, escape(r["summary"]), r["licence"], escape(r["source"])
        )
    out.print(table)
    out.print("\n[dim]use them as testbed:NAME wherever a MODEL is asked for[/dim]")


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print versions, machine and settings, for bug reports."""
    from ..env import environment, lines

    facts = environment()
    if as_json:
        print_json(facts)
        return
    table = plain_table("what", "value")
    for what, value in lines(facts):
        table.add_row(what, escape(value))
    out.print(table)


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option("--out", help="default: runs/<date>-demo")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="a look in a minute; too few items for numbers")
    ] = False,
    only: Annotated[str | None, typer.Option(help="language or vision")] = None,
    seed: Annotated[int, typer.Option(help="seed of items and intervals")] = 0,
) -> None:
    """Patch a real language model and a real vision transformer, compare with dense, undo, and write a page."""
    from .demo import run_demo

    raise typer.Exit(run_demo(folder, quick=quick, only=only, seed=seed))


from . import cab as _cab  # noqa: E402, F401
from . import calibrate as _calibrate  # noqa: E402, F401  registers its command
from . import cost as _cost  # noqa: E402, F401
from . import evaluate as _evaluate  # noqa: E402, F401
from . import finetune as _finetune  # noqa: E402, F401
from . import inspect as _inspect  # noqa: E402, F401
