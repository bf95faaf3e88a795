"""Built-in methods, one file each. This table is all that listing them needs; nothing here imports a method.

A test keeps the table equal to what the classes say (`tests/test_registry.py`).
"""

from __future__ import annotations

# name -> (module:Class, summary, paper, arXiv id, parts)
BUILTIN: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "streaming": (
        "hf_attn_patch.patches.sparse.streaming:Streaming",
        "Attention sinks + sliding window; the KV cache stays at sinks + window tokens",
        "Efficient Streaming Language Models with Attention Sinks",
        "2309.17453",
        ("text", "encoder", "decoder", "audio"),
    ),
    "moa": (
        "hf_attn_patch.patches.sparse.moa:MoA",
        "Mixture of attention spans: every head its own sink + window, elastic in the length",
        "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        "2406.14909",
        ("text", "decoder"),
    ),
    "head_gate": (
        "hf_attn_patch.patches.heads.head_gate:HeadGate",
        "Multiply head outputs by per-layer, per-head factors (the head mask transformers v5 removed)",
        "Are Sixteen Heads Really Better than One?",
        "1905.10650",
        ("text", "vision", "audio", "encoder", "decoder", "cross"),
    ),
    "neighborhood": (
        "hf_attn_patch.patches.vision.neighborhood:NeighborhoodAttention",
        "Generalised neighborhood attention on 1-D, 2-D and 3-D token grids",
        "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        "2504.16922",
        ("vision",),
    ),
    "var": (
        "hf_attn_patch.patches.grounding.var:VisualAttentionRedistribution",
        "Move attention from sink tokens to the image tokens in image-centric heads",
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        "2503.03321",
        ("text",),
    ),
}
