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
    "block_topk": (
        "hf_attn_patch.patches.sparse.block_topk:BlockTopK",
        "Every query (or block of queries) reads the key blocks that score best for it: dynamic block sparsity",
        "MoBA: Mixture of Block Attention for Long-Context LLMs",
        "2502.13189",
        ("text", "decoder"),
    ),
    "moba": (
        "hf_attn_patch.patches.sparse.block_topk:MoBA",
        "Mixture of block attention: every query reads its own block and the best `topk` - 1 blocks before it",
        "MoBA: Mixture of Block Attention for Long-Context LLMs",
        "2502.13189",
        ("text", "decoder"),
    ),
    "quest": (
        "hf_attn_patch.patches.sparse.block_topk:Quest",
        "Decoding reads the pages of keys whose bound on q . k is highest; the prompt is dense",
        "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        "2406.10774",
        ("text", "decoder"),
    ),
    "xattention": (
        "hf_attn_patch.patches.sparse.block_topk:XAttention",
        "Blocks of queries read the blocks of keys that hold most of the attention mass estimated along anti-diagonals",
        "XAttention: Block Sparse Attention with Antidiagonal Scoring",
        "2503.16428",
        ("text", "decoder"),
    ),
    "duo": (
        "hf_attn_patch.patches.sparse.duo:Duo",
        "Retrieval heads keep full attention; streaming heads read sinks + recent tokens, and only those stay cached",
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        "2410.10819",
        ("text", "decoder"),
    ),
    "vertical_slash": (
        "hf_attn_patch.patches.sparse.vertical_slash:VerticalSlash",
        "The prompt is read along columns and diagonals that its last queries point at (MInference); decoding is dense",
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        "2407.02490",
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
    "s2": (
        "hf_attn_patch.patches.sparse.s2:S2",
        "Strided shards: every KV head reads a local window and its own stripes of the context",
        "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
        "2407.17678",
        ("text", "decoder"),
    ),
    "entropy_scale": (
        "hf_attn_patch.patches.heads.entropy_scale:EntropyScale",
        "Scale queries by the log of how many keys they see (log-n, sqrt(log N / log T))",
        "Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis",
        "2306.08645",
        ("text", "vision", "audio", "encoder", "decoder"),
    ),
    "pasta": (
        "hf_attn_patch.patches.heads.pasta:Pasta",
        "Steer chosen heads to marked spans of the prompt by a bias on the other keys",
        "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs",
        "2311.02262",
        ("text", "decoder"),
    ),
    "moh": (
        "hf_attn_patch.patches.heads.moh:MoH",
        "Mixture of heads: per token the first heads are always on, and the K best of the others",
        "MoH: Multi-Head Attention as Mixture-of-Head Attention",
        "2410.11842",
        ("text", "vision", "audio", "encoder", "decoder"),
    ),
    "retrieval_mask": (
        "hf_attn_patch.patches.heads.retrieval_mask:RetrievalMask",
        "Zero the outputs of chosen heads (a head set), to see what they are for",
        "Retrieval Head Mechanistically Explains Long-Context Factuality",
        "2404.15574",
        ("text", "vision", "audio", "encoder", "decoder", "cross"),
    ),
}
