"""``hf-attn-patch demo``: two real models patched, compared with themselves, undone; tables, JSON and a page."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .progress import Steps

SCHEMA_VERSION = 1
LANGUAGE, VISION = "smollm2", "dinov2s"
CPU_DTYPE = "bfloat16 took two to three times as long on the CPU this was written on (AVX-512, no AMX)."
ONLY = ("language", "vision")


def run_demo(folder: Path | None, *, quick: bool = False, only: str | None = None, seed: int = 0) -> int:
    """Run the demo; returns the exit code (1 if a model could not be restored exactly).

    Raises:
        ValueError: `only` is not a half of the demo. TestbedError: a model cannot be had.
    """
    if only is not None and only not in ONLY:
        raise ValueError(f"only={only!r} is not one of {', '.join(ONLY)}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    started, clock = datetime.datetime.now().astimezone(), time.perf_counter()
    console.print("[bold]hf_attn_patch[/] demo: the same live model, dense beside patched\n")

    import torch

    from .. import testbed
    from ..eval.demo.common import Size

    size = Size.quick() if quick else Size()
    target = folder or Path("runs") / f"{started:%Y-%m-%d}-demo"
    for name, half in ((LANGUAGE, "language"), (VISION, "vision")):
        if only in (None, half) and not testbed.is_cached(name):
            testbed.path(name)  # before the bars below: fetching shows progress of its own
    models, threads = [], torch.get_num_threads()
    with warnings.catch_warnings():
        # deprecations inside torch and transformers: nothing that somebody who watches the demo could change
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with Steps(console) as steps:
                if only != "vision":
                    models.append(language(size, seed, steps, target))
                torch.set_num_threads(threads)
                if only != "language":
                    models.append(vision(size, seed, steps))
        finally:
            torch.set_num_threads(threads)
    for model in models:
        print_model(console, model)

    record = make_record(models, started, time.perf_counter() - clock, seed, quick, target)
    write_record(record, target)
    console.print(
        f"\n[dim]{record['seconds']:.0f} seconds. Written:[/] {target / 'index.html'}  {target / 'result.json'}"
    )
    return 0 if all(m["undo"]["undone"] for m in models) else 1


def language(size: Any, seed: int, steps: Steps, folder: Path) -> dict[str, Any]:
    """The language-model half."""
    import torch

    from .. import testbed
    from ..eval import measurements
    from ..eval.demo import language as half
    from ..eval.demo.undo import UndoProof

    steps.step(f"{LANGUAGE}: load", 0, 1)
    model, tokenizer = testbed.load(LANGUAGE)
    steps.step(f"{LANGUAGE}: load", 1, 1)
    # before the proof: making a plan looks at attention probabilities, for which transformers installs hooks to stay
    steps.step(f"{LANGUAGE}: per-head plan", 0, 1)
    patches = half.choices(model, tokenizer, folder)
    steps.step(f"{LANGUAGE}: per-head plan", 1, 1)
    ids = measurements.prose_ids(tokenizer, 1024)
    proof = UndoProof(model, {"input_ids": ids[:, :512]})
    torch.set_num_threads(measurements.fastest_threads(lambda: measurements.prefill(model, ids[:, :512])))
    full, size = size, size.fitting_tokens(1024 / measurements.prefill(model, ids)[0], len(patches) + 1)
    part = half.measure(model, tokenizer, patches, size, seed, steps.under(LANGUAGE))
    return _model(
        LANGUAGE, "SmolLM2-135M-Instruct", [part], proof.check(patches["streaming, no sinks"]), size, full
    )


def vision(size: Any, seed: int, steps: Steps) -> dict[str, Any]:
    """The vision half."""
    import torch

    from .. import testbed
    from ..eval import measurements
    from ..eval.demo import vision as half
    from ..eval.demo.undo import UndoProof

    steps.step(f"{VISION}: load", 0, 1)
    model, preprocess = testbed.load(VISION)
    steps.step(f"{VISION}: load", 1, 1)
    patches = half.choices()
    pixels = half.pixels_of(model, preprocess, 8, seed)
    proof = UndoProof(model, {"pixel_values": pixels[:4]})
    torch.set_num_threads(measurements.fastest_threads(lambda: measurements.time_images(model, pixels, 8)))
    full, size = size, size.fitting_images(8 / measurements.time_images(model, pixels, 8), len(patches) + 1)
    parts = half.measure(model, preprocess, patches, size, seed, steps.under(VISION))
    return _model(VISION, "DINOv2-S/14", parts, proof.check(patches["neighborhood 7 × 7"]), size, full)


def _model(
    name: str, title: str, parts: list[dict[str, Any]], undo: dict[str, Any], size: Any, full: Any
) -> dict[str, Any]:
    import torch

    from .. import testbed

    about = parts[0]["model"]
    threads = torch.get_num_threads()
    if threads == 1 and (os.cpu_count() or 1) > 1:
        parts[0]["notes"].append("Run with one thread, which was faster: the other cores are in use.")
    if size != full:
        wanted, used = asdict(full), asdict(size)
        less = ", ".join(f"{k} {used[k]} instead of {wanted[k]}" for k in used if used[k] != wanted[k])
        parts[0]["notes"].append(
            f"This machine is slow or busy, so less was measured to stay in time: {less}."
        )
    return {
        "key": name,
        "title": title,
        "summary": testbed.describe(name)["summary"],
        **about,
        "dtype_reason": CPU_DTYPE if about["device"] == "cpu" else "as loaded.",
        "size": asdict(size),
        "threads": threads,
        "parts": parts,
        "undo": undo,
    }


def print_model(console: Console, model: Mapping[str, Any]) -> None:
    """One table per part, and the undo proof."""
    console.print(f"\n[bold]{model['title']}[/]  [dim]{escape(model['summary'])}, {model['dtype']}[/dim]")
    for part in model["parts"]:
        console.print(part_table(part, narrow=console.width < 112))
        for note in part["notes"]:
            console.print(f"[dim]{escape(note)}[/dim]")
    undo = model["undo"]
    mark = "[green]undone[/]" if undo["undone"] else "[bold red]NOT undone[/]"
    console.print(
        f"{mark}: largest difference of {undo['values']} {undo['outputs']}, before patching and after removal: "
        f"[bold]{undo['max_abs_difference']}[/] "
        f"[dim](while patched {undo['while_patched']:.3g}; hooks left {undo['hooks_left']})[/dim]"
    )


def part_table(part: Mapping[str, Any], narrow: bool) -> Table:
    """A table of the record for the terminal; a narrow one leaves out what `passkey, all` sums up."""
    from ..report.page import format_ratio, format_value, verdict

    table = Table(
        title=part["title"] or None,
        title_justify="left",
        title_style="",
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("", no_wrap=not narrow)
    columns = [c for c in part["columns"] if c.get("of") is None or not narrow]
    for column in columns:
        arrow = {"lower": " ↓", "higher": " ↑"}.get(column["better"], "")
        table.add_column("\n".join(column["label"].rsplit(" ", 1)) + arrow, justify="right")
    for row in part["rows"]:
        cells = [row["label"]]
        for column in columns:
            if column["key"] not in row["values"]:
                cells.append("")
                continue
            text = format_value(row["values"][column["key"]], column)
            note = "" if row["method"] is None else format_ratio(row, column, {})
            style = {"good": "green", "bad": "red"}.get(verdict(row, column, part["intervals"]), "dim")
            cells.append(f"{text}\n[{style}]{escape(note)}[/]" if note else text)
        table.add_row(*cells)
    return table


def make_record(
    models: list[dict[str, Any]],
    started: datetime.datetime,
    seconds: float,
    seed: int,
    quick: bool,
    folder: Path,
) -> dict[str, Any]:
    """Everything the demo found, as plain data."""
    from ..env import command_line, environment

    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "demo",
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "command": command_line(),
        "seed": seed,
        "quick": quick,
        "models": models,
        "tiles": tiles(models),
        "reproduce": reproduce(models, seed, folder),
        "environment": environment(),
    }


def tiles(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The few numbers that say it all, for the top of the page."""
    found: list[tuple[str, str]] = []
    for model in models:
        rows = {row["label"]: row for row in model["parts"][0]["rows"]}
        dense = rows["dense"]["values"]
        if model["key"] == LANGUAGE:
            sinks, none = rows["streaming, 4 sinks"]["values"], rows["streaming, no sinks"]["values"]
            moa = rows["moa, per-head plan"]
            chain = " → ".join(f"{v['perplexity']:.1f}" for v in (dense, none, sinks))
            found += [
                (chain, "perplexity: dense, a window of 256 keys, the same window with 4 sink tokens"),
                (f"{sinks['kv_bytes']:.0f} of {dense['kv_bytes']:.0f} MiB",
                 "of KV cache really held after the prefill, streaming with sinks"),
                (f"{moa['values']['passkey']:.0%} at {moa['ratios']['kv_bytes']:.0%}",
                 f"moa: hidden numbers found, at this share of the KV cache (dense finds {dense['passkey']:.0%})"),
            ]  # fmt: skip
        else:
            label, row = list(rows.items())[-1]
            text = f"cosine to the dense CLS features, at this share of pairs read: {model['title']}, {label}"
            found.append((f"{row['values']['cls_cosine']:.3f} at {row['values']['density']:.0%}", text))
    worst = max((m["undo"]["max_abs_difference"] for m in models), default=0.0)
    found.append((f"{worst:g}", "largest difference of any output, before patching and after removal"))
    return [{"value": value, "text": text} for value, text in found]


def reproduce(models: Sequence[Mapping[str, Any]], seed: int, folder: Path) -> list[str]:
    """Commands that repeat the whole, and each task alone."""
    from ..eval.specs import format_spec

    commands = [f"hf-attn-patch demo --seed {seed} --out {folder}"]
    for model in models:
        for part in model["parts"]:
            for result in part["evals"]:
                config = {k: v for k, v in result["task"]["config"].items() if v is not None}
                patches = [v["patch"] for v in result["variants"] if v["patch"]]
                flags = "".join(f" \\\n    --patch '{format_spec(p['name'], p['options'])}'" for p in patches)
                task = format_spec(result["task"]["name"], config)
                commands += [
                    "",
                    f"hf-attn-patch eval '{task}' \\\n    --model testbed:{model['key']}{flags} --seed {seed}",
                ]
    return commands


def write_record(record: Mapping[str, Any], folder: Path) -> None:
    """``result.json`` and ``index.html`` into `folder`."""
    from ..eval.result import jsonable
    from ..report import write

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(jsonable(record), indent=1, allow_nan=False, ensure_ascii=False)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    write(record, folder / "index.html")
