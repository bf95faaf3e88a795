"""Several conversations at a time on one patched model."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..conformance.families import columns_of
from .base import Bench, Pairs, setting


@contextmanager
def eager_switching() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def jobs(bench: Bench) -> list[dict[str, Any]]:
    return [bench.inputs(batch=1 + i % 2, length=10 + 3 * (i % 3), seed=i) for i in range(6)]


@setting("threads", "a pool of 4 threads, different prompts; equals one at a time")
def threads(bench: Bench) -> Pairs:
    model, prompts = bench.model, jobs(bench)
    with bench.patched(model):
        want = [bench.answer(model, one) for one in prompts]
        with eager_switching(), ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda one: bench.answer(model, one), prompts))
    for number, (a, b) in enumerate(zip(got, want)):
        yield f"prompt {number}", a, b


@setting(
    "asyncio: run_in_executor and to_thread", "tasks that leave forwards to threads; equals one at a time"
)
def executor(bench: Bench) -> Pairs:
    model, prompts = bench.model, jobs(bench)[:4]

    async def everything() -> list[Tensor]:
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(None, bench.answer, model, one) for one in prompts[:2]]
        tasks += [asyncio.to_thread(bench.answer, model, one) for one in prompts[2:]]
        return await asyncio.gather(*tasks)

    with bench.patched(model):
        want = [bench.answer(model, one) for one in prompts]
        with eager_switching():
            got = asyncio.run(everything())
    for number, (a, b) in enumerate(zip(got, want)):
        yield f"prompt {number}", a, b


def steps(bench: Bench, model: Any, inputs: dict[str, Any], length: int, said: bool) -> Iterator[Tensor]:
    """A loop of one's own: a prompt of `length` tokens, then one token at a time."""
    cache = DynamicCache(config=model.config)
    end = inputs["input_ids"].shape[1]
    with bench.prompt(model, length=length) if said else nullcontext():
        for begin, stop in [(0, length), *((i, i + 1) for i in range(length, end))]:
            part = columns_of(inputs, begin, stop)
            yield bench.forward(model, part, past_key_values=cache, use_cache=True)


def talks(bench: Bench) -> list[tuple[dict[str, Any], int]]:
    """Three conversations with prompts of different lengths."""
    found = []
    for number in range(3):
        inputs = bench.inputs(batch=1, length=15 + 2 * number, seed=number)
        found.append((inputs, bench.prompt_end(inputs) + number))
    return found


@setting(
    "asyncio: awaits between forwards",
    "three decoding tasks, each with its hap.prompt; equals one at a time",
    decoder=True,
)
def awaits(bench: Bench) -> Pairs:
    model = bench.model

    async def talk(inputs: dict[str, Any], length: int) -> Tensor:
        found = []
        cache = DynamicCache(config=model.config)
        with bench.prompt(model, length=length):
            for begin, stop in [
                (0, length),
                *((i, i + 1) for i in range(length, inputs["input_ids"].shape[1])),
            ]:
                part = columns_of(inputs, begin, stop)
                found.append(bench.forward(model, part, past_key_values=cache, use_cache=True))
                await asyncio.sleep(0)
        return torch.cat(found, 1)

    async def everything() -> list[Tensor]:
        return await asyncio.gather(*(talk(*one) for one in talks(bench)))

    with bench.patched(model):
        want = [torch.cat(list(steps(bench, model, *one, said=True)), 1) for one in talks(bench)]
        got = asyncio.run(everything())
    for number, (a, b) in enumerate(zip(got, want)):
        yield f"conversation {number}", a, b


def interleaved(bench: Bench, said: bool) -> Pairs:
    model = bench.model
    with bench.patched(model):
        want = [torch.cat(list(steps(bench, model, *one, said=said)), 1) for one in talks(bench)]
        running = [steps(bench, model, *one, said=said) for one in talks(bench)]
        got: list[list[Tensor]] = [[] for _ in running]
        over: set[int] = set()
        try:
            while len(over) < len(running):
                for number, one in enumerate(running):
                    try:
                        got[number].append(next(one))
                    except StopIteration:
                        over.add(number)
        finally:
            for one in reversed(running):
                one.close()
    for number, (a, b) in enumerate(zip(got, want)):
        yield f"conversation {number}", torch.cat(a, 1), b


@setting(
    "generators",
    "three loops of one's own, interleaved in one thread; equals one after the other",
    decoder=True,
)
def generators(bench: Bench) -> Pairs:
    yield from interleaved(bench, said=False)


@setting(
    "generators with hap.prompt around their yields",
    "the same, each inside its own hap.prompt(length=)",
    decoder=True,
)
def generators_said(bench: Bench) -> Pairs:
    yield from interleaved(bench, said=True)
