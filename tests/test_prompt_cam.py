"""`prompt_cam`: numbers of the original code, a model that answers with its classes, undo, training."""

from __future__ import annotations

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel

import hf_attn_patch as hap
from benchmarks import prompt_cam as benchmark
from hf_attn_patch.call.program import ScoreEdit
from hf_attn_patch.patches.vision import prompt_cam
from tests.test_golden import read

EXACT = {"rtol": 0, "atol": 1e-9}


def vit_of(c, param, cls=ViTModel, prefix=""):
    """A ViT or DINOv2 (where there is layer scale) with the blocks of a golden file, in float64."""
    sizes = dict(
        hidden_size=c["dim"], num_hidden_layers=c["depth"], num_attention_heads=c["heads"], patch_size=2
    )
    sizes |= dict(image_size=2 * c["grid"][0], layer_norm_eps=c["ln_eps"], attn_implementation="eager")
    if c.get("layer_scale"):
        model = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=int(c["mlp_ratio"])))
        layers, norms = model.encoder.layer, ("norm1", "norm2")
    else:
        config = ViTConfig(**sizes, intermediate_size=int(c["dim"] * c["mlp_ratio"]), num_labels=3)
        model = cls(config, add_pooling_layer=False) if cls is ViTModel else cls(config)
        layers, norms = getattr(model, "vit", model).layers, ("layernorm_before", "layernorm_after")
    model = model.double().eval()
    with torch.no_grad():
        for number, layer in enumerate(layers):
            start = f"{prefix}blocks.{number}."
            block = {k.removeprefix(start): v for k, v in param.items() if k.startswith(start)}
            for part in ("weight", "bias"):
                for name, value in zip("qkv", block[f"attn.qkv.{part}"].chunk(3)):
                    getattr(getattr(layer.attention, f"{name}_proj"), part).copy_(value)
                getattr(layer.attention.o_proj, part).copy_(block[f"attn.proj.{part}"])
                getattr(layer.mlp.fc1, part).copy_(block[f"mlp.fc1.{part}"])
                getattr(layer.mlp.fc2, part).copy_(block[f"mlp.fc2.{part}"])
                for ours, theirs in zip(norms, ("norm1", "norm2")):
                    getattr(getattr(layer, ours), part).copy_(block[f"{theirs}.{part}"])
            if c.get("layer_scale"):
                layer.layer_scale1.lambda1.copy_(block["ls1.gamma"])
                layer.layer_scale2.lambda1.copy_(block["ls2.gamma"])
        norm = getattr(model, "vit", model).layernorm
        norm.weight.copy_(param[f"{prefix}norm.weight"])
        norm.bias.copy_(param[f"{prefix}norm.bias"])
    return model


def embedded(model, tokens):
    """Make the embeddings of `model` give `tokens`, and return pixels of the right size."""
    base = getattr(model, "vit", model)
    base.embeddings.register_forward_hook(lambda *_: tokens)
    side = model.config.image_size
    return torch.zeros(len(tokens), 3, side, side, dtype=torch.float64)


def golden(case, impl="auto"):
    tensors, c = read(f"promptcam__{case}")
    param = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    model = vit_of(c, param)
    pixels = embedded(model, tensors["in.tokens"])
    handle = hap.patch(model, "prompt_cam", classes=c["num_classes"], impl=impl)
    with torch.no_grad():
        for site in handle.sites:
            patch = next(iter(site.module.attn_patch.patches.values())).double()
            patch.prompts.copy_(param["vpt.prompt_embeddings"][site.layer])
        patch.class_weight.copy_(param["head.weight"][0])
        patch.class_bias.copy_(param["head.bias"][0])
    return model, pixels, tensors, c


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", ["k3_depth2", "k2_layerscale"])
def test_logits_maps_and_ranking_are_the_original_ones(case, impl):
    model, pixels, tensors, c = golden(case, impl)
    found = prompt_cam.class_maps(model, pixels)
    torch.testing.assert_close(found.logits, tensors["out.logits"], **EXACT)
    # maps are computed in float32 whatever the model is in
    torch.testing.assert_close(found.maps.flatten(3), tensors["out.class_maps"].float(), rtol=0, atol=1e-6)
    target, heads = c["target_class"], range(c["heads"])
    for name, blurred in (("blur0", [0]), ("blur_all", list(heads))):
        with torch.no_grad(), prompt_cam.studied(model, prompt_cam.Study(c["num_classes"], target, blurred)):
            torch.testing.assert_close(
                model(pixel_values=pixels).logits, tensors[f"out.logits_{name}"], **EXACT
            )
    model, pixels, tensors, c = golden(case, impl)
    model.embeddings.register_forward_hook(lambda m, a, out: out[:1])
    ranking = prompt_cam.rank_heads(model, pixels[:1], target)
    assert ranking.heads == tensors["out.ranking"].tolist()
    assert ranking.probabilities == pytest.approx(
        tensors["out.ranking_probs"].tolist(), abs=1e-6
    )  # float32 softmax


def small(cls=Dinov2Model, **more):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=12, patch_size=4)
    sizes |= dict(initializer_range=0.2)
    if cls is Dinov2Model:
        return cls(Dinov2Config(**sizes, mlp_ratio=2)).eval()
    return cls(ViTConfig(**sizes, intermediate_size=48, **more)).eval()


def pixels(n=2, seed=0):
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_undo_leaves_no_hook_no_parameter_and_the_same_numbers():
    model = small()
    hooks = lambda: [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    before, names, dense = hooks(), list(model.state_dict()), model(pixel_values=pixels()).last_hidden_state
    handle = hap.patch(model, "prompt_cam", classes=5)
    out = model(pixel_values=pixels())
    assert out.logits.shape == (2, 5) and out.last_hidden_state.shape == dense.shape
    assert not torch.equal(out.last_hidden_state, dense)
    with handle.disabled():
        again = model(pixel_values=pixels())
        assert torch.equal(again.last_hidden_state, dense) and "logits" not in again
    handle.remove()
    assert hooks() == before and list(model.state_dict()) == names
    after = model(pixel_values=pixels())
    assert torch.equal(after.last_hidden_state, dense) and "logits" not in after


def test_prompts_that_nobody_sees_leave_the_tokens_alone(monkeypatch):
    model = small().double()
    dense = model(pixel_values=pixels().double()).last_hidden_state

    def hide(self, program, call):
        classes = torch.zeros(program.batch, program.q_len, dtype=torch.int8)
        classes[:, : self.classes] = 1
        others = torch.ones(1, program.q_len, dtype=torch.bool)
        others[:, : self.classes] = False
        program.classify(classes)
        program.score_edits.append(ScoreEdit("add", -1e9, key_class=1, rows=others))

    monkeypatch.setattr(prompt_cam.PromptCam, "edit", hide)
    hap.patch(model, "prompt_cam", classes=4)
    found = model(pixel_values=pixels().double())
    torch.testing.assert_close(found.last_hidden_state, dense, rtol=0, atol=1e-12)
    assert found.logits.shape == (2, 4)


def test_maps_are_the_patches_share_of_the_attention_of_prompts():
    model = small()
    hap.patch(model, "prompt_cam", classes=4)
    with prompt_cam.studied(model, prompt_cam.Study(4)) as study, torch.no_grad():
        model(pixel_values=pixels())
    assert study.maps.shape == (2, 4, 4, 4 + 1 + 9)  # prompts, CLS, patches
    torch.testing.assert_close(study.maps.sum(-1), torch.ones(2, 4, 4))
    found = prompt_cam.class_maps(model, pixels())
    assert found.maps.shape == (2, 4, 4, 3, 3)
    torch.testing.assert_close(found.maps.flatten(3), study.maps[..., 5:])
    torch.testing.assert_close(found.of(2), found.maps[:, :, 2].mean(1))
    torch.testing.assert_close(found.of(torch.tensor([1, 3]), [0])[1], found.maps[1, 0, 3])


def test_labels_give_the_loss_of_the_classes_and_never_reach_the_models_own_head():
    model = small(ViTForImageClassification, num_labels=2)
    hap.patch(model, "prompt_cam", classes=7)
    labels = torch.tensor([6, 3])  # its own head has two classes
    out = model(pixel_values=pixels(), labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    assert out.logits.shape == (2, 7)


def test_only_prompts_and_head_learn_and_all_of_them():
    model = small()
    model.requires_grad_(False)
    hap.patch(model, "prompt_cam", classes=3)
    model.train()
    model(pixel_values=pixels(), labels=torch.tensor([0, 2])).loss.backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    with_grad = {name.rpartition(".")[2] for name in moved}
    assert with_grad == {"prompts", "class_weight", "class_bias"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_training_on_the_tokens_that_enter_the_first_prompted_layer_is_training_on_pixels():
    model, labels = small(), torch.tensor([0, 2])
    model.requires_grad_(False)
    hap.patch(model, "prompt_cam", classes=3, layers="-2:")
    own = [p for p in model.parameters() if p.requires_grad]
    whole = model(pixel_values=pixels(), labels=labels).loss
    wanted = torch.autograd.grad(whole, own)
    names, tokens = list(model.state_dict()), benchmark.entering(model, 1, pixels(), 1)
    with benchmark.tail(model, 1):
        short = benchmark.Prompts(model).loss(tokens, labels)
        found = torch.autograd.grad(short, own)
        assert len(list(model.state_dict())) < len(names)  # the first layer is out of the way
    torch.testing.assert_close(short, whole)
    torch.testing.assert_close(found, wanted)
    assert list(model.state_dict()) == names
    assert torch.equal(model(pixel_values=pixels(), labels=labels).loss, whole)


def test_saved_prompts_come_back(tmp_path):
    model = small()
    handle = hap.patch(model, "prompt_cam", classes=3, seed=5)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.shape == (3, 32)):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    wanted = model(pixel_values=pixels()).logits
    handle.save(tmp_path)
    handle.remove()
    hap.load(model, tmp_path)
    assert torch.equal(model(pixel_values=pixels()).logits, wanted)


def test_blurring_all_heads_makes_the_class_read_every_token_alike():
    model = small()
    hap.patch(model, "prompt_cam", classes=3)
    with torch.no_grad():
        plain = model(pixel_values=pixels()).logits
        with prompt_cam.studied(model, prompt_cam.Study(3, 1, [0, 1, 2, 3])):
            blurred = model(pixel_values=pixels()).logits
    assert torch.equal(plain[:, [0, 2]], blurred[:, [0, 2]]) and (plain[:, 1] != blurred[:, 1]).all()


BAD = {
    "option 'classes' is required": {},
    "classes=0": {"classes": 0},
    "leave the last one out": {"classes": 3, "layers": [0]},
    "cannot be limited to heads": {"classes": 3, "heads": [0]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_changes(message):
    model = small()
    with pytest.raises(hap.PatchError, match=message):
        hap.patch(model, "prompt_cam", **BAD[message])
    assert not hap.active(model)


def test_two_sets_of_prompts_and_a_model_without_prompts_are_refused():
    model = small()
    with pytest.raises(hap.PatchError, match="carries no prompt_cam"):
        prompt_cam.class_maps(model, pixels())
    hap.patch(model, "prompt_cam", classes=3)
    with pytest.raises(hap.PatchError, match="added tokens"):
        hap.patch(model, "prompt_cam", classes=3)
    with pytest.raises(ValueError, match="one image and a class below 3"):
        prompt_cam.rank_heads(model, pixels(), 0)
