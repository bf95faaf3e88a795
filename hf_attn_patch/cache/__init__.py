"""KV caches: layers that keep a span per KV head, and how a cache is converted to them."""

from .convert import convertible, first_real, real_with_holes
from .spans import Span, SpanLayer

__all__ = ["Span", "SpanLayer", "convertible", "first_real", "real_with_holes"]
