"""`tcpa`: numbers of the original code, role split, what tokens choose, undo, training."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTForImageClassification

import hf_attn_patch as hap
from hf_attn_patch.patches.vision.tcpa import choose
from tests.test_golden import read
from tests.test_prompt_cam import embedded, pixels, small, vit_of

EXACT = {"rtol": 0, "atol": 1e-9}


def golden(case, impl="reference"):
    tensors, c = read(f"tcpa__{case}")
    param = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    model = vit_of(c, param, ViTForImageClassification, "backbone.")
    with torch.no_grad():
        model.classifier.weight.copy_(param["backbone.head.weight"])
        model.classifier.bias.copy_(param["backbone.head.bias"])
    images = embedded(model, tensors["in.tokens"])
    return model, images, tensors, c, param


def patched(model, c, param, impl):
    pools = (c["pool_cls"], c["pool_image"])
    topk = (c["topk_cls"], c["topk_image"]) if c["token_selection"] else pools
    options = {"prompts": pools, "topk": topk, "length": c["len_cls"], "fourier": c["fourier"], "pull": 1.0}
    handle = hap.patch(model, "tcpa", **options, impl=impl)
    with torch.no_grad():
        for site in handle.sites:
            patch = next(iter(site.module.attn_patch.patches.values())).double()
            for pool in ("cls", "image"):
                for kind in ("keys", "prompts"):
                    getattr(patch, f"{pool}_{kind}").copy_(param[f"Pool.Pool_{pool}.{kind}"][site.layer])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", ["vpt_topk_len2", "vfpt_topk", "vpt_role_only"])
def test_attention_mask_hidden_states_logits_and_pull_are_the_original_ones(case, impl):
    model, images, tensors, c, param = golden(case)
    patched(model, c, param, impl)
    layer = {}
    model.vit.layers[0].register_forward_hook(lambda m, a, out: layer.update(out=out))
    model.train()  # losses are collected in training; the model has no dropout
    found = model(pixel_values=images, output_attentions=impl == "reference")  # only that executor keeps them
    torch.testing.assert_close(found.logits, tensors["out.logits"], **EXACT)
    torch.testing.assert_close(layer["out"], tensors["out.hidden_layer0"], **EXACT)
    if "out.pull_distance" in tensors:
        pull = hap.aux_losses(model)["tcpa.pull"] * c["depth"]  # ours is a mean over layers
        torch.testing.assert_close(pull, tensors["out.pull_distance"], **EXACT)
    if impl != "reference":
        return
    added = tensors["out.mask"].shape[-1] - tensors["out.mask"].shape[-2]
    ours = torch.stack(found.attentions, 1)[..., added:, :]  # rows of the model's own tokens
    ours = torch.cat(
        [ours[..., added : added + 1], ours[..., :added], ours[..., added + 1 :]], -1
    )  # CLS first there
    torch.testing.assert_close(ours[:, 0], tensors["out.attn_layer0"], **EXACT)
    assert torch.equal((ours > 0).all(2), tensors["out.mask"]) and torch.equal(
        (ours > 0).any(2), tensors["out.mask"]
    )
    if "out.pull_distance" in tensors:
        pull = hap.aux_losses(model)["tcpa.pull"] * c["depth"]  # ours is a mean over layers
        torch.testing.assert_close(pull, tensors["out.pull_distance"], **EXACT)


def rows_of(options, n=2):
    """Attention [B, layers, H, N, P + N] of a small model's own rows, and P."""
    model = small(ViTForImageClassification, num_labels=3)
    model.set_attn_implementation("eager")
    added = 2 * options["prompts"] * options.get("length", 1)
    hap.patch(model, "tcpa", **options)
    with torch.no_grad():
        found = model(pixel_values=pixels(n), output_attentions=True).attentions
    return torch.stack(found, 1)[..., added:, :], added


def test_cls_and_patches_read_their_own_pool_and_as_many_prompts_as_asked():
    rows, added = rows_of({"prompts": 5, "topk": 2})
    read = (rows[..., :added] > 0).sum(-1)
    assert (read == 2).all()
    assert not rows[..., 0, 5:added].any() and not rows[..., 1:, :5].any()
    assert (rows.sum(-1) < 1).all()


def test_renormalised_rows_are_those_of_prompts_hidden_before_the_softmax():
    lossy, _ = rows_of({"prompts": 5, "topk": 2})
    whole, _ = rows_of({"prompts": 5, "topk": 2, "renormalise": True})
    torch.testing.assert_close(whole.sum(-1), torch.ones(whole.shape[:-1]))
    first = lossy[:, 0]  # behind the first layer hidden states differ
    torch.testing.assert_close(whole[:, 0], first / first.sum(-1, keepdim=True))


def test_role_split_alone_does_not_depend_on_the_image():
    rows, added = rows_of({"prompts": 3, "topk": 3}, n=3)
    seen = rows[..., :added] > 0
    assert (seen == seen[:1, :1, :1]).all()


def test_tokens_choose_the_keys_that_point_their_way():
    keys = torch.eye(4, 8)
    near, chosen = choose(torch.tensor([[[0.0, 2, 1] + [0.0] * 5]]), keys, 2)
    assert chosen.tolist() == [[[False, True, True, False]]]
    torch.testing.assert_close(near, torch.tensor([[[2, 1]]]) / 5**0.5)


def test_undo_leaves_the_model_as_it_was_and_a_saved_patch_comes_back(tmp_path):
    model = small()
    dense, names = model(pixel_values=pixels()).last_hidden_state, list(model.state_dict())
    handle = hap.patch(model, "tcpa", prompts=4, topk=2, classes=3, seed=1)
    found = model(pixel_values=pixels())
    assert found.logits.shape == (2, 3) and not torch.equal(found.last_hidden_state, dense)
    handle.save(tmp_path)
    handle.remove()
    assert list(model.state_dict()) == names
    assert torch.equal(model(pixel_values=pixels()).last_hidden_state, dense)
    hap.load(model, tmp_path)
    assert torch.equal(model(pixel_values=pixels()).logits, found.logits)


def test_loss_of_labels_includes_the_pull_and_everything_of_the_patch_learns():
    model = small()
    model.requires_grad_(False)
    hap.patch(model, "tcpa", prompts=3, topk=2, classes=3, pull=0.5)
    labels = torch.tensor([0, 2])
    model.train()
    out = model(pixel_values=pixels(), labels=labels)
    plain = torch.nn.functional.cross_entropy(out.logits, labels)
    torch.testing.assert_close(out.loss, plain + 0.5 * hap.aux_losses(model)["tcpa.pull"])
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    grads = {
        n.rpartition(".")[2]
        for n, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert grads == {"cls_keys", "image_keys", "cls_prompts", "image_prompts", "class_weight", "class_bias"}


BAD = {
    "topk=5": {"prompts": 4, "topk": 5},
    "both pools at most 126": {"prompts": 64},
    "one number, or": {"prompts": (3, 3, 3)},
    "pull=-1": {"pull": -1.0},
    "cannot be limited to heads": {"heads": [0]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_changes(message):
    model = small()
    with pytest.raises(hap.PatchError, match=message):
        hap.patch(model, "tcpa", **BAD[message])
    assert not hap.active(model)
