"""`vit_throughput`: images per second, time and memory of a vision model over image sizes, measured in turns.

Dense and patched take turns on each size (as in `throughput`). Pixels are random: no executor looks at them; methods
that read a fixed number of keys read as many of noise, those with a threshold may not. A size that a model was not
trained at gets interpolated position embeddings where the model can do that. Two forwards of each variant at each size
are not timed: the first builds layouts, the second is asked for its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .feature_cache import patches_of
from .features import _needs_interpolation
from .measurements import _wait
from .task import Metric, Scores, Task, Tick, require_pixels
from .throughput import MIB, PEAK, peak_memory


@dataclass(frozen=True)
class Run:
    """One measurement. size: side in pixels. pixels: [batch, C, size, size]."""

    size: int
    pixels: Any


@dataclass
class VitThroughput(Task):
    """Speed and memory of a vision model.

    Attributes:
        sizes: sides in pixels, multiples of the patch size. batch: images per forward; images/s counts all of them, ms
        is the time of the forward divided by them. repeats: measurements per size.
    """

    sizes: tuple[int, ...] = (224, 448, 896)
    batch: int = 1
    repeats: int = 3

    name: ClassVar[str] = "vit_throughput"
    summary: ClassVar[str] = "images/s, ms and memory over image sizes (vision)"
    in_turns: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("images", "images/s", True, digits=2, over="mean of groups"),
        Metric("per image", "ms", False, digits=1, over="mean of groups"),
    )

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or self.batch < 1 or self.repeats < 1:
            raise ValueError(
                f"vit_throughput: sizes={list(self.sizes)}, batch={self.batch} and repeats={self.repeats} must be at "
                "least 1, and one size be given"
            )

    def items(self, model: Any, processor: Any, seed: int) -> list[Run]:
        import torch

        require_pixels(self.name, model)
        self._peaks: dict[tuple[int, str], float] = {}
        with peak_memory(model) as peak:
            pass
        if peak.known:
            self.metrics = (*type(self).metrics, replace(PEAK, over="mean of groups"))  # type: ignore[misc]
        channels = getattr(model.config, "num_channels", 3)
        draw, pixels = torch.Generator().manual_seed(seed), {}
        for size in self.sizes:
            made = torch.randn(self.batch, channels, size, size, generator=draw)
            pixels[size] = made.to(model.device, model.dtype)
            _check_size(self.name, model, pixels[size])
        return [Run(size, pixels[size]) for _ in range(self.repeats) for size in self.sizes]

    def batches(self, items: list[Run]) -> list[list[int]]:
        return [[i] for i in range(len(items))]

    def groups(self, items: list[Run]) -> list[str]:
        return [f"{item.size} px" for item in items]

    def facts(self, items: list[Run]) -> list[dict[str, Any]]:
        return [{"size": item.size, "images": self.batch} for item in items]

    def score(self, model: Any, processor: Any, items: list[Run], reference: Any, tick: Tick) -> Scores:
        scores: Scores = {m.name: [] for m in self.metrics}
        on = json.dumps(patches_of(model), default=str)
        for item in items:
            if (item.size, on) not in self._peaks:
                seconds_of(model, item.pixels)
                return_free_memory()
                with peak_memory(model) as peak:
                    seconds_of(model, item.pixels)
                self._peaks[item.size, on] = peak.bytes
            seconds = seconds_of(model, item.pixels)
            scores["images"].append(len(item.pixels) / seconds)
            scores["per image"].append(1000 * seconds / len(item.pixels))
            if PEAK.name in scores:
                scores[PEAK.name].append(self._peaks[item.size, on] / MIB)
            tick(1)
        return scores


def seconds_of(model: Any, pixels: Any) -> float:
    """Seconds of one forward of pixels [B, C, H, W], until the device is done."""
    import torch

    with torch.inference_mode():
        _wait(model)
        start = time.perf_counter()
        model(pixel_values=pixels, **_needs_interpolation(model, pixels))
        _wait(model)
    return time.perf_counter() - start


def return_free_memory() -> None:
    """Let the C library give back what was freed: what it kept from an earlier forward is no peak of the next one."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _check_size(task: str, model: Any, pixels: Any) -> None:
    """Raises ValueError if `model` does not take images of this size (one is tried), or would cut their edge off."""
    size, patch = pixels.shape[-1], getattr(model.config, "patch_size", None)
    sides = (patch,) if isinstance(patch, int) else tuple(patch or ())
    if any(size % side for side in sides):
        raise ValueError(
            f"{task}: {size} pixels are no multiple of the patch size {patch} of {type(model).__name__}; ask for sizes "
            f"like {size // max(sides) * max(sides) or max(sides)}"
        )
    try:
        seconds_of(model, pixels[:1])
    except (ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{task}: {type(model).__name__} takes no images of {size} pixels: {first}"
        ) from error
