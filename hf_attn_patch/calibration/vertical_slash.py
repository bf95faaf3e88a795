"""`vertical_slash` calibration: per query head, how many columns and how many diagonals hold most of its attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call.program import Program
from ..call.rules import ColumnsDiagonals
from ..kernels import reference
from ..model.sites import base_model, find_sites
from ..patches.sparse.vertical_slash import KIND, VerticalSlash, chosen, line_scores
from .calibrator import Calibration, CalibrationError, Calibrator, Progress, Work
from .capture import captured
from .data import check_lengths, samples

PUBLISHED = ((30, 800), (100, 750), (500, 700), (3500, 100))  # (columns, diagonals) of the original's search
SHARES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85)  # of the budget, for columns
ROWS = 256


@dataclass
class VerticalSlashCalibrator(Calibrator):
    """Sizes per query head for the `vertical_slash` patch, in MInference's own JSON.

    Source: MInference, arXiv 2407.02490 (microsoft/MInference fb56c91, `search_pattern`, READ). For every head each
    candidate (columns, diagonals) is tried: the recall is the attention mass that its lines hold, mean over samples and
    over all queries but the first quarter. The best recall wins; equal ones go to fewer lines.

    Options: budget: columns + diagonals of every candidate, so that all cost about the same (a line is read once per
    query). candidates: your own instead, ``published`` for the original's four (whose costs differ, and which hold
    everything at a few thousand tokens). length, samples: of the data. sinks, recent, last: as in the patch.

    Differs from the original code: candidates of one cost (its own hold 830 to 3600 lines); its A-shape and
    block-sparse candidates, which it rewrites to columns and diagonals afterwards, are left out; several samples
    instead of one prompt, and the first quarter of the queries is skipped, not the first 2500.
    """

    name = "vertical_slash"
    summary = "columns and diagonals per query head by recall of the attention mass"
    patch = "vertical_slash"

    budget: int = 850
    candidates: tuple[tuple[int, int], ...] | str = ()
    length: int = 2048
    samples: int = 2
    sinks: int = 30
    recent: int = 100
    last: int = 64
    seed: int = 0

    def validate(self) -> None:
        self.require(self.sinks >= 0, "sinks", "not negative")
        self.require(self.recent >= 1, "recent", "at least 1")
        self.require(self.last >= 1, "last", "at least 1")
        self.require(self.length >= 4 * self.last, "length", f"at least four times last={self.last}")
        self.require(self.samples >= 1, "samples", "at least 1")
        self.require(self.candidates in ("", (), "published") or not isinstance(self.candidates, str), "candidates",
                     "pairs of numbers, or 'published'")  # fmt: skip
        if not self.candidates:
            self.require(self.budget > self.sinks + self.recent, "budget",
                         f"more than sinks + recent = {self.sinks + self.recent}, which are always read")  # fmt: skip
        for pair in self.pairs():
            if len(pair) != 2 or not all(isinstance(n, int) and n >= 0 for n in pair):
                raise CalibrationError(f"vertical_slash: candidate {pair!r} is no pair (columns, diagonals)")

    def pairs(self) -> list[tuple[int, int]]:
        """Candidates (columns, diagonals) in order of their number of lines."""
        if self.candidates == "published":
            found = list(PUBLISHED)
        elif self.candidates:
            found = [tuple(p) for p in self.candidates]  # type: ignore[misc]
        else:
            free = self.budget - self.sinks - self.recent
            columns = [self.sinks + round(free * share) for share in SHARES]
            found = [(c, self.budget - c) for c in columns]
        return sorted(found, key=lambda p: (p[0] + p[1], p[0]))

    def calibrate(self, model: Any, tokenizer: Any, data: Any, work: Work, progress: Progress) -> Calibration:
        notes = check_lengths(self.name, model, [self.length])
        texts = samples(data, model, tokenizer, self.length, self.samples, answers="given", seed=self.seed)
        pairs = self.pairs()
        sites = [s for s in find_sites(base_model(model)) if s.causal and s.parts & set(VerticalSlash.parts)]
        total: dict[int, Tensor] = {}
        share: dict[int, Tensor] = {}
        for number, sample in enumerate(texts):
            progress("samples", number, len(texts))
            found = work.tensors(
                f"recall-{number}", functools.partial(self._measure, model, sample.ids, pairs)
            )
            for name, value in found.items():
                kind, _, of = name.partition("-")
                into = total if kind == "recall" else share
                into[int(of)] = into.get(int(of), 0) + value / len(texts)  # type: ignore[assignment]
        progress("samples", len(texts), len(texts))
        if not total:
            raise CalibrationError(
                f"vertical_slash: none of the {len(sites)} causal text layers reads its whole past, so no head has a "
                "pattern to find"
            )
        layers = max(s.layer for s in sites) + 1
        plan: list[dict[str, list[Any]]] = [{} for _ in range(layers)]
        wins = [0] * len(pairs)
        recalls, shares = [], []
        for layer, recall in total.items():
            best = recall.round(decimals=6).argmax(0)  # the first of equal ones has the fewest lines
            for head, winner in enumerate(best.tolist()):
                wins[winner] += 1
                recalls.append(float(recall[winner, head]))
                shares.append(float(share[layer][winner, head]))
                plan[layer][str(head)] = [KIND, *pairs[winner], round(recalls[-1], 4)]
        every = torch.cat(list(total.values()), 1).mean(1)
        report = {
            "recall": round(sum(recalls) / len(recalls), 4),
            "recall_of_one_pair_for_all_heads": {
                f"{v}+{s}": round(float(r), 4) for (v, s), r in zip(pairs, every)
            },
            "heads_per_pair": {f"{v}+{s}": n for (v, s), n in zip(pairs, wins)},
            "share_of_keys_read": round(sum(shares) / len(shares), 4),
            "notes": notes,
        }
        options = {"patterns": plan, "sinks": self.sinks, "recent": self.recent, "last": self.last}
        return Calibration(self.name, self.patch, plan, options, report)

    def _measure(self, model: Any, ids: Tensor, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Recall and share of keys read, [candidates, H], of every layer that reads its whole past."""
        found: dict[str, Tensor] = {}

        def look(layer: int, program: Program, output: Tensor) -> None:
            if program.mask.window is None:
                found[f"recall-{layer}"], found[f"share-{layer}"] = self.recall(program, pairs)

        device = base_model(model).device
        with captured(model, look), torch.no_grad():
            base_model(model)(input_ids=ids[None].to(device), use_cache=False)
        return found

    def recall(self, program: Program, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """(attention mass, share of keys) that the lines of each candidate hold in a call of one row of the batch:
        float64 [candidates, H], means over all queries but the first quarter."""
        H, length = program.num_heads, program.q_len
        columns, diagonals, until = line_scores(program, 0, program.mask.q_offset + length, self.last)
        rules = [
            ColumnsDiagonals(
                chosen(columns[None], [v] * H, self.sinks),
                chosen(diagonals[None], [s] * H, self.recent),
                torch.tensor([until], device=columns.device),
            )
            for v, s in pairs
        ]
        mass = torch.zeros(len(pairs), H, dtype=torch.float64)
        share = torch.zeros_like(mass)
        cols, heads = program.mask.key_columns, torch.arange(H).reshape(1, -1, 1, 1)
        rows_asked = torch.arange(length // 4, length)
        for index in rows_asked.split(ROWS):
            rows = index.to(columns.device) + program.mask.q_offset
            allowed = reference.visible(program, rows, cols)
            _, probs = reference.attend(
                program, program.query[:, :, index], program.key, program.value, allowed, rows, cols, index  # type: ignore[arg-type]
            )  # fmt: skip
            for i, rule in enumerate(rules):
                seen = rule.visible(heads, rows.reshape(1, 1, -1, 1), cols.reshape(1, 1, 1, -1)) & allowed
                mass[i] += (probs * seen).sum((0, 2, 3)).double().cpu()
                share[i] += (seen.sum(3) / allowed.sum(3).clamp(min=1)).sum((0, 2)).double().cpu()
        return mass / len(rows_asked), share / len(rows_asked)
