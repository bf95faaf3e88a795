"""KV caches: layers that keep a span per KV head, and how a cache is converted to them."""

from .convert import convertible, first_real
from .spans import Span, SpanLayer

__all__ = ["Span", "SpanLayer", "convertible", "first_real"]
