"""Auxiliary losses: counted once, with gradients, whatever runs around the layers."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch.errors import PatchError

from .small import close, inputs_of, model_of
from .test_moh import randomise

OPTIONS = {"router": "learned", "active": 0.75, "shared": 0.25, "balance": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def training_model(**options):
    model = model_of("llama").requires_grad_(True).train()
    hap.patch(model, "moh", **{**OPTIONS, **options})
    randomise(model)
    return model


def cross_entropy(model, inputs, labels):
    with torch.no_grad():
        logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def close32(a, b):
    """Losses are computed in float32 by transformers: equal up to the rounding of a few sums."""
    assert abs(float(a) - float(b)) <= 8 * torch.finfo(torch.float32).eps * abs(float(b))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tuples", [False, True])
def test_the_weighted_mean_over_layers_is_added_once(tuples):
    model = training_model()
    inputs = inputs_of(model, left_pad=[3, 0])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain = cross_entropy(model, inputs, labels)
    output = model(**inputs, labels=labels, return_dict=not tuples)
    loss = output[0] if tuples else output.loss
    ((name, value),) = hap.aux_losses(model).items()
    assert name == "moh.balance" and float(value.detach()) > 0
    close32(loss.detach(), plain + 0.5 * value.detach())
    (weighted,) = hap.aux_losses(model, weighted=True).values()
    close(weighted, 0.5 * value)
    assert len(model._attn_patch_state.context.losses.values[name]) == 2  # one per layer


def test_padding_does_not_count():
    model = training_model()
    inputs = inputs_of(model, batch=1)
    model(**inputs)
    alone = hap.aux_losses(model)["moh.balance"].detach()
    padded = {k: torch.cat([v, torch.full((1, 6), fill)], 1) for (k, v), fill in zip(inputs.items(), (5, 0))}
    assert list(inputs) == ["input_ids", "attention_mask"]
    model(**padded)
    close(hap.aux_losses(model)["moh.balance"].detach(), alone)


def test_no_labels_or_no_training_adds_nothing():
    model = training_model()
    inputs = inputs_of(model)
    assert model(**inputs).loss is None
    (value,) = hap.aux_losses(model, weighted=True).values()  # a loop with its own loss adds this
    value.backward()
    routers = {n: g for n, g in gradients(model).items() if n.endswith("routed")}
    assert len(routers) == 2 and all(float(g.abs().max()) > 0 for g in routers.values())
    model.eval()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert hap.aux_losses(model) == {}
    close32(loss.detach(), cross_entropy(model, inputs, inputs["input_ids"]))
    with pytest.raises(PatchError, match="hap.patch"):
        hap.aux_losses(model_of("llama"))


def test_checkpointing_gives_the_same_loss_and_gradients():
    model = training_model()
    inputs = inputs_of(model, left_pad=[3, 0])
    inputs["labels"] = inputs["input_ids"]
    loss = model(**inputs).loss
    loss.backward()
    expected = gradients(model)
    assert any(n.endswith("routed") for n in expected)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first, second = model(**inputs).loss, model(**inputs).loss  # both wait for their backward
    close(first.detach(), loss.detach())
    first.backward()
    counted = len(model._attn_patch_state.context.losses.values["moh.balance"])
    for name, gradient in gradients(model).items():
        close(gradient, expected[name], name)
    second.backward()
    assert counted == 2 == len(model._attn_patch_state.context.losses.values["moh.balance"])
    for name, gradient in gradients(model).items():
        close(gradient, 2 * expected[name], name)


def test_norm_router_under_checkpointing_of_a_model_that_normalises_queries():
    model = model_of("qwen3").requires_grad_(True).train()
    inputs = inputs_of(model)
    inputs["labels"] = inputs["input_ids"]
    hap.patch(model, "moh", active=0.5, shared=0.25, balance=0.5)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs).loss.backward()
    for name, gradient in gradients(model).items():
        close(gradient, expected[name], name)


def test_reentrant_checkpointing_is_refused_with_the_way_out():
    model = training_model()
    inputs = inputs_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(PatchError, match="'use_reentrant': False"):
        model(**inputs, labels=inputs["input_ids"])
    hap.unpatch(model)
    hap.patch(model, "moh", **{**OPTIONS, "balance": 0.0})  # without a loss there is nothing to lose
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_accumulated_micro_batches_count_the_loss_once_per_step():
    model = training_model()
    inputs = inputs_of(model, batch=4)
    labels = inputs["input_ids"].clone()
    labels[:2, :9] = -100  # the first micro-batch has fewer targets
    items = (labels[:, 1:] != -100).sum()
    total, shares = torch.zeros(()), []
    for rows in (slice(0, 2), slice(2, 4)):
        part = {k: v[rows] for k, v in inputs.items()}
        loss = model(**part, labels=labels[rows], num_items_in_batch=items).loss
        share = (labels[rows, 1:] != -100).sum() / items
        shares.append(float(share) * 0.5 * float(hap.aux_losses(model)["moh.balance"].detach()))
        total = total + loss.detach()
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    assert shares[0] < 0.4 * sum(shares)
    close32(total, plain + sum(shares))


def test_two_patches_keep_their_losses_apart_and_copies_start_without():
    model = training_model()
    hap.patch(model, "moh", router="learned", active=0.75, shared=0.5, balance=0.25)
    randomise(model)
    inputs = inputs_of(model)
    model(**inputs, labels=inputs["input_ids"])
    assert set(hap.aux_losses(model)) == {"moh.balance", "moh_2.balance"}
    twin = copy.deepcopy(model)  # tensors with a graph cannot be copied
    assert hap.aux_losses(twin) == {}


def test_data_parallel_averages_like_one_process(tmp_path):
    """One process of a process group: the hooks run inside DistributedDataParallel."""
    import torch.distributed as dist

    model = training_model()
    inputs = inputs_of(model)
    inputs["labels"] = inputs["input_ids"]
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(**inputs).loss.backward()
        for name, gradient in gradients(model).items():
            close(gradient, expected[name], name)
    finally:
        dist.destroy_process_group()
