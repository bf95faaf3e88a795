"""Which model families can be patched: every family of the installed transformers, tried, in docs/coverage.md.

    python scripts/coverage.py                       # all families, two processes, writes docs/coverage.md
    python scripts/coverage.py llama vit --json -    # some families, as JSON on stdout, no file written

For each family a tiny random model is built and run under its default attention, text padded on the left and once more
without padding, where transformers drops the mask. It is run again with every attention site routed through the
dispatch of hf_attn_patch, no patch on it. The outputs must be bit-identical, and at least one site must really have
been called. Then it generates (greedy, a dictionary as result): natively, through the dispatch, and with `streaming`
on it, once with cache="auto" (spans per KV head) and once with cache="keep"; both must give the same logits.
Exit status 1 if any family differs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PER_PROCESS = 60  # families per worker process: imported modeling files add up in memory
STATES = {
    "identical": "bit-identical outputs with every site routed through our dispatch",
    "refused": "the dispatch says that it cannot do this model, before or instead of computing something else",
    "different": "outputs differ, or only the dispatched forward fails (must be 0)",
    "not called": "sites exist, but this forward reached none of them",
    "no sites": "no module uses the attention interface of transformers",
    "forward failed": "the tiny model was built, our inputs do not fit it",
    "not built": "no tiny model could be built",
    "crashed": "the worker died or ran out of time",
}
GENERATED = {
    "equal": "cache='auto' frees what is never read again; logits equal those of cache='keep'",
    "kept": "cache='auto' leaves the cache of this family alone and the report says why; logits equal",
    "refused": "the patch says that it cannot run on this model or its cache",
    "different": "logits differ, or only the patched model fails (must be 0)",
    "": "no generate method, or it fails natively on our inputs",
}
STREAMING = {"sinks": 1, "window": 6}


# --- in the worker ---------------------------------------------------------------------------------------------------


def examine(family: str) -> dict[str, Any]:
    """One row of the table."""
    import torch

    from hf_attn_patch.model.sites import attention_classes, find_sites
    from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

    row: dict[str, Any] = {
        "family": family,
        "class": "",
        "sites": None,
        "called": None,
        "diff": None,
        "why": "",
        "generate": "",
        "generate_why": "",
    }
    try:
        model = tiny_model(family)
    except Exception as error:
        return {**row, "state": "not built", "why": short(error)}
    row["class"] = type(model).__name__
    try:
        sites = find_sites(model)
    except Exception as error:
        return {**row, "state": "different", "why": "find_sites failed: " + short(error)}
    row["sites"] = len(sites)
    if not sites:
        return {**row, "state": "no sites", "why": no_interface(attention_classes(model))}
    # padded and not: without padding transformers drops the mask, and modules decide about causality themselves
    try:
        padded = tiny_inputs(model, left_pad=[0, 3])
        batches = [padded, tiny_inputs(model)] if "attention_mask" in padded else [padded]
        plain = [forward(model, inputs) for inputs in batches]
    except Exception as error:
        return {**row, "state": "forward failed", "why": short(error)}
    configs = json.dumps(model.config.to_dict(), default=str)
    try:
        with calls_counted() as called, dispatched(model):
            ours = [forward(model, inputs) for inputs in batches]
    except Exception as error:
        from hf_attn_patch.errors import ModelMismatchError

        if isinstance(error, ModelMismatchError):
            return {**row, "state": "refused", "why": short(error)}
        return {**row, "state": "different", "why": "dispatched forward failed: " + short(error)}
    row["called"] = len(called)
    differences = [difference(a, b) for a, b in zip(plain, ours)]
    row["diff"] = max(differences)
    if row["diff"] != 0.0:
        where = "padded" if differences[0] else "unpadded"
        return {**row, "state": "different", "why": f"max abs difference {row['diff']:.3g} ({where} batch)"}
    after = difference(plain[0], forward(model, batches[0]))
    if after != 0.0 or json.dumps(model.config.to_dict(), default=str) != configs:
        return {
            **row,
            "state": "different",
            "why": "the model is not as before after the dispatch was taken off",
        }
    if not called:
        return {**row, "state": "not called", "why": f"sites such as {sites[0].class_name} were not reached"}
    if not all(torch.isfinite(t).all() for batch in plain for t in batch):
        row["why"] = "outputs hold inf or NaN"
    row["generate"], row["generate_why"] = examine_generate(model, batches[0])
    return {**row, "state": "identical"}


def examine_generate(model: Any, inputs: dict[str, Any]) -> tuple[str, str]:
    """(state in GENERATED, why) of a family that runs under our dispatch."""
    import torch

    import hf_attn_patch as hap
    from hf_attn_patch.errors import PatchError

    if not model.can_generate():
        return "", "it does not generate"

    given = {k: v for k, v in inputs.items() if k not in ("decoder_input_ids", "labels")}
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        given["decoder_start_token_id"] = 1

    def logits() -> list[Any]:
        torch.manual_seed(0)
        dtype = model.dtype
        kept = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in given.items()
        }
        with torch.no_grad():
            out = model.generate(
                **kept, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        return list(out.logits)

    try:
        try:
            model.double()  # what is left between auto and keep is then no rounding
            native = logits()
        except Exception:
            model.float()
            native = logits()
    except Exception as error:
        return "", "natively: " + short(error)
    try:
        with dispatched(model):
            if (d := difference(native, logits())) != 0.0:
                return "different", f"dispatched, without a patch: max abs difference {d:.3g}"
    except Exception as error:
        return "refused" if isinstance(error, PatchError) else "different", "dispatched: " + short(error)
    try:
        hap.plan(model, "streaming", **STREAMING)
    except PatchError as error:
        return "refused", short(error)
    results = []
    for cache in ("keep", "auto"):
        try:
            with hap.patched(model, "streaming", cache=cache, **STREAMING) as handle:
                results.append(logits())
                notes = handle.report().notes
                freed = any(site.slots for site in handle.report().sites)
        except Exception as error:
            state = "refused" if isinstance(error, PatchError) else "different"
            return state, f"cache={cache!r}: " + short(error)
    try:
        torch.testing.assert_close(results[1], results[0], equal_nan=True)
    except AssertionError:
        return "different", f"auto and keep: max abs difference {difference(*results):.3g}"
    return (
        ("equal", "")
        if freed
        else ("kept", "; ".join(notes)[:110] or "nothing was freed, and no note says why")
    )


def forward(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """Floating-point tensors of the output in a fixed order. Seeded: some models draw noise even in eval mode."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        return list(tensors(model(**inputs)))


def tensors(value: Any) -> Any:
    """Every floating-point tensor inside an output, caches left out."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def difference(a: list[Any], b: list[Any]) -> float:
    """Largest absolute difference; 0.0 only if all tensors are bit-identical (NaN equals NaN)."""
    import torch

    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b):
        if not torch.equal(x, y) and not torch.allclose(x, y, rtol=0, atol=0, equal_nan=True):
            worst = max(worst, float((x - y).abs().nan_to_num(float("inf")).max()))
    return worst


@contextlib.contextmanager
def dispatched(model: Any) -> Any:
    """Every site of `model` through our dispatch, without a patch."""
    from hf_attn_patch.install.attach import dispatched as attached

    with attached(model):
        yield


@contextlib.contextmanager
def calls_counted() -> Any:
    """The set of site stacks that were run inside."""
    from hf_attn_patch.install.stack import PatchStack

    called: set[int] = set()
    original = PatchStack.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.add(id(self))
        return original(self, *args, **kwargs)

    PatchStack.forward = counting
    try:
        yield called
    finally:
        PatchStack.forward = original


def short(error: BaseException, limit: int = 110) -> str:
    """One line for the table; of a chained error the cause."""
    cause = error.__cause__ or error
    message = (
        " ".join(str(cause).split()).replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
    )
    for noise in ("Class validation error for validator 'validate_architecture': ",):
        message = message.replace(noise, "")
    text = f"{type(cause).__name__}: {message}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def no_interface(classes: list[str]) -> str:
    """The reason for a model without sites."""
    if not classes:
        return "no attention modules"
    return "no attention interface: " + ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")


def work() -> None:
    """Family names on stdin, one JSON row per line on stdout; everything else that prints goes to stderr."""
    import warnings

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    for line in sys.stdin:
        start = time.monotonic()
        row = examine(line.strip())
        row["seconds"] = round(time.monotonic() - start, 2)
        print(json.dumps(row), file=answers, flush=True)


# --- in the master ---------------------------------------------------------------------------------------------------


def run_all(names: list[str], processes: int, timeout: float) -> list[dict[str, Any]]:
    """Rows in the order of `names`."""
    queue: SimpleQueue[str] = SimpleQueue()
    for name in names:
        queue.put(name)
    rows: dict[str, dict[str, Any]] = {}
    threads = [threading.Thread(target=_serve, args=(queue, rows, timeout)) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rows[name] for name in names]


def _serve(queue: SimpleQueue[str], rows: dict[str, dict[str, Any]], timeout: float) -> None:
    worker, done = None, 0
    while True:
        try:
            name = queue.get_nowait()
        except Empty:
            break
        if worker is None:
            worker, done = _start(), 0
        worker.stdin.write(name + "\n")
        worker.stdin.flush()
        # the first family of a process also pays for importing torch and transformers
        ready, _, _ = select.select([worker.stdout], [], [], timeout + (60 if done == 0 else 0))
        line = worker.stdout.readline() if ready else ""
        if line:
            rows[name] = json.loads(line)
            done += 1
        else:
            why = (
                f"no answer in {timeout:.0f} s" if not ready else f"worker exited with status {worker.wait()}"
            )
            rows[name] = {"family": name, "class": "", "sites": None, "called": None, "diff": None}
            rows[name] |= {
                "state": "crashed",
                "why": why,
                "seconds": timeout,
                "generate": "",
                "generate_why": "",
            }
        if not line or done >= PER_PROCESS:
            _stop(worker)
            worker = None
    if worker is not None:
        _stop(worker)


def _start() -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def _stop(worker: subprocess.Popen) -> None:
    worker.stdin.close()
    try:
        worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Number of rows per state, in the order of STATES."""
    return {state: sum(row["state"] == state for row in rows) for state in STATES}


def generated(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Number of identical families per state of `examine_generate`."""
    same = [row for row in rows if row["state"] == "identical"]
    return {state: sum(row["generate"] == state for row in same) for state in GENERATED}


def markdown(rows: list[dict[str, Any]], seconds: float, command: str) -> str:
    """The page."""
    import torch
    import transformers

    counts = totals(rows)
    built = len(rows) - counts["not built"] - counts["crashed"]
    lines = [
        "# Model families",
        "",
        "Generated by `scripts/coverage.py`; do not edit. Tiny random models of every family that the installed "
        "transformers knows,",
        "run under their default attention (text with and without left padding) and again with every attention site "
        "routed",
        "through our dispatch with no patch on it.",
        "Patches are tested per family elsewhere; this page says where they can be put without changing anything else.",
        "",
        f"**{len(rows)} families: {built} built, {counts['identical']} identical, {counts['different']} different "
        f"(must be 0), {counts['no sites']} without sites.**",
        "",
        "| state | families | meaning |",
        "|---|---:|---|",
        *(f"| {state} | {counts[state]} | {meaning} |" for state, meaning in STATES.items()),
        "",
        "`generate` with `streaming` on the identical ones, 8 tokens:",
        "",
        "| generate | families | meaning |",
        "|---|---:|---|",
        *(f"| {state} | {generated(rows)[state]} | {meaning} |" for state, meaning in GENERATED.items()),
        "",
        f"{datetime.date.today()}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}, {seconds:.0f} s with `{command}`.",
        "`sites` is called / found: a forward without video, for example, does not reach every site.",
        "",
        "| family | model class | sites | identical | generate | why not |",
        "|---|---|---:|---|---|---|",
    ]
    order = list(STATES)
    for row in sorted(rows, key=lambda row: (order.index(row["state"]), row["family"])):
        sites = "" if row["sites"] is None else str(row["sites"])
        if row["called"] is not None:
            sites = f"{row['called']} / {row['sites']}"
        same = {"identical": "yes", "different": "**no**"}.get(row["state"], "")
        if row["state"] == "different" and row["diff"] is not None:
            same += f" ({row['diff']:.2g})"
        why = f"{row['state']}: {row['why']}" if row["state"] not in ("identical", "no sites") else row["why"]
        told = row.get("generate", "")
        if row.get("generate_why") and told:
            why = "; ".join(filter(None, [why, "generate: " + row["generate_why"]]))
        lines.append(f"| {row['family']} | {row['class']} | {sites} | {same} | {told} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="families to try (all of transformers if none is named)")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the rows as JSON; '-' prints them and writes no page"
    )
    parser.add_argument(
        "--output", type=Path, help="page to write (docs/coverage.md for a run over all families)"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60, help="seconds per family")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return 0
    sys.path.insert(0, str(ROOT))
    from hf_attn_patch.testbed.tiny import families

    start = time.monotonic()
    rows = run_all(args.families or families(), args.processes, args.timeout)
    seconds = time.monotonic() - start
    counts = totals(rows)
    if args.json == "-":
        print(json.dumps(rows, indent=1))
    elif args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    output = args.output or (ROOT / "docs" / "coverage.md" if not args.families else None)
    if output and args.json != "-":
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(markdown(rows, seconds, " ".join(["python scripts/coverage.py", *args.families])))
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    print(f"{len(rows)} families in {seconds:.0f} s: {summary}", file=sys.stderr)
    print(
        "generate: " + ", ".join(f"{n} {s or 'not run'}" for s, n in generated(rows).items() if n),
        file=sys.stderr,
    )
    for row in rows:
        if row["state"] == "different":
            print(f"  {row['family']} ({row['class']}): {row['why']}", file=sys.stderr)
        if row.get("generate") == "different":
            print(f"  {row['family']} ({row['class']}): generate: {row['generate_why']}", file=sys.stderr)
    return 1 if counts["different"] or generated(rows)["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
