"""`longbench`: metrics on cases done by hand, official prompts, truncation, buckets, and files that are not right."""

from __future__ import annotations

import json
import sys
import types
import zipfile

import pytest

from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval.longbench import LongBench, LongBenchE, bucket, read, table, without_middle
from hf_attn_patch.eval.longbench_metrics import METRICS, f1, score
from tests.eval_models import Characters, language_model
from tests.test_eval_retrieval import Chatty, Long, Oracle
from tests.test_eval_tasks import NOTHING, Uniform

CLASSES = ["Location", "Location of a city", "Number"]


@pytest.mark.parametrize(
    "metric, answer, truth, value",
    [
        ("qa_f1", "The cat, sat!", "a cat sat", 1.0),
        ("qa_f1", "cat on mat", "cat", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("qa_f1", "dog", "cat", 0.0),
        ("qa_f1", "", "cat", 0.0),
        ("qa_f1", "cat cat cat", "cat cat", 0.8),
        ("count", "there are 7, no 8 of 7", "7", 2 / 3),
        ("count", "17", "7", 0.0),
        ("count", "none", "7", 0.0),
        ("retrieval", "Paragraph 7", "Paragraph 7", 1.0),
        ("retrieval", "Paragraph 3 or 7", "Paragraph 7", 0.5),
        ("retrieval", "段落12", "段落12", 1.0),
        ("classification", "It is a Number", "Number", 1.0),
        ("classification", "Number or Location", "Number", 0.5),
        ("classification", "Location of a city", "Location of a city", 1.0),
        ("classification", "Location of a city", "Location", 0.5),
        ("classification", "who knows", "Number", 0.0),
        ("code", "# a comment\nreturn x", "return x", 1.0),
        ("code", "```\nabcd", "abed", 0.75),
        ("code", "// only\n# comments", "return", 0.0),
        ("rouge", "the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("rouge", "a b c d", "a x c y", 0.5),
        ("rouge", "a b", "a b c d e f", 2 * 1 * (1 / 3) / (4 / 3)),
        ("rouge", "", "a b", 0.0),
        ("rouge", "...", "a b", 0.0),
        ("rouge_zh", "今天天气很好", "今天天气很好", 1.0),
        ("qa_f1_zh", "北京。", "北京", 1.0),
        ("qa_f1_zh", "上海", "北京", 0.0),
    ],
)
def test_metrics_by_hand(metric, answer, truth, value):
    assert METRICS[metric](answer, truth, CLASSES) == pytest.approx(value, abs=1e-6)


def test_the_best_of_several_truths_counts():
    assert score("qa_f1", "cat", ["dog", "cat"]) == 1.0 and score("qa_f1", "cat", []) == 0.0
    assert f1([], []) == 0.0


def test_the_table_has_the_datasets_of_the_paper():
    assert len(table()) == 21 and sum(about["e"] for about in table().values()) == 13
    for about in table().values():
        assert about["metric"] in METRICS and "{context}" in about["prompt"] and 32 <= about["new"] <= 512
        about["prompt"].format(context="c", input="i")


def row(**changes) -> dict:
    base = {
        "input": "who?",
        "context": "Ann did it. " * 4,
        "answers": ["Ann"],
        "length": 12,
        "all_classes": None,
    }
    return {**base, **changes}


@pytest.fixture
def folder(tmp_path):
    def write(name, *rows):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n"
        )

    write("hotpotqa", row(), row(answers=["Bob", "ann!"]), row(answers=["Eve"]))
    write("trec", row(input="Q: where?\nType:", answers=["Number"], all_classes=CLASSES))
    write("hotpotqa_e", row(length=10), row(length=5000), row(length=8000), row(length=9000, answers=["Eve"]))
    return tmp_path


def test_answers_are_scored_as_the_dataset_says_and_datasets_count_alike(folder):
    says = Oracle(lambda text: "\nNumber\nLocation" if "type of the question" in text else " Ann. ")
    task = LongBench(data=str(folder))
    items = task.items(Uniform(), Characters(), 0)
    assert [i.group for i in items] == ["hotpotqa"] * 3 + ["trec"] and [i.new for i in items] == [32] * 3 + [
        64
    ]
    scores = task.score(says, Characters(), items, None, NOTHING)["score"]
    assert scores == [1.0, 1.0, 0.0, 1.0]  # of trec only the first line counts
    weights = task.weights(items)
    mean = sum(s * w for s, w in zip(scores, weights)) / sum(weights)
    assert mean == pytest.approx((2 / 3 + 1) / 2)


def test_prompts_are_the_official_ones(folder):
    text = Characters().decode(
        LongBench(data=str(folder), datasets=("hotpotqa",)).items(Uniform(), Characters(), 0)[0].ids
    )
    assert text == table()["hotpotqa"]["prompt"].format(context=row()["context"], input="who?")
    chat = LongBench(data=str(folder), chat=True).items(Uniform(), Chatty(), 0)
    assert [Characters().decode(i.ids).startswith("[user]") for i in chat] == [True] * 3 + [False]


def test_long_prompts_lose_their_middle(folder):
    text = "".join(chr(97 + i % 26) for i in range(300))
    assert without_middle(Characters(), text, 101) == text[:50] + text[250:]
    assert without_middle(Characters(), text, 300) == text == without_middle(Characters(), text, None)
    item = LongBench(data=str(folder), datasets=("hotpotqa",), max_length=100).items(
        Uniform(), Characters(), 0
    )[0]
    assert len(item.ids) == 100 and Characters().decode(item.ids).endswith("Question: who?\nAnswer:")


def test_without_max_length_the_model_decides(tmp_path):
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row(context="x" * 9000)))
    item = LongBench(data=str(tmp_path)).items(Uniform(), Characters(), 0)[0]
    assert len(item.ids) == 4096 - 32 - 64
    with pytest.raises(ValueError, match="Ask for at most 4000"):
        LongBench(data=str(tmp_path), max_length=4096).items(Uniform(), Characters(), 0)
    assert len(LongBench(data=str(tmp_path)).items(Long(), Characters(), 0)[0].ids) > 9000


def test_the_e_datasets_come_in_buckets_with_a_length_each(folder):
    assert [bucket(n) for n in (0, 3999, 4000, 7999, 8000, 99999)] == [
        "0-4k",
        "0-4k",
        "4-8k",
        "4-8k",
        "8k+",
        "8k+",
    ]
    task = LongBenchE(data=str(folder), max_lengths=(60, 80, 100))
    items = task.items(Uniform(), Characters(), 0)
    assert [i.group for i in items] == ["hotpotqa 0-4k", "hotpotqa 4-8k", "hotpotqa 8k+", "hotpotqa 8k+"]
    assert [len(i.ids) for i in items] == [60, 80, 100, 100]
    assert task.weights(items) == [1.0, 1.0, 0.5, 0.5]


def test_it_runs_dense_and_patched_from_a_zip_file(folder, tmp_path):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "hotpotqa.jsonl", "data/hotpotqa.jsonl")
    model, tokenizer = language_model()
    task = LongBench(data=str(archive), samples=2, max_length=400, batch_size=2)
    result = evaluation.run(task, model, tokenizer, patches=["streaming:window=16"])
    assert result.items == 2 and list(result["dense"].by_group["score"]) == ["hotpotqa"]
    assert result["dense"].answers != result.variants[1].answers
    assert result.facts[1]["expected"] == ["Bob", "ann!"] and result.facts[0]["dataset"] == "hotpotqa"


def test_a_missing_package_names_the_extra_before_any_answer(tmp_path, monkeypatch):
    (tmp_path / "gov_report.jsonl").write_text(json.dumps(row()))
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(ValueError, match=r"rouge not installed: pip install 'hf_attn_patch\[longbench\]'"):
        LongBench(data=str(tmp_path)).items(Uniform(), Characters(), 0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: LongBench(datasets=("hotpot",)), "no dataset hotpot. There are narrativeqa"),
        (lambda p: LongBenchE(datasets=("vcsum",)), "no dataset vcsum"),
        (lambda p: LongBench(samples=0), "'samples': 0.* must be at least 1"),
        (lambda p: LongBenchE(max_lengths=(1, 2)), "must be three lengths"),
        (lambda p: LongBenchE(max_lengths=(1, 2, 3), max_length=4), "Give one of them"),
        (lambda p: read(str(p), ("qasper",), "", True), "has no qasper.jsonl; it has bad.jsonl"),
        (lambda p: read(str(p), ("bad",), "", True), "bad, line 2 has no answers, length"),
        (lambda p: read(str(p / "bad.jsonl"), ("bad",), "", True), "neither a folder nor a zip file"),
        (lambda p: read("nobody/nothing", ("qasper",), "", True), "cannot be had from the hub"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(tmp_path, make, words):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row()) + '\n{"input": "a", "context": "b"}\n')
    with pytest.raises(ValueError, match=words):
        make(tmp_path)


def test_a_model_without_room_for_the_answer_is_refused(tmp_path):
    (tmp_path / "gov_report.jsonl").write_text(json.dumps(row()))

    class Short(Uniform):
        config = types.SimpleNamespace(
            get_text_config=lambda: types.SimpleNamespace(max_position_embeddings=512)
        )

    with pytest.raises(ValueError, match="gov_report answers in 512 tokens, the model has 512 positions"):
        LongBench(data=str(tmp_path)).items(Short(), Characters(), 0)
