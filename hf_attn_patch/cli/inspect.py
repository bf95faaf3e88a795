"""``hf-attn-patch inspect``: one HTML page with a map per head of a vision model, NMI and attention distance."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .app import AsJson, Dtype, Model, app, out, print_json


@app.command()
def inspect(
    model: Model,
    image: Annotated[Path, typer.Option("--image", "-i", help="image file")],
    page: Annotated[Path, typer.Option("--out", "-o", help="the page")] = Path("heads.html"),
    patch: Annotated[
        list[str] | None,
        typer.Option(
            "--patch", "-p", metavar="NAME:key=value,…", help="look at the patched model (repeatable)"
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="side of the image in pixels; default: the processor's")
    ] = None,
    of: Annotated[
        str, typer.Option(help="auto, cls (where CLS looks) or received (what a patch gets)")
    ] = "auto",
    layers: Annotated[str | None, typer.Option(help='layers, e.g. "0-3,-2:"')] = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Look at every attention head of a vision model on one image, and write a page."""
    from .. import api
    from ..env import command_line
    from ..errors import ConfigError
    from ..eval.images import pixel_values
    from ..eval.specs import parse_patch_spec
    from ..inspection.heads import head_maps
    from ..report import heads as report
    from .models import load_model

    if not image.is_file():
        raise ConfigError(f"inspect: --image {str(image)!r} is no file")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigError("reading image files needs Pillow: pip install pillow") from error
    try:
        picture = Image.open(image).convert("RGB")
    except UnidentifiedImageError:
        raise ConfigError(f"inspect: {str(image)!r} is no image that Pillow can read") from None
    specs = [parse_patch_spec(text) for text in patch or []]
    loaded, processor = load_model(model, dtype)
    values = pixel_values(loaded, _images_of(loaded, processor), [picture], size)
    with ExitStack() as stack:
        for spec in specs:
            stack.enter_context(api.patched(loaded, spec.name, **spec.options))
        maps = head_maps(loaded, values, of=of, layers=layers)  # type: ignore[arg-type]
    written = report.write(
        maps, shown(values[0]), page, name=model, source=image.name, command=command_line()
    )
    if as_json:
        print_json({**maps.to_dict(), "page": str(written)})
    else:
        out.print(escape(f"{maps}\n{written}"), soft_wrap=True)


def _images_of(model: Any, processor: Any) -> Any:
    """What makes pixel values: the image part of a processor, or a plain one where the checkpoint has none."""
    found = getattr(processor, "image_processor", processor)
    if found is not None and not hasattr(found, "vocab_size"):
        return found
    from ..testbed.pixels import Pixels

    config = getattr(model.config, "vision_config", None) or model.config
    side = getattr(config, "image_size", 224)
    return Pixels(side[0] if isinstance(side, (list, tuple)) else side)


def shown(values: Any) -> Any:
    """Pixel values [C, H, W] as a picture again, uint8 [H, W, 3]: each channel from its smallest to its largest."""
    values = values.detach().float().cpu()
    low, high = (f((1, 2), keepdim=True) for f in (values.amin, values.amax))
    scaled = ((values - low) / (high - low).clamp(min=1e-6) * 255).round().byte()
    return (
        scaled.expand(3, -1, -1).permute(1, 2, 0).numpy()
        if len(scaled) == 1
        else scaled[:3].permute(1, 2, 0).numpy()
    )
