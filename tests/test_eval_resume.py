"""A killed run goes on where it stopped; two processes find what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval.journal import Journal, JournalError, digest, model_fingerprint
from hf_attn_patch.eval.passkey import Passkey
from hf_attn_patch.eval.perplexity import Perplexity
from hf_attn_patch.eval.team import TeamError, find
from tests.eval_models import language_model

TASK = Passkey(lengths=(300,), depths=(0.1, 0.3, 0.5, 0.7, 0.9), max_new_tokens=3, batch_size=2)
PATCHES = ["streaming:sinks=2,window=40"]
FOUND = ("scores", "answers", "aggregates", "by_group", "difference", "sites", "label", "patch")


def found(result) -> list[dict]:
    """What a run found, without its clock."""
    return json.loads(json.dumps([{k: v[k] for k in FOUND} for v in result.to_dict()["variants"]]))


class Killed(Exception):
    pass


def counting(model, most: int | None = None) -> list[int]:
    """Counts the prompts of each generate call of `model`; dies at the call after `most`."""
    calls: list[int] = []
    real = type(model).generate

    def generate(*args, **kwargs):
        if most is not None and len(calls) == most:
            raise Killed
        calls.append(len(kwargs["input_ids"]))
        return real(model, *args, **kwargs)

    model.generate = generate
    return calls


@pytest.mark.parametrize("most", [1, 3, 4])
def test_a_killed_run_goes_on_and_finds_the_same(tmp_path, most):
    model, tokenizer = language_model()
    whole = evaluation.run(TASK, model, tokenizer, patches=PATCHES)
    calls = counting(model, most)
    with pytest.raises(Killed):
        evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=tmp_path)
    assert not (tmp_path / "result.json").exists()
    kept = sum(calls)
    rest = counting(model)
    again = evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=tmp_path)
    assert found(again) == found(whole)
    assert kept + sum(rest) == 10 and len(rest) == 6 - most
    assert f"{kept} of 10 scores are from an earlier start" in again.notes[-1]


def test_a_finished_run_is_repeated_without_the_model(tmp_path):
    model, tokenizer = language_model()
    first = evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=tmp_path)
    calls = counting(model, most=0)
    second = evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=tmp_path)
    assert found(first) == found(second) and calls == []
    assert second["dense"].seconds == pytest.approx(first["dense"].seconds)


def test_half_a_line_is_dropped_and_measured_again(tmp_path):
    model, tokenizer = language_model()
    first = evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=tmp_path)
    journal = tmp_path / "items.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    for _ in range(2):  # the second reads what the first has written behind the cut
        calls = counting(model)
        assert found(evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=tmp_path)) == found(first)
    assert calls == []


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda model: ({"seed": 1}, TASK), "seed: 0 there, 1 asked"),
        (lambda model: ({"patches": ["streaming:window=9"]}, TASK), "patches: "),
        (lambda model: ({"limit": 2}, TASK), "items: .5 items, .* there, .2 items, .* asked"),
        (lambda model: ({}, Passkey((300,), (0.1, 0.3, 0.5, 0.7, 0.9), 4, 2)), "max_new_tokens"),
        (lambda model: (model.lm_head.weight.data.mul_(2), {})[1:] + (TASK,), "weights"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, change, words):
    model, tokenizer = language_model()
    evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=tmp_path)
    before = (tmp_path / "items.jsonl").read_bytes()
    options, task = change(model)
    with pytest.raises(JournalError, match=words) as error:
        evaluation.run(task, model, tokenizer, **{"patches": PATCHES, "out": tmp_path, **options})
    assert "Give another folder with --out" in str(error.value)
    assert (tmp_path / "items.jsonl").read_bytes() == before


def test_a_plan_that_was_written_anew_is_another_run(tmp_path):
    model, tokenizer = language_model()
    plan = tmp_path / "plan.json"
    patches = [("moa", {"plan": str(plan)})]
    for beta in (1.0, 0.5):
        plan.write_text(json.dumps({"alphas": [[64.0, 64.0]] * 2, "betas": [[beta, beta]] * 2}))
        if beta == 1.0:
            evaluation.run(TASK, model, tokenizer, patches=patches, out=tmp_path / "out")
    with pytest.raises(JournalError, match="files: "):
        evaluation.run(TASK, model, tokenizer, patches=patches, out=tmp_path / "out")


def test_perplexity_keeps_whole_contexts(tmp_path):
    model, tokenizer = language_model()
    task = Perplexity(tokens=300, context=100, chunk=20)
    forwards = []
    model.register_forward_pre_hook(lambda *a: forwards.append(1))
    whole = evaluation.run(task, model, tokenizer)
    assert len(forwards) == 3  # one forward per context, as before batches
    evaluation.run(task, model, tokenizer, out=tmp_path)
    journal = tmp_path / "items.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:8]))  # the run, the 5 chunks of one context, 2 of the next
    forwards.clear()
    assert found(evaluation.run(task, model, tokenizer, out=tmp_path)) == found(whole)
    assert len(forwards) == 2


def test_batches_that_lose_an_item_are_refused():
    class Loses(Passkey):
        def batches(self, items):
            return [[0, 1], [1]]

    model, tokenizer = language_model()
    with pytest.raises(ValueError, match="must hold each of the 6 items once"):
        evaluation.run(Loses(lengths=(300,)), model, tokenizer)


def test_digests_tell_items_and_weights_apart():
    base = [{"a": 1, "b": (torch.ones(2), "x")}]
    assert digest(base) == digest([{"a": 1, "b": (torch.ones(2), "x")}])
    others = [
        [{"a": 1, "b": (torch.zeros(2), "x")}],
        [{"a": 1.0, "b": (torch.ones(2), "x")}],
        [[1], 2],
        [1, [2]],
    ]
    assert len({digest(v) for v in [base, *others]}) == 5
    model, _ = language_model()
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 1e-3
    assert model_fingerprint(model)["weights"] != before["weights"]


def test_an_item_is_on_disk_before_the_next_is_asked(tmp_path):
    journal = Journal(tmp_path, {"seed": 0})
    for i in range(3):
        journal.add("dense", {i: {"scores": {"a": 0.1 * i}, "answer": "é"}}, 1.0, [])
        assert Journal(tmp_path, {"seed": 0})["dense"].items[i] == {"scores": {"a": 0.1 * i}, "answer": "é"}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, {})
    journal.add("dense", {0: {"scores": {"a": 1.0}, "answer": None}}, 1.0, [])
    assert journal.known() == 1 and list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from hf_attn_patch import eval as evaluation
from tests.eval_models import language_model
from tests.test_eval_resume import PATCHES, TASK

model, tokenizer = language_model()
result = evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=sys.argv[1])
assert len(result["dense"].answers) == 5, "every process has the whole result"
"""


def test_two_processes_write_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).parents[1])
    arguments = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *arguments.split()]
    launch += ["--main_process_port", str(port)]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    model, tokenizer = language_model()
    alone = evaluation.run(TASK, model, tokenizer, patches=PATCHES)
    assert [{k: v[k] for k in FOUND} for v in record["variants"]] == found(alone)
    assert record["notes"] == ["shared by 2 processes"]
    shares = [
        sum('"item"' in line for line in (tmp_path / "out" / name).read_text().splitlines())
        for name in ("items.jsonl", "items.rank1.jsonl")
    ]
    assert shares == [6, 4]  # batches 0 and 2, batch 1; dense and patched
    calls = counting(model, most=0)  # one process reads what two have written
    assert found(evaluation.run(TASK, model, tokenizer, patches=PATCHES, out=tmp_path / "out")) == found(
        alone
    )
    assert calls == []


def test_several_processes_without_accelerate_are_told_what_to_install(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TeamError, match=r"pip install 'hf_attn_patch\[eval\]'"):
        find()
