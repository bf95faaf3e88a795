"""What torch.compile and torch.export do with every method, tried on tiny models, in docs/compile.md.

    python scripts/compile_table.py                     # all methods, writes the table of docs/compile.md (~5 minutes)
    python scripts/compile_table.py streaming moh       # some methods, printed, no file written

A method is `fullgraph` if ``torch.compile(fullgraph=True)`` of a prefill without cache gives what the uncompiled model
gives, `breaks` if only ``torch.compile`` with graph breaks does. Exit status 1 if any method is wrong.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.patches import BUILTIN
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "compile.md"
BEGIN, END = "<!-- table: python scripts/compile_table.py -->", "<!-- end of table -->"
WRONG = 1e-4  # float32 activations of size about 1; other orders of summation stay below 1e-5


def family_of(method: str) -> str:
    """The tiny model that a method is tried on."""
    where, _, _, _, parts = BUILTIN[method]
    if "grounding" in where:
        return "llava"
    return "llama" if "text" in parts else "vit" if method == "tcpa" else "dinov2"


def inputs_of(model: Any, family: str, padded: bool, length: int = 40) -> dict[str, Any]:
    """Inputs of a prefill without cache, the second row padded on the left."""
    if family in ("dinov2", "vit"):
        return dict(tiny_inputs(model, batch=2))
    inputs = {
        **tiny_inputs(model, batch=2, length=length, left_pad=[0, 5] if padded else 0),
        "use_cache": False,
    }
    if not padded:
        inputs.pop("attention_mask", None)
    return inputs


def difference(got: torch.Tensor, wanted: torch.Tensor, mask: Any) -> float:
    """Largest difference on real tokens."""
    found = got - wanted
    return float((found if mask is None or found.ndim < 3 else found[mask.bool()]).abs().max())


def compiled(method: str, padded: bool = True, backend: str = "eager") -> str:
    """`fullgraph`, `breaks`, or what went wrong, of one method."""
    family = family_of(method)
    model = tiny_model(family).eval()
    inputs = inputs_of(model, family, padded)
    with torch.no_grad(), hap.patched(model, method, **(registry.get(method).examples(model) or [{}])[0]):
        try:
            wanted = model(**inputs)[0]
        except Exception as error:
            return f"not run: {error}".splitlines()[0]
        said = ""
        for full in (True, False):
            torch._dynamo.reset()
            try:
                got = torch.compile(model, fullgraph=full, backend=backend)(**inputs)[0]
            except hap.PatchError as error:
                return f"refused: {error}"
            except Exception as error:
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            off = difference(got, wanted, inputs.get("attention_mask"))
            return ("fullgraph" if full else "breaks") if off < WRONG else f"WRONG by {off:.1e}"
        return f"WRONG: {said}"


def exported(method: str, padded: bool = True) -> str:
    """`right`, `refused`, or what went wrong, of ``torch.export.export(model, (), inputs, strict=False)``."""
    family = family_of(method)
    model = tiny_model(family).eval()
    inputs = inputs_of(model, family, padded)
    with torch.no_grad(), hap.patched(model, method, **(registry.get(method).examples(model) or [{}])[0]):
        try:
            wanted = model(**inputs)[0]
        except Exception as error:
            return f"not run: {error}".splitlines()[0]
        try:
            got = torch.export.export(model, (), inputs, strict=False).module()(**inputs)[0]
        except hap.PatchError:
            return "refused"
        except Exception as error:
            return f"WRONG: {type(error).__name__}: {error}".splitlines()[0]
        off = difference(got, wanted, inputs.get("attention_mask"))
        return "right" if off < WRONG else f"WRONG by {off:.1e}"


def rows(methods: list[str]) -> list[str]:
    """Lines of the table."""
    lines = [
        "| method | model | compile, with mask | compile, without mask | export |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        family = family_of(method)
        text = family == "llama"
        masked = compiled(method)
        cells = [method, family, masked, compiled(method, False) if text else "", exported(method)]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main(methods: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    lines = rows(methods or list(BUILTIN))
    if not methods:
        text = DOCUMENT.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        DOCUMENT.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)
    return int(any("WRONG" in line for line in lines))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
