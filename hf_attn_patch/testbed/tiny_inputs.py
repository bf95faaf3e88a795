"""Inputs for a tiny model: which tensors its forward takes, and how many image tokens its text must hold."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.testbed import tiny_rules as rules

VIDEO = ("video", "vivit", "timesformer", "vjepa", "xclip")  # in the class name: takes frames
UNFLATTENED = ("paddleocr", "kimi_k25", "kimi_vl")  # patches as [C, P, P] and not as rows
TIME_FIRST = (
    "speech_to_text",
    "wav2vec2-bert",
    "seamless",
    "granite",
    "parakeet",
    "lasr",
    "cohere_asr",
    "gemma",
)
MEDIA_TOKEN_FIELDS = (
    "image_token_id",
    "image_token_index",
    "media_token_id",
    "audio_token_id",
    "audio_token_index",
)


@dataclass
class Request:
    """What is asked for, and what the model's forward accepts."""

    model: Any
    batch: int
    length: int
    pads: list[int]
    random: torch.Generator
    accepts: set[str] = field(default_factory=set)

    @property
    def config(self) -> Any:
        return self.model.config

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)


def build_inputs(model: Any, batch: int, length: int, pads: list[int], seed: int) -> dict[str, Any]:
    """See `tiny.tiny_inputs`."""
    accepts = set(inspect.signature(inspect.unwrap(type(model).forward)).parameters)
    request = Request(model, batch, length, pads, torch.Generator().manual_seed(seed), accepts)
    inputs: dict[str, Any] = {}
    if any(
        name in accepts
        for name in ("pixel_values", "pixel_values_videos", "hidden_states", "flattened_patches")
    ):
        inputs.update(_vision(request))
    inputs.update(_audio(request))
    if "input_ids" in accepts:
        inputs.update(_text(request, inputs))
    if "decoder_input_ids" in accepts:
        codebooks = _first(getattr(model.config, "decoder", None), ("num_codebooks",), 1)
        inputs["decoder_input_ids"] = _ids(request, max(length - 4, 1)).repeat_interleave(codebooks, 0)
    return {name: value for name, value in inputs.items() if name in accepts}


# --- text ------------------------------------------------------------------------------------------------------------


def special_ids(config: Any) -> set[int]:
    """Token ids that mean something to the model, of the config and its sub-configs."""
    found: set[int] = set()
    for name, value in config.to_dict().items():
        if isinstance(value, dict) and "model_type" in value:
            found |= (
                special_ids(getattr(config, name))
                if not isinstance(getattr(config, name, None), dict)
                else set()
            )
        elif name.endswith(("_token_id", "_token_ids", "_token_index")) and value is not None:
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return found


def _ids(request: Request, length: int) -> Tensor:
    """[B, length] ordinary tokens."""
    text = text_config(request.config)
    vocab = _first(text, ("vocab_size", "text_vocab_size"), rules.VOCAB)
    special = special_ids(request.config)
    allowed = [i for i in range(3, min(vocab, rules.FIRST_SPECIAL_ID)) if i not in special]
    chosen = torch.randint(len(allowed), (request.batch, length), generator=request.random)
    return torch.tensor(allowed)[chosen]


def text_config(config: Any) -> Any:
    """The config that has the vocabulary."""
    for name in ("text_config", "llm_config", "language_config", "decoder"):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "vocab_size"):
            return part
    return config


def _text(request: Request, media: dict[str, Any]) -> dict[str, Any]:
    ids = _ids(request, request.length)
    mask = torch.ones_like(ids)
    pad_id = _first(text_config(request.config), ("pad_token_id",), 0)
    for row, pad in enumerate(request.pads):
        mask[row, :pad] = 0
        ids[row, :pad] = pad_id
    kinds = torch.zeros_like(ids)
    placeholder = _first(request.config, MEDIA_TOKEN_FIELDS, None)
    count = media_tokens(request, media) if media and placeholder is not None else 0
    if count:
        # after the first real token: padding | bos | image ... | text, as processors write it
        at = [pad + 1 for pad in request.pads]
        ids, mask, kinds = (
            torch.stack([_inserted(row, position, count, value) for row, position in zip(tensor, at)])
            for tensor, value in ((ids, placeholder), (mask, 1), (kinds, 1))
        )
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    if count or getattr(request.config, "type_vocab_size", 0):  # GPT-2 would add the embedding of token 0
        inputs["token_type_ids"] = kinds
    return {**inputs, "qformer_input_ids": ids, "qformer_attention_mask": mask}


def _inserted(row: Tensor, position: int, count: int, value: int) -> Tensor:
    return torch.cat([row[:position], row.new_full((count,), value), row[position:]])


def media_tokens(request: Request, media: dict[str, Any]) -> int:
    """Placeholder tokens per row: as many as feature vectors the model's own tower returns."""
    inner = getattr(request.model, "model", request.model)
    for owner in (request.model, inner):
        for name in ("get_image_features", "get_audio_features"):
            method = getattr(owner, name, None)
            if method is None:
                continue
            takes = set(inspect.signature(inspect.unwrap(method)).parameters)
            given = {k: v for k, v in media.items() if k in takes}
            if not given:
                continue
            if "qformer_input_ids" in takes:
                return request.config.num_query_tokens
            with torch.no_grad():
                features = method(**given)
            return _rows(features) // request.batch
    return 1 if "input_features" in media else 0  # Qwen2-Audio widens one placeholder to a whole clip itself


def _rows(features: Any) -> int:
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, (list, tuple)):
        return sum(_rows(part) for part in features)
    return features.shape[:-1].numel()


# --- images and video ------------------------------------------------------------------------------------------------


def vision_config(config: Any) -> Any:
    """The config that has the patch size."""
    for name in ("vision_config", "vision_tower_config", "encoder", "visual_config", "image_encoder_config"):
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            return part
    thinker = getattr(config, "thinker_config", None)
    return vision_config(thinker) if thinker is not None else config


def _vision(request: Request) -> dict[str, Any]:
    config = vision_config(request.config)
    channels = _first(config, ("num_channels", "in_channels", "in_chans", "num_input_channels"), 3)
    patch = _side(_first(config, ("patch_size", "spatial_patch_size"), rules.PATCH))
    height, width = _size(config, request.config)
    accepts, batch = request.accepts, request.batch
    grid = next((name for name in ("image_grid_thw", "grid_thw", "image_grid_hws") if name in accepts), None)
    if grid is not None:
        time = _first(config, ("temporal_patch_size",), 1)
        values = request.randn(batch * 16, channels * time * patch * patch)
        if any(word in getattr(config, "model_type", "") for word in UNFLATTENED):
            values = values.reshape(batch * 16, channels, patch, patch)
        name = "pixel_values" if "pixel_values" in accepts else "hidden_states"
        merge = torch.full((batch,), _first(config, ("spatial_merge_size",), 1))
        return {
            name: values,
            grid: torch.tensor([[1, 4, 4]] * batch),
            "image_merge_sizes": merge,
            "merge_sizes": merge,
        }
    if "spatial_shapes" in accepts:
        side = height // patch
        return {
            "pixel_values": request.randn(batch, side * side, channels * patch * patch),
            "spatial_shapes": torch.tensor([[side, side]] * batch),
            "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.long),
        }
    if {
        "image_position_ids",
        "pixel_position_ids",
    } & accepts:  # Gemma 4: patches as rows, with their positions
        side = 2 * _first(config, ("pooling_kernel_size",), 1)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        positions = torch.stack([x, y], -1).reshape(1, -1, 2).repeat(batch, 1, 1)
        values = request.randn(batch, side * side, channels * patch * patch).sigmoid()
        return {"pixel_values": values, "image_position_ids": positions, "pixel_position_ids": positions}
    if "flattened_patches" in accepts:  # Pix2Struct: row and column of each patch, then its pixels
        cells = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float().repeat(batch, 1, 1)
        return {
            "flattened_patches": torch.cat([cells, request.randn(batch, 16, channels * patch * patch)], -1)
        }
    if "aspect_ratio_ids" in accepts:  # Mllama: one image of two tiles
        tiles = _first(config, ("max_num_tiles",), 4)
        used = torch.zeros(batch, 1, tiles, dtype=torch.long)
        used[:, :, :2] = 1
        return {
            "pixel_values": request.randn(batch, 1, tiles, channels, height, width),
            "aspect_ratio_ids": torch.full((batch, 1), 2),
            "aspect_ratio_mask": used,
            "cross_attention_mask": used[:, None].repeat(1, request.length, 1, 1),
        }
    if "pixel_values_videos" in accepts and "pixel_values" not in accepts:
        frames = _first(config, ("num_frames", "frames_per_clip"), rules.FRAMES)
        return {"pixel_values_videos": request.randn(batch, frames, channels, height, width)}
    if "pixel_values" not in accepts:
        return {}
    if "image_attention_mask" in accepts:  # Idefics: which tokens may look at which image
        seen = torch.ones(batch, request.length, 1, dtype=torch.long)
        return {
            "pixel_values": request.randn(batch, 1, channels, height, width),
            "image_attention_mask": seen,
        }
    frames = _first(config, ("num_frames",), None)
    if frames is not None and _is_video(request.model):
        return {"pixel_values": request.randn(batch, frames, channels, height, width)}
    if "image_sizes" in accepts and hasattr(request.config, "image_grid_pinpoints"):
        values = request.randn(batch, 3, channels, height, width)
        return {"pixel_values": values, "image_sizes": torch.tensor([[height, width]] * batch)}
    if "pixel_attention_mask" in accepts:
        return {
            "pixel_values": request.randn(batch, 1, channels, height, width),
            "pixel_attention_mask": torch.ones(batch, 1, height, width, dtype=torch.long),
        }
    values = {"pixel_values": request.randn(batch, channels, height, width)}
    if "image_sizes" in accepts and getattr(config, "model_type", "") == "pixtral":
        values["image_sizes"] = torch.tensor([[height, width]] * batch)
    return values


def _is_video(model: Any) -> bool:
    return any(word in type(model).__name__.lower() for word in VIDEO)


def _size(config: Any, outer: Any) -> tuple[int, int]:
    value = getattr(config, "image_size", None) or getattr(outer, "image_size", None) or rules.IMAGE
    if isinstance(value, dict):
        return value.get("height", rules.IMAGE), value.get("width", rules.IMAGE)
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _side(value: Any) -> int:
    return value if isinstance(value, int) else value[-1]


# --- audio -----------------------------------------------------------------------------------------------------------


def _audio(request: Request) -> dict[str, Any]:
    accepts, batch = request.accepts, request.batch
    config = request.config
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    mel = _first(
        audio,
        (
            "feature_projection_input_dim",
            "num_mel_bins",
            "input_feat_per_channel",
            "feature_size",
            "input_dim",
        ),
        80,
    )
    main = request.model.main_input_name
    if "input_features" in accepts and "pixel_values" not in accepts:
        frames = 2 * min(_first(audio, ("max_source_positions",), 32), rules.POSITIONS)
        kinds = f"{getattr(config, 'model_type', '')} {getattr(audio, 'model_type', '')}"
        last = any(word in kinds for word in TIME_FIRST) or not hasattr(audio, "num_mel_bins")
        shape = (batch, frames, mel) if last else (batch, mel, frames)
        heard = torch.ones(batch, frames, dtype=torch.long)
        inputs = {"input_features": request.randn(*shape)}
        return {**inputs, "feature_attention_mask": heard, "input_features_mask": heard}
    if "input_values" in accepts and hasattr(config, "frequency_stride"):  # a spectrogram as an image
        return {"input_values": request.randn(batch, config.max_length, config.num_mel_bins)}
    if "input_values" in accepts:
        shape = (
            (batch, 4000)
            if main == "input_values" and not hasattr(audio, "audio_channels")
            else (batch, 1, 4000)
        )
        return {"input_values": request.randn(*shape)}
    return {}


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    return next((v for n in names if (v := getattr(config, n, None)) is not None), default)
