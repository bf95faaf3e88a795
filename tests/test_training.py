"""Training: LoRA beside patches, NaN and nothing-to-train refused by name, `finetune` with its data and checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import training
from hf_attn_patch.cli import main
from hf_attn_patch.errors import AdapterError, ConfigError, PatchError
from hf_attn_patch.training.checks import broken_gradient, patch_parameters
from hf_attn_patch.training.data import Collate
from hf_attn_patch.training.finetune import finetune

from .small import close, inputs_of, output, refused
from .test_moh import randomise
from .tiny_text import characters, language_model, save_folder

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
MOH = {"router": "learned", "active": 0.75, "shared": 0.25}


def lora(model, **more):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return wrapped


def ids(model, length=17):
    return {"input_ids": inputs_of(model, length=length)["input_ids"]}


def step(model, inputs, lr=0.5):
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad
                p.grad = None
    model.eval()


# -- LoRA and patch side by side ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["patch first", "peft first"])
def test_both_adapters_train_save_load_and_merge(order, tmp_path):
    model = language_model()
    inputs = ids(model)
    dense = output(model, inputs)
    if order == "patch first":
        hap.patch(model, "moh", **MOH)
        model = lora(model, modules_to_save=["attn_patch"])
    else:
        model = lora(model)
        hap.patch(model, "moh", **MOH)
    count = training.check_trainable(model)
    assert 0 < count["patch"] < count["trained"] < count["all"]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    step(model, inputs)
    moved = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert {n for n in before if "attn_patch" in n} <= moved and any("lora_A" in n for n in moved)
    expected = output(model, inputs)
    assert float((expected - dense).abs().max()) > 1e-3
    training.save(model, tmp_path)

    again = training.load(language_model(), tmp_path)
    assert torch.equal(output(again.eval(), inputs), expected)
    assert [h.name for h in hap.active(again)] == ["moh"]
    more = training.load(language_model(), tmp_path, trainable=True)
    assert training.check_trainable(more) == count

    exact = output(model.double(), inputs)
    merged = model.merge_and_unload()
    assert not [n for n, _ in merged.named_modules() if "lora" in n or "modules_to_save" in n]
    close(output(merged, inputs), exact)
    assert [h.name for h in hap.active(merged)] == ["moh"]
    hap.unpatch(merged)
    assert not [n for n, _ in merged.named_parameters() if "attn_patch" in n]
    assert float((output(merged, inputs) - expected).abs().max()) > 1e-4


def test_both_orders_compute_the_same():
    inputs = ids(language_model())
    first, second = language_model(), language_model()
    hap.patch(first, "moh", **MOH)
    randomise(first)
    first = lora(first, modules_to_save=["attn_patch"])
    second = lora(second)
    hap.patch(second, "moh", **MOH)
    randomise(second)
    assert torch.equal(output(first.eval(), inputs), output(second.eval(), inputs))


def test_a_patch_alone_and_lora_alone_are_saved_too(tmp_path):
    model = language_model()
    with refused(PatchError, "no patch and no PEFT adapter"):
        training.save(model, tmp_path / "none")
    hap.patch(model, "moh", **MOH)
    randomise(model)
    inputs = ids(model)
    training.save(model, tmp_path / "patch")
    assert torch.equal(
        output(training.load(language_model(), tmp_path / "patch"), inputs), output(model, inputs)
    )
    wrapped = lora(language_model()).eval()
    training.save(wrapped, tmp_path / "lora")
    again = training.load(language_model(), tmp_path / "lora").eval()
    assert torch.equal(output(again, inputs), output(wrapped, inputs))


def test_loading_refuses_what_it_cannot_do_and_leaves_the_model(tmp_path):
    with refused(AdapterError, "adapters.json", "training.save"):
        training.load(language_model(), tmp_path)
    model = language_model()
    hap.patch(model, "moh", **MOH)
    training.save(lora(model, modules_to_save=["attn_patch"]), tmp_path)
    with refused(PatchError, "plain model", "MoH"):
        training.load(model, tmp_path)
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    plain = language_model()
    with pytest.raises(Exception):  # noqa: B017  PEFT's own
        training.load(plain, tmp_path)
    assert not hap.active(plain)


# -- what must not go unnoticed -------------------------------------------------------------------------------------


def test_nothing_to_train_is_refused_by_name():
    model = language_model().requires_grad_(False)
    with refused(PatchError, "no patch"):
        training.check_trainable(model)
    with (
        hap.patched(model, "streaming", window=8),
        refused(PatchError, "streaming declares no gradient", "--lora"),
    ):
        training.check_trainable(model)
    with (
        hap.patched(model, "moh", active=0.5, shared=0.25),
        refused(PatchError, "moh has no parameters", "router=learned"),
    ):
        training.check_trainable(model)


def test_routers_that_peft_froze_are_refused():
    model = language_model()
    hap.patch(model, "moh", **MOH)
    with refused(PatchError, "frozen", "modules_to_save=['attn_patch']"):
        training.check_trainable(lora(model))


@pytest.mark.parametrize("where", ["router", "projection", "labels", "hidden"])
def test_a_nan_loss_says_where_it_began(where):
    model = language_model().train()
    hap.patch(model, "moh", layers=1, **MOH)
    inputs = ids(model)
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        if where == "router":
            next(iter(patch_parameters(model).values()))[0, 0] = float("nan")
        elif where == "projection":
            model.model.layers[1].self_attn.v_proj.weight.mul_(1e38)
            model.model.layers[1].self_attn.o_proj.weight.mul_(1e38)
        elif where == "hidden":
            model.model.layers[0].self_attn.v_proj.weight.mul_(1e38)
            model.model.layers[0].self_attn.o_proj.weight.mul_(1e38)
        else:
            labels[:] = -100
    words = {
        "router": ("parameter model.layers.1.self_attn.attn_patch.patches.moh.", "not finite"),
        "projection": ("model.layers.1.self_attn, patched by moh",),
        "hidden": ("model.layers.0.self_attn, which is not patched",),
        "labels": ("no token of this batch has a label",),
    }[where]
    with training.nan_guard(model), refused(PatchError, "the loss is", *words):
        model(**inputs, labels=labels)
    model(**inputs, labels=labels)  # the guard is gone


def trainer(model, tmp_path, rows=None, callbacks=(), **arguments):
    from transformers import Trainer, TrainingArguments

    rows = rows or [{"input_ids": r, "labels": r} for r in ids(model)["input_ids"].repeat(4, 1).tolist()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        remove_unused_columns=False, per_device_train_batch_size=2, **{"max_steps": 2, **arguments},
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=Collate(0), callbacks=list(callbacks)
    )


def test_trainer_with_the_callback_stops_at_nan_and_logs_losses(tmp_path):
    model = language_model()
    hap.patch(model, "moh", **MOH)
    run = trainer(model, tmp_path, callbacks=[training.PatchCallback()], gradient_accumulation_steps=2)
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert len(entries) == 2 and all(0.5 < e["moh.balance"] < 3 for e in entries)
    assert not model._forward_hooks or len(model._forward_hooks) == 1  # only the one that adds losses
    with torch.no_grad():
        next(iter(patch_parameters(model).values()))[0, 0] = float("nan")
    with refused(PatchError, "attn_patch.patches.moh"):
        trainer(model, tmp_path, callbacks=[training.PatchCallback()]).train()


def test_trainer_with_the_callback_names_a_gradient_that_is_not_finite(tmp_path):
    model = language_model()
    hap.patch(model, "moh", **MOH)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.register_hook(lambda g: g * float("inf"))
    with refused(PatchError, "gradient of model.layers.0.mlp.down_proj.weight", "step 1"):
        trainer(model, tmp_path, callbacks=[training.PatchCallback()]).train()
    assert broken_gradient(model) == "model.layers.0.mlp.down_proj.weight"


def test_accumulation_in_trainer_gives_the_step_of_one_large_batch(tmp_path):
    """Trainer hands num_items_in_batch on to the attention function, and divides nothing by the number of batches."""
    results = []
    for batch, accumulate in ((4, 1), (2, 2)):
        model = language_model()
        hap.patch(model, "moh", **MOH, balance=0.0)  # the balance of a batch is no mean over its parts
        run = trainer(
            model, tmp_path, gradient_accumulation_steps=accumulate, max_steps=1, learning_rate=0.1, optim="sgd",
            data_seed=1, max_grad_norm=0.0,
        )  # fmt: skip
        run.args.per_device_train_batch_size = batch
        run._train_batch_size = batch
        run.train()
        results.append({n: p.detach() for n, p in model.named_parameters()})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


# -- data -----------------------------------------------------------------------------------------------------------


def test_texts_are_joined_and_cut_and_answers_are_the_only_targets(tmp_path):
    tokenizer = characters()
    text = tmp_path / "a.txt"
    text.write_text("abcdefgh")
    rows = training.examples(str(text), tokenizer, 4)
    assert [tokenizer.decode(r["input_ids"]).replace(" ", "") for r in rows] == ["abcd", "efgh"]
    assert all(r["labels"] == r["input_ids"] for r in rows)
    lines = tmp_path / "b.jsonl"
    lines.write_text(
        json.dumps({"prompt": "0123456789", "answer": "ab"}) + "\n\n" + json.dumps({"text": "xyzxyz"})
    )
    answer, piece = training.examples(str(lines), tokenizer, 6)
    assert tokenizer.decode(answer["input_ids"]).replace(" ", "") == "789ab</s>"
    assert answer["labels"] == [-100] * 3 + answer["input_ids"][3:]
    assert tokenizer.decode(piece["input_ids"]).replace(" ", "") == "xyzxyz"
    batch = Collate(0)([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}])
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6], [7, 0]], "attention_mask": [[1, 1], [1, 0]], "labels": [[-100, 6], [7, -100]],
    }  # fmt: skip


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"prompt": "a"}\n', ("line 1", "no training target", "'prompt'")),
        ('{"text": "abcdefgh"}\n{"prompt": "a", "answer": " "}\n', ("line 2", "non-empty")),
        ("{oops\n", ("line 1", "no JSON")),
        ("[1]\n", ("line 1", "list")),
        ('{"text": "a"}\n', ("2 tokens, fewer than one example of length=4",)),
    ],
)
def test_bad_data_is_refused_with_its_line(tmp_path, content, words):
    file = tmp_path / "d.jsonl"
    file.write_text(content)
    with refused(ConfigError, *words):
        training.examples(str(file), characters(), 4)


def test_missing_data_is_refused(tmp_path):
    with refused(ConfigError, "no such file"):
        training.examples(str(tmp_path / "none.jsonl"), characters(), 4)
    pytest.importorskip("datasets")
    with refused(ConfigError, "the hub gives no data set"):
        training.examples("nobody/nothing-of-this-name", characters(), 4)


def test_a_hub_data_set_is_read_by_name_config_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    table = datasets.Dataset.from_list([{"text": "abcdefgh"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (asked.append((a, k)), table)[1])
    assert len(training.examples("some/set@en:validation", characters(), 4)) == 2
    assert asked == [(("some/set", "en"), {"split": "validation"})]


def test_prose_for_training_is_not_what_perplexity_reads():
    from hf_attn_patch.testbed import prose

    rows = training.examples("testbed:prose", characters(), 400)
    trained = "".join(characters().convert_ids_to_tokens(rows[0]["input_ids"]))
    assert trained[:300] == prose.prose(300, 40_000)


# -- finetune -------------------------------------------------------------------------------------------------------


class Stop(RuntimeError):
    """A killed training."""


def recipe(**more):
    options = dict(
        steps=4, lr=1e-2, batch=2, length=16, log_every=1, save_every=2, lora=training.Lora(r=2, alpha=4)
    )
    return training.Recipe(**{**options, **more})


def run(out, data, **more):
    options = {k: more.pop(k) for k in ("resume", "callbacks") if k in more}
    patches = more.pop("patches", [("moh", {**MOH, "layers": "0"})])
    return finetune(language_model(), characters(), str(data), out, patches, recipe(**more), **options)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    return file


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path, text):
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 3:
                raise Stop

    whole = run(tmp_path / "whole", text)
    assert whole.loss is not None and whole.log[0]["loss"] > whole.loss
    with pytest.raises(Stop):
        run(tmp_path / "part", text, callbacks=[Kill()])
    with refused(ConfigError, "checkpoint-2", "--resume"):
        run(tmp_path / "part", text)
    again = run(tmp_path / "part", text, resume=True)
    assert again.tokens == whole.tokens // 2 == 2 * 2 * 16
    a, b = (dict(r.model.named_parameters()) for r in (whole, again))
    for name in a:
        assert torch.equal(a[name], b[name]), name
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert (
        record["parameters"] == whole.parameters
        and len([e for e in record["log"] if "moh.balance" in e]) == 4
    )
    loaded = training.load(language_model(), tmp_path / "whole").eval()
    inputs = ids(loaded)
    assert torch.equal(output(loaded, inputs), output(whole.model, inputs))


def test_eval_measures_what_finetune_wrote(tmp_path, text, capsys, monkeypatch):
    from hf_attn_patch.cli import models

    made = run(tmp_path / "out", text)
    capsys.readouterr()  # the log of Trainer
    monkeypatch.setattr(
        models, "load_model", lambda name, dtype="float32", takes=None: (language_model(), characters())
    )
    command = [
        "eval",
        "perplexity:tokens=64,context=64",
        "--model",
        "x",
        "--adapter",
        str(tmp_path / "out"),
        "--json",
    ]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["active_patches"] and "MoH" in found["model"]["active_patches"][0]
    from hf_attn_patch.eval import run as measure

    here = measure("perplexity:tokens=64,context=64", made.model, characters())["dense"].aggregates[
        "perplexity"
    ]
    assert found["variants"][0]["aggregates"]["perplexity"] == pytest.approx(here, rel=1e-6)


def test_routers_alone_and_the_dense_model_with_lora(tmp_path, text):
    alone = run(tmp_path / "router", text, lora=None, steps=1, checkpointing=True)
    assert alone.parameters["patch"] == alone.parameters["trained"]
    dense = run(tmp_path / "dense", text, patches=[], steps=1, checkpointing=True)
    assert dense.parameters["patch"] == 0 < dense.parameters["trained"]
    with_both = run(tmp_path / "both", text, steps=1, checkpointing=True)
    without = run(tmp_path / "both2", text, steps=1)
    a, b = (dict(r.model.named_parameters()) for r in (with_both, without))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"resume": True}, ("nothing to resume",)),
        ({"length": 1 << 20}, ("length=1048576", "positions")),
        (
            {"patches": [("streaming", {"window": 8})], "lora": None},
            ("streaming declares no gradient", "--lora"),
        ),
        ({"lora": training.Lora(targets=("nope",))}, ("no layer is called nope", "q_proj")),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, text, options, words):
    with refused(PatchError, *words):
        run(tmp_path / "out", text, **options)


def test_recipe_and_lora_are_checked():
    assert training.Lora.parse("r=4,targets=q_proj+k_proj") == training.Lora(4, 16, ("q_proj", "k_proj"))
    for bad in ("r=x", "rank=4", "r=0"):
        with pytest.raises(ConfigError, match="lora"):
            training.Lora.parse(bad)
    with refused(ConfigError, "steps=0"):
        training.Recipe(steps=0)


@pytest.mark.parametrize("package", ["peft", "accelerate", "datasets"])
def test_a_missing_package_names_its_extra(tmp_path, text, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    extra = "eval" if package == "datasets" else "peft"
    data = "some/set" if package == "datasets" else text
    with refused(PatchError, package, f"pip install 'hf-attn-patch[{extra}]'"):
        run(tmp_path / "out", data)


def command(folder, text, out, *more):
    return [
        "finetune", "--model", str(folder), "--data", str(text), "--out", str(out), "--steps", "2", "--batch", "2",
        "--length", "16", "--lr", "0.01", "--log-every", "1", "--lora", "r=2,alpha=4,targets=q_proj+v_proj",
        "--patch", "moh:router=learned,active=0.75,shared=0.25,balance=0.0", *more,
    ]  # fmt: skip


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "peft" / "adapter_model.safetensors") | load_file(
        folder / "patch-0-moh" / "attn_patch.safetensors"
    )


def test_two_processes_learn_what_one_does_with_twice_the_batch(tmp_path, text, capsys):
    folder = save_folder(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # on a CPU accelerate starts one process unless there is MPI; its launcher for GPUs only sets the environment
    launch = f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0 -m hf_attn_patch"
    arguments = [*launch.split(), *command(folder, text, tmp_path / "two")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "two" / "training.json").read_text())
    assert record["processes"] == 2 and record["tokens"] == 2 * 2 * 2 * 16
    assert done.stdout.count("parameters trained") == 1
    with pytest.raises(SystemExit) as end:
        main(command(folder, text, tmp_path / "one", "--batch", "4"))
    assert end.value.code in (0, None) and "tokens/s" in capsys.readouterr().out
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_example_script_needs_two_lines(tmp_path):
    source = ROOT / "examples" / "trainer.py"
    assert sum("# line" in line for line in source.read_text().splitlines()) == 2
    spec = importlib.util.spec_from_file_location("example", source)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        balance = example.main(str(save_folder(tmp_path / "model")), 2, str(tmp_path / "out"))
    assert 0 < balance < 4
    assert (tmp_path / "out" / "adapters" / "patch-0-moh" / "attn_patch.safetensors").is_file()
