"""Fill the generated parts of README.md: the method list from the registry, the table from a demo run.

python scripts/readme.py                       # method list only
python scripts/readme.py runs/2026-11-24-demo  # and the measured table
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from hf_attn_patch import registry

README = Path(__file__).parents[1] / "README.md"


def methods() -> str:
    """Markdown table of the registered methods."""
    lines = ["| method | what it does | parts | training-free | paper |", "|---|---|---|---|---|"]
    for name, entry in registry.available().items():
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.arxiv})"
        free = "trainable too" if entry.load().trainable else "yes"
        lines.append(f"| `{name}` | {entry.summary} | {', '.join(entry.parts)} | {free} | {paper} |")
    return "\n".join(lines)


def cell(column: dict[str, Any], row: dict[str, Any]) -> str:
    """One number as text: hits of n, per cent, or a value with its ratio to dense where that says more."""
    key = column["key"]
    value = row["values"].get(key)
    if value is None:
        return ""
    if column["unit"] == "of":
        return f"{round(value * column['of'])}/{column['of']}"
    if column["unit"] == "%":
        return f"{100 * value:.{column['digits']}f} %"
    ratio = row["ratios"].get(key)
    # shares and cosines are read as they are, speeds and sizes against dense
    beside = (
        f" (x{ratio:.2f})"
        if row["method"] and ratio and key != "perplexity" and abs(value / ratio) > 1.5
        else ""
    )
    return f"{value:.{column['digits']}f}{beside}"


def demo(result: dict[str, Any]) -> str:
    """Markdown tables of a demo run."""
    lines = []
    env = result["environment"]
    for model in result["models"]:
        undo = model["undo"]
        for part in model["parts"]:
            columns = part["columns"]
            title = f", {part['title']}" if part.get("title") else ""
            lines += [f"**{model['title']}**{title}, {model['dtype']}", ""]
            lines.append("| | " + " | ".join(c["label"] for c in columns) + " |")
            lines.append("|---|" + "---:|" * len(columns))
            for row in part["rows"]:
                lines.append(f"| {row['label']} | " + " | ".join(cell(c, row) for c in columns) + " |")
            lines.append("")
        lines += [
            f"Undone: the largest difference of {undo['values']:,} {undo['outputs']} before patching and after "
            f"removal is **{undo['max_abs_difference']}** (while patched {undo['while_patched']:.3g}).",
            "",
        ]
    packages = env["packages"]
    lines.append(
        f"Measured by `make demo` in {result['seconds'] / 60:.1f} minutes on {env['cpu_count']} cores "
        f"({env['cpu']}), torch {packages['torch']}, transformers {packages['transformers']}, "
        f"{result['started'][:10]}. Ratios are to dense within the run. SmolLM2's weights are de-quantised from 4 "
        "bits: compare its numbers with each other only."
    )
    return "\n".join(lines)


def replace(text: str, name: str, content: str) -> str:
    """`text` with the lines between the markers of `name` replaced."""
    pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
    found, count = re.subn(pattern, lambda m: m[1] + content + "\n" + m[2], text, flags=re.S)
    if count != 1:
        raise SystemExit(f"README.md has {count} places marked {name}, expected one")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, nargs="?", help="folder of a demo run")
    args = parser.parse_args()
    text = replace(README.read_text(), "methods", methods())
    if args.demo:
        result = json.loads((args.demo / "result.json").read_text())
        text = replace(text, "demo", demo(result))
    README.write_text(text)


if __name__ == "__main__":
    main()
