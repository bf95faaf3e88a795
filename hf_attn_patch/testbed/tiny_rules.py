"""How a config is made tiny, as data: one rule per kind of field, plus what single families need.

A rule matches the whole field name, the first match wins. A family is helped by a row in `OVERRIDES` and not by a
branch in the code.
"""

from __future__ import annotations

from typing import Any

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 4, 2, 16, 128
WIDTH, FFN, EXPERTS = HEADS * HEAD_DIM, 96, 4
IMAGE, PATCH, POSITIONS, WINDOW, FRAMES = 32, 8, 128, 8, 4
FIRST_SPECIAL_ID = 100  # ids of image, video, audio ... tokens start here; ordinary text is drawn below

KEEP = "keep"  # as a rule's value or an override: leave the field as the family's default has it

# pattern of the field name -> value of an integer field
INTEGERS: tuple[tuple[str, Any], ...] = (
    (r".*(initializer|init_std|dropout|epsilon|eps|theta|_scale|factor|ratio|prob|loss|temperature)", KEEP),
    (
        r".*(num_labels|num_channels|num_mel_bins|merge_size|tubelet_size|temporal_patch_size|_stride|kernel_size)",
        KEEP,
    ),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|mtp_num_layers|n_hash_layers", 0),
    (
        r"num_residual_layers|num_adapter_layers|num_feat_extract_layers|iou_head_depth|max_window_layers",
        KEEP,
    ),
    (r"first_k_dense_replace", 1),
    (r"mamba_(n|num)_heads", 8),  # times mamba_head_dim 16 = expand 2 x width 64
    (r"(upsample_groups|output_channels|hidden_output_channels|fpn_hidden_size)", WIDTH),
    (r"image_embedding_size", IMAGE // PATCH),
    (r"num_pos_feats", WIDTH // 2),
    (r"vit_dim", WIDTH),
    (
        r"(.*_)?(num_key_value_heads|num_kv_heads|multi_query_group_num|n_kv_heads|num_global_key_value_heads)",
        KV_HEADS,
    ),
    (r"(.*_)?(index_n_heads|index_topk)", 4),
    (r"index_head_dim", 32),
    (r"(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|rotary_dim)", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank)", 32),
    (
        r"(.*_)?(head_dim|head_size|d_kv|kv_channels|attention_head_size|key_value_proj_dim|dim_head)",
        HEAD_DIM,
    ),
    (r"(.*_)?(num_heads|n_heads?|attention_heads|num_attn_heads|num_head)(_global)?", HEADS),
    (r"(.*_)?(num_|n_)?(hidden_|encoder_|decoder_|transformer_|attention_|self_attention_)?layers?", LAYERS),
    (r"(.*_)?(depth|num_blocks|num_hidden_groups|encoder_depth|num_layer)", LAYERS),
    (r"(.*_)?(ffn|intermediate|mlp|inner|feed_?forward|ff)_?(dim|size|hidden_size|channels)(_mlp)?", FFN),
    (
        r"(n_inner|d_ff|d_inner|dim_feedforward|ffn_dim|moe_intermediate_size|ffn_hidden_size|hidden_dim|dim_ff)",
        FFN,
    ),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|model_dim|embed_size|embedding_size)(_per_layer_input)?",
        WIDTH,
    ),
    (
        r"(dim|projection_dim|embedding_dim|word_embed_proj_dim|out_dim|output_dim|proj_dim|hidden_size_global)",
        WIDTH,
    ),
    (
        r"(.*_)?(encoder_dim|decoder_dim|width|output_proj_dims|input_dim|lm_embed_dim|project_dim|projection_size)",
        WIDTH,
    ),
    (
        r"(.*_)?(num_experts_per_tok|num_selected_experts|moe_topk|moe_k|top_k_experts|experts_per_token)",
        2,
    ),
    (
        r"(.*_)?(n_group|num_group|num_expert_group|topk_group|moe_num_shared_experts|n_shared_experts|num_shared_experts)",
        1,
    ),
    (r"(.*_)?(num_experts|num_local_experts|n_routed_experts|num_routed_experts)", EXPERTS),
    (r"(.*_)?(vocab_size|vocab_size_per_layer_input|n_vocab|vocabulary_size)", VOCAB),
    (r"(.*_)?(image_size|img_size|input_resolution)", IMAGE),
    (r"(.*_)?patch_size", PATCH),
    (r"(max_)?num_frames", FRAMES),
    (
        r"(.*_)?(max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx|max_seq_len)",
        POSITIONS,
    ),
    (
        r"sliding_window|sliding_window_size|attention_chunk_size|local_attention|attention_window|window_size",
        WINDOW,
    ),
    (r"(num_queries|num_query_tokens|num_latents|resampler_n_latents|num_query_groups)", 8),
    (
        r"(mamba_d_state|ssm_state_size|state_size|mamba_d_head|mamba_head_dim|linear_key_head_dim|mamba_headdim)",
        16,
    ),
)

# integer fields that count layers: the per-layer lists beside them (layer_types, ...) are cut to the same layers
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "layers")

# lists of layer numbers: clipped to the layers that are left
LAYER_INDICES = (
    r"(global_attn_indexes|fullatt_block_indexes|deepstack_visual_indexes|window_block_indices|cross_attention_layers"
    r"|mlp_only_layers|global_attention_blocks|full_attn_idxs|attn_layer_idx|.*_block_indexes|intermediate_layers_indices"
    r"|vision_feature_layer|feature_layer|.*layer_indices|.*layer_ids|reassemble_.*indices)"
)

# other fields by name, if the default is not None
VALUES: dict[str, Any] = {
    "layer_scale_init_value": 1.0,  # 1e-5 would hide the whole attention block
    "layerscale_value": 1.0,
    "query_pre_attn_scalar": HEAD_DIM,
    "type_vocab_size": KEEP,
    "mm_tokens_per_image": 4,
    "max_position_embeddings": POSITIONS,  # also raised: OWL-ViT reads 16 tokens
    "image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]],
}

# fields that must not stay None in the families that have them
NOT_NONE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": KV_HEADS,
    "moe_intermediate_size": FFN,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}

# a config that has the first field gets the others: MLA has as many key heads as query heads
ALONG_WITH: dict[str, dict[str, Any]] = {
    "kv_lora_rank": {"num_key_value_heads": HEADS},
    "qkv_lora_rank": {"num_key_value_heads": HEADS},
}

# derived from others by the config class, never passed on
DERIVED = ("stage_names", "out_indices", "transformers_version", "architectures", "_name_or_path")

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_HALF_MROPE = {
    "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
}

# families and their parts (by `model_type`) whose fields the rules get wrong
OVERRIDES: dict[str, dict[str, Any]] = {
    "blip-2": {"image_token_index": FIRST_SPECIAL_ID},
    "instructblip": {"image_token_index": FIRST_SPECIAL_ID},
    "instructblipvideo": {"video_token_index": FIRST_SPECIAL_ID},
    "diffusion_gemma_text": {"num_experts": EXPERTS, "top_k_experts": 2},
    "esm": {"pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": HEADS},
    "exaone4_5_vision": {"window_size": 32},
    "glm4v_moe_text": _HALF_MROPE,
    "glm4v_text": _MROPE,
    "glm5_next_text": {"num_key_value_heads": HEADS},
    "glmasr_encoder": {"intermediate_size": 4 * WIDTH},  # the projector reads four frames at once
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mllama_vision_model": {"vision_output_dim": 2 * WIDTH},  # last state and one intermediate
    "pix2struct_vision_model": {"patch_embed_hidden_size": 3 * PATCH * PATCH},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 110, "vision_end_token_id": 111},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": FFN},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110, "vision_end_token_id": 111},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "step3p5": {"sliding_window": WINDOW},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "voxtral": {"audio_token_id": FIRST_SPECIAL_ID},
    "voxtral_encoder": {"intermediate_size": 4 * WIDTH},
    "glm_image_text": _MROPE,
    "glm_ocr_text": _MROPE,
    "llama4_vision_model": {
        "intermediate_size": 4 * WIDTH,  # four patches are shuffled into one token before this MLP
        "vision_output_dim": WIDTH,
        "projector_input_dim": WIDTH,
        "projector_output_dim": WIDTH,
    },
    "mamba2": {"num_heads": 8},
    "mobilebert": {"embedding_size": WIDTH, "intra_bottleneck_size": WIDTH, "true_hidden_size": WIDTH},
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "paddleocr_vl_text": _MROPE,
    "qwen2_5_omni_talker": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "qwen2_5_omni_vision_encoder": {"window_size": 32},
    "qwen2_5_vl_text": _MROPE,
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen2_vl_text": _MROPE,
    "swin": {
        "image_size": 128,
        "embed_dim": 16,
        "depths": [2, 2, 1, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
    },
    "xmod": {"default_language": "en_XX"},
}

# parts that a family leaves empty by default: tiny configs of these families, with these fields
PARTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "encoder-decoder": {
        "encoder": ("bert", {}),
        "decoder": ("gpt2", {"add_cross_attention": True, "is_decoder": True}),
    },
    "vision-encoder-decoder": {
        "encoder": ("vit", {}),
        "decoder": ("gpt2", {"add_cross_attention": True, "is_decoder": True}),
    },
    "gemma4": {"vision_config": ("gemma4_vision", {})},
    "embedding_gemma2": {"vision_config": ("gemma4_vision", {})},
}
