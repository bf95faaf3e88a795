"""pope, chair, mme, amber, vqa: published figures from published answers, and live models dense beside patched."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from hf_attn_patch import eval as evaluation
from hf_attn_patch.cli.models import load_model
from hf_attn_patch.eval import amber_figures, chair, mme, pope_questions, vlm_data, vqa, yes_no
from hf_attn_patch.eval.amber import Amber
from hf_attn_patch.eval.chair import Chair
from hf_attn_patch.eval.mme import Mme
from hf_attn_patch.eval.object_words import ObjectWords, duplicate_share
from hf_attn_patch.eval.pope import Pope
from hf_attn_patch.eval.stats import paired_bootstrap
from hf_attn_patch.eval.task import Metric
from hf_attn_patch.eval.vlm_data import ImageRef, generate, prompt
from hf_attn_patch.eval.vqa import Vqa
from hf_attn_patch.patches.grounding.pai import PayAttentionToImage
from hf_attn_patch.report import evaluation as page
from tests import eval_models, tiny_vlm

GOLDEN = Path(__file__).parent / "golden"
PAI = "pai:alpha=3,first_layer=0"
BROKEN = {"alpha": 9.0, "first_layer": 0}  # is no neutral value


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def pooled(rows: list[dict[str, float]], metrics: tuple[Metric, ...]) -> dict[str, float]:
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {m.name: float(m.at(columns, None, [np.arange(len(rows))])) for m in metrics}


def pictures(folder: Path, names) -> str:
    """Small images of different shapes under these names."""
    from PIL import Image

    for n, name in enumerate(dict.fromkeys(names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(n).integers(0, 255, (40, 40 + 60 * (n % 2), 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return str(folder)


def jsonl(path: Path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def says(monkeypatch):
    """Models answer what the test says, by what they are asked."""

    def make(answer):
        monkeypatch.setattr(
            vlm_data, "generate", lambda model, processor, asked, new, template=None: [answer(t) for _, t in asked]
        )  # fmt: skip

    return make


# -- figures of published answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["pope__handmade", "pope__real_answers"])
@pytest.mark.parametrize("parser", ["official", "pai", "vcd"])
def test_pope_parsers_give_the_published_counts_and_ratios(case, parser):
    data = golden(case)
    for row in data["rows"]:
        said = yes_no.PARSERS[parser](row["answer"], row["label"])
        assert (said == row["label"] if parser == "vcd" else said) == row[
            {"vcd": "vcd_correct"}.get(parser, parser)
        ]
    found = yes_no.figures([r["answer"] for r in data["rows"]], [r["label"] for r in data["rows"]], parser)
    assert found == pytest.approx(data["totals"][parser], abs=1e-12)


@pytest.mark.parametrize("case", ["pope__handmade", "pope__real_answers"])
def test_lmms_parser_takes_the_bare_word_only(case):
    data = golden(case)
    found = yes_no.figures([r["answer"] for r in data["rows"]], [r["label"] for r in data["rows"]], "lmms")
    wanted = data["totals"]["lmms"]
    for name in ("accuracy", "precision", "recall", "f1"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-12)
    assert found["yes_ratio"] == pytest.approx(wanted["yes_ratio_predicted"])


CHAIR_CASES = ["chair__nltk_lemma", "chair__pattern_singularize", "chair__rules_handmade"]


@pytest.mark.parametrize("case", CHAIR_CASES)
def test_chair_of_given_mentions_is_the_published_one(case):
    data = golden(case)
    found = pooled([chair.counts(r["objects"], r["gt"]) for r in data["rows"]], chair.METRICS[:5])
    names = dict(chair_s="CHAIRs", chair_i="CHAIRi", recall="Recall", precision="Precision", f1="F1")
    wanted = {k: 100 * data["totals"][v] for k, v in names.items()}
    assert found == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("case", CHAIR_CASES)
def test_chair_of_captions_has_the_published_chair_s_and_chair_i_within_a_tenth(case):
    data, table = golden(case), ObjectWords.coco()
    named = [[m.name for m in table.mentions(r["caption"])] for r in data["rows"]]
    same = sum(n == r["objects"] for n, r in zip(named, data["rows"]))
    assert same / len(named) >= 0.9
    found = pooled([chair.counts(n, r["gt"]) for n, r in zip(named, data["rows"])], chair.METRICS[:5])
    assert found["chair_s"] == pytest.approx(100 * data["totals"]["CHAIRs"])
    assert found["chair_i"] == pytest.approx(100 * data["totals"]["CHAIRi"], abs=0.1)
    assert found["recall"] == pytest.approx(100 * data["totals"]["Recall"], abs=1.0)


@pytest.mark.parametrize(
    "text, names",
    [
        ("They were caring and training, then bowling, and booking a boating trip.", []),
        ("The parking and sheeping of caring, bussing, birding and catting.", []),
        ("He is skiing, skateboarding and surfboarding.", ["skis", "skateboard", "surfboard"]),
        ("Cars, trains, bowls and books.", ["car", "train", "bowl", "book"]),
        (
            "Two men and a woman.",
            ["person"],
        ),  # as published by nltk's lemmas: its dictionary has a noun "men"
        ("A man, two women and policemen.", ["person", "person", "person"]),
    ],
)
def test_words_that_end_like_objects_are_none(text, names):
    assert [m.name for m in ObjectWords.coco().mentions(text)] == names


def test_men_are_counted_where_a_table_names_them():
    table = ObjectWords.of({"person": ["man", "men"]})
    assert [m.name for m in table.mentions("Two men.")] == ["person"]


def test_a_caption_that_repeats_itself_is_seen_beside_its_chair():
    data = golden("chair__nltk_lemma")
    rows = [chair.grade(r["caption"], r["gt"], ObjectWords.coco()) for r in data["rows"]]
    found = pooled(rows, chair.METRICS)
    assert found["repeated"] > 20 and found["distinct_2"] < 0.8  # PAINT's captions, low CHAIR and all
    once = pooled(
        [chair.grade("There is a dog. There is a cat.", ["dog"], ObjectWords.coco())], chair.METRICS
    )
    assert once["repeated"] == 0 and once["distinct_2"] == pytest.approx(5 / 7)
    assert duplicate_share("A cat. A cat! A dog.\nA cat") == 0.5


def test_chair_i_of_nothing_said_is_not_zero():
    found = pooled([chair.grade("Nothing.", ["dog"], ObjectWords.coco())], chair.METRICS)
    assert found["chair_s"] == 0 and np.isnan(found["chair_i"]) and found["recall"] == 0


@pytest.mark.parametrize("parser", ["original", "lmms"])
def test_mme_parsers_and_scores_are_the_published_ones(parser):
    data = golden("mme__four_tasks")
    total = 0.0
    for task, rows in data["tasks"].items():
        assert [mme.PARSERS[parser](r["answer"]) for r in rows] == [r[parser] for r in rows]
        pairs = list(zip(rows[::2], rows[1::2]))
        graded = [
            mme.grade([a["answer"], b["answer"]], [a["label"].lower(), b["label"].lower()], parser)
            for a, b in pairs
        ]
        score = float(np.mean([g["score"] for g in graded]))
        total += score
        wanted = data["results"][parser][task]
        assert score == pytest.approx(wanted if parser == "lmms" else wanted["score"])
        if parser == "original":
            assert np.mean([g["acc_plus"] for g in graded]) == pytest.approx(wanted["acc_plus"])
    assert total == pytest.approx(data["results"][f"{parser}_total"])


def test_mme_parsers_differ_on_letters_and_points():
    assert (mme.original("Y."), mme.lmms("Y.")) == ("other", "yes")
    assert (mme.original("  no"), mme.original("the answer is no"), mme.lmms(" \n no")) == (
        "no",
        "other",
        "no",
    )


def test_amber_discriminative_rounds_as_the_script_does():
    data = golden("amber__discriminative")
    kinds = [amber_figures.kind(r["type"]) for r in data["rows"]]
    assert kinds == [r["kind"] for r in data["rows"]]
    found = amber_figures.discriminative(
        kinds, [r["truth"] for r in data["rows"]], [r["response"] for r in data["rows"]]
    )
    names = {"all": "Descriminative Task", "existence": "Exsitence"}
    for group, values in found.items():
        wanted = {k.lower(): v for k, v in data["results"][names.get(group, group.capitalize())].items()}
        assert values == wanted, group
    assert (
        amber_figures.normalised("no, it is not") == "No" and amber_figures.normalised("Perhaps") == "Perhaps"
    )


def test_amber_attribute_group_starts_its_denominators_three_times_as_high():
    one = amber_figures.discriminative(["state"], ["yes"], ["Yes"])  # denominators of 1.003 and 1.001
    assert (one["attribute"]["accuracy"], one["state"]["accuracy"]) == (99.7, 99.9)


def test_amber_generative_counts_nouns_as_the_script_does():
    data = golden("amber__generative_nouns")
    alike = {tuple(pair) for pair in data["similar"]}
    rows = [
        amber_figures.generative_counts(
            r["nouns"], r["truth"], r["hallu"], data["association"], data["safe_words"], lambda a, b: (a, b) in alike
        )
        for r in data["rows"]
    ]  # fmt: skip
    assert amber_figures.generative(rows) == {k.lower(): v for k, v in data["results"].items()}


@pytest.mark.parametrize(
    "rule, column", [("official", "official"), ("vqav2", "lmms_vqav2"), ("textvqa", "m4c")]
)
def test_vqa_accuracy_is_the_published_one(rule, column):
    data = golden("vqa__accuracy")
    found = [vqa.accuracy(r["prediction"], r["answers"], rule) for r in data["rows"]]
    assert found == pytest.approx([r[column] for r in data["rows"]], abs=1e-6)
    if rule != "official":
        name = f"normalised_{rule}"
        assert [vqa.normalise(r["prediction"], rule) for r in data["rows"]] == [r[name] for r in data["rows"]]
    assert vqa.accuracy("dont", ["don't"] * 4 + ["no"], rule) == 1.0


# -- numbers of many items ----------------------------------------------------------------------------------------

F1 = Metric("f1", "share", True, "ratio", 4, "top", "bottom", empty=0.0)


def test_a_ratio_is_a_ratio_of_sums_and_a_mean_of_groups_is_not():
    columns = {"top": np.array([1.0, 0, 3, 0]), "bottom": np.array([1.0, 1, 4, 0])}
    assert F1.at(columns, None, [np.arange(4)]) == pytest.approx(4 / 6)
    by_group = Metric("f1", "", True, "ratio", 4, "top", "bottom", over="mean of groups")
    assert by_group.at(columns, None, [np.array([0, 1]), np.array([2, 3])]) == pytest.approx((0.5 + 0.75) / 2)
    total = Metric("f1", "", True, "ratio", 4, "top", "bottom", over="sum of groups")
    assert total.at(columns, None, [np.array([0, 1]), np.array([2, 3])]) == pytest.approx(1.25)


def test_groups_are_resampled_within_themselves():
    """Two groups without any spread inside: the mean of groups cannot vary, a pooled mean does."""
    zeros, second = [0.0] * 20, [0.0] * 4 + [1.0] * 16
    groups = ["a"] * 4 + ["b"] * 16
    within = paired_bootstrap(zeros, second, Metric("m", "", True, over="mean of groups"), groups=groups)
    assert (within.value, within.low, within.high) == (0.5, 0.5, 0.5)
    across = paired_bootstrap(zeros, second, Metric("m", "", True), groups=groups)
    assert across.value == 0.8 and across.low < 0.8 < across.high


def test_a_share_of_nothing_in_some_resamples_has_no_interval():
    columns = {"top": [0.0, 1.0], "bottom": [0.0, 1.0]}
    undefined = Metric("chair_i", "%", False, "ratio", 1, "top", "bottom")
    found = paired_bootstrap(columns, columns, undefined)
    assert found.value == 0 and found.low is None
    assert paired_bootstrap(columns, columns, F1).low == 0


# -- POPE's questions ---------------------------------------------------------------------------------------------

OBJECTS = {
    "a": ["dog", "cat", "dog", "car", "cup"],
    "b": ["dog", "car"],
    "c": ["cat", "cup"],
    "d": ["car", "cat", "umbrella"],
    "e": ["kite"],
}  # in images: car 3, cat 3, cup 2, dog 2, kite 1, umbrella 1


def asked(split: str, image: str, per_image: int = 4, **options) -> list[tuple[str, str]]:
    rows = pope_questions.sample_questions(OBJECTS, split, per_image, **options)
    return [(r["object"], r["label"]) for r in rows if r["image"] == image]


def test_popular_questions_ask_for_what_most_images_have():
    assert asked("popular", "b") == [("dog", "yes"), ("cat", "no"), ("car", "yes"), ("cup", "no")]
    assert asked("popular", "e") == [("kite", "yes"), ("car", "no")]


def test_adversarial_questions_ask_for_what_is_seen_with_the_object_before():
    assert asked("adversarial", "c") == [("cat", "yes"), ("car", "no"), ("cup", "yes"), ("dog", "no")]
    assert asked("adversarial", "b", per_image=2) == [("dog", "yes"), ("cat", "no")]
    zoo = {
        "x": ["dog"],
        "y": ["dog", "zebra"],
        "z": ["dog", "zebra", "ant"],
    }  # a zebra is seen with a dog most often
    rows = pope_questions.sample_questions(zoo, "adversarial", 2, vocabulary=["kite"])
    assert [(r["object"], r["label"]) for r in rows if r["image"] == "x"] == [("dog", "yes"), ("zebra", "no")]
    assert {n for n, label in asked("adversarial", "e") if label == "no"} <= set(
        "dog cat car cup umbrella".split()
    )


@pytest.mark.parametrize("split", pope_questions.SPLITS)
def test_questions_alternate_are_balanced_and_true(split):
    rows = pope_questions.sample_questions(OBJECTS, split, per_image=4, vocabulary=["zebra", "horse"], seed=3)
    assert [r["label"] for r in rows] == ["yes", "no"] * (len(rows) // 2)
    assert [r["question_id"] for r in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert (row["object"] in OBJECTS[row["image"]]) == (row["label"] == "yes")
    pairs = [(r["image"], r["object"]) for r in rows]
    assert len(set(pairs)) == len(pairs) and all(pairs.count(p) == 1 for p in pairs)
    backwards = dict(reversed(OBJECTS.items()))
    again = pope_questions.sample_questions(
        backwards, split, per_image=4, vocabulary=["horse", "zebra"], seed=3
    )
    assert {(r["image"], r["text"]) for r in rows} == {(r["image"], r["text"]) for r in again}


def test_random_questions_depend_on_the_seed_and_use_the_right_article():
    options = dict(vocabulary=[f"thing {i}" for i in range(30)])
    assert asked("random", "a", **options) == asked("random", "a", **options)
    assert asked("random", "a", **options) != asked("random", "a", seed=1, **options)
    assert pope_questions.question("umbrella") == "Is there an umbrella in the image?"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((OBJECTS, "hard"), "'hard' is none of random, popular, adversarial"),
        ((OBJECTS, "random", 5), "per_image=5 must be even"),
        (({"a": []}, "random"), "no image has an object"),
        (
            ({"a": ["dog", "cat"], "b": ["dog"]}, "random"),
            "image 'a' lacks only 0 of 2 objects, 2 are to be asked",
        ),
    ],
)
def test_questions_that_cannot_be_made_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        pope_questions.sample_questions(*arguments)


# -- data ---------------------------------------------------------------------------------------------------------

COCO_200 = GOLDEN / "pope_questions_coco_random_200.jsonl"


def test_missing_images_are_counted_named_and_refused(tmp_path):
    names = list(dict.fromkeys(json.loads(line)["image"] for line in COCO_200.read_text().splitlines()))
    folder = pictures(tmp_path / "val2014", names[:32])
    with pytest.raises(ValueError, match=f"2 of 34 images are not in .*: {names[32]}, {names[33]}. Get them"):
        Pope(data=str(COCO_200), images=folder).read(0)
    with pytest.raises(ValueError, match="images=FOLDER says where the 34 images"):
        Pope(data=str(COCO_200)).read(0)
    items = Pope(data=str(COCO_200), images=folder, samples=2, suffix="vcd").read(0)
    assert len(items) == 12 and {i.group for i in items} == {"random"}
    assert items[0].texts == (
        "Is there a snowboard in the image? Please answer this question with one word.",
    )
    assert [i.expected[0] for i in items] == ["yes", "no"] * 6


def test_a_folder_of_question_files_has_a_split_per_file(tmp_path):
    folder = pictures(tmp_path, ["x.png"])
    row = {"image": "x.png", "text": "Is there a cat in the image?", "label": "yes"}
    for split in ("popular", "random"):
        jsonl(tmp_path / f"coco_pope_{split}.json", [row])
    with pytest.raises(ValueError, match="no file for adversarial; it has coco_pope_popular.json"):
        Pope(data=str(tmp_path), images=folder).read(0)
    items = Pope(data=str(tmp_path), images=folder, splits=("random", "popular")).read(0)
    assert [i.group for i in items] == ["random", "popular"]
    jsonl(tmp_path / "coco_pope_random.json", [{**row, "label": "maybe"}])
    with pytest.raises(ValueError, match="question 1 .random. has the label 'maybe'"):
        Pope(data=str(tmp_path), images=folder, splits=("random",)).read(0)


def test_pope_and_vqa_read_a_dataset_of_the_hub_kind(tmp_path):
    from hf_attn_patch.testbed import scenes

    data = scenes.build("test", 2)
    rows = {
        "image": [data[0]["image"], data[0]["image"], data[1]["image"]],
        "image_source": ["one", "one", "two"],
        "question": ["Is there a cat?", "Is there a dog?", "Is there a cow?"],
        "answer": ["no", "yes", "no"],
        "category": ["adversarial", "random", "random"],
        "answers": [["no"] * 10] * 3,
    }
    import datasets

    made = datasets.Dataset.from_dict(rows, features=datasets.Features(
        {**{k: datasets.Value("string") for k in rows if k not in ("image", "answers")}, "image": datasets.Image(),
         "answers": datasets.List(datasets.Value("string"))}))  # fmt: skip
    made.to_parquet(tmp_path / "test-00000.parquet")
    items = Pope(data=str(tmp_path)).read(0)
    assert [(i.group, i.expected[0]) for i in items] == [
        ("random", "yes"),
        ("random", "no"),
        ("adversarial", "no"),
    ]
    assert items[1].image.load().getpixel((5, 5)) == data[1]["image"].getpixel((5, 5))
    assert [i.expected[0] for i in Pope(data=str(tmp_path), samples=1).read(0)] == ["yes", "no"]
    assert len(Vqa(data=str(tmp_path), split="test", samples=2).read(0)) == 2
    with pytest.raises(ValueError, match="no split 'validation'; it has test"):
        Vqa(data=str(tmp_path)).read(0)


def test_a_hub_id_that_cannot_be_reached_says_what_to_do(monkeypatch):
    import datasets

    def gone(name):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(
        ValueError, match="cannot be had from the hub: offline Give data=FILE and images=FOLDER"
    ):
        Pope(data="lmms-lab/POPE").read(0)


def test_chair_reads_files_and_coco_annotations(tmp_path):
    folder = pictures(tmp_path, ["1.png", "2.png", "3.png"])
    rows = [{"image": "1.png", "objects": ["dogs", "TV"], "captions": ["A man with a hot dog."]}]
    items = Chair(data=jsonl(tmp_path / "c.jsonl", rows), images=folder).read(0)
    assert items[0].expected == ("dog", "hot dog", "person", "tv")
    with pytest.raises(
        ValueError, match="wug is no object of the synonym table. Add it with synonyms=FILE.json"
    ):
        Chair(data=jsonl(tmp_path / "c.jsonl", [{"image": "1.png", "objects": ["wug"]}]), images=folder).read(
            0
        )
    with pytest.raises(ValueError, match="has no instances_val2014.json, captions_val2014.json"):
        Chair(data=str(tmp_path), images=folder).read(0)
    images = [{"id": n, "file_name": f"{n}.png"} for n in (1, 2, 3)]
    boxes = [{"image_id": 2, "category_id": 62}, {"image_id": 2, "category_id": 62}]
    kinds = [{"id": 62, "name": "chair"}]
    said = [{"image_id": 2, "caption": "A stool."}, {"image_id": 1, "caption": "Two buses"}]
    (tmp_path / "instances_val2014.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": kinds})
    )
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": said}))
    items = Chair(data=str(tmp_path), images=folder, samples=2).read(0)
    assert len(items) == 2 and items == Chair(data=str(tmp_path), images=folder, samples=2).read(0)
    everything = Chair(data=str(tmp_path), images=folder).read(0)
    assert [i.expected for i in everything] == [("bus",), ("chair",), ()]


@pytest.mark.parametrize("apart", [False, True])
def test_mme_reads_both_layouts_of_its_folder(tmp_path, apart):
    texts = tmp_path / "color" / ("questions_answers_YN" if apart else "")
    pictures(tmp_path / "color" / ("images" if apart else ""), ["1.jpg", "2.jpg"])
    texts.mkdir(exist_ok=True)
    for n in (1, 2):
        (texts / f"{n}.txt").write_text("Is it red? Please answer yes or no.\tYes\nIs it blue?\tNo\n")
    items = Mme(data=str(tmp_path), subtasks=("color",)).read(0)
    assert [i.expected for i in items] == [("yes", "no")] * 2
    assert items[0].texts[0] == "Is it red? Please answer yes or no."
    (texts / "3.txt").write_text("Is it red?\tYes")
    with pytest.raises(ValueError, match="1 of 3 images of color are not in .*: 3. Get them"):
        Mme(data=str(tmp_path), subtasks=("color",)).read(0)
    with pytest.raises(ValueError, match="has no folder count; it has color"):
        Mme(data=str(tmp_path), subtasks=("count",)).read(0)


def amber_folder(tmp_path: Path) -> dict[str, str]:
    rows = [{"id": 7, "image": "AMBER_1.jpg", "query": "Is there a cloud?"},
            {"id": 8, "image": "AMBER_1.jpg", "query": "Is the sky grey?"}]  # fmt: skip
    notes = [{"id": 7, "type": "discriminative-hallucination", "truth": "no"},
             {"id": 8, "type": "discriminative-attribute-state", "truth": "yes"}]  # fmt: skip
    for name, content in (("query_discriminative", rows), ("annotations", notes), ("relation", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "safe_words.txt").write_text("view\n")
    return {"data": str(tmp_path), "images": pictures(tmp_path / "image", ["AMBER_1.jpg"])}


def test_amber_scores_the_answer_no_and_notes_the_rounding_of_the_script(tmp_path, says):
    says(lambda text: "no." if "cloud" in text else "No")
    model, processor = tiny_vlm.llava()
    result = evaluation.run(Amber(**amber_folder(tmp_path)), model, processor)
    found = result["dense"].aggregates
    assert (found["accuracy"], found["precision"], found["recall"]) == (0.5, 0.5, 1.0)
    assert result["dense"].by_group["accuracy"] == {"existence": 1.0, "state": 0.0}
    assert (
        "dense: AMBER's own rounding, accuracy / F1 of no: all 50.0 / 66.6, existence 99.9 / 99.9"
        in result.notes[0]
    )


def test_amber_generative_without_word_vectors_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(
        ValueError, match="python -m spacy download en_core_web_lg; or take part=discriminative"
    ):
        Amber(**amber_folder(tmp_path), part="generative").read(0)
    with pytest.raises(ValueError, match="data=FOLDER says where AMBER"):
        Amber()


# -- live models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next", "paligemma", "gemma3"])
def test_left_padding_and_neighbours_do_not_change_an_answer(tmp_path, family):
    model, processor = getattr(tiny_vlm, family)()
    pictures(tmp_path, ["a.png", "b.png", "c.png"])
    texts, template = ["hi", "Is there a much longer question in the image?", "a cat"], "U {image} {text}"
    pairs = [(ImageRef(str(tmp_path / f"{n}.png")), text) for n, text in zip("abc", texts)]
    asked = [([[image.load()]], [prompt(processor, text, template)]) for image, text in pairs]
    assert len({len(processor(images=i, text=t)["input_ids"][0]) for i, t in asked}) == 3
    side = processor.tokenizer.padding_side = "right"
    together = generate(model, processor, pairs, 8, template)
    assert together == [generate(model, processor, [pair], 8, template)[0] for pair in pairs]
    assert len(set(together)) == 3 and processor.tokenizer.padding_side == side


def test_prompts_use_the_chat_template_if_there_is_one_and_yours_if_you_give_one():
    _, plain = tiny_vlm.llava()
    _, chat = tiny_vlm.llava(chat=True)
    assert prompt(plain, "Is it?") == "<image>\nIs it?"
    assert prompt(chat, "Is it?") == "user: <image>Is it?answer:"
    assert prompt(chat, "Is it?", "U: {image} {text} A:") == "U: <image> Is it? A:"


def test_a_template_that_writes_the_first_token_itself_gets_no_second_one(tmp_path):
    model, processor = tiny_vlm.llava()
    pictures(tmp_path, ["a.png"])
    given = []

    class Recording:
        tokenizer, batch_decode, image_token = processor.tokenizer, processor.batch_decode, "<image>"

        def __call__(self, **options):
            given.append(options.get("add_special_tokens", True))
            return processor(**options)

    for template in ("<s>{image} {text}", "{image} {text}"):
        generate(model, Recording(), [(ImageRef(str(tmp_path / "a.png")), "hi")], 2, template)
    assert given == [False, True]


SMALL = dict(samples=3, max_new_tokens=4, batch_size=4)


def test_pope_on_scenes_gives_figures_per_split_and_their_mean(says):
    says(lambda text: "Yes")
    model, processor = tiny_vlm.llava()
    result = evaluation.run(Pope(samples=4), model, processor)
    found = result["dense"]
    assert found.aggregates == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0}
    )
    assert set(found.by_group["f1"]) == set(pope_questions.SPLITS)
    assert result.facts[0]["asked"][0].endswith("in the image?")


def test_chair_on_scenes_marks_what_is_not_there(says):
    said = "There is a giraffe. There is a cow. There is a cow."
    says(lambda text: said)
    model, processor = tiny_vlm.llava()
    result = evaluation.run(Chair(samples=40), model, processor)
    cows = [m.start() for m in re.finditer("cow", said)]
    with_cow = ["cow" in f["expected"] for f in result.facts]
    assert any(with_cow) and not all(with_cow)
    for there, marked in zip(with_cow, result["dense"].marks):
        css = {said[start:end]: css for start, end, css in marked}
        assert css["cow"] == ("good" if there else "bad")
        assert [start for start, end, _ in marked if said[start:end] == "cow"] == cows
    assert result["dense"].aggregates["repeated"] == pytest.approx(100 / 3)
    html = page.render(result.to_dict(), result.attachments)
    assert html.count('src="data:image/jpeg;base64,') == 40
    assert html.count('<mark class="good">cow</mark>') == 2 * sum(with_cow)
    assert html.count('<mark class="bad">cow</mark>') == 2 * (40 - sum(with_cow))


def test_captions_of_scenes_name_exactly_their_objects():
    """The synonym table, plurals and words of several tokens agree with what draws and describes the scenes."""
    from hf_attn_patch.testbed import scenes

    table = ObjectWords.of(chair.all_names(scenes))
    for row in scenes.build("tune", 60).remove_columns("image"):
        named = {m.name for m in table.mentions(row["caption"])}
        assert named == {o["name"] for o in row["objects"]}, row["caption"]
    for name in scenes.NAMES:
        assert [m.name for m in table.mentions(scenes.question(name))] == [name]


def test_more_pictures_of_an_item_stand_beside_its_image():
    """The place for attention maps of other tools: data URIs and SVG, in the order they were added."""
    model, processor = tiny_vlm.llava(chat=True)
    result = evaluation.run(Pope(**SMALL), model, processor, limit=2)
    result.attachments[1]["attention <1>"] = "<svg><rect/></svg>"
    html = page.render(result.to_dict(), result.attachments)
    source = "data:image/svg+xml;base64," + base64.b64encode(b"<svg><rect/></svg>").decode()
    assert html.count(f'src="{source}" alt="attention &lt;1&gt;"') == 1
    assert page.render(result.to_dict()).count("data:image") == 0


def test_mme_on_scenes_sums_its_subtasks(says):
    says(lambda text: "yes")
    model, processor = tiny_vlm.llava()
    result = evaluation.run(Mme(samples=12), model, processor)
    assert set(result["dense"].by_group["score"]) == set(mme.SUBTASKS)
    assert result["dense"].aggregates == {"score": 200.0, "acc": 0.5, "acc_plus": 0.0}
    assert result["dense"].answers[0] == "yes\nyes"


@pytest.mark.parametrize("task", [Pope(**SMALL), Chair(**SMALL), Mme(**SMALL)], ids=lambda t: t.name)
def test_a_patch_at_its_neutral_value_gives_the_dense_answers(task):
    model, processor = tiny_vlm.llava(chat=True)
    result = evaluation.run(task, model, processor, patches=[PAI])
    check = result.checks[0]
    assert check.ok and check.total == result.items
    assert check.options == {"alpha": 0.0, "first_layer": 0}
    assert f"neutral == dense: {result.items} of {result.items}" in str(result)
    changed = [a != b for a, b in zip(result["dense"].answers, result.variants[1].answers)]
    assert any(changed)  # the patch itself does something
    assert check.answers == dict(enumerate(result["dense"].answers))
    assert json.loads(result.to_json())["checks"][0]["ok"] is True


def test_a_neutral_value_that_is_none_is_said_in_red(monkeypatch):
    monkeypatch.setattr(PayAttentionToImage, "neutral", classmethod(lambda cls, model: BROKEN))
    model, processor = tiny_vlm.llava(chat=True)
    result = evaluation.run(Pope(**SMALL), model, processor, patches=[PAI])
    check = result.checks[0]
    assert check.ok is False and check.same < check.total
    assert "The numbers of this patch are not to be trusted" in " ".join(str(result).split())
    html = page.render(json.loads(result.to_json()), result.attachments)
    assert re.search(r'<p class="check bad">neutral == dense: \d+ of \d+ \(pai', html)
    assert html.count("at its neutral value said:") == check.total - check.same


def test_a_method_without_neutral_value_and_a_check_switched_off_are_said(monkeypatch):
    model, processor = tiny_vlm.llava()
    result = evaluation.run(Pope(**SMALL, neutral=0), model, processor, patches=[PAI])
    assert "the check at its neutral value was switched off" in str(result).replace("\n", " ")
    monkeypatch.setattr(PayAttentionToImage, "neutral", classmethod(lambda cls, model: None))
    result = evaluation.run(Pope(**SMALL), model, processor, patches=[PAI])
    assert result.checks[0].ok is None and "has no neutral value" in str(result)


def test_many_items_are_checked_in_whole_batches_spread_over_all():
    batches = [list(range(i, min(i + 8, 100))) for i in range(0, 100, 8)]
    chosen = Pope(neutral=20).neutral_batches(batches)
    assert chosen == [batches[0], batches[4], batches[8]]
    assert Pope(neutral=64, batch_size=8).neutral_batches(batches[:8]) == batches[:8]
    model, processor = tiny_vlm.llava(chat=True)
    result = evaluation.run(Pope(**SMALL, neutral=7), model, processor, patches=[PAI])
    check = result.checks[0]
    assert check.ok and list(check.answers) == [0, 1, 2, 3, 28, 29, 30, 31] and result.items == 54


def test_a_killed_run_goes_on_and_its_neutral_check_too(tmp_path):
    model, processor = tiny_vlm.llava(chat=True)
    task = Pope(**SMALL)
    whole = evaluation.run(task, model, processor, patches=[PAI])
    calls = []
    real = type(model).generate

    def dying(*args, **kwargs):
        if len(calls) == 12:
            raise KeyboardInterrupt
        calls.append(1)
        return real(model, *args, **kwargs)

    model.generate = dying
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(task, model, processor, patches=[PAI], out=tmp_path)
    del model.generate
    again = evaluation.run(task, model, processor, patches=[PAI], out=tmp_path)
    assert [v.answers for v in again] == [v.answers for v in whole]
    assert str(again.checks[0]) == str(whole.checks[0]) and "are from an earlier start" in " ".join(
        again.notes
    )
    model.generate = dying  # nothing is left to ask
    finished = evaluation.run(task, model, processor, patches=[PAI], out=tmp_path)
    assert finished["dense"].aggregates == whole["dense"].aggregates


def test_batch_size_and_limit_work_as_for_every_task():
    model, processor = tiny_vlm.llava(chat=True)
    one = evaluation.run(Pope(samples=3, max_new_tokens=4, batch_size=1), model, processor, limit=5)
    five = evaluation.run(Pope(samples=3, max_new_tokens=4, batch_size=5), model, processor, limit=5)
    assert one.items == 5 and one["dense"].answers == five["dense"].answers


def test_the_command_line_loads_the_processor_and_writes_pictures(tmp_path):
    from tests.test_cli import invoke

    model, processor = tiny_vlm.llava(chat=True)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert type(load_model(str(folder), takes="processor")[1]).__name__ == "LlavaProcessor"
    assert hasattr(load_model(str(folder))[1], "encode")
    text = invoke("eval", "pope:samples=2,max_new_tokens=3", "-m", str(folder), "-p", PAI, "--batch-size", "4",
                  "--limit", "6", "--out", str(tmp_path / "run"))  # fmt: skip
    assert "neutral == dense: 6 of 6" in text
    html = (tmp_path / "run" / "index.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 6 and "neutral == dense: 6 of 6" in html
    assert "base64" not in (tmp_path / "run" / "result.json").read_text()


# -- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: eval_models.language_model(), "LlamaForCausalLM takes no images"),
        (lambda: eval_models.vision_model(), "Dinov2Model generates no text"),
        (lambda: (tiny_vlm.llava()[0], None), "needs the processor of the model.*found nothing"),
        (
            lambda: (tiny_vlm.llava()[0], tiny_vlm.characters()),
            "AutoProcessor.*found TokenizersBackend",
        ),
    ],
    ids=["text model", "vision model", "no processor", "a tokenizer"],
)
def test_models_and_processors_that_do_not_fit_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        evaluation.run(Pope(**SMALL), *make())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Pope(template="USER: {text}"), "must hold {image} and {text} once each"),
        (lambda: Pope(parser="mine"), "parser='mine' is none of official, pai, vcd, lmms"),
        (lambda: Pope(splits=("hard",)), "must be some of random, popular, adversarial"),
        (lambda: Chair(batch_size=0), "chair: batch_size=0 must be at least 1"),
        (lambda: Mme(parser="pai"), "none of original, lmms"),
        (lambda: Vqa(rule="exact"), "none of official, vqav2, textvqa"),
        (
            lambda: ObjectWords.of({"dog": ["hound"], "wolf": ["hound"]}),
            "'hound' stands for 'dog' and for 'wolf'",
        ),
        (lambda: ObjectWords.load("nowhere.json"), "neither coco nor a JSON file"),
        (lambda: yes_no.figures(["yes"], [], "pai"), "one label per answer"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_prompt_that_does_not_fit_its_image_is_shown(tmp_path):
    model, processor = tiny_vlm.llava()
    pictures(tmp_path, ["a.png"])
    pair = (ImageRef(str(tmp_path / "a.png")), "hi")
    assert generate(model, processor, [pair], 4, "{image} {text}")
    with pytest.raises(
        ValueError, match="LlavaProcessor makes no batch of 1 prompts such as '<image> <image> hi'"
    ):
        generate(model, processor, [pair], 4, "<image> {image} {text}")
    processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"  # a template that forgets images
    with pytest.raises(ValueError, match="such as 'hi': .*Say where the image goes with template='"):
        generate(model, processor, [pair], 4)


def test_a_processor_that_loses_the_image_without_a_word_is_caught(tmp_path):
    """Without the check the model would answer from the text alone."""
    model, processor = tiny_vlm.llava()
    pictures(tmp_path, ["a.png"])

    class Careless:
        tokenizer, batch_decode = processor.tokenizer, processor.batch_decode

        def __call__(self, images, text, **options):
            return self.tokenizer([t.replace("<image>", "") for t in text], **options)

    with pytest.raises(
        ValueError, match=r"1 of 1 prompts hold no image token, such as '<image>\\nhi'. Say where"
    ):
        generate(model, Careless(), [(ImageRef(str(tmp_path / "a.png")), "hi")], 4)
