"""Ways to read a prompt and to decode."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_attn_patch.testbed.tiny import tiny_model

from ..conformance.families import columns_of
from .base import Bench, NotApplicable, Pairs, setting


def parts(bench: Bench, model: Any, inputs: dict[str, Any], cuts: list[int], cache: Any) -> Tensor:
    """Outputs of forwards that end at `cuts`, on one cache."""
    found, begin = [], 0
    for end in cuts:
        part = columns_of(inputs, begin, end)
        found.append(bench.forward(model, part, past_key_values=cache, use_cache=True))
        begin = end
    return torch.cat(found, 1)


def dynamic(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def plain(bench: Bench, model: Any, inputs: dict[str, Any], end: int, last: int) -> Tensor:
    """The prompt in one forward, then a token at a time: what the other ways must equal."""
    with bench.prompt(model, length=end):
        return parts(bench, model, inputs, [end, *range(end + 1, last + 1)], dynamic(model))


@setting(
    "prefill_chunk_size",
    "generate that reads its prompt in chunks of 5; logits of one that reads it at once",
    decoder=True,
)
def chunk_size(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs(left_pad=[2, 0])
    with bench.patched(model):
        want = bench.generate(model, inputs).logits
        yield "logits", bench.generate(model, inputs, prefill_chunk_size=5).logits, want


def in_chunks(bench: Bench, said: bool) -> Pairs:
    model, inputs = bench.model, bench.inputs(length=20, left_pad=[3, 0])
    last = inputs["input_ids"].shape[1]
    first, end = bench.prompt_end(inputs), last - 4
    with bench.patched(model):
        want = plain(bench, model, inputs, end, last)
        with bench.prompt(model, length=end) if said else nullcontext():
            # a forward of one token on a filled cache is decoding, as far as nobody says otherwise
            cuts = [first, *([first + 1] if said else []), first + 3, end, *range(end + 1, last + 1)]
            got = parts(bench, model, inputs, sorted(set(cuts)), dynamic(model))
    for row, pad in enumerate(
        (3, 0)
    ):  # what padding says is nobody's business; unsaid, the answer must be right
        begin = pad if said else end
        yield f"row {row}", got[row, begin:], want[row, begin:]


@setting(
    "chunks by hand, length said",
    "forwards of several tokens inside hap.prompt(length=); equals the prompt at once",
    decoder=True,
)
def chunks_said(bench: Bench) -> Pairs:
    yield from in_chunks(bench, True)


@setting(
    "chunks by hand, length unsaid",
    "the same without hap.prompt: the answer is that of the prompt at once, or refused",
    decoder=True,
)
def chunks_unsaid(bench: Bench) -> Pairs:
    yield from in_chunks(bench, False)


@setting(
    "several turns on one cache",
    "two calls of generate on one cache; logits of a hand-written loop over the same tokens",
    decoder=True,
)
def turns(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs(batch=1)
    more = torch.randint(5, 90, (1, 6), generator=torch.Generator().manual_seed(3))
    given = {k: v for k, v in inputs.items() if k != "position_ids"}
    with bench.patched(model):
        first = bench.generate(model, given, 4)
        ids = torch.cat([first.sequences, more], 1)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = bench.generate(model, text, 4, past_key_values=first.past_key_values)
        end, turn, last = given["input_ids"].shape[1], ids.shape[1], second.sequences.shape[1]
        everything = {
            **given,
            "input_ids": second.sequences,
            "attention_mask": torch.ones_like(second.sequences),
        }
        everything["position_ids"] = torch.arange(last)[None]
        cuts = [end, *range(end + 1, end + 4), turn, *range(turn + 1, last)]
        want = parts(bench, model, everything, cuts, dynamic(model))
    yield "first answer", first.logits, want[:, end - 1 : end + 3].float()  # those of generate are in float32
    yield "second answer", second.logits, want[:, turn - 1 : last - 1].float()


@setting(
    "copies of caches",
    "a prefix read once, its cache deep-copied for two continuations; equals reading it anew",
    decoder=True,
)
def copies(bench: Bench) -> Pairs:
    model = bench.model
    one = bench.inputs(batch=1, length=18)
    other = {**one, "input_ids": one["input_ids"].clone()}
    cut, last = bench.prompt_end(one), one["input_ids"].shape[1]
    end = min(cut + 4, last - 2)
    other["input_ids"][:, cut:] = other["input_ids"][:, cut:].flip(1)
    cuts = [end, *range(end + 1, last + 1)]
    with bench.patched(model):
        wants = [plain(bench, model, x, end, last) for x in (one, other)]
        with bench.prompt(model, length=end):
            prefix = dynamic(model)
            bench.forward(model, columns_of(one, 0, cut), past_key_values=prefix, use_cache=True)
            for name, x, want in zip(("first", "second"), (one, other), wants):
                cache, found, begin = copy.deepcopy(prefix), [], cut
                for stop in cuts:
                    part = columns_of(x, begin, stop)
                    found.append(bench.forward(model, part, past_key_values=cache, use_cache=True))
                    begin = stop
                yield name, torch.cat(found, 1), want[:, cut:]


@setting("beams", "3 beams with a cache; sequences and scores of the search without one", decoder=True)
def beams(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs(left_pad=[3, 0])
    with bench.patched(model):
        found = [
            bench.generate(
                model, inputs, num_beams=3, num_return_sequences=2, output_scores=True, use_cache=c
            )
            for c in (True, False)
        ]
    yield "sequences", found[0].sequences, found[1].sequences
    yield "scores", found[0].sequences_scores, found[1].sequences_scores


@setting("use_cache=False", "generate without a cache; logits of one with", decoder=True)
def uncached(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs(left_pad=[3, 0])
    with bench.patched(model):
        want = bench.generate(model, inputs).logits
        yield "logits", bench.generate(model, inputs, use_cache=False).logits, want


@setting(
    "several samples of a prompt", "num_return_sequences=3, seeded; with a cache as without", decoder=True
)
def samples(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs(left_pad=[3, 0])
    found = []
    with bench.patched(model):
        for cached in (True, False):
            torch.manual_seed(5)
            more = dict(do_sample=True, num_return_sequences=3, use_cache=cached)
            found.append(bench.generate(model, inputs, **more))
    yield "sequences", found[0].sequences, found[1].sequences
    yield "logits", found[0].logits, found[1].logits


def repeating(bench: Bench) -> dict[str, Any]:
    """One row whose text repeats itself, so that prompt lookup finds something."""
    inputs = bench.inputs(batch=1, length=24)
    ids, begin = inputs["input_ids"], bench.prompt_end(inputs)
    count = ids.shape[1] - begin
    ids[:, begin:] = torch.tensor([7, 11, 13]).repeat(count // 3 + 1)[:count]
    return {k: v for k, v in inputs.items() if k != "position_ids"}


def same_tokens(bench: Bench, **more: Any) -> Pairs:
    model, inputs = bench.model, repeating(bench)
    with bench.patched(model):
        want = bench.generate(model, inputs, 8).sequences
        got = bench.generate(model, inputs, 8, output_logits=False, **more).sequences
    yield "tokens", got, want


@setting("prompt-lookup decoding", "prompt_lookup_num_tokens=3; tokens of greedy decoding", decoder=True)
def lookup(bench: Bench) -> Pairs:
    yield from same_tokens(bench, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)


@setting("assisted decoding", "a second model drafts; tokens of greedy decoding", decoder=True)
def assisted(bench: Bench) -> Pairs:
    if "pixel_values" in bench.inputs():
        raise NotApplicable("drafts for a model that sees images need a drafting model that sees them")
    drafter = copy.deepcopy(
        bench.model
    )  # the dense model drafts well for its patched self, but not always rightly
    drafter.generation_config.num_assistant_tokens = 4
    yield from same_tokens(bench, assistant_model=drafter)
    other = tiny_model(bench.family, seed=1).double()
    other.generation_config.num_assistant_tokens = 3
    yield from same_tokens(bench, assistant_model=other)


@setting("static cache by hand", "StaticCache longer than the text; equals a dynamic one", decoder=True)
def static(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs(left_pad=[3, 0])
    last = inputs["input_ids"].shape[1]
    end = bench.prompt_end(inputs)
    cuts = [end, *range(end + 1, last + 1)]
    with bench.patched(model):
        want = plain(bench, model, inputs, end, last)
        with bench.prompt(model, length=end):
            cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=last + 9)
            got = parts(bench, model, inputs, cuts, cache)
    for row, pad in enumerate((3, 0)):
        yield f"row {row}", got[row, pad:], want[row, pad:]


@setting("static cache of generate", 'cache_implementation="static"; logits of a dynamic one', decoder=True)
def static_generate(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs(left_pad=[3, 0])
    with bench.patched(model):
        want = bench.generate(model, inputs).logits
        yield "logits", bench.generate(model, inputs, cache_implementation="static").logits, want


@setting(
    "disabled() meanwhile",
    "half of a conversation inside handle.disabled(): dense there, refused, or the dense tokens",
    decoder=True,
)
def disabled(bench: Bench) -> Pairs:
    model, inputs = bench.model, bench.inputs(batch=1)
    last, end = inputs["input_ids"].shape[1], bench.prompt_end(inputs)
    want = plain(Bench(bench.case, dense=True), model, inputs, end, last)
    with bench.patched(model) as handle:
        expected = bench.answer(model, inputs)
        with handle.disabled() if handle else nullcontext():
            got = plain(bench, model, inputs, end, last)
        again = bench.answer(model, inputs)
    yield "disabled", got, want
    yield "enabled again", again, expected
