"""What attention patterns cost a pretrained ViT, and what they save: DINOv2-S on rendered scenes, before and after a
short distillation.

    python -m benchmarks.vision_quality measure --size 224            # features, heads, kept attention, density
    python -m benchmarks.vision_quality tune --size 224 --only block,alternating,sparsifiner
    python -m benchmarks.vision_quality time --size 224               # every variant in turns, on an idle machine
    python -m benchmarks.vision_quality table                         # -> benchmarks/results/vision-dinov2s/table.md

Every step writes one JSON file per variant and goes on where it stopped. Nothing is chosen on the test scenes.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import hf_attn_patch as hap
from hf_attn_patch import eval as evaluation
from hf_attn_patch import probing, testbed
from hf_attn_patch.cost import simulate
from hf_attn_patch.eval.agreement import Agreement
from hf_attn_patch.eval.feature_cache import encoded
from hf_attn_patch.eval.images import pixel_values
from hf_attn_patch.eval.knn import nearest_class
from hf_attn_patch.eval.labelled import SCENES, labelled
from hf_attn_patch.eval.states import states
from hf_attn_patch.eval.vit_throughput import VitThroughput
from hf_attn_patch.model.sites import find_sites

RESULTS = Path("benchmarks/results/vision-dinov2s")
Variant = tuple[str, dict[str, Any]]
EVEN, ODD = "0::2", "1::2"


def variants(side: int) -> dict[str, Variant]:
    """Label -> (patch, options) for a grid of side x side patches; fixed patterns read about a quarter of the keys.

    A prime side (37 at 518 px) has no partition: there windows are cut at the border, and lattices become dilation.
    """
    half, divides = side // 2, side % 4 == 0
    window = half if divides else 19
    alternate = lambda even, odd: {EVEN: even, ODD: odd}
    blocks, lattice = {"window": half, "stride": half}, {"window": half, "dilation": 2}
    found: dict[str, Variant] = {
        "swin": ("swin_window", {"window": window}),
        "swin-shifted": ("swin_window", {"window": window, "layers": alternate({}, {"shift": window // 2})}),
        "neighborhood": ("neighborhood", {"window": window}),
        "neighborhood-7": ("neighborhood", {"window": 7}),
        "neighborhood-7-dilated": (
            "neighborhood",
            {"window": 7, "layers": alternate({}, {"dilation": side // 7})},
        ),
        "halo": ("halo", {"block": half // 2, "halo": half // 4})
        if divides
        else ("halo", {"block": 37, "halo": 0}),
        "clear": ("clear", {"radius": round((side * side / 4 / np.pi) ** 0.5, 1)}),
        "agent": ("agent", {"agents": 7}),
        "biformer": ("biformer", {"regions": 4, "topk": 4}),
        "vmoba": ("vmoba", {"tile": [4, 4], "kinds": ["tile"], "pool": "head", "threshold": 0.25}),
        "sparsifiner": ("sparsifiner", {"keep": 0.25, "grid": [side, side]}),
        "paro": ("paro", {"density": 0.25}),
    }
    if divides:
        found |= {
            "block": ("maxvit_block", {"window": half}),
            "grid": ("maxvit_grid", {"size": half}),
            "alternating": ("neighborhood", {**blocks, "layers": alternate(blocks, lattice)}),
            "alternating-lattice-first": ("neighborhood", {**blocks, "layers": alternate(lattice, blocks)}),
            "block-4": ("maxvit_block", {"window": side // 4}),
            "block-last-dense": ("maxvit_block", {"window": half, "layers": "0-7"}),
        }
    else:
        for name in ("halo", "biformer", "vmoba"):  # they need a grid that divides
            del found[name]
    return found


def ready(variant: Variant, data: Data) -> Variant:
    """The variant with the plan that `paro` calibrates on training images; any other as it is."""
    name, options = variant
    if name != "paro":
        return variant
    return name, hap.calibrate(data.model, "paro", data=data.train[:8], **options).options


class Data:
    """Scenes as pixels: `train` and `test` [n, 3, size, size], labels, and what the dense model makes of them."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model, self.processor = testbed.load("dinov2s")
        self.size, self.cache = given.size, given.cache
        self.learn, self.ask = labelled("vision_quality", SCENES, given.train, given.test, seed=0)
        self.train, self.test = (
            pixel_values(self.model, self.processor, part.images, self.size)
            for part in (self.learn, self.ask)
        )
        self.side = self.size // self.model.config.patch_size
        self.known, self.asked = self.features(self.model)
        self.head = self.linear(self.known)

    def features(self, model: Any) -> list[Any]:
        return [encoded(model, pixels, 4, self.cache) for pixels in (self.train, self.test)]

    def linear(self, known: Any) -> Any:
        return probing.fit(known[0], self.learn.targets(), "linear", classes=len(self.learn.names), seed=0)

    def scores(self, model: Any) -> dict[str, float]:
        """Features of `model` against the dense ones, and what heads find in them."""
        known, asked = self.features(model)
        cosine = lambda a, b: float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean())
        old, new = (self.head.logits(x[0].clone()).double() for x in (self.asked, asked))
        own = self.linear(known).logits(asked[0].clone())
        common, truth = known[0].mean(0), torch.tensor(self.ask.labels)
        near = nearest_class(known[0] - common, self.learn.labels, asked[0] - common, 10, 0.07)
        p, q = old.log_softmax(-1), new.log_softmax(-1)
        return {
            "cls_cosine": cosine(asked[0], self.asked[0]),
            "patch_cosine": cosine(asked[1], self.asked[1]),
            "top1_agreement": float((old.argmax(-1) == new.argmax(-1)).double().mean()),
            "kl": float((p.exp() * (p - q)).sum(-1).mean()),
            "old_head": float((new.argmax(-1) == truth).double().mean()),
            "own_head": float((own.argmax(-1) == truth).double().mean()),
            "knn": float((torch.tensor(near) == truth).double().mean()),
            "images": len(truth),
        }


def density(model: Any, variant: Variant, size: int) -> dict[str, float | None]:
    """Mean over layers of the pairs read and of the 64-token tiles visited; None where content decides."""
    name, options = variant
    plan = hap.plan(model, name, **options)
    pairs: list[float] = []
    tiles: list[float] = []
    for saving in simulate(model, plan, image=(size, size)).savings:
        if saving.tiles is not None:
            pairs += [saving.tiles.pairs / saving.tiles.possible_pairs] * len(saving.layers)
            tiles += [saving.tiles.visited / saving.tiles.possible] * len(saving.layers)
    dense = len(find_sites(model)) - len(plan.sites)
    mean = lambda found: float(np.mean(found + [1.0] * dense)) if found else None
    return {"pairs": mean(pairs), "tiles": mean(tiles)}


def chosen_share(handle: Any) -> float | None:
    """Share of the cells that a choice by content read in the last call; None for fixed patterns."""
    shares = [
        s.block_density for s in handle.report().sites if s.density is None and s.block_density is not None
    ]
    return float(np.mean(shares)) if shares else None


def pending(given: argparse.Namespace, step: str, names: list[str]) -> Iterator[tuple[str, Path]]:
    """(label, file) of what is asked for and not there yet."""
    wanted = given.only.split(",") if given.only else names
    if unknown := set(wanted) - set(names):
        raise SystemExit(
            f"no variant {', '.join(sorted(unknown))} at this size; there are {', '.join(names)}"
        )
    for name in wanted:
        path = given.out / f"{step}-{given.size}" / f"{name}.json"
        if not path.exists():
            yield name, path


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path, {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}, flush=True)


def measure(given: argparse.Namespace) -> None:
    data = Data(given)
    choices = variants(data.side)
    dense = given.out / f"measure-{given.size}" / "dense.json"
    if not dense.exists():
        write(dense, {**data.scores(data.model), "pairs": 1.0, "tiles": 1.0, "kept_mass": 1.0})
    for name, path in pending(given, "measure", list(choices)):
        patch, options = variant = ready(choices[name], data)
        found = {"patch": patch, "options": choices[name][1], **density(data.model, variant, given.size)}
        begin = time.monotonic()
        with hap.patched(data.model, patch, **options) as handle:
            found |= data.scores(data.model)
            states(data.model, data.test[:1])  # features may have come from the cache
            found["chosen"] = chosen_share(handle)
        task = Agreement(count=given.kept, data=SCENES, size=given.size, batch=4)
        result = evaluation.run(task, data.model, data.processor, patches={name: (patch, options)})
        kept = result[name].aggregates["kept_mass"]
        kept = None if np.isnan(kept) else kept  # keys of the method's own: there is no share to tell
        write(path, {**found, "kept_mass": kept, "seconds": time.monotonic() - begin})


def distil(
    model: Any, data: Data, given: argparse.Namespace, params: list[Any], lr: float, loss_of: Any
) -> list[float]:
    """AdamW with warm-up and cosine on `params`; loss_of(rows) gives the loss of some training images."""
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=lr, total_steps=given.steps, pct_start=0.1
    )
    rows = torch.cat([torch.randperm(len(data.train), generator=draw) for _ in range(given.steps)])
    losses = []
    model.train()
    for step in range(given.steps):
        loss = loss_of(rows[step * given.batch : (step + 1) * given.batch])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss))
        if step % 10 == 0:
            print(f"  step {step}: {losses[-1]:.4f}", flush=True)
    model.eval()
    return losses


def tune(given: argparse.Namespace) -> None:
    """The attention weights learn to give the dense features again with the pattern on; a predictor learns first."""
    data = Data(given)
    choices = variants(data.side)
    for name, path in pending(given, "tune", list(choices)):
        patch, options = choices[name]
        begin, model = time.monotonic(), copy.deepcopy(data.model).requires_grad_(False)
        hap.patch(model, patch, **options)
        own = [p for n, p in model.named_parameters() if "attn_patch" in n and p.requires_grad]
        found: dict[str, Any] = {
            "patch": patch,
            "options": options,
            "steps": given.steps,
            "batch": given.batch,
        }

        def likeness(rows: torch.Tensor, model: Any = model) -> torch.Tensor:
            hidden = model(pixel_values=data.train[rows]).last_hidden_state
            teacher = torch.cat([data.known[0][rows, None], data.known[1][rows]], 1)
            away = 1 - F.cosine_similarity(hidden, teacher, dim=-1)
            return away[:, 0].mean() + away[:, 1:].mean()

        def reconstruction(rows: torch.Tensor, model: Any = model) -> torch.Tensor:
            model(pixel_values=data.train[rows])
            return torch.stack(list(hap.aux_losses(model, weighted=True).values())).sum()

        if own:
            found["predictor_loss"] = distil(model, data, given, own, given.predictor_lr, reconstruction)
            found |= {f"predictor_{k}": v for k, v in data.scores(model).items()}
            for parameter in own:
                parameter.requires_grad_(False)
        learnt = [
            p
            for site in find_sites(model)
            for n, p in site.module.named_parameters()
            if "attn_patch" not in n
        ]
        for parameter in learnt:
            parameter.requires_grad_(True)
        found["loss"] = distil(model, data, given, learnt, given.lr, likeness)
        write(path, {**found, **data.scores(model), "seconds": time.monotonic() - begin})


def clock(given: argparse.Namespace) -> None:
    """All variants in turns at one size."""
    model, processor = testbed.load("dinov2s")
    choices = variants(given.size // model.config.patch_size)
    wanted = [name for name, _ in pending(given, "time", list(choices))]
    if not wanted:
        return
    task = VitThroughput(sizes=(given.size,), batch=given.batch, repeats=given.repeats)
    result = evaluation.run(task, model, processor, patches={n: choices[n] for n in wanted})
    middle = {label: float(np.median(result[label].scores["per image"])) for label in ("dense", *wanted)}
    for name in wanted:
        write(
            given.out / f"time-{given.size}" / f"{name}.json",
            {"ms": middle[name], "dense_ms": middle["dense"], "ratio": middle["dense"] / middle[name],
             "threads": torch.get_num_threads(), "batch": given.batch, "repeats": given.repeats},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("measure", "tune", "time", "table"))
    for name, default in (
        ("size", 224),
        ("train", 200),
        ("test", 150),
        ("kept", 16),
        ("steps", 60),
        ("batch", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--predictor-lr", type=float, default=3e-3)
    parser.add_argument("--only", default="", help="labels, separated by commas; default: all")
    parser.add_argument("--cache", default="runs/features", help="folder for features")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*saves 0 %|.*will be refused")  # of the configured image size
    {"measure": measure, "tune": tune, "time": clock, "table": table}[given.step](given)


def table(given: argparse.Namespace) -> None:
    from benchmarks.vision_table import page

    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(page(given.out))
    print((given.out / "table.md").read_text(), file=sys.stdout)


if __name__ == "__main__":
    main()
