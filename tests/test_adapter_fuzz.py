"""Registry x damaged adapter files: `hap.load` refuses with a PatchError, or the loaded model gives finite outputs.

Seeded. ``HAP_FUZZ=N`` loads N adapters per method (and shows the seed of what fails).
"""

from __future__ import annotations

import functools
import os
import random
import signal
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.errors import PatchError
from hf_attn_patch.install import dispatch
from hf_attn_patch.testbed.tiny import tiny_inputs, tiny_model

from .adapter_mutations import Files, mutate
from .conformance.families import snapshot

ROUNDS = int(os.environ.get("HAP_FUZZ", "12"))
SECONDS = 10  # one load and one forward; most take 10 ms
FAMILIES = ("llama", "llava", "dinov2", "vit")
pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def model_of(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model(family).requires_grad_(False).eval()
    return model, tiny_inputs(model, batch=1, length=17)


@contextmanager
def in_time(what):
    """The block ends within SECONDS."""

    def late(*_):
        raise TimeoutError(what)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def saved(name) -> list[tuple[str, Files]]:
    """(family, files) of a few adapters of a method."""
    found = []
    for family in FAMILIES:
        model, _ = model_of(family)
        for options in registry.get(name).examples(model)[:3]:
            for more in ({}, {"layers": "0"}):
                try:
                    with (
                        hap.patched(model, name, **options, **more) as handle,
                        tempfile.TemporaryDirectory() as folder,
                    ):
                        handle.save(folder)
                        found.append((family, {f.name: f.read_bytes() for f in Path(folder).iterdir()}))
                except PatchError:
                    continue
        if found:
            break
    return found


def outcome(model, inputs, folder):
    """What a load did, in words; anything but a PatchError or finite outputs fails."""
    try:
        hap.load(model, folder)
    except PatchError as refusal:
        assert len(str(refusal)) < 4000
        return "refused"
    try:
        with torch.no_grad():
            out = model(**inputs, **({"use_cache": False} if "input_ids" in inputs else {}))[0]
    except PatchError:
        return "refused by the forward"
    assert torch.isfinite(out).all(), "accepted, and its outputs are not finite"
    return "loaded"


@pytest.mark.parametrize("name", list(hap.available()))
def test_damaged_adapters_are_refused_or_work(name, tmp_path):
    adapters = saved(name)
    assert adapters, f"no family of {FAMILIES} takes {name}"
    for number in range(ROUNDS):
        seed = f"{name}-{number}"
        draw = random.Random(seed)
        family, files = draw.choice(adapters)
        model, inputs = model_of(family)
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, content in mutate(draw, files).items():
            (folder / file).write_bytes(content)
        before, start = snapshot(model), time.monotonic()
        try:
            with in_time(seed):
                outcome(model, inputs, folder)
        except Exception as error:
            raise AssertionError(f"{seed}: {type(error).__name__}: {str(error)[:300]}") from error
        finally:
            hap.unpatch(model)
        assert time.monotonic() - start < SECONDS
        after = snapshot(model)
        assert not hap.active(model) and not dispatch.registered()
        assert all(after[key] == before[key] for key in before), seed
