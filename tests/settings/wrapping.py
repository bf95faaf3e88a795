"""What is done to, and built from, a patched model: offload, PEFT, pickles, pipelines, errors, compilation."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import hf_attn_patch as hap
from hf_attn_patch.model.sites import find_sites

from .base import TEXT, Bench, NotApplicable, Pairs, Wrong, setting


def reference(bench: Bench) -> tuple[Any, Any]:
    """(inputs, what the patched model says to them)."""
    inputs = bench.inputs(left_pad=0)
    with bench.patched(bench.model):
        return inputs, bench.answer(bench.model, inputs)


def offloaded(bench: Bench, offload: Any) -> Pairs:
    inputs, want = reference(bench)
    for when in ("before", "behind"):
        model = bench.fresh()
        if when == "before":
            bench.patch(model)
            offload(model)
        else:
            offload(model)
            bench.patch(model)
        yield f"patched {when} the offload", bench.answer(model, inputs), want
        hap.unpatch(model)


@setting(
    "accelerate cpu_offload",
    "parameters on meta between uses; patched before or behind it; equals no offload",
)
def cpu_offload(bench: Bench) -> Pairs:
    from accelerate import cpu_offload as offload

    yield from offloaded(bench, lambda model: offload(model, execution_device=torch.device("cpu")))


@setting("accelerate disk_offload", "the same from files")
def disk_offload(bench: Bench) -> Pairs:
    from accelerate import disk_offload as offload

    with tempfile.TemporaryDirectory() as folder:
        number = iter(range(9))

        def run(model: Any) -> None:
            offload(model, f"{folder}/{next(number)}", execution_device=torch.device("cpu"))

        yield from offloaded(bench, run)


PROJECTIONS = ("q_proj", "v_proj", "query", "value")


def with_lora(model: Any) -> Any:
    """The model with two LoRA adapters of random weights."""
    from peft import LoraConfig, get_peft_model

    linear = {
        n.rsplit(".", 1)[-1]
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "attn_patch" not in n
    }
    targets = [n for n in PROJECTIONS if n in linear]
    if not targets:
        raise NotApplicable("no projection of a known name to put LoRA on")
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="a")
    wrapped.add_adapter("b", config)
    return wrapped.double()


@setting("PEFT LoRA", "two adapters switched, then merge_and_unload; equals the merged weights, patched")
def lora(bench: Bench) -> Pairs:
    inputs = bench.inputs(left_pad=0)
    wants = {}
    for name in ("a", "b"):
        wrapped = with_lora(bench.fresh())
        wrapped.set_adapter(name)
        merged = wrapped.merge_and_unload()
        with bench.patched(merged):
            wants[name] = bench.answer(merged, inputs)
    for when in ("before", "behind"):
        model = bench.fresh()
        if when == "before":
            bench.patch(model)
            wrapped = with_lora(model)
        else:
            wrapped = with_lora(model)
            bench.patch(wrapped)
        for name in ("a", "b", "a"):
            wrapped.set_adapter(name)
            yield f"adapter {name}, patched {when} PEFT", bench.answer(wrapped, inputs), wants[name]
        wrapped.set_adapter("b")
        merged = wrapped.merge_and_unload()
        yield f"merged, patched {when} PEFT", bench.answer(merged, inputs), wants["b"]
        if not bench.dense and hap.unpatch(merged) != 1:
            raise Wrong("the merged model did not carry one patch")


@setting(
    "PEFT prompt tuning",
    "virtual tokens as embeddings in front; equals the embeddings given by hand",
    text=True,
)
def prompt_tuning(bench: Bench) -> Pairs:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    inputs, model = bench.inputs(left_pad=0), bench.fresh()
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    torch.manual_seed(1)
    wrapped = get_peft_model(copy.deepcopy(model), config).double()
    virtual = wrapped.get_prompt(2).double()
    embeds = torch.cat([virtual, model.get_input_embeddings()(inputs["input_ids"])], 1).detach()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (4, 0), value=1)
    with bench.patched(model):
        want = bench.forward(model, {"inputs_embeds": embeds, "attention_mask": mask})
    with bench.patched(wrapped):
        plain = {k: v for k, v in inputs.items() if k != "position_ids"}
        yield "outputs", bench.forward(wrapped, plain), want


@contextmanager
def quiet() -> Iterator[None]:
    """Dynamo logs whole graphs when it gives up."""
    torch._dynamo.reset()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        torch._dynamo.reset()


class Boom(Exception):
    """The user's own error."""


@setting(
    "nested blocks and errors inside",
    "an error in the inner of two patched blocks; outer patch, then the dense model come back",
)
def nested(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs()
    dense = bench.forward(model, inputs)
    second = "head_gate" if bench.case.patch != "head_gate" else "entropy_scale"
    options = {"head_gate": {"gate": 0.5}, "entropy_scale": {"train_length": 4}}[second]
    with bench.patched(model):
        want = bench.forward(model, inputs)
        if not bench.dense:
            try:
                with hap.patched(model, second, **options):
                    bench.forward(model, inputs)
                    raise Boom
            except Boom:
                pass
            except (
                hap.PatchError
            ) as error:  # the two do not compose: the block raises before anything changed
                if bench.case.patch not in str(error) and "site" not in str(error):
                    raise
        yield "outer patch", bench.forward(model, inputs), want
    try:
        with bench.patched(model):
            raise Boom
    except Boom:
        pass
    if hap.active(model):
        raise Wrong("a patch is left")
    if not torch.equal(bench.forward(model, inputs), dense):
        raise Wrong("the model is not what it was")


def cut_off(bench: Bench, error: type[BaseException]) -> Pairs:
    model = bench.model
    inputs, other = bench.inputs(), bench.inputs(batch=1, length=12, seed=5)
    with bench.patched(model):
        want = bench.answer(model, other)
        for site in find_sites(model)[:2]:

            def stop(module: Any, args: Any) -> None:
                raise error

            for module in (
                site.module,
                next(m for m in site.module.modules() if isinstance(m, torch.nn.Linear)),
            ):
                hook = module.register_forward_pre_hook(stop)
                try:
                    bench.answer(model, inputs)
                    raise Wrong("was not interrupted")
                except error:
                    pass
                finally:
                    hook.remove()
                yield f"after {site.path}", bench.answer(model, other), want


@setting("Ctrl-C inside a forward", "interrupted in a layer; the next forwards equal those of a rested model")
def interrupted(bench: Bench) -> Pairs:
    yield from cut_off(bench, KeyboardInterrupt)


@setting("an error inside a forward", "the same with an exception (out of memory)")
def failed(bench: Bench) -> Pairs:
    yield from cut_off(bench, MemoryError)


@setting("deepcopy", "a copy of the patched model says the same, and is undone by itself")
def copied(bench: Bench) -> Pairs:
    inputs, want = reference(bench)
    dense = bench.forward(bench.model, inputs)
    with bench.patched(bench.model):
        twin = copy.deepcopy(bench.model)
    yield "copy", bench.answer(twin, inputs), want
    hap.unpatch(twin)
    yield "copy undone", bench.forward(twin, inputs), dense


@setting("pickle and torch.save", "a pickled patched model says the same, and is undone by itself")
def pickled(bench: Bench) -> Pairs:
    inputs, want = reference(bench)
    dense = bench.forward(bench.model, inputs)
    with bench.patched(bench.model):
        data, file = pickle.dumps(bench.model), io.BytesIO()
        torch.save(bench.model, file)
    file.seek(0)
    for how, twin in (("pickle", pickle.loads(data)), ("torch.save", torch.load(file, weights_only=False))):
        yield how, bench.answer(twin, inputs), want
        hap.unpatch(twin)
        yield f"{how} undone", bench.forward(twin, inputs), dense


@setting("save_pretrained and load", "weights and adapter saved apart, loaded in a new model; says the same")
def saved(bench: Bench) -> Pairs:
    inputs, want = reference(bench)
    with tempfile.TemporaryDirectory() as folder:
        with bench.patched(bench.model) as handle:
            bench.model.save_pretrained(f"{folder}/weights")
            if handle is not None:
                handle.save(f"{folder}/adapter")
        model = type(bench.model).from_pretrained(f"{folder}/weights", dtype=torch.float64).eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        if handle is not None:
            hap.load(model, f"{folder}/adapter")
        yield "outputs", bench.answer(model, inputs), want


@setting(
    "weights loaded meanwhile",
    "load_state_dict of dense weights into the patched model; equals patching the loaded one",
)
def weights(bench: Bench) -> Pairs:
    inputs = bench.inputs(left_pad=0)
    other = bench.fresh()
    torch.manual_seed(8)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01 * torch.randn_like(p))
    dense = other.state_dict()
    with bench.patched(other):
        want = bench.answer(other, inputs)
    model = bench.fresh()
    with bench.patched(model):
        model.load_state_dict(dense)
        yield "outputs", bench.answer(model, inputs), want


@setting(
    "set_attn_implementation meanwhile",
    'model.set_attn_implementation("eager") while patched: still patched, or refused by name',
)
def implementation(bench: Bench) -> Pairs:
    inputs, eager, model = bench.inputs(left_pad=0), bench.fresh(), bench.fresh()
    eager.set_attn_implementation("eager")
    with bench.patched(eager):
        want = bench.answer(eager, inputs)
    with bench.patched(model):
        model.set_attn_implementation("eager")
        yield "outputs", bench.answer(model, inputs), want
    yield "the user's choice is kept", model.config._attn_implementation, "eager"


@setting(
    'pipeline("text-generation")',
    "built from a patched model, and patched itself; text of generate",
    text=True,
)
def pipeline(bench: Bench) -> Pairs:
    from transformers import pipeline as build

    from ..tiny_text import characters

    if bench.family not in TEXT:
        raise NotApplicable("no tokenizer")
    tokenizer, model = characters(), bench.fresh()
    text = "the attention of this text, twice over"
    inputs = {k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"}
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with bench.patched(model):
        want = model.generate(**inputs, **how)[0].tolist()
        logits = bench.forward(model, inputs)
        made = build("text-generation", model=model, tokenizer=tokenizer)
        how["return_tensors"] = True
        yield "built from a patched model", made(text, **how)[0]["generated_token_ids"], want
        yield "logits", bench.forward(made.model, inputs), logits
    made = build("text-generation", model=bench.fresh(), tokenizer=tokenizer)
    with bench.patched(made):
        yield "patched itself", made(text, **how)[0]["generated_token_ids"], want


@setting(
    "torch.compile",
    'backend "eager": the graph is traced, nothing is generated; equals no compilation',
    slow=True,
)
def compiled(bench: Bench) -> Pairs:
    model = bench.fresh()
    inputs, other = bench.inputs(left_pad=0), bench.inputs(length=23, seed=2)
    more = {"use_cache": False} if bench.decoder else {}
    with quiet(), bench.patched(model):
        want = [bench.forward(model, x, **more) for x in (inputs, other)]
        quick = torch.compile(model, backend="eager")
        for number, x in enumerate((inputs, other)):
            yield f"forward {number}", bench.forward(quick, x, **more), want[number]


@setting("torch.export", "the exported graph of a patched model; equals the model", slow=True)
def exported(bench: Bench) -> Pairs:
    model = bench.fresh()
    inputs = bench.inputs(left_pad=0)
    if bench.family in TEXT:
        inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    more = {"use_cache": False} if bench.decoder else {}
    with quiet(), bench.patched(model), torch.no_grad():
        want = bench.forward(model, inputs, **more)
        graph = torch.export.export(model, (), {**inputs, **more}, strict=False).module()
        yield "outputs", graph(**inputs, **more)[0], want
