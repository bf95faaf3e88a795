"""Quality against the share of the context that is kept or read: SmolLM2-135M, one line of the plot per family.

    make frontier                                                    # plans first, then this; hours on 2 cores
    python benchmarks/frontier.py --only "moa,uniform 50 %" --depths 0.1,0.3,0.5,0.7,0.8,0.9 --out DIR    # some of them

Per variant: passkey accuracy over prompts of 0.6k to 4.5k tokens and three depths (through generate and its cache),
perplexity of 2048 tokens of prose, bytes of the KV cache after a prompt of 4096 tokens relative to
dense (measured on the cache object), and the share of causal (query, key) pairs that are read at 4096. Finished items
are kept in the output folder; the same command goes on where a killed run stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import hf_attn_patch as hap  # noqa: E402
from hf_attn_patch import testbed  # noqa: E402
from hf_attn_patch.eval import measurements  # noqa: E402
from hf_attn_patch.eval.harness import evaluating, run  # noqa: E402

PLANS = Path("benchmarks/plans")
LAYERS, KV_HEADS = 30, 3
KV_LENGTH = 4096
Variant = tuple[str, dict[str, Any]]


def uniform_plan(share: float) -> dict[str, Any]:
    """Every head the same elastic window, 64 sinks inside: StreamingLLM at a given average span."""
    return {"alphas": [[0.0] * KV_HEADS] * LAYERS, "betas": [[share] * KV_HEADS] * LAYERS}


def families() -> dict[str, dict[str, Variant]]:
    """family -> label -> (patch, options), ordered from much to little."""
    elastic = {"max_new_tokens": 8}
    moa = {
        f"moa {d} %": ("moa", {"plan": str(PLANS / f"smollm2-moa-{d}.json"), **elastic}) for d in (50, 30, 25)
    }
    uniform = {f"uniform {d} %": ("moa", {"plan": uniform_plan(d / 100), **elastic}) for d in (50, 30, 25)}
    left = {
        f"leave one out, {n} of 90 full": (
            "duo",
            {
                "alphas": top_heads(PLANS / "smollm2-window-loss.json", n),
                "sinks": 4,
                "window": 256,
            },
        )
        for n in (24, 12, 6)
        if (PLANS / "smollm2-window-loss.json").exists()
    }
    duo = {
        f"duo {round(100 * s)} % streaming": (
            "duo",
            {"alphas": str(PLANS / "smollm2-duo.json"), "sparsity": s, "sinks": 4, "window": 256},
        )
        for s in (0.5, 0.7, 0.87)
        if (PLANS / "smollm2-duo.json").exists()
    }
    s2 = {
        f"s2 stride {s}{', every second layer dense' if e else ''}": (
            "s2",
            {"stride": s, "local_blocks": n, "dense_every": e},
        )
        for s, n, e in ((3, 4, 2), (3, 4, 0))
    }
    topk = {f"block_topk {k} of 32-blocks": ("block_topk", {"block": 32, "topk": k}) for k in (16,)}
    slash = {
        f"vertical_slash {v}+{s}": ("vertical_slash", {"vertical": v, "slash": s})
        for v, s in ((500, 700), (100, 250))
    }
    return {
        "moa": moa,
        "uniform": uniform,
        "leave one out": left,
        "duo": duo,
        "s2": s2,
        "block_topk": topk,
        "vertical_slash": slash,
    }  # type: ignore[dict-item]


def top_heads(file: Path, count: int) -> dict[str, Any]:
    """The best `count` heads of a head-set file."""
    data = json.loads(file.read_text())
    return {**data, "heads": data["heads"][:count]}


def measure_space(model: Any, tokenizer: Any, variants: dict[str, Variant]) -> dict[str, dict[str, float]]:
    """KV bytes and share of pairs read, per label."""
    dense = measurements.kv_bytes(model, KV_LENGTH, tokenizer)
    found = {"dense": {"kv_bytes": dense, "kv_share": 1.0, "read": 1.0}}
    for label, (name, options) in variants.items():
        with hap.patched(model, name, **options) as handle:
            held = measurements.kv_bytes(model, KV_LENGTH, tokenizer)
            read = share_read(handle.report())
        found[label] = {
            "kv_bytes": held,
            "kv_share": held / dense,
            "read": read,
        }
        print(f"{label}: {found[label]}", flush=True)
    return found


def share_read(report: Any) -> float:
    """Mean share of pairs over all layers; a layer that a patch left alone reads everything."""
    shares = [s.density if s.density is not None else s.block_density for s in report.sites]
    return sum(1.0 if share is None else float(share) for share in shares) / len(shares)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy and perplexity against what is kept (read, where nothing is freed)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dense = next(r for r in rows if r["label"] == "dense")
    for family in dict.fromkeys(r["family"] for r in rows if r["family"]):
        mine = sorted((r for r in rows if r["family"] == family), key=lambda r: r["share"])
        style = dict(marker="o", markersize=5, linewidth=1.4, label=family)
        left.plot([r["share"] for r in mine], [r["passkey"] for r in mine], **style)
        right.plot([r["share"] for r in mine], [r["perplexity"] / dense["perplexity"] for r in mine], **style)
    left.set_ylabel("passkey accuracy")
    left.axhline(dense["passkey"], color="grey", linewidth=0.8, linestyle=":")
    right.set_ylabel("perplexity relative to dense")
    right.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.set_xlabel("share of the KV cache kept\n(of pairs read, where the cache is kept whole)")
        axes.set_xlim(0, 1)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def measured(
    variants: dict[str, Variant], family_of: dict[str, str], out: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per variant and for dense; also written to `out`/frontier.json."""
    model, tokenizer = testbed.load("smollm2")
    say = lambda label, done, total: (
        print(f"  {label}: {done}/{total}", flush=True) if done == total else None
    )
    with evaluating(model):
        space = measure_space(model, tokenizer, variants)
    results = {
        task.split(":")[0]: run(
            task, model, tokenizer, patches=variants, out=out / task.split(":")[0], progress=say
        )
        for task in (
            "perplexity:tokens=2048,context=2048",
            f"passkey:depths=[{options.depths}],lengths=[{options.lengths}]",
        )
    }
    rows = []
    for label in ["dense", *variants]:
        row = {"label": label, "family": family_of.get(label), **space[label]}
        row["share"] = row["kv_share"] if row["kv_share"] < 0.999 else row["read"]
        row["perplexity"] = results["perplexity"][label].aggregates["perplexity"]
        passkey = results["passkey"]
        facts = [(int(f["length"]), float(f["depth"])) for f in passkey.facts]
        row["found"] = [[*f, s] for f, s in zip(facts, passkey[label].scores["accuracy"])]
        rows.append(row)
    (out / "frontier.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "frontier-smollm2"))
    parser.add_argument("--only", help="families or variants, comma separated; '' only merges")
    parser.add_argument("--depths", default="0.1,0.5,0.9", help="of the number in passkey prompts")
    parser.add_argument("--lengths", default="600,1200,2300,4500", help="of passkey prompts, in tokens")
    parser.add_argument(
        "--merge", nargs="*", help="folders of earlier runs that go into the table and the plot too"
    )
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    only = options.only.split(",") if options.only is not None else None
    chosen = {
        family: {label: v for label, v in group.items() if only is None or {family, label} & set(only)}
        for family, group in families().items()
    }
    family_of = {label: name for name, group in chosen.items() for label in group}
    variants = {label: spec for group in chosen.values() for label, spec in group.items()}
    rows = measured(variants, family_of, out, options) if variants else []
    for folder in options.merge or []:
        others = json.loads((Path(folder) / "frontier.json").read_text())
        rows += [r for r in others if r["label"] not in {mine["label"] for mine in rows}]
    order = list(families())
    rows.sort(key=lambda r: (order.index(r["family"]) if r["family"] else -1, -r["share"]))
    common = set.intersection(*({(n, d) for n, d, _ in r["found"]} for r in rows))
    for r in rows:
        asked = [(n, s) for n, d, s in r["found"] if (n, d) in common]
        r["passkey"] = sum(s for _, s in asked) / len(asked)
        r["by_length"] = {n: [s for m, s in asked if m == n] for n in sorted({n for n, _ in asked})}
    plot(rows, out / "frontier.png")
    dense = rows[0]["perplexity"]
    lines = [
        "| variant | KV kept | pairs read | perplexity | of dense | passkey | by length |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        by = ", ".join(f"{n}: {sum(s):.0f}/{len(s)}" for n, s in r["by_length"].items())
        lines.append(
            f"| {r['label']} | {r['kv_share']:.2f} | {r['read']:.2f} | {r['perplexity']:.2f} | "
            f"{r['perplexity'] / dense:.3f} | {r['passkey']:.2f} | {by} |"
        )
    (out / "frontier.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
