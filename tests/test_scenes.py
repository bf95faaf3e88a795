"""Scenes say what is in them: captions, questions and boxes agree with what was drawn, and seeds decide everything."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from hf_attn_patch.testbed import objects, scenes
from hf_attn_patch.testbed.sprites import sprites

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def data():
    return scenes.build("test", 60, seed=3)


def test_every_object_has_a_picture_and_words_of_its_own():
    assert list(sprites()) == objects.NAMES and len(objects.NAMES) == 86
    assert all(np.array(s)[..., 3].max() == 255 for s in sprites().values())
    words = Counter(w for words in scenes.SYNONYMS.values() for w in words)
    assert max(words.values()) == 1
    assert set(objects.PARTNER) <= set(objects.NAMES) and set(objects.PAINTED) <= set(objects.NAMES)


def test_the_same_seed_draws_the_same_scenes_and_splits_differ(data):
    again = scenes.build("test", 5, seed=3)
    for a, b in zip(data, again):
        assert np.array_equal(a["image"], b["image"]) and a["caption"] == b["caption"]
    others = [scenes.build("train", 1, seed=3)[0]["caption"], scenes.build("test", 1, seed=4)[0]["caption"]]
    assert data[0]["caption"] not in others
    with pytest.raises(ValueError, match="train, tune, test"):
        scenes.build("validation", 1)


def test_captions_name_exactly_the_objects_of_the_scene(data):
    for row in data:
        names = {o["name"] for o in row["objects"]}
        text = f" {row['caption'].lower().replace('.', ' ')} "
        said = {n for n, words in scenes.SYNONYMS.items() if any(f" {w} " in text for w in words)}
        # "teddy bear" says "bear" too: longer names win
        said -= {n for n in said for m in said if n != m and n in m.split() and n not in names}
        assert said == names, row["caption"]


def test_boxes_lie_in_the_image_where_the_place_says_and_something_is_drawn_there(data):
    for row in data:
        for thing, o in zip(scenes.things_of(row), row["objects"]):
            left, top, right, bottom = o["box"]
            assert 0 <= left < right <= scenes.SIZE and 0 <= top < bottom <= scenes.SIZE
            assert scenes.SMALLEST - 1 <= max(right - left, bottom - top) <= scenes.LARGEST + 1
            assert o["place"] == thing.place
            if "left" in o["place"]:
                assert thing.center[0] < scenes.SIZE / 3
            if "bottom" in o["place"]:
                assert thing.center[1] >= scenes.SIZE * 2 / 3
        for a in row["objects"]:
            covers = [scenes.covered(a["box"], b["box"]) for b in row["objects"] if b is not a]
            assert max(covers, default=0.0) <= scenes.HIDDEN


def test_questions_come_in_pairs_and_their_answers_are_true(data):
    asked = scenes.pairs(data)
    assert {q["subtask"] for q in asked} == {"existence", "count", "position", "color"}
    yes = Counter((q["subtask"], q["answer"]) for q in asked)
    assert all(yes[kind, "Yes"] == yes[kind, "No"] for kind, _ in yes)
    assert asked == scenes.pairs(data) != scenes.pairs(data, seed=1)
    for q in asked:
        things = scenes.things_of(data[q["image_id"]])
        names = [t.name for t in things]
        text = q["question"]
        if q["subtask"] == "existence":
            true = any(text == scenes.question(n) for n in names)
        elif q["subtask"] == "count":
            number = next(n for n, w in {1: "only one", **scenes.COUNTS}.items() if w in text)
            word = text.removesuffix(" in the image?").split(scenes.COUNTS.get(number, "only one") + " ")[1]
            name = next(n for n in objects.NAMES if word in (n, objects.plural(n)))
            true = names.count(name) == number
        elif q["subtask"] == "position":
            first, second = text.removesuffix("?").split(" the ", 1)[1].split(" on the left of the ")
            a, b = (next(t for t in things if t.name == n) for n in (first, second))
            true = a.center[0] < b.center[0]
        else:
            true = any(text == f"Is the {t.name} {t.color}?" for t in things)
        assert true == (q["answer"] == "Yes"), (text, names)


def test_partners_are_seen_together_more_often_than_chance():
    rng = random.Random(0)
    seen = [set(scenes.sample_names(rng, rng.choice(list(scenes.GROUPS)))) for _ in range(3000)]
    have = lambda *names: sum(set(names) <= s for s in seen) / len(seen)
    for a, b in objects.PARTNERS[:6]:
        assert have(a, b) > 2 * have(a) * have(b)


@pytest.mark.parametrize(
    "name, text",
    [("apple", "Is there an apple"), ("grapes", "Are there grapes"), ("deer", "Is there a deer")],
)
def test_questions_are_english(name, text):
    assert scenes.question(name) == f"{text} in the image?"


def test_a_row_for_training_lets_every_turn_see_the_image_and_itself_only():
    from hf_attn_patch.testbed import train_llava

    class Words:  # a tokenizer of words: enough to see the structure
        pad_token_id = 0

        def __call__(self, text, add_special_tokens=False):
            ids = [1 + sum(w.encode()) % 97 for w in text.replace("<image>", " <image> ").split()]
            return type("Out", (), {"input_ids": ids})

    class Processor:
        tokenizer = Words()

        @staticmethod
        def image_processor(images, return_tensors):
            import torch

            return type("Out", (), {"pixel_values": torch.zeros(len(images), 3, 2, 2)})

    import torch

    rows = [train_llava.row_of(f"train-0-{i}", Processor) for i in range(3)]
    batch = train_llava.batch_of(rows, Processor, torch.float32)
    for i, row in enumerate(rows):
        seen = batch["attention_mask"][i, 0] == 0
        n = len(row.ids)
        for q in range(n):
            for k in range(n):
                own = row.turns[k] in (0, row.turns[q]) and k <= q
                assert bool(seen[q, k]) == own
        assert not seen[:n, n:].any()
        starts = [row.turns.index(t) for t in range(1, max(row.turns) + 1)]
        assert len({row.positions[s] for s in starts}) == 1
        # every target is the token that follows in its turn
        for q, target in enumerate(row.targets):
            if target >= 0:
                assert row.ids[q + 1] == target and row.turns[q + 1] == row.turns[q]
        assert any(row.short) and sum(t >= 0 for t in row.targets) > 20
