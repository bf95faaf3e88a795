"""The process that owns the GPU while cases run; `scripts/gpu_check.py` watches and replaces it.

Writes JSON lines: {"start": case} before a case, its rows, {"done": case} after it. Every group of cases gets a share
of the time; what does not fit waits until all groups had their turn, and is then run as long as time is left.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import attention_cases, other_cases
from .case import Case, Context, run
from .timing import Clock

# share of the measuring time, in the order in which groups run
SHARES = {
    "ceilings": 0.02, "full forward": 0.17, "sparse": 0.22, "decode": 0.12, "classes": 0.10, "full backward": 0.16,
    "linear": 0.08, "gate": 0.05, "int8": 0.03, "model": 0.05,
}  # fmt: skip


def all_cases(tiny: bool = False) -> list[Case]:
    """Every case, group by group."""
    found = [*attention_cases.cases(tiny), *other_cases.cases(tiny)]
    return sorted(found, key=lambda case: list(SHARES).index(case.group))


def schedule(cases: list[Case], deadline: float, now: Callable[[], float] = time.time) -> Iterator[Case]:
    """Cases in the order in which they run, until `deadline`: first each group within its share, then the rest."""
    begin, later, used = now(), [], 0.0
    for group, share in SHARES.items():
        used += share
        end = min(begin + (deadline - begin) * used, deadline)
        for case in cases:
            if case.group == group:
                if now() < end:
                    yield case
                else:
                    later.append(case)
    for case in later:
        if now() < deadline:
            yield case


def work(
    context: Context, cases: list[Case], deadline: float, write: Callable[[dict[str, Any]], None], warm: bool
) -> None:
    """Run cases until `deadline` (time.time) and write their lines."""
    for case in schedule(cases, deadline):
        write({"start": case.id})
        try:
            for line in run(case, context, warm):
                write(line)
        except Exception:
            if not warm:
                raise  # the row is written; this process is of no use any more
        write({"done": case.id})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since 1970")
    parser.add_argument("--skip", type=Path, help="JSON list of cases that are done")
    parser.add_argument("--warm", action="store_true", help="compile everything once, measure nothing")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case from the i-th")
    given = parser.parse_args()
    skip = set(json.loads(given.skip.read_text())) if given.skip else set()
    i, n = map(int, given.part.split("/"))
    cases = [case for case in all_cases() if case.id not in skip][i::n]
    context = Context("cuda", torch.bfloat16, clock=Clock("cuda"))
    with given.out.open("a") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        work(context, cases, given.deadline, write, given.warm)


if __name__ == "__main__":
    main()
