"""`line_retrieval` and `ruler`: what the prompts hold, what counts as right, and that padding changes no answer."""

from __future__ import annotations

import json
import re
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hf_attn_patch import eval as evaluation
from hf_attn_patch.eval.generation import cut, encode, fit, generate
from hf_attn_patch.eval.line_retrieval import LineRetrieval, last_integer
from hf_attn_patch.eval.passkey import Passkey
from hf_attn_patch.eval.ruler import SUBTASKS, Ruler, found
from hf_attn_patch.eval.words import coined, pairs
from tests.eval_models import Characters, language_model
from tests.test_eval_tasks import NOTHING, Uniform

GOLDEN = json.loads((Path(__file__).parent / "golden" / "moa__retrieval_scoring.json").read_text())


class Long(Uniform):
    """With positions enough for one token per character."""

    config = types.SimpleNamespace(
        get_text_config=lambda: types.SimpleNamespace(max_position_embeddings=16384)
    )


class Chatty(Characters):
    """With a chat template."""

    chat_template = "a template"

    def apply_chat_template(self, turns, add_generation_prompt, tokenize):
        return (
            "".join(f"[{t['role']}] {t['content']}" for t in turns) + "[assistant] " * add_generation_prompt
        )


class Oracle(Uniform):
    """Reads the prompt and says what `answer` makes of it."""

    def __init__(self, answer):
        self.answer = answer

    def generate(self, input_ids, max_new_tokens, **_):
        import torch

        rows = [Characters().encode(self.answer(Characters().decode(row))) for row in input_ids]
        rows = [(row + [0] * max_new_tokens)[:max_new_tokens] for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


@pytest.mark.parametrize("case, wanted", list(zip(GOLDEN["in"], GOLDEN["out"])))
def test_last_integer_as_the_original_scores_it(case, wanted):
    assert last_integer(case["generated"]) == wanted["parsed"]
    task = LineRetrieval()
    prompt = task_prompt(expected=(str(case["label"]),))
    assert task.grade(case["generated"], prompt) == {"accuracy": float(wanted["correct"])}


def task_prompt(**changes):
    from hf_attn_patch.eval.generation import Prompt

    return Prompt(**{"ids": (1, 2), "expected": ("1",), "new": 4, "group": "", **changes})


def test_lines_fill_the_length_and_the_asked_one_stands_in_its_bin():
    items = LineRetrieval(lengths=(600, 1500), bins=5, repeats=2).items(Uniform(), Characters(), 0)
    assert len(items) == 20 and [i.group for i in items] == ["600"] * 10 + ["1500"] * 10
    for item in items:
        text = Characters().decode(item.ids)
        lines = re.findall(r"^line ([a-z-]+): REGISTER_CONTENT is <(\d+)>$", text, re.M)
        names = [name for name, _ in lines]
        asked = re.search(r"Answer: line ([a-z-]+): REGISTER_CONTENT is <$", text)[1]
        assert len(set(names)) == len(names) == item.facts["lines"]
        assert dict(lines)[asked] == item.expected[0]
        where = names.index(asked) / len(names)
        assert abs(where - item.facts["depth"]) <= 0.5 / 5 + 1 / len(names)
        assert (
            item.facts["length"] - 60 < len(item.ids) <= item.facts["length"]
        )  # one more line would not fit


def test_line_retrieval_is_right_for_who_reads_and_wrong_for_who_does_not():
    def read(text):
        asked = re.search(r"Answer: line ([a-z-]+): REGISTER_CONTENT is <$", text)[1]
        number = re.search(rf"line {asked}: REGISTER_CONTENT is <(\d+)>", text)[1]
        return f"{number}>\nline {asked}: REGISTER_CONTENT is <1>"  # goes on as base models do

    task = LineRetrieval(lengths=(600,), bins=4)
    items = task.items(Uniform(), Characters(), 0)
    right = task.score(Oracle(read), Characters(), items, None, NOTHING)
    assert right == {"accuracy": [1.0] * 4} and all("\n" not in a for a in task.answers)
    wrong = task.score(Oracle(lambda text: "<7> 0"), Characters(), items, None, NOTHING)
    assert wrong == {"accuracy": [0.0] * 4}


def test_chat_uses_the_template_or_says_that_there_is_none():
    item = LineRetrieval(lengths=(700,), bins=1, chat=True).items(Uniform(), Chatty(), 0)[0]
    text = Characters().decode(item.ids)
    assert text.startswith("[user] This is a record") and text.endswith("Answer with the number.[assistant] ")
    assert item.stop is None and len(item.ids) <= 700
    with pytest.raises(ValueError, match="has no chat template. Leave chat out"):
        Ruler(lengths=(700,), chat=True).items(Uniform(), Characters(), 0)


@pytest.mark.parametrize("task", [LineRetrieval(lengths=(800,)), Ruler(lengths=(3500,), samples=2)])
def test_items_follow_the_seed(task):
    make = lambda seed: [(i.ids, i.expected) for i in task.items(Uniform(), Characters(), seed)]
    assert make(0) == make(0)
    assert not set(make(0)) & set(make(1))


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_ruler_prompts_have_their_length_and_hold_the_answer(subtask):
    items = Ruler(lengths=(3200, 3900), subtasks=(subtask,), samples=3).items(Uniform(), Characters(), 0)
    assert len(items) == 6 and len({i.expected for i in items}) == 6
    for item in items:
        text = Characters().decode(item.ids)
        length = item.facts["length"]
        assert length - 230 < len(text) <= length, len(text)
        assert all(e in text for e in item.expected) and item.group == f"{subtask} {length}"
    counts = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    assert {len(i.expected) for i in items} == {counts.get(subtask, 1)}


def test_needles_stand_at_their_depth_among_others_that_look_like_them():
    items = Ruler(lengths=(3000,), subtasks=("niah_multikey",), samples=4).items(Uniform(), Characters(), 0)
    for item in items:
        text = Characters().decode(item.ids)
        assert len(re.findall(r"access number of [a-z-]+ is \d{7}\.", text)) == 4
        assert abs(text.index(item.expected[0]) / len(text) - item.facts["depth"]) < 0.2
    assert [i.facts["depth"] for i in items] == [0.125, 0.375, 0.625, 0.875]


def test_variables_lead_back_to_the_number_that_is_asked():
    item = Ruler(lengths=(2000,), subtasks=("vt",), samples=1).items(Uniform(), Characters(), 0)[0]
    text = Characters().decode(item.ids)
    value = re.search(r"that hold (\d+) are$", text)[1]
    holds = {value}
    for left, right in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", text):  # in order: each is set once
        if right in holds:
            holds.add(left)
    assert holds - {value} == set(item.expected)


@pytest.mark.parametrize("subtask", ["cwe", "fwe"])
def test_common_and_frequent_words_are_those_that_come_most_often(subtask):
    item = Ruler(lengths=(9000,), subtasks=(subtask,), samples=1).items(Long(), Characters(), 0)[0]
    head = "than others.\n" if subtask == "cwe" else "leave them out.\n\n"
    body = Characters().decode(item.ids).rpartition(head)[2].split("\nQuestion")[0]
    words = re.findall(r"[a-z]{4,9}", body)
    counted = Counter(words)
    top = [w for w, _ in counted.most_common(len(item.expected))]
    assert set(top) == set(item.expected)
    if subtask == "cwe":
        assert {counted[w] for w in top} == {30}


@pytest.mark.parametrize(
    "answer, score", [("A1 and b2", 1.0), ("only B2", 0.5), ("", 0.0), ("a 1", 0.0), ("xa1b2", 1.0)]
)
def test_ruler_counts_the_share_of_strings_that_were_said(answer, score):
    assert found(answer, ("a1", "B2")) == score


@pytest.mark.parametrize("patch", [[], ["streaming:sinks=2,window=40"]])
@pytest.mark.parametrize(
    "task",
    [
        Passkey(lengths=(300, 420), depths=(0.2, 0.8), max_new_tokens=6),
        LineRetrieval(lengths=(500, 700), bins=2, max_new_tokens=6),
        Ruler(lengths=(900,), subtasks=("niah_single", "niah_multikey"), samples=2, max_new_tokens=6),
    ],
    ids=lambda t: t.name,
)
def test_batches_padded_on_the_left_give_the_same_answers(task, patch):
    from dataclasses import replace

    model, tokenizer = language_model()
    alone = evaluation.run(task, model, tokenizer, patches=patch)
    together = evaluation.run(replace(task, batch_size=3), model, tokenizer, patches=patch)
    assert [v.answers for v in alone] == [v.answers for v in together]
    assert len({fact["tokens"] for fact in alone.facts}) > 1  # so that there was something to pad
    if patch:
        assert alone["dense"].answers != alone.variants[1].answers


def test_an_answer_ends_at_the_end_of_text_token_its_budget_and_its_stop():
    prompts = [task_prompt(new=12), task_prompt(new=5, ids=(1, 2, 3)), task_prompt(new=12, stop="|")]
    said = generate(Oracle(lambda text: " ab|cd\0ef"), Characters(), prompts)
    assert said == [" ab|cd", " ab|c", " ab"]
    assert cut("\n\n a\nb", "\n") == "\n\n a" and cut("\n\n", "\n") == "\n\n"


def test_fit_finds_the_largest_that_fits():
    for length in (3, 50, 51, 777):
        n = fit(lambda n: "ab" * n, len, length, 0, 10_000)
        assert 2 * n <= length < 2 * (n + 1)
    assert fit(lambda n: "ab" * n, len, 10_000, 0, 30) == 30
    with pytest.raises(ValueError, match="takes at least 20 tokens"):
        fit(lambda n: "ab" * n, len, 19, 10, 99)


def test_names_and_coined_words_are_distinct():
    import random

    assert len(set(pairs(5000, random.Random(0)))) == 5000
    assert len(set(coined(3000, random.Random(0)))) == 3000
    with pytest.raises(ValueError, match="ask for a shorter length"):
        pairs(1_000_000, random.Random(0))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LineRetrieval(bins=0), "'bins': 0.* must be at least 1"),
        (lambda: LineRetrieval(lengths=()), "lengths is empty"),
        (lambda: Ruler(samples=0), "'samples': 0.* must be at least 1"),
        (lambda: Ruler(subtasks=("niah",)), "choose among niah_single, niah_multikey"),
        (lambda: Ruler(lengths=()), "lengths is empty"),
        (lambda: LineRetrieval(lengths=(50,)).items(Uniform(), Characters(), 0), "length 50 is too short, it takes"),
        (lambda: Ruler(lengths=(50,)).items(Uniform(), Characters(), 0), "too short for niah_single, it takes"),
        (lambda: Ruler(lengths=(9000,)).items(Uniform(), Characters(), 0), "Ask for lengths up to 3968"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_met_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_prompt_is_encoded_as_the_tokenizer_does_it():
    assert encode(Characters(), "ab") == [97, 98]
    assert np.array_equal(encode(Chatty(), "ab", chat=True), Characters().encode("[user] ab[assistant] "))
