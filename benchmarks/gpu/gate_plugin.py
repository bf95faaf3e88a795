"""pytest plugin of the gate: the quick subset first (or alone), and one JSON line per result as it happens.

Lines: {"collected": n, "quick": k} once per process that collects, {"id", "outcome", "quick", "text"} per test. A gate
that is killed when its time is up has still told what it knows.
"""

from __future__ import annotations

import json
import os
from typing import Any

# every kernel, every head dimension and dtype, gradients, decoding: what a wrong launch or a wrong type breaks first
QUICK = (
    "test_executor.py::test_every_mask[", "test_executor.py::test_head_dims[", "test_executor.py::test_every_edit[",
    "test_executor.py::test_edits_in_half_precision", "test_executor.py::test_decoding[",
    "test_executor.py::test_a_cache_with_a_span", "test_executor.py::test_closed_heads",
    "test_layout_attention.py::test_dynamic_layouts", "test_layout_attention.py::test_int8",
    "test_classes.py::test_mass_edits_under", "test_classes.py::test_a_transfer", "test_classes.py::test_statistics",
    "test_decode.py::test_every_number_of_keys", "test_decode.py::test_spans", "test_decode.py::test_ring",
    "test_ragged_queries.py::test_a_random_choice", "test_linear.py::test_causal_output",
    "test_linear.py::test_gradients_with", "test_int8_quantise.py::test_an_element",
)  # fmt: skip


def is_quick(test: str) -> bool:
    return any(name in test for name in QUICK)


def write(**line: Any) -> None:
    with open(os.environ["GPU_GATE_FILE"], "a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    quick = [item for item in items if is_quick(item.nodeid)]
    rest = (
        []
        if os.environ.get("GPU_GATE_QUICK") == "1"
        else [item for item in items if not is_quick(item.nodeid)]
    )
    items[:] = quick + rest
    write(collected=len(items), quick=len(quick))


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the controller gets every report too
        return
    if report.when == "call" or report.outcome in ("failed", "skipped"):
        text = str(report.longrepr)[-3000:] if report.failed else ""
        write(id=report.nodeid, outcome=report.outcome, quick=is_quick(report.nodeid), text=text)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        write(id=str(report.nodeid), outcome="failed", quick=True, text=str(report.longrepr)[-3000:])
