"""Watching the worker: rows are read as they come, and a worker that dies or hangs costs its case, not the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import row
from .gate import ROOT, finish
from .report import table
from .worker import all_cases

LEAST_SECONDS = 20.0  # without so much time left no worker is started
LAST_CASE = 10.0  # seconds before the deadline in which no case is started
SILENCE = 100.0  # seconds a worker may spend on one case (FlexAttention compiles for half a minute)
CRASHES = 4  # workers that may die


class Worker:
    """A process that runs cases (`benchmarks.gpu.worker`), and what it has written so far."""

    def __init__(self, folder: Path, number: int, deadline: float, done: set[str], *options: str):
        self.out, self.read_to = folder / f"worker-{number}.jsonl", 0
        skip = folder / f"skip-{number}.json"
        skip.write_text(json.dumps(sorted(done)))
        self.log = (folder / f"worker-{number}.log").open("w")
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--out", str(self.out), "--deadline", str(deadline),
                   "--skip", str(skip), *options]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
            stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        """Complete lines that are new."""
        if not self.out.exists():
            return []
        with self.out.open("rb") as file:
            file.seek(self.read_to)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.read_to += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def end(self) -> None:
        """End the process and its children, if it has not ended."""
        finish(self.process, 0.0)
        self.log.close()

    def last_words(self) -> str:
        return Path(self.log.name).read_text(errors="replace")[-600:].strip()


def measure(
    folder: Path,
    deadline: float,
    say: Callable[[str], Any] = print,
    silence: float = SILENCE,
    start: Any = Worker,
) -> list[dict[str, Any]]:
    """Rows of every case, until `deadline` (time.time); a case without a result says why."""
    cases = {case.id: case for case in all_cases()}
    rows: list[dict[str, Any]] = []
    done: set[str] = set()
    words = ""
    for number in range(CRASHES):
        if time.time() + LEAST_SECONDS > deadline or len(done) == len(cases):
            break
        worker, current, heard, ended = (
            start(folder, number, deadline - LAST_CASE, done),
            None,
            time.time(),
            False,
        )
        why = ""
        while not ended:
            ended = worker.process.poll() is not None  # before reading: what it wrote last is read too
            for line in worker.lines():
                heard = time.time()
                if "start" in line:
                    current = line["start"]
                elif "done" in line:
                    done.add(line["done"])
                    current = None
                else:
                    rows.append(line)
                    say("\n".join(table([line])))
            if time.time() > deadline or time.time() - heard > silence:
                why = f"nothing was heard of it for {silence:.0f} s"
                ended = True
            time.sleep(0 if ended else 0.1)
        worker.end()
        words = worker.last_words()
        if time.time() > deadline:
            break
        if current is not None:
            done.add(current)
            if not any(r["case"] == current for r in rows):
                rows.append(row(cases[current], "ours", "error", why=why or f"the process died: {words}"))
        elif worker.process.returncode == 0:
            break
    known = {r["case"] for r in rows}
    out_of_time = time.time() + LEAST_SECONDS > deadline - LAST_CASE
    why = "time budget" if out_of_time else f"no process survived ({CRASHES} tried): {words}"
    return rows + [row(case, "ours", "not run", why=why) for case in cases.values() if case.id not in known]
