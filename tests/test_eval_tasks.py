"""Each task alone: what its items are, and scores that can be known beforehand."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch

from hf_attn_patch.eval.agreement import Agreement
from hf_attn_patch.eval.knn import Knn, nearest_class
from hf_attn_patch.eval.passkey import Passkey, is_right
from hf_attn_patch.eval.perplexity import Perplexity
from tests.eval_models import Characters, language_model, vision_model

NOTHING = lambda n: None


class Uniform:
    """A language model that knows nothing, with just enough of the interface."""

    device = torch.device("cpu")
    config = types.SimpleNamespace(
        get_text_config=lambda: types.SimpleNamespace(max_position_embeddings=4096)
    )

    def get_output_embeddings(self):
        return object()

    def __call__(self, input_ids, **_):
        return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, 128))


@pytest.mark.parametrize(
    "context, stride, chunk", [(256, None, 64), (256, 64, 50), (100, 33, 7), (300, 300, 300)]
)
def test_perplexity_counts_every_token_once(context, stride, chunk):
    task = Perplexity(tokens=300, context=context, stride=stride, chunk=chunk)
    items = task.items(Uniform(), Characters(), 0)
    counted = [t for i in items for t in range(i.first, i.last)]
    # the first token of the text has no past; with overlapping contexts only that one is left out
    skipped = [0] if stride or context >= 300 else list(range(0, 300, context))
    assert sorted(counted + skipped) == list(range(300))
    assert all(i.start < i.first and i.last <= i.end <= i.start + context for i in items)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary():
    task = Perplexity(tokens=200, context=100, stride=50)
    items = task.items(Uniform(), Characters(), 0)
    scores = task.score(Uniform(), Characters(), items, None, NOTHING)["perplexity"]
    assert task.metrics[0].of(np.array(scores), np.array(task.weights(items))) == pytest.approx(128, rel=1e-5)


def test_perplexity_agrees_with_the_loss_of_transformers():
    model, tokenizer = language_model()
    task = Perplexity(tokens=120, context=120, chunk=13)
    items = task.items(model, tokenizer, 0)
    scores = task.score(model, tokenizer, items, None, NOTHING)["perplexity"]
    with torch.no_grad():
        loss = model(task._ids, labels=task._ids).loss
    assert task.metrics[0].of(np.array(scores), np.array(task.weights(items))) == pytest.approx(
        loss.exp().item(), rel=1e-4
    )


def test_perplexity_reads_a_file(tmp_path):
    (tmp_path / "text.txt").write_text("abc" * 30)
    task = Perplexity(tokens=90, context=90, text=str(tmp_path / "text.txt"))
    task.items(Uniform(), Characters(), 0)
    assert Characters().decode(task._ids[0]) == "abc" * 30
    with pytest.raises(ValueError, match="asked for 91 tokens, the text has 90"):
        Perplexity(tokens=91, context=91, text=str(tmp_path / "text.txt")).items(Uniform(), Characters(), 0)


def test_perplexity_of_answers_counts_answers_only(tmp_path):
    model, tokenizer = language_model()
    pairs = [("What is it?", " A cat."), ("And why is that so?", " Because of the night.")]
    file = tmp_path / "replies.jsonl"
    file.write_text("\n\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in pairs))
    task = Perplexity(answers=str(file), context=100)
    items = task.items(model, tokenizer, 0)
    scores = task.score(model, tokenizer, items, None, NOTHING)["perplexity"]
    for (prompt, answer), score in zip(pairs, scores):
        ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : len(prompt)] = -100  # one token per character
        with torch.no_grad():
            assert score == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-4)
    assert task.weights(items) == [len(a) for _, a in pairs]
    assert task.batches(items) == [[0], [1]]


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"prompt": "a"}', "line 1 is not"),
        ('{"prompt": "a", "answer": "b"}\n[1]', "line 2 is not"),
        ('{"prompt": "a", "answer": 3}', "must be texts"),
        ('{"prompt": "a", "answer": ""}', "line 1: the answer has no tokens"),
        ('{"prompt": "aaaaaaaaaa", "answer": "b"}', "line 1 has 11 tokens, context=10"),
        ("", "has no lines"),
    ],
)
def test_replies_that_cannot_be_used_name_their_line(tmp_path, text, words):
    file = tmp_path / "replies.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        Perplexity(answers=str(file), context=10).items(Uniform(), Characters(), 0)
    with pytest.raises(ValueError, match="is not a file"):
        Perplexity(answers=str(tmp_path / "none")).items(Uniform(), Characters(), 0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Perplexity(text="a", answers="b"), "give one of them"),
        (lambda: Perplexity(tokens=1), "at least 2"),
        (lambda: Perplexity(context=8, stride=9), "stride=9 must be between 1 and context=8"),
        (lambda: Passkey(lengths=(10,)), "at least 64"),
        (lambda: Passkey(depths=(1.5,)), "between 0 and 1"),
        (lambda: Passkey(max_new_tokens=0), "at least 1"),
        (lambda: Agreement(count=0), "at least 1"),
        (lambda: Knn(train=5, k=6), "k=6 must be between 1 and train=5"),
    ],
)
def test_options_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_passkey_prompts_have_their_length_and_hide_the_key_at_the_right_depth():
    items = Passkey(lengths=(400, 900), depths=(0.0, 0.5, 1.0)).items(Uniform(), Characters(), 0)
    assert len({i.expected for i in items}) == len(items)
    for item in items:
        text, key, length = Characters().decode(item.ids), item.expected[0], item.facts["length"]
        assert length - 210 < len(text) <= length + 2
        assert text.count(key) == 2 and text.endswith("The secret number is")
        assert abs(text.index(key) / len(text) - item.facts["depth"]) < 0.35


def test_passkey_is_the_same_for_a_seed_and_another_for_another():
    make = lambda seed: [i.expected for i in Passkey(lengths=(400,)).items(Uniform(), Characters(), seed)]
    assert make(0) == make(0) != make(1)


class Parrot(Uniform):
    """Answers every prompt with `answer`, {key} being the hidden number."""

    def __init__(self, answer: str):
        self.answer = answer

    def generate(self, input_ids, **_):
        text = Characters().decode(input_ids[0])
        key = text.split("The secret number is ")[1][:5]
        return torch.cat([input_ids, torch.tensor([Characters().encode(self.answer.format(key=key))])], 1)


@pytest.mark.parametrize(
    "answer, right", [(" {key}. Remember", 1.0), (" 1{key}", 0.0), (" not a number", 0.0)]
)
def test_passkey_scores_the_answer(answer, right):
    task = Passkey(lengths=(400,), depths=(0.2, 0.8))
    items = task.items(Uniform(), Characters(), 0)
    assert task.score(Parrot(answer), Characters(), items, None, NOTHING) == {"accuracy": [right, right]}
    assert task.groups(items) == ["400", "400"] and len(task.answers) == 2


@pytest.mark.parametrize(
    "answer, right",
    [
        ("12345", True),
        (" 12,345.", True),
        ("it is 12345 67", True),
        ("123456", False),
        ("1 2345", False),
        ("", False),
    ],
)
def test_only_the_first_number_counts(answer, right):
    assert is_right(answer, "12345") is right


def test_tasks_say_what_they_need():
    language, tokenizer = language_model()
    vision, pixels = vision_model()
    with pytest.raises(ValueError, match="no language-model head"):
        Perplexity().items(vision, tokenizer, 0)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        Passkey().items(language, None, 0)
    with pytest.raises(ValueError, match="takes 'input_ids', not pixel_values"):
        Knn().items(language, pixels, 0)
    with pytest.raises(ValueError, match="the model has 1024 positions. Ask for at most 1024"):
        Perplexity(tokens=2048, context=2048).items(language, tokenizer, 0)
    with pytest.raises(ValueError, match="Ask for lengths up to 1016"):
        Passkey(lengths=(2000,)).items(language, tokenizer, 0)


def test_a_model_agrees_with_itself_and_not_with_another():
    model, pixels = vision_model()
    task = Agreement(count=4, batch=3)
    items = task.items(model, pixels, 0)
    reference = task.reference(model, items)
    same = task.score(model, pixels, items, reference, NOTHING)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    other = task.score(model, pixels, items, reference, NOTHING)
    assert np.allclose(same["cls_cosine"], 1) and np.allclose(same["patch_cosine"], 1)
    assert max(other["cls_cosine"]) < 0.99 and max(other["patch_cosine"]) < 0.99


def test_agreement_takes_another_size_and_image_files(tmp_path):
    from PIL import Image

    model, pixels = vision_model()
    assert Agreement(count=2, size=28).items(model, pixels, 0)[0].pixels.shape == (3, 28, 28)
    for i in range(3):
        Image.new("L", (20, 30), color=80 * i).save(tmp_path / f"{i}.png")
    items = Agreement(count=2, images=str(tmp_path)).items(model, pixels, 0)
    first, second = (item.pixels for item in items)
    assert first.shape == (3, 56, 56) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="is not a folder"):
        Agreement(images=str(tmp_path / "none")).items(model, pixels, 0)


def test_nearest_class_is_the_vote_of_the_neighbours():
    known = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    asked = torch.tensor([[2.0, 0.1], [0.1, 3.0]])
    assert nearest_class(known, [3, 3, 7, 7], asked, k=3, temperature=0.07) == [3, 7]


def test_knn_finds_classes_that_are_in_the_pixels():
    model, pixels = vision_model()
    task = Knn(train=300, test=60, k=5, batch=50)
    items = task.items(model, pixels, 0)
    accuracy = np.mean(task.score(model, pixels, items, None, NOTHING)["accuracy"])
    assert accuracy > 0.3  # chance is 0.1; even random features keep some of a digit
    assert len(task.groups(items)) == 60
