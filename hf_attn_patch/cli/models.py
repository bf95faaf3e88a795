"""MODEL on the command line: a testbed item, a tiny random model, a local folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def load_model(name: str, dtype: str = "float32", takes: str = "tokenizer") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or image processor or None; the processor of both if `takes` is "processor").

    Raises:
        ValueError: unknown dtype, or nothing is to be found under `name`. TestbedError, TinyError: see there.
    """
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    number_format = getattr(torch, dtype)
    kind, _, rest = name.partition(":")
    if kind == "testbed" and rest:
        from .. import testbed

        return testbed.load(rest, number_format)
    if kind == "tiny" and rest:
        from ..testbed.tiny import tiny_model

        return tiny_model(rest).to(number_format).eval(), None
    return _from_pretrained(name, number_format, takes)


def _from_pretrained(name: str, dtype: Any, takes: str = "tokenizer") -> tuple[Any, Any]:
    import transformers
    from transformers import AutoConfig

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"MODEL {name!r}: no such folder")
    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"MODEL {name!r} cannot be loaded: {first} Give a local folder, a hub id that can be reached, "
            "testbed:NAME (see hf-attn-patch testbed) or tiny:FAMILY, e.g. tiny:llama."
        ) from error
    model = getattr(transformers, _loader(config)).from_pretrained(source, dtype=dtype)
    return model.eval(), _processor(source, model, takes)


def _loader(config: Any) -> str:
    """Name of the auto class that loads the checkpoint with the head it was saved with."""
    from transformers.models.auto import modeling_auto as auto

    for loader, table in (
        ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ):
        known = config.architectures or loader != "AutoModelForImageClassification"
        if config.model_type in table and known and not _is_backbone(config, table):
            return loader
    return "AutoModel"


def _is_backbone(config: Any, table: Any) -> bool:
    """True if the checkpoint names a class that is not in `table`: a BERT encoder is also listed as a causal LM."""
    wanted = table[config.model_type]
    names = wanted if isinstance(wanted, (tuple, list)) else (wanted,)
    return bool(config.architectures) and not set(config.architectures) & set(names)


def _processor(source: str, model: Any, takes: str) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    kinds: list[Any] = [AutoTokenizer, AutoImageProcessor]
    if getattr(model, "main_input_name", "") == "pixel_values":
        kinds.reverse()
    if takes == "processor":
        kinds.insert(0, AutoProcessor)
    for kind in kinds:
        try:
            return kind.from_pretrained(source)
        except Exception:  # many checkpoints have only one of the two, some none; tasks say what they miss
            continue
    return None
