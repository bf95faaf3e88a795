"""`kept`: what a pure function made, kept while its tensors fit into a number of bytes; the least recently used goes.

A count of entries is the wrong bound for layouts: a model of 80 layers that each have a rule of their own scans a
cache of 64 from end to end in every forward and never hits, while 64 layouts of a long text may hold gigabytes.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")
NUMBER = 36  # bytes of a Python int in a list: the object and the pointer to it
AGAIN = (
    16  # entries grow after they were made: all are measured again after this many new ones (or half of all)
)


class CacheInfo(NamedTuple):
    """hits, misses: calls that found a result, and calls that made one. bytes: held, of `budget`. entries: results."""

    hits: int
    misses: int
    bytes: int
    budget: int
    entries: int


def nbytes(x: Any) -> int:
    """Bytes of tensors and numbers in `x` (dataclasses, lists, tuples, dicts); views count what they show."""
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    if isinstance(x, (list, tuple)):
        return NUMBER * len(x) if x and isinstance(x[0], int) else sum(nbytes(y) for y in x)
    if isinstance(x, dict):
        return sum(nbytes(y) for y in x.values())
    if is_dataclass(x):
        return sum(nbytes(getattr(x, f.name)) for f in fields(x))
    return 0


@_disable_dynamo
def _outside(function: Any, args: Any, kwargs: Any) -> Any:
    """What a traced function asks for is made outside of the trace (torch.compile breaks its graph here)."""
    with _disable_current_modes():
        return function._look(args, kwargs)


class Kept(Generic[P, R]):
    """A function that remembers its results; safe to call from several threads."""

    def __init__(self, make: Callable[P, R], budget: int):
        self.make, self.budget = make, budget
        self.__doc__, self.__name__, self.__wrapped__ = make.__doc__, make.__name__, make
        self._parameters = inspect.signature(make).parameters
        self._lock = threading.Lock()
        self.cache_clear()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return _outside(self, args, kwargs)
        return self._look(args, kwargs)

    def _look(self, args: Any, kwargs: Any) -> R:
        key = self._key(args, kwargs)
        with self._lock:
            if key in self._held:
                self._hits += 1
                self._held.move_to_end(key)
                return self._held[key][0]
            self._misses += 1
        made = self.make(*args, **kwargs)  # not under the lock: it may call itself, and others need not wait
        with self._lock:
            if key in self._held:  # another thread was faster: everybody gets the same object
                return self._held[key][0]
            size = nbytes(made)
            self._held[key] = (made, size)
            self._bytes += size
            self._unmeasured += 1
            if self._unmeasured > max(AGAIN, len(self._held) // 2):
                self._measure()
            self._shrink()
        return made

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """All arguments in order, however they were given."""
        if not kwargs.keys() <= self._parameters.keys():
            raise TypeError(f"{self.__name__} takes no {sorted(kwargs.keys() - self._parameters.keys())}")
        rest = list(self._parameters.values())[len(args) :]
        return (*args, *[kwargs.get(p.name, p.default) for p in rest])

    def _measure(self) -> None:
        for key, (value, _) in self._held.items():
            self._held[key] = (value, nbytes(value))
        self._bytes, self._unmeasured = sum(size for _, size in self._held.values()), 0

    def _shrink(self) -> None:
        """Forget what was not used for longest; the newest stays, whatever its size."""
        while self._bytes > self.budget and len(self._held) > 1:
            _, (_, size) = self._held.popitem(last=False)
            self._bytes -= size

    def cache_info(self) -> CacheInfo:
        with self._lock:
            self._measure()
            return CacheInfo(self._hits, self._misses, self._bytes, self.budget, len(self._held))

    def cache_clear(self) -> None:
        with self._lock:
            self._held: OrderedDict[Hashable, tuple[R, int]] = OrderedDict()
            self._hits = self._misses = self._bytes = self._unmeasured = 0


def kept(budget: int) -> Callable[[Callable[P, R]], Kept[P, R]]:
    """Decorator: remember results (of hashable arguments) up to `budget` bytes of tensors. Do not modify a result.

    ``f.cache_info()`` and ``f.cache_clear()`` are those of `functools.lru_cache`, with bytes instead of a count.
    """
    return lambda make: Kept(make, budget)
