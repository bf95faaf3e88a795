"""``hf-attn-patch finetune``: a thin shell over `training.finetune`; ``accelerate launch`` scales it out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .app import Dtype, app, out


@app.command()
def finetune(
    model: Annotated[str, typer.Option("--model", "-m", help="hub id, local folder or testbed:NAME")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            help="text file, .jsonl, hub data set NAME[@CONFIG][:SPLIT], testbed:prose; for vision models "
            "testbed:scenes, testbed:digits, a folder of class folders or a hub id",
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="adapters, checkpoints and training.json go here")
    ],
    patch: Annotated[
        list[str] | None,
        typer.Option(
            "--patch",
            "-p",
            metavar="NAME:key=value,…",
            help="patch to train (repeatable); none = dense",
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(metavar="r=8,alpha=16,targets=q_proj+v_proj", help="LoRA; none = patches only"),
    ] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps in all")] = 100,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 1e-4,
    batch: Annotated[int, typer.Option(help="examples per micro-batch and process")] = 4,
    accumulate: Annotated[int, typer.Option(help="micro-batches per step")] = 1,
    length: Annotated[int, typer.Option(help="tokens per example")] = 512,
    images: Annotated[int, typer.Option(help="images of the data (vision models)")] = 600,
    size: Annotated[
        int | None, typer.Option(help="side of images in pixels; default: as the processor does")
    ] = None,
    warmup: Annotated[int, typer.Option(help="steps of linear warm-up")] = 0,
    seed: Annotated[int, typer.Option(help="seed of order, LoRA and dropout")] = 0,
    dtype: Dtype = "float32",
    checkpointing: Annotated[bool, typer.Option(help="recompute layers in backward to save memory")] = False,
    log_every: Annotated[int, typer.Option(help="steps between log lines")] = 10,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in --out")] = False,
) -> None:
    """Train patches (routers, gates, prompts) and LoRA on a text or on labelled images, and write both adapters."""
    import os

    from ..eval.specs import parse_patch_spec
    from ..training import need
    from ..training.finetune import Lora, Recipe, finetune
    from .models import load_model

    need("accelerate")
    specs = [parse_patch_spec(text) for text in patch or []]
    recipe = Recipe(
        steps=steps, lr=lr, batch=batch, accumulate=accumulate, length=length, seed=seed, warmup=warmup,
        checkpointing=checkpointing, log_every=log_every, save_every=save_every,
        lora=None if lora is None else Lora.parse(lora), images=images, size=size,
    )  # fmt: skip
    loaded, tokenizer = load_model(model, dtype)
    trained = finetune(
        loaded, tokenizer, data, folder, [(s.name, s.options) for s in specs], recipe, resume=resume
    )
    if int(os.environ.get("RANK", "0")) == 0:
        out.print(escape(str(trained)), soft_wrap=True)
