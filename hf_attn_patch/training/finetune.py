"""`finetune`: patch a model, add LoRA, train both with transformers' Trainer, write adapters and a log.

Several processes (``accelerate launch``), GPUs and checkpoints are Trainer's business; this file fills in arguments.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import __version__
from ..api import active, patch
from ..errors import ConfigError
from ..forward.needs.added_tokens import takes_pixels
from ..install.names import CHILD
from . import need
from .adapters import is_peft, save
from .callback import PatchCallback
from .checks import check_trainable, patch_parameters
from .data import Collate, examples
from .images import CollateImages, check_classes, image_examples

LOG = "training.json"
CHECKPOINTS = "checkpoints"


@dataclass
class Lora:
    """Low-rank adapters: rank, scale (alpha / r), dropout, and the names of the linear layers that get them."""

    r: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``r=8,alpha=16,targets=q_proj+v_proj,dropout=0.05``.

        Raises:
            ConfigError: unknown name or wrong type.
        """
        kinds: dict[str, Any] = {
            "r": int,
            "alpha": int,
            "dropout": float,
            "targets": lambda x: tuple(x.split("+")),
        }
        values = {}
        for piece in filter(None, text.split(",")):
            name, _, value = piece.partition("=")
            try:
                values[name.strip()] = kinds[name.strip()](value)
            except (KeyError, ValueError):
                raise ConfigError(
                    f"lora: {piece!r} is not understood; expected r=8,alpha=16,targets=q_proj+v_proj,dropout=0.05"
                ) from None
        made = cls(**values)
        if made.r < 1 or made.alpha < 1 or not 0 <= made.dropout < 1:
            raise ConfigError(f"lora: {made} is out of range: r >= 1, alpha >= 1, 0 <= dropout < 1")
        return made


@dataclass
class Recipe:
    """How to train. length: tokens per example. images, size: for vision models, how many images and their side in
    pixels (None = as the processor does). accumulate: micro-batches per step. warmup: steps. save_every: steps
    between checkpoints. checkpointing: recompute layers in backward (non-reentrant) to save memory."""

    steps: int = 100
    lr: float = 1e-4
    batch: int = 4
    accumulate: int = 1
    length: int = 512
    seed: int = 0
    warmup: int = 0
    schedule: str = "linear"
    clip: float = 1.0
    log_every: int = 10
    save_every: int = 200
    checkpointing: bool = False
    lora: Lora | None = None
    images: int = 600
    size: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "save_every", "images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"finetune: {name}={getattr(self, name)}, expected at least 1")
        if not self.lr > 0:
            raise ConfigError(f"finetune: lr={self.lr}, expected a positive number")


@dataclass
class Trained:
    """Outcome of a training. log: one dict per logged step. tokens: read in this run, without padding.
    images: seen in this run (vision models)."""

    folder: Path
    model: Any = field(repr=False)
    parameters: dict[str, int] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    tokens: int = 0
    images: int = 0

    @property
    def loss(self) -> float | None:
        """The last logged loss."""
        return next((entry["loss"] for entry in reversed(self.log) if "loss" in entry), None)

    def __str__(self) -> str:
        p = self.parameters
        seen, unit = (self.images, "images") if self.images else (self.tokens, "tokens")
        return (
            f"{p['trained']:,} of {p['all']:,} parameters trained ({p['patch']:,} of patches), {seen:,} {unit} "
            f"in {self.seconds:.1f} s ({seen / max(self.seconds, 1e-9):,.0f} {unit}/s), last loss {self.loss}; "
            f"adapters in {self.folder}"
        )


def prepare(model: Any, patches: Sequence[tuple[str, dict[str, Any]]], lora: Lora | None) -> Any:
    """Freeze `model`, patch it, add LoRA; returns the model to train.

    Raises:
        PatchError: a patch does not fit, a LoRA target is not in the model, or nothing would learn.
    """
    peft = None if lora is None else need("peft")
    if lora is not None:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        missing = [t for t in lora.targets if t not in names]
        if missing:
            linear = sorted(
                {n.rpartition(".")[2] for n, m in model.named_modules() if "Linear" in type(m).__name__}
            )
            raise ConfigError(
                f"lora: no layer is called {', '.join(missing)}; linear layers: {', '.join(linear)}"
            )
    model.requires_grad_(False)
    for name, options in patches:
        patch(model, name, **options)
    if lora is not None and peft is not None:
        config = peft.LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets),
            task_type=None if takes_pixels(model) else "CAUSAL_LM",
            modules_to_save=[CHILD] if patch_parameters(model) else None,
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
    check_trainable(model)
    return model


def finetune(
    model: Any,
    tokenizer: Any,
    data: str,
    out: str | Path,
    patches: Sequence[tuple[str, dict[str, Any]]] = (),
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
) -> Trained:
    """Train patches and LoRA of a language model, or of a vision model with classes, on `data`.

    Args:
        model: a plain transformers model that returns a loss for labels; it is patched and trained in place.
        tokenizer: of the model; the image processor of a vision model.
        data: see `data.examples`; for vision models `images.image_examples`. out: folder of adapters,
        checkpoints and log. patches: (name, options of
        `hap.patch`). resume: go on from the last checkpoint in `out`. callbacks: more Trainer callbacks.

    Raises:
        PatchError: everything that can be known before training, a loss that is not finite, a missing package.
    """
    need("accelerate")
    from transformers import Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    recipe = recipe or Recipe()
    folder = Path(out)
    last = get_last_checkpoint(str(folder / CHECKPOINTS)) if (folder / CHECKPOINTS).is_dir() else None
    if last and not resume:
        raise ConfigError(
            f"{folder} holds {Path(last).name} of an earlier training: --resume goes on, or choose another folder"
        )
    if resume and not last:
        raise ConfigError(f"nothing to resume: {folder / CHECKPOINTS} holds no checkpoint")
    vision = takes_pixels(model)
    if tokenizer is None and not vision:
        raise ConfigError(
            "finetune needs the tokenizer of the model; tiny: models and vision models have none"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and recipe.length > limit and not vision:
        raise ConfigError(f"length={recipe.length}, the model has {limit} positions")
    collate: Any
    if vision:
        rows = image_examples(model, tokenizer, data, recipe.images, recipe.size, recipe.seed)
        check_classes(model, rows, patches)
        collate = CollateImages()
    else:
        rows = examples(data, tokenizer, recipe.length)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        collate = Collate(pad)
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS), max_steps=recipe.steps, learning_rate=recipe.lr, seed=recipe.seed,
        per_device_train_batch_size=recipe.batch, gradient_accumulation_steps=recipe.accumulate,
        warmup_steps=recipe.warmup, lr_scheduler_type=recipe.schedule, max_grad_norm=recipe.clip,
        logging_steps=recipe.log_every, logging_first_step=True, logging_nan_inf_filter=False,
        save_steps=recipe.save_every, save_total_limit=2,
        include_num_input_tokens_seen="no" if vision else "non_padding",
        report_to=[], remove_unused_columns=False, ddp_find_unused_parameters=False, use_cpu=not _accelerator(),
        disable_tqdm=True, **(_checkpointing(TrainingArguments) if recipe.checkpointing else {}),
    )  # fmt: skip
    set_seed(
        recipe.seed
    )  # before LoRA draws its first weights, so that every process and every run draws the same
    model = prepare(model, patches, recipe.lora)
    parameters = check_trainable(model)
    if recipe.checkpointing and is_peft(model):
        model.enable_input_require_grads()  # the first checkpointed layer has no other input with a gradient
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate,  # type: ignore[arg-type]
        callbacks=[PatchCallback(), *callbacks],
    )  # fmt: skip
    before = (
        json.loads((Path(last) / "trainer_state.json").read_text())["num_input_tokens_seen"] if last else 0
    )
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer.train(resume_from_checkpoint=last if resume else None)
    seconds = time.monotonic() - started
    model.eval()
    tokens = int(trainer.state.num_input_tokens_seen) - before
    result = Trained(folder, model, parameters, list(trainer.state.log_history), seconds, tokens)
    if vision:
        begun = int(last.rpartition("-")[2]) if last else 0
        steps = int(trainer.state.global_step) - begun
        result.images = steps * recipe.batch * recipe.accumulate * arguments.world_size
    if trainer.is_world_process_zero():
        if active(model) or is_peft(model):
            save(model, folder)
        _write(result, data, recipe, arguments.world_size)
    return result


def _checkpointing(arguments: Any) -> dict[str, Any]:
    """Arguments that recompute layers in backward, under the name this version of transformers calls it."""
    names = {f.name for f in fields(arguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _write(result: Trained, data: str, recipe: Recipe, processes: int) -> None:
    import torch
    import transformers

    record = {
        "data": data, "recipe": asdict(recipe), "processes": processes, "parameters": result.parameters,
        "patches": [{"name": h.name, "options": h.config.to_dict()} for h in active(result.model)],
        "seconds": round(result.seconds, 3), "tokens": result.tokens,
        "tokens_per_second": round(result.tokens / max(result.seconds, 1e-9), 1),
        "log": result.log, "versions": {
            "hf_attn_patch": __version__, "torch": torch.__version__, "transformers": transformers.__version__
        },
    }  # fmt: skip
    (result.folder / LOG).write_text(json.dumps(record, indent=1) + "\n")
