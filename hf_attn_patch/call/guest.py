"""A mask as a guest in code that expects a tensor: it turns into one where somebody computes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Guest:
    """Base of `Mask`: indexing, arithmetic and torch functions on it give the tensor that the model would have seen."""

    batch: int
    q_len: int
    kv_len: int
    device: Any
    flavour: str
    arguments: dict[str, Any]

    def native(self, implementation: str) -> Any:
        raise NotImplementedError

    def dense(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def from_transformers(cls, flavour: str = "sdpa", **arguments: Any) -> Any:
        raise NotImplementedError

    def as_tensor(self) -> Tensor:
        """The tensor a model would have seen without us (never None), for models that compute with their mask."""
        value = self.native("eager" if self.flavour == "eager" else "sdpa")
        if value is None:
            value = self.dense()
        return value

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, 1, self.q_len, self.kv_len))

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments.get("dtype", torch.float32) if self.flavour == "eager" else torch.bool

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Device moves keep the facts; anything else (a dtype) needs the tensor."""
        targets = [a for a in [*args, *kwargs.values()] if not isinstance(a, bool)]
        if all(isinstance(t, (torch.device, str, int)) for t in targets):
            if not targets or torch.device(targets[0]) == torch.device(self.device):
                return self
            moved = {k: v.to(targets[0]) if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
            if moved:
                return type(self).from_transformers(
                    self.flavour, **{**moved, "device": torch.device(targets[0])}
                )
        return self.as_tensor().to(*args, **kwargs)

    def contiguous(self, **_: Any) -> Guest:
        """Facts have no memory layout (`generate` asks for one when its cache is static)."""
        return self

    clone = detach = contiguous  # and nobody changes them in place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"Mask has no attribute {name!r}")
        return getattr(self.as_tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.as_tensor()[index]

    def __len__(self) -> int:
        return self.batch

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            if isinstance(x, Guest):
                return x.as_tensor()
            if isinstance(x, (list, tuple)):
                return type(x)(plain(y) for y in x)
            return x

        return func(*plain(tuple(args)), **{k: plain(v) for k, v in (kwargs or {}).items()})


def _operator(name: str) -> Callable:
    def method(self: Guest, *others: Any) -> Any:
        return getattr(self.as_tensor(), name)(
            *(o.as_tensor() if isinstance(o, Guest) else o for o in others)
        )

    method.__name__ = name
    return method


_ARITHMETIC = "add radd sub rsub mul rmul truediv rtruediv floordiv mod pow neg abs"
_LOGIC = "and rand or ror xor rxor invert lt le gt ge eq ne"
for _name in f"{_ARITHMETIC} {_LOGIC}".split():
    setattr(Guest, f"__{_name}__", _operator(f"__{_name}__"))
