"""Pooling heads give the numbers of the code they are named after (``tests/golden``: ep__*, acmil__*)."""

from __future__ import annotations

import pytest
import torch

from hf_attn_patch import probing
from hf_attn_patch.eval.knn import nearest_class
from hf_attn_patch.probing import cross, light
from hf_attn_patch.probing.acmil import HIDDEN, Acmil
from hf_attn_patch.probing.acmil_mha import AcmilMha
from hf_attn_patch.probing.cbam import Cbam
from hf_attn_patch.probing.ep import EfficientProbing
from hf_attn_patch.probing.pool import Probe
from tests.test_golden import read

EXACT = {"rtol": 0, "atol": 1e-9}  # the tolerance the files name


def load(module, tensors, renamed):
    """Give `module` the parameters of a golden file; every one of both sides is used."""
    given = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    for old, new in renamed.items():
        given = {(new + k.removeprefix(old) if k.startswith(old) else k): v for k, v in given.items()}
    own = module.state_dict()
    given = {k: v.reshape(own[k].shape) if k in own else v for k, v in given.items() if k not in UNUSED}
    module.double().load_state_dict(given | {k: v for k, v in own.items() if k.endswith("batches_tracked")})
    return module.eval()


UNUSED = ("norm2_cross.weight", "norm2_cross.bias")  # of CAE: the original code never applies it
BLOCK = {"mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2."}
CROSS = {
    "cross_attention_block.xattn.": "",
    "cross_attention_block.mlp.fc1.": "mlp.0.",
    "cross_attention_block.mlp.fc2.": "mlp.2.",
    "cross_attention_block.": "",
}
COCA = {
    "norm.gamma": "norm.weight",
    "norm.beta": "norm.bias",
    "to_out": "proj",
    "to_": "",
    "img_queries": "query",
}
CBAM = {
    "channel.fc1": "channel.0",
    "channel.fc2": "channel.2",
    "spatial.conv.conv": "conv",
    "spatial.conv.bn": "norm",
}
AIM = {"cls_token": "query", "bn.": "norm.", "k.": "key.", "v.": "value."}
SCORER = {"self_attn.": "", "attention_predictor.": "scorer."}
CAIT = {
    "blocks_token_only.0.attn.": "",
    "blocks_token_only.0.": "",
    "gamma_": "scale",
    "cls_token": "query",
    **BLOCK,
}
CAE = {"cross_attn.": "", "norm1_": "norm_", "query_token": "query"}
NORM = {"norm_patches.": "norm."}
DINO = {"dino_block.attn.": "", "dino_block.": "", **BLOCK}
CASES = {
    "abmilp_both_tanh2": (lambda c: light.AbMilp(c["C"], c["self_attention"]), SCORER),
    "abmilp_none_tanh2": (lambda c: light.AbMilp(c["C"], c["self_attention"]), SCORER),
    "simpool": (
        lambda c: light.SimPool(c["C"], c["heads"], eps=c["ln_eps"]),
        {**NORM, "wq.": "query.", "wk.": "key."},
    ),
    "esimpool": (lambda c: light.SimPool(c["C"], c["heads"], False, c["ln_eps"]), NORM),
    "aim": (lambda c: light.Aim(c["C"], c["heads"], c["queries"], c["bn_eps"]), AIM),
    "coca": (lambda c: light.CoCa(c["C"], c["heads"], c["dim_head"]), COCA),
    "clip_attnpool": (
        lambda c: cross.ClipPool(c["C"], c["N"], c["heads"], c["ln_eps"]),
        {"pos_embed": "positions"},
    ),
    "siglip_latent": (
        lambda c: cross.LatentPool(c["C"], c["heads"], c["mlp_ratio"]),
        {"latent": "query", **BLOCK},
    ),
    "cait_ca": (
        lambda c: cross.ClassAttention(
            c["C"], c["heads"], c["mlp_ratio"], eps=c["ln_eps"], last_eps=c["final_ln_eps"]
        ),
        CAIT,
    ),
    "vjepa": (
        lambda c: cross.CrossBlock(c["C"], c["heads"], c["mlp_ratio"], c["ln_eps"]),
        {"query_tokens": "query", **CROSS},
    ),
    "cae": (lambda c: cross.CaePool(c["C"], c["heads"], c["ln_eps"]), CAE),
    "dinovit_block": (lambda c: cross.BlockPool(c["C"], c["heads"], c["mlp_ratio"], c["ln_eps"]), DINO),
    "cbam": (lambda c: Cbam(c["C"], c["N"], c["reduction"], c["kernel"]), CBAM),
}


@pytest.mark.parametrize("case", CASES)
def test_pooling_gives_the_original_vector_and_map(case):
    tensors, config = read(f"ep__{case}")
    make, renamed = CASES[case]
    if case == "coca":  # only the first of its queries has an effect there
        tensors["param.img_queries"] = tensors["param.img_queries"][:1]
    pool = load(make(config), tensors, renamed)
    with torch.no_grad():
        pooled, maps = pool.attend(tensors["in.x"])
    torch.testing.assert_close(pooled, tensors["out.pooled"], **EXACT)
    if case == "cbam":
        torch.testing.assert_close(pool.gate(tensors["in.x"]), tensors["out.channel_gate"], **EXACT)
        torch.testing.assert_close(maps, tensors["out.spatial_gate"].flatten(1)[:, None], **EXACT)
        return
    wanted, tokens = tensors["out.attn"], tensors["in.x"].shape[1]
    if case == "dinovit_block":
        wanted = wanted.mean(2)
    wanted = wanted[..., -tokens:].reshape(len(wanted), -1, tokens)  # columns of a class token come first
    torch.testing.assert_close(maps, wanted, **EXACT)


@pytest.mark.parametrize("case", ["ep_q4_d1", "ep_q2_d2_trainbn"])
def test_efficient_probing_gives_the_original_logits_maps_and_statistics(case):
    tensors, config = read(f"ep__{case}")
    pool = EfficientProbing(config["C"], config["num_queries"], config["d_out"])
    probe = Probe(pool, config["classes"], config["bn_eps"])
    names = {"fc.": "classifier.", "running": "norm.running", "queries": "pool.queries", "v.": "pool.value."}
    load(probe, tensors, names).train(config["bn_mode"] == "train")
    assert sum(p.numel() for p in pool.parameters()) == config["pooling_params"]
    assert sum(p.numel() for p in probe.parameters()) == config["total_params"]
    with torch.no_grad():
        torch.testing.assert_close(pool(tensors["in.x"]), tensors["out.pooled"], **EXACT)
        logits, maps = probe.attend(tensors["in.x"])
    torch.testing.assert_close(logits, tensors["out.logits"], **EXACT)
    torch.testing.assert_close(maps, tensors["out.attn"], **EXACT)
    if config["bn_mode"] == "train":
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(probe.norm, name), tensors[f"out.{name}_after"], **EXACT)


def test_knn_table_is_the_original_one():
    tensors, config = read("ep__knn")
    train, test = (
        torch.nn.functional.normalize(tensors[f"in.{n}_x"].double(), dim=-1) for n in ("train", "test")
    )
    labels, truth = tensors["in.train_y"].tolist(), tensors["in.test_y"].tolist()
    for k, temperature, top1, _ in tensors["out.table"].tolist():
        found = nearest_class(train, labels, test, int(k), temperature)
        accuracy = sum(a == b for a, b in zip(found, truth)) / len(truth)
        assert accuracy == pytest.approx(top1 / 100 if top1 > 1 else top1, abs=1e-6)


ACMIL = {
    "dimreduction.fc1.": "reduce.", "attention.attention_V.0.": "tanh.", "attention.attention_U.0.": "sigmoid.",
    "attention.attention_weights.": "scorer.", "classifier.": "branches.", "Slide_classifier.fc.": "bag.",
    **{f"branches.{t}.fc.": f"branches.{t}." for t in range(5)},
}  # fmt: skip


def acmil(case):
    tensors, c = read(f"acmil__{case}")
    sizes = ("D_feat", "n_class", "n_token", "n_masked_patch", "mask_drop", "D_inner", "D_gate")
    head = Acmil(*(c[name] for name in sizes))
    return load(head, tensors, ACMIL).train(c["train"]), tensors


@pytest.mark.parametrize("case", ["ga_eval", "ga_train_stkim_loss"])
def test_acmil_gives_the_original_branches_bag_and_hidden_tokens(case):
    head, tensors = acmil(case)
    drawn = tensors["in.rand"][None] if "in.rand" in tensors else None
    with torch.no_grad():
        bag = head.run(tensors["in.x"], drawn)
    torch.testing.assert_close(bag.raw[0], tensors["out.scores_raw"], **EXACT)
    torch.testing.assert_close(bag.scores[0], tensors["out.scores"], **EXACT)
    torch.testing.assert_close(bag.branches[0], tensors["out.branch_logits"], **EXACT)
    torch.testing.assert_close(bag.logits, tensors["out.slide_logits"], **EXACT)
    torch.testing.assert_close(bag.maps[0], tensors["out.branch_attn"], **EXACT)
    if drawn is not None:
        hidden = head.hidden(bag.raw, drawn)[0]
        assert torch.equal(hidden.sort().values, tensors["out.masked_idx"].sort().values)


def test_acmil_losses_are_the_original_ones():
    head, tensors = acmil("ga_train_stkim_loss")
    with torch.no_grad():
        found = head.losses(head.run(tensors["in.x"], tensors["in.rand"][None]), tensors["in.label"])
    for name, theirs in (("bag", "slide"), ("branches", "sub"), ("difference", "diff")):
        assert float(found[name]) == pytest.approx(
            float(tensors[f"out.{theirs}_loss"]), abs=1e-6
        )  # float32 there


MHA = {
    "dimreduction.fc1.": "reduce.", "classifier.": "branches.", "Slide_classifier.fc.": "bag.",
    "sub_attention.": "attentions.", "bag_attention.": "whole.",
}  # fmt: skip
PARTS = {
    "q_proj.": "query.",
    "k_proj.": "key.",
    "v_proj.": "value.",
    "out_proj.": "proj.",
    "layer_norm.": "norm.",
}


def test_acmil_with_multi_head_branches_gives_the_original_scores_and_logits():
    tensors, c = read("acmil__mha_eval")
    tokens = tensors.pop("param.q")[0]  # there one parameter for all branches
    for t in range(c["n_token"]):
        tensors[f"param.attentions.{t}.token"] = tokens[t]
    renamed = MHA | {f"branches.{t}.fc.": f"branches.{t}." for t in range(c["n_token"])}
    places = ["whole", *(f"attentions.{t}" for t in range(c["n_token"]))]
    renamed |= {f"{place}.{old}": f"{place}.{new}" for place in places for old, new in PARTS.items()}
    sizes = (
        c[name]
        for name in ("D_feat", "n_class", "n_token", "n_masked_patch", "mask_drop", "D_inner", "heads")
    )
    head = load(AcmilMha(*sizes), tensors, renamed)
    with torch.no_grad():
        bag = head.run(tensors["in.x"])
        logits, maps = head.attend(tensors["in.x"])
    torch.testing.assert_close(bag.scores[0], tensors["out.scores"], **EXACT)
    torch.testing.assert_close(bag.branches[0], tensors["out.branch_logits"], **EXACT)
    torch.testing.assert_close(logits, tensors["out.slide_logits"], **EXACT)
    torch.testing.assert_close(maps[0], tensors["out.scores"].softmax(-1).flatten(0, 1), **EXACT)


def test_multi_head_branches_hide_favourites_of_each_head_by_itself():
    torch.manual_seed(0)
    head, x = AcmilMha(12, 3, branches=2, hide=4, drop=0.5, inner=16, branch_heads=4), torch.randn(3, 9, 12)
    uniform = torch.rand(3, 4, 2, 4)
    bag = head.train().run(x, uniform)
    hidden = bag.scores == HIDDEN
    best = torch.zeros_like(hidden).scatter(-1, bag.raw.topk(4).indices, True)
    assert torch.equal(hidden.sum(-1), torch.full((3, 4, 2), 2)) and not (hidden & ~best).any()
    chosen = bag.raw.topk(4).indices.gather(-1, uniform.argsort(-1)[..., :2])
    assert torch.equal(hidden, torch.zeros_like(hidden).scatter(-1, chosen, True))
    # the bag reads with the hidden ones hidden: it cannot see a token that every branch hides in every head
    assert torch.equal(head.eval().run(x, uniform).scores, head.run(x).raw)


def test_every_golden_head_is_a_known_name():
    compared = {
        "abmilp",
        "simpool",
        "esimpool",
        "aim",
        "coca",
        "clip",
        "siglip",
        "cait",
        "vjepa",
        "cae",
        "cbam",
    }
    assert compared | {"ep", "acmil", "acmil_mha", "linear", "dino_block"} == set(probing.names())
