"""What a patch leaves of a vision model: kept attention, features by layer, logits; k-NN on any data; speed by size."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import eval as evaluation
from hf_attn_patch import registry
from hf_attn_patch.call.program import Program
from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.eval import kept_mass as kept_mass_module
from hf_attn_patch.eval.agreement import Agreement
from hf_attn_patch.eval.kept_mass import kept_mass, kept_share
from hf_attn_patch.eval.knn import Knn
from hf_attn_patch.eval.states import states
from hf_attn_patch.eval.vit_throughput import VitThroughput
from tests.eval_models import language_model, vision_model
from tests.test_eval_probes import LOCAL, NEUTRAL, classifier, pictures

RESTRICTING = [
    "neighborhood:window=2",
    "swin_window:window=2",
    "clear:radius=1.0",
    "biformer:regions=2,topk=1",
    "vmoba:slab=1,tile=[2,2],pool=query,topk=1",
    "sparsifiner:keep=0.4,coefs=2,reduce=2",
]
DIGITS = {"data": "testbed:digits", "train": 60, "test": 20, "batch": 20}
NOTHING = lambda n: None


def images(count=3, seed=1, side=56):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def probabilities(model, pixels):
    """Attention probabilities of every layer by the model's own eager attention, or the patched one's."""
    model.set_attn_implementation("eager") if not hap.active(model) else None
    with torch.no_grad():
        return [a.double() for a in model(pixel_values=pixels, output_attentions=True).attentions]


def spec(text):
    found = evaluation.parse_patch_spec(text)
    return found.name, dict(found.options)


# -- kept mass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", RESTRICTING)
def test_kept_mass_is_dense_probability_on_keys_that_the_patched_model_reads(text):
    # A patch on one layer only gets the dense queries and keys there, so its zeros are the keys that it leaves out.
    model, _ = vision_model()
    pixels, (name, options) = images(), spec(text)
    dense, expected = probabilities(model, pixels), []
    for layer in (0, 1):
        with hap.patched(model, name, layers=[layer], **options):
            read = probabilities(model, pixels)[layer] > 0
        expected.append((dense[layer] * read).sum(-1).mean((1, 2)))
    # On all layers at once, layer 1 of the patched model would see other queries and keys.
    with hap.patched(model, name, **options) as handle, kept_mass(model, [handle], len(pixels)) as found:
        probabilities(model, pixels)
    for layer in (0, 1):
        assert 0.1 < expected[layer].max() < 0.95
        assert torch.allclose(found[layer][0], expected[layer], rtol=0, atol=1e-6)


def test_while_it_looks_the_model_computes_what_it_does_without_the_patch():
    model, _ = vision_model()
    pixels = images()
    with torch.no_grad():
        dense = model(pixel_values=pixels).last_hidden_state
        with hap.patched(model, "neighborhood", window=1) as handle:
            patched = model(pixel_values=pixels).last_hidden_state
            with kept_mass(model, [handle], 3):
                looked_at = model(pixel_values=pixels).last_hidden_state
            again = model(pixel_values=pixels).last_hidden_state
    assert torch.equal(looked_at, dense) and torch.equal(again, patched) and not torch.equal(dense, patched)
    assert not hap.active(model)


def test_kept_mass_of_some_heads_counts_the_others_as_whole():
    model, _ = vision_model()
    pixels, found = images(), {}
    for heads in (None, [1]):
        with hap.patched(model, "neighborhood", window=1, layers=[0], heads=heads) as handle:
            with kept_mass(model, [handle], 3) as kept, torch.no_grad():
                model(pixel_values=pixels)
        found[heads is None] = kept[0][0]
    dense = probabilities(model, pixels)[0]
    own = torch.eye(17, dtype=torch.bool)
    own[0] = own[:, 0] = True
    of_heads = (dense * own).sum(-1).mean(-1)
    assert torch.allclose(found[True], of_heads.mean(1), atol=1e-6, rtol=0)
    assert torch.allclose(found[False], (of_heads[:, 1] + 3) / 4, atol=1e-6, rtol=0)


def test_rows_are_looked_at_in_blocks_and_the_block_does_not_matter(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 300, 8, generator=draw) for h in (4, 2, 2))
    dense = Program(q, k, v, hap.masks.Mask(2, 300, 300), scale=8**-0.5)
    copy = dataclasses.replace(dense, rules=[SinkWindow(1, 40)])
    asked, real = [], kept_mass_module.probabilities

    def spy(program, rows):
        asked.append(len(rows))
        return real(program, rows)

    monkeypatch.setattr(kept_mass_module, "probabilities", spy)
    whole = kept_share(dense, copy)
    assert sum(asked) == 300 and max(asked) == kept_mass_module.BLOCK < 300
    assert torch.allclose(kept_share(dense, copy, block=7), whole, rtol=0, atol=1e-9)
    assert whole.shape == (2,) and 0 < whole.min() and whole.max() < 1


def test_rows_that_read_nothing_are_not_counted():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, generator=draw) for _ in range(3))
    padding = torch.tensor([[False, False, True, True, True, True]])
    dense = Program(q, k, v, hap.masks.Mask(1, 6, 6, causal=True, padding=padding), scale=0.5)
    assert kept_share(dense, dense).tolist() == [1.0]


def test_windows_of_an_image_are_one_image():
    from hf_attn_patch.testbed.tiny import tiny_model

    @dataclasses.dataclass
    class Half(registry.Patch):
        name = "half"

        def edit(self, program, call):
            program.restrict(SinkWindow(0, 1), call.heads)

    model = tiny_model("swin").eval()
    side = model.config.image_size
    two = images(2, side=side)[:, : model.config.num_channels]
    found = []
    for pixels in (two, two[:1], two[1:]):
        with hap.patched(model, Half()) as handle, kept_mass(model, [handle], len(pixels)) as kept:
            with torch.no_grad():
                model(pixel_values=pixels)
        found.append(kept)
    assert found[0]
    for layer, shares in found[0].items():
        both = [a[0] for a in (found[1][layer], found[2][layer])]
        assert torch.allclose(shares[0], torch.cat(both), atol=1e-5, rtol=0) and shares[0].max() < 1


# -- agreement --------------------------------------------------------------------------------------------------------


def test_agreement_of_a_backbone_has_features_and_kept_mass_by_layer():
    model, pixels = vision_model()
    result = evaluation.run("agreement:count=4", model, pixels, patches={"same": NEUTRAL, "local": LOCAL})
    assert [m.name for m in result.metrics] == ["cls_cosine", "patch_cosine", "kept_mass"]
    assert set(result["dense"].scores["kept_mass"]) == {1.0} == set(result["same"].scores["kept_mass"])
    local = result["local"].scores
    assert max(local["kept_mass"]) < 0.9
    # the last layer is what the model gives
    assert np.allclose(local["cls_cosine layer 1"], local["cls_cosine"])
    assert np.allclose(local["patch_cosine layer 1"], local["patch_cosine"])
    assert np.allclose(
        np.mean([local["kept_mass layer 0"], local["kept_mass layer 1"]], axis=0), local["kept_mass"]
    )
    (table,) = result.details
    assert table.columns == ("layer", "same", "local") and [row[0] for row in table.rows] == ["0", "1"]
    assert table.rows[1][1] == "1.000 / 1.000 / 1.000"
    means = [np.mean(local[f"{name} layer 0"]) for name in ("cls_cosine", "patch_cosine", "kept_mass")]
    assert table.rows[0][2] == " / ".join(f"{mean:.3f}" for mean in means)


def test_layers_before_a_patch_are_untouched_and_layers_without_it_keep_all():
    model, pixels = vision_model()
    last, first = (
        evaluation.run("agreement:count=3", model, pixels, patches=[f"{LOCAL},layers={n}"]).variants[1].scores
        for n in (1, 0)
    )
    for name in ("cls_cosine", "patch_cosine", "kept_mass"):
        assert np.allclose(last[f"{name} layer 0"], 1, atol=1e-9)
    assert max(last["patch_cosine layer 1"]) < 0.999 and max(last["kept_mass layer 1"]) < 0.9
    assert max(first["patch_cosine layer 0"]) < 0.999 and set(first["kept_mass layer 1"]) == {1.0}


def test_a_method_with_keys_of_its_own_has_no_kept_mass_and_the_table_says_why(tmp_path):
    from hf_attn_patch.report import evaluation as page

    model, pixels = vision_model()
    patches = {"agent": "agent:agents=2", "prompts": "tcpa", "local": LOCAL}
    result = evaluation.run("agreement:count=2", model, pixels, patches=patches)
    for label in ("agent", "prompts"):
        assert math.isnan(result[label].aggregates["kept_mass"])
        assert result[label].aggregates["patch_cosine"] < 0.9999  # the rest is there
    text = str(result)
    assert "nan" not in text and "kept mass –: the patch reads keys of its own" in text
    numbers = re.compile(r"[01]\.\d{3} / 0\.\d{3} / –")  # cosines of every layer are there
    assert [row[0] for row in result.details[0].rows] == ["0", "1"]
    assert all(numbers.fullmatch(cell) for row in result.details[0].rows for cell in row[1:3])
    written = page.write(result.to_dict(), tmp_path / "index.html").read_text()
    assert "by layer: CLS cosine / patch cosine / kept mass" in written and "reads keys of its own" in written
    assert result.details[0].rows[0][3] in written
    assert not evaluation.run("agreement:count=2", model, pixels, patches=[LOCAL]).details[0].note


@pytest.mark.parametrize("asked_before", [False, True])
def test_states_are_those_between_the_layers_also_where_a_patch_adds_tokens(asked_before):
    model, _ = vision_model()
    pixels, entered = images(2), []
    if asked_before:  # transformers' hooks, which stay, then come before those that take the tokens away
        states(model, pixels, every_layer=True)
    model.encoder.layer[1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with hap.patched(model, "tcpa"):
        found = states(model, pixels, every_layer=True)
        with torch.no_grad():
            last = model(pixel_values=pixels).last_hidden_state
    assert len(found.layers) == 2 and torch.equal(found.layers[0], entered[0])
    assert torch.equal(found.layers[1], last) and torch.equal(found.cls(), last[:, 0]) and found.prefix == 1


def test_a_layer_of_another_shape_has_no_cosine_and_the_others_keep_their_number(monkeypatch):
    from hf_attn_patch.eval import agreement

    def without_first(*args, **kwargs):
        found = states(*args, **kwargs)
        if len(found.layers) > 1:
            found.layers[0] = None
        return found

    monkeypatch.setattr(agreement, "states", without_first)
    model, pixels = vision_model()
    result = evaluation.run("agreement:count=2", model, pixels, patches={"local": LOCAL})
    first, last = (row[1] for row in result.details[0].rows)
    assert first.startswith("– / – / 0.") and "–" not in last


def test_a_classifier_is_compared_by_its_logits():
    model, pixels = classifier()
    task = Agreement(count=12, batch=5)
    result = evaluation.run(task, model, pixels, patches={"local": LOCAL})
    values = torch.stack([item.pixels for item in task.items(model, pixels, 0)])
    with torch.no_grad():
        dense = torch.distributions.Categorical(logits=model(pixel_values=values).logits.double())
        with hap.patched(model, "neighborhood", window=[1, 1]):
            patched = torch.distributions.Categorical(logits=model(pixel_values=values).logits.double())
    expected = torch.distributions.kl_divergence(dense, patched)
    assert np.allclose(result["local"].scores["kl"], expected, atol=1e-6) and expected.min() > 1e-4
    same = (dense.probs.argmax(-1) == patched.probs.argmax(-1)).double()
    assert result["local"].scores["top1_agreement"] == same.tolist() and 0 < same.mean() < 1
    assert set(result["dense"].scores["kl"]) == {0.0} and result["dense"].aggregates["top1_agreement"] == 1


def test_a_probe_is_trained_on_dense_features_and_asked_about_both():
    model, pixels = vision_model()
    task = Agreement(count=10, data="testbed:digits", probe=60, batch=20, layers=False)
    heads = []

    class Spy(Agreement):
        def reference(self, model, items):
            heads.append((len(hap.active(model)), super().reference(model, items)))
            return heads[-1][1]

    spy = Spy(**dataclasses.asdict(task))
    result = evaluation.run(spy, model, pixels, patches={"local": LOCAL})
    ((carried, (cls, _, logits, head)),) = heads  # one head, from the model as it was given
    assert carried == 0 and torch.equal(head.logits(cls), logits)
    values = torch.stack([item.pixels for item in spy.items(model, pixels, 0)])
    with torch.no_grad(), hap.patched(model, "neighborhood", window=[1, 1]):
        after = head.logits(model(pixel_values=values).last_hidden_state[:, 0]).double()
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (logits, after))
    assert np.allclose(result["local"].scores["kl"], torch.distributions.kl_divergence(p, q), atol=1e-5)
    # the probe knows its digits: it is no random head
    assert head.accuracy > 0.6 and [m.name for m in result.metrics][-2:] == ["top1_agreement", "kl"]


def test_default_digits_are_the_same_with_and_without_a_probe():
    model, pixels = vision_model()
    plain, probed = (Agreement(count=5, probe=n).items(model, pixels, 0) for n in (0, 30))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(plain, probed))
    task = Agreement(count=5, probe=30)
    task.items(model, pixels, 0)
    training = {p.numpy().tobytes() for p in task._train[0]}
    assert len(training) == 30 and not training & {item.pixels.numpy().tobytes() for item in plain}


def test_a_patch_that_the_model_carries_is_part_of_dense():
    model, pixels = vision_model()
    hap.patch(model, "neighborhood", window=1, layers=[0])
    same, local = f"{NEUTRAL},layers=1", f"{LOCAL},layers=1"
    result = evaluation.run("agreement:count=3", model, pixels, patches={"same": same, "local": local})
    assert result["same"].aggregates["kept_mass"] == 1 and result["same"].aggregates["patch_cosine"] > 0.99999
    assert result["dense"].aggregates["kept_mass"] == 1 > result["local"].aggregates["kept_mass"]
    assert len(hap.active(model)) == 1


def test_layers_off_saves_the_second_dense_forward_and_changes_no_cosine():
    model, pixels = vision_model()
    calls, real = [], model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    counts, results = [], []
    for layers in ("true", "false"):
        calls.clear()
        results.append(evaluation.run(f"agreement:count=8,layers={layers}", model, pixels, patches=[LOCAL]))
        counts.append(len(calls))
    # 8 images are one batch: one look at the model, the reference, and per variant one forward or two
    assert counts == [1 + 1 + 2 * 2, 1 + 1 + 2]
    assert [m.name for m in results[1].metrics] == ["cls_cosine", "patch_cosine"] and not results[1].details
    for name in ("cls_cosine", "patch_cosine"):
        assert np.allclose(
            results[0].variants[1].scores[name], results[1].variants[1].scores[name], atol=1e-9
        )


def test_a_killed_agreement_goes_on_and_finds_the_same_table(tmp_path):
    model, pixels = vision_model()
    run = lambda: evaluation.run("agreement:count=6,batch=2", model, pixels, patches=[LOCAL], out=tmp_path)
    whole = run()
    lines = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "items.jsonl").write_text("".join(lines[:-1]))  # an item of the last batch is lost
    again = run()
    assert any("11 of 12 scores are from an earlier start" in note for note in again.notes)
    assert again.details == whole.details and again.variants[1].scores == whole.variants[1].scores


@pytest.mark.parametrize(
    "options, words",
    [
        ({"images": "somewhere", "probe": 5}, "images=somewhere has no labels, so it cannot go with probe=5"),
        ({"images": "somewhere", "data": "testbed:scenes"}, "cannot go with data=testbed:scenes"),
        ({"probe": -1}, "probe=-1 at least 0"),
    ],
)
def test_agreement_refuses_what_does_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        Agreement(**options)


# -- knn --------------------------------------------------------------------------------------------------------------


def test_knn_takes_labelled_data_and_keeps_features(tmp_path):
    model, pixels = vision_model()
    pictures(tmp_path / "data", ("black", "grey", "light"), 8)
    task = f"knn:data={tmp_path / 'data'},train=15,test=9,k=3,cache={tmp_path / 'cache'}"
    first = evaluation.run(task, model, pixels, patches={"local": LOCAL})
    assert set(first.groups) <= {"black", "grey", "light"} and first["dense"].aggregates["accuracy"] > 0.5
    files = {f.name for f in (tmp_path / "cache").iterdir()}
    assert len(files) == 4  # train and test, dense and patched
    model.forward = None  # a second run asks the model nothing
    again = evaluation.run(task, model, pixels, patches={"local": LOCAL})
    assert [v.scores for v in again.variants] == [v.scores for v in first.variants]
    assert {f.name for f in (tmp_path / "cache").iterdir()} == files


def test_knn_votes_with_training_images_and_is_asked_about_others():
    model, pixels = vision_model()
    task = Knn(**DIGITS, k=3)
    items = task.items(model, pixels, 0)
    training = {p.numpy().tobytes() for p in task._train[0]}
    assert len(task._train[0]) == 60 and len(items) == 20
    assert not training & {p.numpy().tobytes() for p, _ in items}
    assert task.groups(items) == [str(label) for _, label in items]


def test_knn_without_data_is_what_it_was():
    from hf_attn_patch.eval import images as image_source

    model, pixels = vision_model()
    task = Knn(train=20, test=10, k=3)
    items = task.items(model, pixels, 4)
    values, labels = image_source.digits(30, 4)
    values = image_source.pixel_values(model, pixels, values, None)
    assert torch.equal(task._train[0], values[:20]) and task._train[1] == labels[:20]
    assert all(torch.equal(p, q) and a == b for (p, a), q, b in zip(items, values[20:], labels[20:]))


# -- vit_throughput ---------------------------------------------------------------------------------------------------


def test_sizes_take_turns_and_the_first_forward_of_each_is_not_timed(monkeypatch):
    from hf_attn_patch.eval import vit_throughput

    model, _ = vision_model()
    seen, real = [], vit_throughput.seconds_of

    def spy(model, pixels):
        seen.append((pixels.shape[-1], len(pixels), len(hap.active(model))))
        return real(model, pixels)

    monkeypatch.setattr(vit_throughput, "seconds_of", spy)
    task = VitThroughput(sizes=(28, 56), batch=2, repeats=2)
    result = evaluation.run(task, model, None, patches=["neighborhood:window=2"])
    tried, first, rest = seen[:2], seen[2:14], seen[14:]
    assert tried == [(28, 1, 0), (56, 1, 0)]
    assert first == [
        (side, 2, on) for side in (28, 56) for on in (0, 1) for _ in range(3)
    ]  # warm, memory, timed
    assert rest == [(side, 2, on) for side in (28, 56) for on in (0, 1)]
    assert result.groups == ["28 px", "56 px"] * 2 and result.variants[1].sites and not hap.active(model)
    for variant in result.variants:
        rates, ms = (np.array(variant.scores[name]) for name in ("images", "per image"))
        assert np.allclose(rates * ms, 1000) and rates.min() > 0


def test_another_size_gets_interpolated_positions_or_is_refused_before_anything_is_timed():
    model, _ = classifier()  # a ViT for 8 pixels, patch 2, which refuses other sizes unless told
    task = VitThroughput(sizes=(8, 12), repeats=1)
    result = evaluation.run(task, model)
    assert list(result["dense"].by_group["images"]) == ["8 px", "12 px"]
    with pytest.raises(ValueError, match="9 pixels are no multiple of the patch size 2 .* like 8"):
        VitThroughput(sizes=(9,)).items(model, None, 0)


def test_a_size_that_the_model_refuses_is_named():
    model, _ = vision_model()

    def refuse(pixel_values=None):
        raise ValueError("Input image size (70*70) doesn't match model (56*56).")

    model.forward = refuse
    with pytest.raises(ValueError, match="Dinov2Model takes no images of 70 pixels: Input image size"):
        VitThroughput(sizes=(70,)).items(model, None, 0)


def test_memory_is_that_of_one_forward_and_grows_with_the_image():
    model, _ = vision_model()
    task = VitThroughput(sizes=(56, 448), batch=2, repeats=2)
    result = evaluation.run(task, model)
    if "peak memory" not in result["dense"].aggregates:
        pytest.skip("this machine does not tell the peak of a process (/proc/self/clear_refs)")
    small, large = (result["dense"].by_group["peak memory"][name] for name in ("56 px", "448 px"))
    assert large > 2 > small and len(set(result["dense"].scores["peak memory"])) == 2


def test_vit_throughput_needs_pixels_and_sizes():
    model, tokenizer = language_model()
    with pytest.raises(ValueError, match="takes 'input_ids', not pixel_values"):
        VitThroughput().items(model, tokenizer, 0)
    for options in ({"sizes": ()}, {"sizes": (0,)}, {"batch": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            VitThroughput(**options)
