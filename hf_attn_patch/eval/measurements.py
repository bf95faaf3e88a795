"""What a patch costs or saves: tokens per second, images per second, bytes of KV cache. Measured, never derived.

Each function works on the model as it stands, patched or not. Compare numbers of one process only, and take turns
(`in_turns`): a shared machine drifts by more than most patches change.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def prose_ids(tokenizer: Any, length: int) -> Any:
    """`length` tokens of the testbed's prose, int64 [1, length].

    Raises:
        ValueError: the prose of this machine is shorter.
    """
    from .perplexity import CHARACTERS_PER_TOKEN, longest_prose

    text = longest_prose(length * CHARACTERS_PER_TOKEN)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"asked for {length} tokens of prose, this machine has {ids.shape[1]}")
    return ids


def prefill(model: Any, ids: Any) -> tuple[float, Any]:
    """One forward over `ids` with an empty KV cache: (seconds, the cache object that the model filled)."""
    import torch

    ids = ids.to(model.device)
    with torch.inference_mode():
        _wait(model)
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        _wait(model)
        seconds = time.perf_counter() - start
    return seconds, out.past_key_values


def prefill_tokens_per_second(model: Any, tokenizer: Any, length: int, repeats: int = 2) -> float:
    """Median prefill speed over `repeats` forwards of `length` tokens (a short one warms up first)."""
    ids = prose_ids(tokenizer, length)
    prefill(model, ids[:, :64])
    return length / statistics.median(prefill(model, ids)[0] for _ in range(repeats))


def kv_bytes(model: Any, length: int, tokenizer: Any = None) -> int:
    """Bytes that the KV cache really holds after a prefill of `length` tokens.

    tokenizer: None = token ids 0, 1, 2, … (the bytes do not depend on the text).
    """
    import torch

    if tokenizer is not None:
        ids = prose_ids(tokenizer, length)
    else:
        ids = torch.arange(length)[None] % model.get_input_embeddings().num_embeddings
    return cache_nbytes(prefill(model, ids)[1])


def cache_nbytes(cache: Any) -> int:
    """Bytes behind a cache object of transformers: the layers' own ``nbytes()``, else every storage they keep alive.

    Storages are counted once and in full: a view of a large tensor holds the large tensor.

    Raises:
        ValueError: the object has no layers.
    """
    if hasattr(cache, "self_attention_cache"):
        return cache_nbytes(cache.self_attention_cache) + cache_nbytes(cache.cross_attention_cache)
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"{type(cache).__name__} has no layers, its bytes cannot be counted")
    total = 0
    storages: dict[int, int] = {}  # by address: a storage counts once
    for layer in layers:
        own = getattr(layer, "nbytes", None)
        if callable(own):
            total += int(own())
        else:
            _collect(vars(layer), storages)
    return total + sum(storages.values())


def _collect(value: Any, storages: dict[int, int]) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if value.device.type != "meta":
            storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for inner in value.values():
            _collect(inner, storages)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _collect(inner, storages)


def images_per_second(model: Any, pixels: Any, batch: int = 8, repeats: int = 2) -> float:
    """Median speed of forwards over `pixels` [n, C, H, W] in batches (one batch warms up first)."""
    time_images(model, pixels[:batch], batch)
    return len(pixels) / statistics.median(time_images(model, pixels, batch) for _ in range(repeats))


def time_images(model: Any, pixels: Any, batch: int) -> float:
    """Seconds of one pass over `pixels`."""
    from .features import encode

    _wait(model)
    start = time.perf_counter()
    encode(model, pixels, batch)
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turns (a, b, a, b, …), so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run())
    return times


def fastest_threads(run: Callable[[], Any], margin: float = 1.15) -> int:
    """torch's number of threads, or 1 if `run` is clearly faster with one, as it is where others use the cores:
    every parallel region then waits for a thread that has no core. Leaves the number as it was."""
    import torch

    threads, seconds = torch.get_num_threads(), {}
    try:
        for count in {threads, 1}:
            torch.set_num_threads(count)
            start = time.perf_counter()
            run()
            seconds[count] = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    return 1 if seconds[threads] > margin * seconds[1] else threads


def _wait(model: Any) -> None:
    """A GPU works in the background: its clock is read when it has finished."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
