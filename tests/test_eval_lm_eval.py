"""`lm_eval`: tasks of the harness on the live object, with a task and a data set of this test, offline."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval.lm_eval import LmEval
from tests.eval_models import language_model

try:
    import lm_eval as harness
except ImportError:
    harness = None
needs = pytest.mark.skipif(
    harness is None, reason="lm-eval is not installed: pip install 'hf_attn_patch[lm-eval]'"
)

YAML = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def tokenizer():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=chr(0), eos_token=chr(1), unk_token="?")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    docs = [
        {
            "question": f"Here is question {i}, {'and ' * 8 * i}so:",
            "choices": ["abcd", "efgh", "ijkl"],
            "label": i % 3,
        }
        for i in range(6)
    ]
    data = tmp_path / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "tiny_choice.yaml").write_text(YAML.format(data=data))
    return tmp_path, docs


def by_hand(model, words, docs) -> list[float]:
    """1 where the right choice is the likeliest continuation."""
    scores = []
    for doc in docs:
        sums = []
        for choice in doc["choices"]:
            ids = words(doc["question"] + choice, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0, :-1]
            said = len(choice)
            sums.append(logs.gather(-1, ids[0, 1:, None])[-said:].sum().item())
        scores.append(float(sums.index(max(sums)) == doc["label"]))
    return scores


@needs
def test_it_measures_the_object_as_it_stands_dense_and_patched(folder):
    place, docs = folder
    model, _ = language_model()
    words = tokenizer()
    task = LmEval(tasks=("tiny_choice",), include=str(place), samples=5)
    result = evaluation.run(task, model, words, patches=["streaming:sinks=1,window=6"])
    dense, sparse = result.variants
    assert dense.scores["score"] == by_hand(model, words, docs[:5])
    with hap.patched(model, "streaming", sinks=1, window=6):
        assert sparse.scores["score"] == by_hand(model, words, docs[:5])
    assert dense.scores != sparse.scores  # else the patch may not have been there
    assert list(dense.by_group["score"]) == ["tiny_choice"] and result.facts[4] == {
        "task": "tiny_choice",
        "document": 4,
    }


@needs
def test_an_unknown_task_of_the_harness_is_named(folder):
    model, _ = language_model()
    with pytest.raises(ValueError, match="no task tiny_choise.*include=FOLDER"):
        evaluation.run(LmEval(tasks=("tiny_choise",), include=str(folder[0])), model, tokenizer())


def test_a_missing_harness_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model, words = language_model()
    with pytest.raises(ValueError, match=r"pip install 'hf_attn_patch\[lm-eval\]'"):
        LmEval().items(model, words, 0)


@pytest.mark.parametrize(
    "make, words",
    [(lambda: LmEval(tasks=()), "tasks is empty"), (lambda: LmEval(samples=0), "must be at least 1")],
)
def test_options_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()
