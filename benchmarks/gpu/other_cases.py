"""Cases beside layout attention: decoding, key classes and VAR, linear attention, a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.call.mask import Mask
from hf_attn_patch.call.program import MassEdit, Program
from hf_attn_patch.call.ragged import KVGroup, RaggedKV
from hf_attn_patch.kernels import attention
from hf_attn_patch.kernels.linear import linear_attention
from hf_attn_patch.kernels.triton.classes import class_attention
from hf_attn_patch.kernels.triton.decode import decode, decode_ragged
from hf_attn_patch.kernels.triton.layout_attention import layout_attention
from hf_attn_patch.patches.grounding.var import IMAGE, IMAGE_SINK, TEXT_SINK, transfer

from .attention_cases import causal_flops, causal_layout, sizes
from .case import Case, Context, Prepared
from .competitors import fla, sdpa

VAR = transfer(rho=0.9, min_mass=0.01, move=0.4)  # conditions that random inputs meet


# -- decoding ----------------------------------------------------------------------------------------------


def decoding(context: Context, S: int, B: int, kv_heads: int, spans: str) -> Prepared:
    """One new token per row. spans: ``dense``; ``half the heads`` keep 4 + 512 keys; ``half the keys`` on every head;
    ``ragged cache``: the first as a cache holds it, dropped keys gone."""
    heads, _, dim = sizes(context)
    kv_heads = min(kv_heads, heads)
    torch.manual_seed(0)
    q = context.heads(B, heads, 1, dim)
    k, v = (context.heads(B, kv_heads, S, dim).contiguous() for _ in range(2))  # as a cache holds them
    few = 16 if context.tiny else 512
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=context.device)
    sinks, options = 4, {"scale": dim**-0.5, "q_columns": S - 1}
    dense = lambda: decode(q, k, v, **options)[0]
    if spans == "dense":
        kept, found = [S] * kv_heads, Prepared({"ours": dense})
        found.compete("sdpa", lambda: sdpa(context, "auto", q, k, v, False)[0])
    elif spans == "half the keys":
        kept = [S // 2] * kv_heads
        rule = {"spans": ints([S // 2 - sinks] * kv_heads), "sinks": ints([sinks] * kv_heads)}
        found = Prepared({"ours": lambda: decode(q, k, v, **options, **rule)[0], "dense": dense})
    else:
        short = kv_heads // 2
        kept = [few + sinks] * short + [S] * (kv_heads - short)
        rule = {"spans": ints([few] * short + [S] * (kv_heads - short)), "sinks": ints([sinks] * kv_heads)}
        masked = lambda: decode(q, k, v, **options, **rule)[0]
        if spans == "half the heads":
            found = Prepared({"ours": masked, "dense": dense})
        else:
            cache = ragged_cache(k, v, short, sinks, few)
            found = Prepared(
                {
                    "ours": lambda: decode_ragged(q, cache, **options, **rule)[0],
                    "masked": masked,
                    "dense": dense,
                }
            )
            found.same = ("masked",)
    size = context.dtype.itemsize
    gigabytes = lambda keys: (2 * B * keys * dim * size + 2 * B * heads * dim * size) / 1e9
    found.unit, found.work = "GB/s", {"ours": gigabytes(sum(kept)), "dense": gigabytes(S * kv_heads)}
    found.extra = {"density": sum(kept) / (S * kv_heads)}
    return found


def ragged_cache(key: Tensor, value: Tensor, short: int, sinks: int, window: int) -> RaggedKV:
    """A cache whose first `short` KV heads kept sinks and window only."""
    B, n, S, _ = key.shape
    kept = torch.cat([torch.arange(sinks), torch.arange(S - window, S)]).to(key.device)
    groups = []
    for heads, columns in ((range(short), kept), (range(short, n), torch.arange(S, device=key.device))):
        if len(heads):
            pick = lambda x, h=heads, c=columns: x[:, h[0] : h[-1] + 1].index_select(2, c).contiguous()
            groups.append(KVGroup(tuple(heads), pick(key), pick(value), columns.expand(B, -1).contiguous()))
    return RaggedKV(groups, S)


# -- key classes -------------------------------------------------------------------------------------------


def image_in_the_middle(context: Context, B: int, L: int) -> tuple[Tensor, Tensor]:
    """(classes int8 [B, L]: text, an image of L / 4 tokens in the middle with a few sinks, a text sink at the start;
    rows behind the image, bool [B, L])."""
    classes = torch.zeros(B, L, dtype=torch.int8, device=context.device)
    first, end = 3 * L // 8, 5 * L // 8
    classes[:, first:end] = IMAGE
    classes[:, first : end : max(1, L // 16)] = IMAGE_SINK
    classes[:, 0] = TEXT_SINK
    return classes, (torch.arange(L, device=context.device) >= end).expand(B, -1)


def by_class(context: Context, L: int, edited: bool) -> Prepared:
    """Output, masses and counts of four classes against plain layout attention; edited: with a mass transfer."""
    heads, kv_heads, dim = sizes(context)
    q, k, v = context.qkv(1, heads, kv_heads, L, dim)
    classes, behind = image_in_the_middle(context, 1, L)
    layout, plain = causal_layout(context, L, kernel="classes"), causal_layout(context, L)
    options: dict[str, Any] = {"scale": dim**-0.5}
    if edited:
        options |= {"transfer": VAR, "edited": behind[:, None]}
    found = Prepared({
        "ours": lambda: class_attention(q, k, v, layout, classes, 4, **options)[0],
        "plain": lambda: layout_attention(q, k, v, plain, scale=dim**-0.5)[0],
    })  # fmt: skip
    found.work["ours"] = causal_flops(1, heads, L, dim)
    if edited:
        behind_ = behind[:, None, :, None]  # rows the edit leaves alone
        found.view = dict.fromkeys(found.calls, lambda x: x.masked_fill(behind_, 0.0))
    else:
        found.view["ours"] = lambda parts: parts.sum(0)
    found.same = ("plain",)
    return found


def var_program(context: Context, L: int, heads: int, dim: int) -> Program:
    """What `var` makes of a LLaVA-like call."""
    q, k, v = context.qkv(1, heads, heads, L, dim)
    mask = Mask(1, L, L, causal=True, device=context.device)
    program = Program(q, k, v, mask, dim**-0.5)
    classes, behind = image_in_the_middle(context, 1, L)
    program.classify(classes)
    program.mass_edits.append(MassEdit(VAR, 4, behind))
    return program


def var(context: Context, lengths: tuple[int, ...]) -> Prepared:
    """Time and memory against the dense map (first length); peak memory of ours at every length."""
    heads, _, dim = sizes(context)
    run = lambda program, impl: attention(program, impl).output
    programs = [var_program(context, L, heads, dim) for L in lengths]
    first = programs[0]
    found = Prepared(
        {"ours": lambda: run(first, "triton"), "eager reference": lambda: run(first, "reference")}
    )
    found.same, found.memory = ("eager reference",), True
    found.work["ours"] = causal_flops(1, heads, lengths[0], dim)
    for program in programs:
        run(program, "triton")
    peaks = [context.clock.peak(lambda p=program: run(p, "triton")) for program in programs]
    found.extra = {"lengths": list(lengths), "peak_mib": [None if p is None else p / 2**20 for p in peaks]}
    return found


# -- linear attention, whole model -------------------------------------------------------------------------


def linear(context: Context, L: int, B: int, dim: int) -> Prepared:
    """Causal linear attention on positive features of the head dimension."""
    heads = 2 if context.tiny else 16
    fq, fk, v = context.qkv(B, heads, heads, L, dim)
    fq, fk = fq.softmax(-1), fk.softmax(-1)
    found = Prepared({"ours": lambda: linear_attention(fq, fk, v, causal=True, impl="triton")[0]})
    found.compete("fla", lambda: fla(context, fq, fk, v))
    found.compete("torch", lambda: lambda: linear_attention(fq, fk, v, causal=True, impl="torch")[0])
    found.compete("softmax (sdpa)", lambda: sdpa(context, "auto", fq, fk, v, True)[0], same=False)
    found.unit, found.work["ours"] = "GB/s", 4 * B * heads * L * dim * context.dtype.itemsize / 1e9
    return found


def model(context: Context, L: int) -> Prepared:
    """Prefill of a random model of SmolLM2-135M's shape: streaming on these kernels against the model as it is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_attn_patch as hap

    shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152)  # fmt: skip
    if context.tiny:
        shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, vocab_size=64)  # fmt: skip
    settings = LlamaConfig(**shape, max_position_embeddings=L, attn_implementation="sdpa")
    ids = torch.arange(L, device=context.device)[None] % shape["vocab_size"]
    streaming = {"sinks": 4, "window": 16 if context.tiny else 1024}

    def built(impl: str | None) -> Callable[[], Tensor]:
        torch.manual_seed(0)
        net = LlamaForCausalLM(settings).to(context.on, context.dtype).eval().requires_grad_(False)
        if impl is not None:
            hap.patch(net, "streaming", impl=impl, **streaming)

        def run() -> Tensor:
            with torch.no_grad():
                return net(ids, use_cache=False, logits_to_keep=1).logits

        return run

    found = Prepared(
        {"ours": built("triton"), "torch executor": built("torch"), "unpatched sdpa": built(None)}
    )
    found.same, found.tolerance = ("torch executor",), 0.1  # 30 layers of bf16 roundings
    found.unit, found.work = "thousand tokens/s", {"ours": L / 1e3}
    return found


def ceilings(context: Context, what: str) -> Prepared:
    """What the card reaches at best: bytes per second of a copy (read and written), and a square matrix product."""
    if what == "copy":
        size = 1 << 20 if context.tiny else 4 << 30
        x = torch.randint(0, 127, (size,), dtype=torch.int8, device=context.device)
        y = torch.empty_like(x)
        return Prepared({"ours": lambda: y.copy_(x)}, unit="GB/s", work={"ours": 2 * size / 1e9})
    n = 64 if context.tiny else 8192
    a, b = (torch.randn(n, n, device=context.device, dtype=context.dtype) for _ in range(2))
    return Prepared({"ours": lambda: a @ b}, work={"ours": 2 * n**3 / 1e12})


def cases(tiny: bool) -> Iterator[Case]:
    """All cases of this file."""
    n = 64 if tiny else 8192
    for what, size in (("copy", "4 GiB"), ("matmul", "8192^3")):
        yield Case("ceilings", what, {"size": size}, lambda c, w=what: ceilings(c, w))
    long, B = (96, 1) if tiny else (32768, 8)
    for kv_heads in (2,) if tiny else (4, 32):
        for spans in ("dense", "half the heads", "half the keys", "ragged cache"):
            run = lambda c, k=kv_heads, s=spans: decoding(c, long, B, k, s)
            yield Case("decode", spans, {"S": long, "B": B, "Hkv": kv_heads}, run)
    for edited in (True, False):
        for L in (96,) if tiny else (4096, 16384):
            name = "mass transfer" if edited else "parts"
            yield Case("classes", name, {"L": L}, lambda c, L=L, e=edited: by_class(c, L, e))
    lengths = (64, 128) if tiny else (4096, 8192, 16384)
    yield Case("classes", "var", {"L": lengths[0]}, lambda c: var(c, lengths))
    for dim in (16,) if tiny else (64, 128):
        for L in (64,) if tiny else (4096, 8192, 16384, 32768):
            B = 1 if tiny else 32768 // L
            yield Case(
                "linear", "chunks", {"L": L, "B": B, "D": dim}, lambda c, L=L, B=B, d=dim: linear(c, L, B, d)
            )
    yield Case("model", "prefill", {"L": n}, lambda c: model(c, n))
