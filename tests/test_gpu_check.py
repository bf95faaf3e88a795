"""The GPU check runs, at sizes for Triton's interpreter: every benchmark, the gate, the targets, the result file."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

pytest.importorskip("triton", reason="the triton extra is not installed")

from benchmarks.gpu import attention_cases, competitors, gate, report, targets, tune, watch, worker
from benchmarks.gpu.case import Case, Context, Prepared, run
from benchmarks.gpu.timing import Clock, Times
from hf_attn_patch.kernels.triton import configs
from hf_attn_patch.kernels.triton.configs import Config
from scripts import gpu_check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = worker.all_cases(tiny=True)


@pytest.fixture
def context():
    """perf_counter instead of events, one run: what is tested is that cases run."""
    return Context(DEVICE, torch.float16, tiny=True, clock=Clock("cpu", seconds=0.0, least=1))


@pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
def test_every_case_runs_and_its_competitors_compute_the_same(case, context):
    rows = list(run(case, context))
    ours = [r for r in rows if r["provider"] == "ours"]
    assert len(ours) == 1 and ours[0]["status"] == "ok", ours
    assert ours[0]["ms"]["runs"] == 1 and ours[0]["rate"] > 0
    others = [r for r in rows if r["provider"] != "ours"]
    assert set(ours[0]["versus"]) == {r["provider"] for r in others if r["status"] == "ok"}
    for row in others:
        assert (
            row["status"] == "ok" or row["provider"] in ("flex", "fla") or row["provider"].startswith("sdpa")
        ), row
    json.dumps(rows)


def test_all_groups_of_the_brief_have_cases_with_names_of_their_own():
    cases = worker.all_cases()
    assert {c.group for c in cases} == set(worker.SHARES) == {c.group for c in CASES}
    assert len({c.id for c in cases}) == len(cases)
    assert abs(sum(worker.SHARES.values()) - 1) < 1e-9


def test_a_case_that_fails_or_computes_something_else_is_a_row_with_the_reason(context):
    one, two = torch.ones(4), torch.full((4,), 1.5)

    def broken(_):
        raise ValueError("no such thing")

    def wrong(_):
        return Prepared({"ours": lambda: one, "other": lambda: two}, same=("other",))

    def competitor_breaks(_):
        found = Prepared({"ours": lambda: one}, work={"ours": 1.0})
        found.compete("other", lambda: broken(None))
        return found

    (row,) = run(Case("g", "n", {}, broken), context)
    assert row["status"] == "error" and "no such thing" in row["why"]
    (row,) = run(Case("g", "n", {}, wrong), context)
    assert row["status"] == "error" and "ours and other differ by 0.333" in row["why"] and "ms" not in row
    rows = list(run(Case("g", "n", {}, competitor_breaks), context))
    assert [r["status"] for r in rows] == ["ok", "missing"]


def test_random_block_masks_have_the_density_asked_for(context):
    blocks = attention_cases.random_blocks(context, 4, 64, 0.25)
    assert float(blocks.sum()) / (4 * 64 * 65 / 2) == pytest.approx(0.25, abs=0.02)
    assert not blocks.triu(1).any() and blocks.diagonal(dim1=1, dim2=2).all()


def test_the_block_mask_is_the_one_flex_attention_finds_itself():
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = (
        torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)).lt(0.5).tril() | torch.eye(4).bool()
    )
    seen = lambda b, h, q, k: blocks[h, q // 128, k // 128] & (k <= q)
    truth = create_block_mask(seen, 1, 2, 512, 512, device="cpu", BLOCK_SIZE=128)
    eye = torch.eye(4).bool()
    ours = competitors.block_mask((blocks & eye)[None], (blocks & ~eye)[None], 128, 512, seen)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(truth, name)), name
    assert torch.equal(ours.to_dense(), truth.to_dense()) and ours.shape == truth.shape


# -- time --------------------------------------------------------------------------------------------------


def test_times_are_medians_of_interleaved_runs():
    calls, order = {}, []
    for name in "abc":
        calls[name] = lambda n=name: order.append(n)
    found = Clock("cpu", seconds=0.0, least=10).interleaved(calls)
    assert all(t.runs == 10 for t in found.values())
    assert order[6:12] == ["a", "b", "c", "b", "c", "a"], (
        "one run of each per round, in an order that rotates"
    )
    assert Times.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Times(2.0, 3.0, 4.0, 5)


@pytest.mark.parametrize("deadline, everything", [(100.0, False), (200.0, True)])
def test_groups_that_use_up_their_share_wait_for_the_others(deadline, everything):
    clock, order = [0.0], []
    cases = [Case(group, str(i), {}, lambda _: None) for group in worker.SHARES for i in range(3)]
    for case in worker.schedule(cases, deadline, now=lambda: clock[0]):
        order.append(case)
        clock[0] += 6.0  # 180 in all, and more than the share of most groups
    assert len({c.group for c in order[:10]}) > 3, "no group takes all the time"
    assert clock[0] <= deadline + 6 and len(order) == len({c.id for c in order})
    assert (len(order) == len(cases)) == everything
    assert not everything or order[-1].group != list(worker.SHARES)[-1], "what waited runs last"


class FakeWorker:
    """A worker that writes the given lines and ends (or hangs)."""

    def __init__(self, batches):
        self.batches, self.seen = iter(batches), []

    def __call__(self, folder, number, deadline, done, *options):
        self.seen.append(set(done))
        self.waiting, self.status = next(self.batches)
        self.process = self
        self.returncode = self.status
        return self

    def poll(self):
        return self.status

    def lines(self):
        found, self.waiting = self.waiting, []
        return found

    def end(self):
        pass

    def last_words(self):
        return "CUDA error: an illegal memory access"


def test_a_worker_that_dies_or_hangs_costs_its_case_only(monkeypatch, tmp_path):
    cases = [Case("g", str(i), {}, lambda _: None) for i in range(4)]
    monkeypatch.setattr(watch, "all_cases", lambda: cases)
    ok = lambda i: [{"start": cases[i].id}, report_row(cases[i]), {"done": cases[i].id}]
    start = FakeWorker([
        ([*ok(0), {"start": cases[1].id}], 1), ([{"start": cases[2].id}], None), (ok(3), 0),
    ])  # fmt: skip
    rows = watch.measure(tmp_path, time.time() + 60, say=lambda _: None, silence=0.3, start=start)
    by_case = {r["case"]: r for r in rows}
    assert [by_case[c.id]["status"] for c in cases] == ["ok", "error", "error", "ok"]
    assert (
        "illegal memory access" in by_case[cases[1].id]["why"]
        and "nothing was heard" in by_case[cases[2].id]["why"]
    )
    assert start.seen[1] == {cases[0].id, cases[1].id} and start.seen[2] == {c.id for c in cases[:3]}
    rows = watch.measure(tmp_path, time.time() + 5, say=lambda _: None, start=FakeWorker([]))
    assert {r["status"] for r in rows} == {"not run"} and {r["why"] for r in rows} == {"time budget"}


def report_row(case):
    return {"case": case.id, "group": case.group, "name": case.name, "at": {}, "provider": "ours", "status": "ok",
            "ms": Times(1.0, 2.0, 3.0, 10).json(), "unit": "GB/s", "rate": 5.0, "versus": {}, "extra": {}}  # fmt: skip


# -- gate --------------------------------------------------------------------------------------------------

GREEN = "def test_every_mask():\n    pass\n"
SLOW = "import time\n\ndef test_that_takes_long():\n    time.sleep(60)\n"


def gate_over(tmp_path, monkeypatch, seconds=60.0, quick=False, xdist=False, **files):
    """The gate over test files of its own."""
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    monkeypatch.setattr(gate, "TESTS", tmp_path)
    monkeypatch.setattr(gate, "ROOT", gate.ROOT)
    logs = tmp_path / "logs"
    logs.mkdir()
    return gate.run(logs, seconds, quick, 2, lambda name: name == "pytest" or xdist)


@pytest.mark.parametrize("xdist", [False, True])
def test_the_gate_is_green_when_everything_passes_and_red_with_names_when_not(tmp_path, monkeypatch, xdist):
    if xdist:
        pytest.importorskip("xdist")
    found = gate_over(tmp_path, monkeypatch, xdist=xdist, executor=GREEN, other=GREEN)
    assert found.status == "green" and found.passed == found.collected == 2 and found.open
    (tmp_path / "logs").rename(tmp_path / "old")
    found = gate_over(tmp_path, monkeypatch, xdist=xdist, broken="def test_a_kernel():\n    assert 1 == 2\n")
    assert found.status == "red" and not found.open and found.passed == 2
    (name,) = found.failed
    assert "test_a_kernel" in name and "assert 1 == 2" in found.failed[name]


def test_a_gate_without_time_opens_only_if_its_quick_subset_is_done(tmp_path, monkeypatch):
    found = gate_over(
        tmp_path,
        monkeypatch,
        seconds=8.0,
        executor=GREEN,
        slow=SLOW,
    )
    assert found.status == "red" and "quick subset not among them" in found.note
    lines = [dict(collected=3, quick=1), dict(id="a", outcome="passed", quick=True, text="")]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"id": "cut o')
    found = gate.Gate.of(path, "how", ended=False, files=1, seconds=1.0)
    assert found.status == "quick" and "1 of 3 tests" in found.note


def test_the_built_in_gate_lists_every_kind_of_program():
    names = [name for name, *_ in gate.programs(quick=False)]
    assert len(names) == len(set(names)) > 60
    for word in (
        "mask left padding",
        "edit softcap",
        "head dimension 192",
        "rule neighborhood 2d",
        "ragged cache 7",
    ):
        assert word in names
    from tests.kernels.budget import assert_within_budget

    for name, make, dtypes, gradients in gate.programs(quick=True):
        if name in ("head dimension 16", "mass transfer"):
            assert_within_budget(make(), "triton", dtypes[0], gradients)


# -- the script --------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_and_ends_with_status_2(capsys):
    assert gpu_check.main([]) == 2
    text = capsys.readouterr()
    assert text.out == "" and "no GPU" in text.err and text.err.count("\n") == 1


def pretend(monkeypatch, tmp_path, found, rows=()):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        gpu_check, "environment", lambda: {"gpu": {"name": "NVIDIA H100 80GB"}, "packages": {}, "git": "abc"}
    )
    monkeypatch.setattr(gpu_check.gates, "run", lambda *_: found)
    monkeypatch.setattr(gpu_check, "measure", lambda *_: list(rows))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    status = gpu_check.main(["--no-warm", "--out", str(tmp_path / "results")])
    return status, sorted((tmp_path / "results").glob("*")), sorted((tmp_path / "out").glob("*"))


def test_behind_a_red_gate_no_number_is_taken_printed_or_written(monkeypatch, tmp_path, capsys):
    red = gate.Gate(
        "red", "pytest", passed=7, collected=8, failed={"test_x.py::test_mask": "AssertionError: output"}
    )
    monkeypatch.setattr(gpu_check.targets, "evaluate", None)
    status, results, out = pretend(monkeypatch, tmp_path, red)
    text = capsys.readouterr().out
    assert status == 1 and "FAILED test_x.py::test_mask" in text and "No speed was measured" in text
    assert " ms" not in text and "TFLOP" not in text and "met" not in text
    (path,) = results
    stored = report.read(path)
    assert stored["gate"] == "red" and stored["rows"] == [] == stored["targets"]
    stored["rows"] = synthetic()
    with pytest.raises(ValueError, match="gate is red, yet there are numbers"):
        report.check(stored)


def test_behind_a_green_gate_rows_targets_and_plot_are_written_twice(monkeypatch, tmp_path, capsys):
    status, results, out = pretend(
        monkeypatch, tmp_path, gate.Gate("green", "pytest", passed=8, collected=8), synthetic()
    )
    assert status == 0
    text = capsys.readouterr().out
    assert "met " in text and "missed" in text and "not run" in text
    drawn = importable("matplotlib")
    assert [p.suffix for p in results] == ([".json", ".png"] if drawn else [".json"])
    assert len(out) == len(results) + 1 and out[0].name == "gpu-check.log"
    stored = report.read(results[0])
    assert stored["rows"] == synthetic() and stored["ceilings"] == {"copy": 3000.0}
    assert results[0].name.startswith("nvidia-h100-80gb-20")


def importable(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_a_missing_matplotlib_is_a_message(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.plot({"rows": [], "ceilings": {}}, tmp_path / "x.png") == "matplotlib is not installed"


# -- targets -----------------------------------------------------------------------------------------------


def synthetic():
    """Rows of an imaginary card."""

    def row(group, name, at, ms, versus, rate=100.0, **extra):
        case = Case(group, name, at, lambda _: None)
        return {
            **report_row(case),
            "at": at,
            "ms": Times(ms, ms, ms, 10).json(),
            "versus": versus,
            "rate": rate,
            "extra": extra,
        }

    def lost(group, name, at, status, why, provider="ours"):
        case = Case(group, name, at, lambda _: None)
        return {
            "case": case.id,
            "group": group,
            "name": name,
            "at": at,
            "provider": provider,
            "status": status,
            "why": why,
        }

    sparse, long = "random per head", 32768
    slow = {"build_ms": Times(0.1, 0.1, 0.1, 5).json()}
    return [
        row("ceilings", "copy", {}, 1.0, {}, rate=3000.0),
        row("full forward", "causal", {"L": 8192, "B": 4}, 4.0, {"flex": 1.2, "sdpa flash": 0.9, "sdpa cudnn": 0.72}),
        row("full forward", "causal", {"L": 16384, "B": 2}, 8.0, {"flex": 1.1, "sdpa flash": 1.0, "sdpa cudnn": 0.8}),
        lost("full forward", "causal", {"L": 65536, "B": 1}, "error", "OutOfMemoryError: 80 GiB"),
        row("sparse", sparse, {"L": long, "density": 0.1}, 1.0, {"dense": 9.0, "flex": 1.3}, density=0.1, **slow),
        row("sparse", sparse, {"L": long, "density": 0.5}, 6.0, {"dense": 1.5, "flex": 1.25}, density=0.5, **slow),
        row("decode", "dense", {"S": 32768, "B": 8, "Hkv": 4}, 1.0, {}, rate=2400.0),
        row("classes", "var", {"L": 4096}, 1.0, {"eager reference": 12.0}, lengths=[4096, 16384],
            peak_mib=[10.0, 41.0]),
        row("linear", "chunks", {"L": 4096, "B": 8, "D": 64}, 1.0, {"torch": 9.0}),
        lost("linear", "chunks", {"L": 4096, "B": 8, "D": 64}, "missing", "fla is not installed", "fla"),
    ]  # fmt: skip


def verdict(word, rows=None):
    (found,) = [v for v in targets.evaluate(synthetic() if rows is None else rows) if word in v["what"]]
    return found


def test_targets_are_judged_by_their_worst_case():
    assert verdict(">= 0.70x best SDPA")["worst"] == 0.72, "the best backend is the one that is fastest"
    assert verdict("1.25 x density")["verdict"] == "missed"
    assert verdict("1.25 x density")["worst"] == pytest.approx(1 / 1.5 / 0.5)
    assert (
        verdict("per head >= 1.2x Flex")["verdict"] == "met"
        and verdict("per head >= 1.2x Flex")["worst"] == 1.25
    )
    assert verdict("layout build")["verdict"] == "missed" and verdict("layout build")[
        "worst"
    ] == pytest.approx(0.1)
    assert verdict("75 % of copy")["verdict"] == "met" and verdict("75 % of copy")["worst"] == 0.8
    assert verdict("VAR >= 10x")["verdict"] == "met" and verdict("memory grows")["worst"] == pytest.approx(
        1.025
    )


def test_a_case_that_failed_has_not_met_anything():
    found = verdict("forward >= 1.0x Flex")
    assert found["verdict"] == "met where it ran" and (found["judged"], found["cases"]) == (2, 3)


def test_a_target_without_its_competitor_or_rows_is_not_run_with_the_reason():
    assert verdict("fla") == {**verdict("fla"), "verdict": "not run", "why": "fla is not installed"}
    assert verdict("backward")["verdict"] == "not run" and verdict("backward")["why"] == "no row of it"
    no_copy = [r for r in synthetic() if r["group"] != "ceilings"]
    assert verdict("75 % of copy", no_copy)["verdict"] == "not run"
    assert len(targets.lines(targets.evaluate([]))) == len(targets.TARGETS)


# -- tuning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_give_the_result_of_the_table_before_they_are_timed(kernel, context):
    choice = {"layout_dq": Config(0, 32, 1, 1), "layout_dkv": Config(32, 0, 1, 1)}.get(
        kernel, Config(32, 64, 1, 1)
    )
    lines = list(tune.tune(context, kernel, 16, [choice, Config(3, 3, 1, 1)]))
    assert lines[0]["own"] and "ms" in lines[0] and "ms" in lines[1], lines
    if kernel in ("layout", "classes"):
        assert "ValueError" in lines[2]["why"]
    assert kernel not in configs._forced
    json.dumps([{**line, "config": str(line["config"])} for line in lines])


def test_the_fastest_candidate_wins_only_if_it_is_clearly_faster():
    line = lambda ms, own, k: {"config": Config(64, k), "own": own, "ms": ms}
    assert tune.best([line(1.0, True, 32), line(0.99, False, 64)]) is None
    assert tune.best(
        [line(1.0, True, 32), line(0.9, False, 64), {"config": None, "own": False, "why": "x"}]
    ) == Config(64, 64)
    assert tune.best([]) is None
