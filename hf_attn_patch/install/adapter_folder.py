"""The folder of an adapter: found, read without leaving it, and written as a whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import AdapterError

CONFIG_NAME = "attn_patch_config.json"
TENSORS_NAME = "attn_patch.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def find(directory: str | Path, revision: str | None = None) -> Path:
    """Local folder of an adapter; a hub id is downloaded, by huggingface_hub and nothing else.

    Args:
        revision: branch, tag or commit of a hub id. A commit pins what is read: a branch may hold something else
            tomorrow.

    Raises:
        AdapterError: there is no adapter.
    """
    folder, text = Path(directory), str(directory)
    try:
        is_dir = folder.is_dir()
    except (OSError, ValueError):
        is_dir = False
    if is_dir:
        if revision is not None:
            raise AdapterError(
                f"revision={revision!r} is for adapters on the hub; {text!r} is a local folder"
            )
        if not written(folder):
            inside = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise AdapterError(
                f"{folder} holds no {CONFIG_NAME} (it holds {inside}); expected a folder from handle.save()"
            )
        return folder
    if not HUB_ID.fullmatch(text):
        raise AdapterError(f"adapter folder {text!r} does not exist, and it is not a hub id either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=[CONFIG_NAME, TENSORS_NAME]))
    except Exception as error:
        raise AdapterError(f"no local folder {text!r}, and the hub download failed: {error}") from error


def blobs_of(folder: Path) -> Path | None:
    """``blobs/`` of the hub cache whose snapshot `folder` (resolved) is or lies in; None = it is no snapshot."""
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and (place.parent.parent / "blobs").is_dir():
            return place.parent.parent / "blobs"
    return None


def read(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of file `name` of an adapter, at most `limit` + 1 of them.

    Raises:
        AdapterError: no regular file, or a link that leaves the folder (links of a hub snapshot into the blobs of the
            same cache are what the hub makes, and fine).
    """
    root = folder.resolve()
    path = root / name
    try:
        real = path.resolve(strict=True)
        if real.parent != root and real.parent != blobs_of(root):
            raise AdapterError(
                f"{folder / name} is a link that leaves the folder of the adapter, so it was not read. Copy the file "
                "there if it is yours"
            )
        # non-blocking: a pipe would wait for somebody to write into it
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AdapterError(f"{folder / name} is no regular file")
            return file.read(limit + 1)
    except FileNotFoundError:
        raise AdapterError(f"{folder / name} is missing") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself; AdapterError is one too
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{folder / name} cannot be read: {error}") from None


def target_of(directory: str | Path) -> Path:
    """The folder that `write` would write, checked.

    Raises:
        AdapterError: a file is in the way, or it is a snapshot of the hub cache.
    """
    folder = Path(directory)
    target = folder.resolve() if folder.is_symlink() else folder
    if os.path.lexists(target) and not target.is_dir():
        raise AdapterError(f"cannot save to {folder}: it is no folder. Choose another name")
    if folder.is_symlink() and not target.is_dir():
        raise AdapterError(f"cannot save to {folder}: it is a link to {target}, which does not exist")
    if blobs_of(target.resolve()) is not None:
        raise AdapterError(
            f"cannot save to {folder}: it is a snapshot of the hub cache, which must stay what its revision says. "
            "Save to a folder of your own, and upload that"
        )
    return target


def write(directory: str | Path, files: dict[str, bytes]) -> Path:
    """Make `files` the adapter in a folder, all of them or none; other files there stay. Returns the folder as given.

    A new folder appears by one rename. In an existing one the config is taken away first and comes last, so that at no
    moment the files of two adapters can be loaded together; links are replaced, never followed.

    Raises:
        AdapterError: the folder cannot be written; what was there before is there again.
    """
    target = target_of(directory)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh, done = not target.exists(), False
        place = target.parent if fresh else target  # inside, because the folder may be a mount of its own
        partial = place / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
        try:
            os.mkdir(partial)
            for name, content in files.items():
                with open(partial / name, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            if not (fresh and _appears(partial, target)):
                with _alone(target):
                    _swap(target, partial, files)
            done = True
        finally:
            if done or not os.path.lexists(partial / "old" / CONFIG_NAME):
                shutil.rmtree(partial, ignore_errors=True)  # else it is the only copy of what was there
    except OSError as error:
        raise AdapterError(f"cannot save to {directory}: {error}") from error
    return Path(directory)


def written(folder: Path) -> bool:
    """True if `folder` holds an adapter."""
    return os.path.lexists(folder / CONFIG_NAME)


def _appears(partial: Path, target: Path) -> bool:
    """Rename `partial` to `target`; False if another rank or thread has made that folder meanwhile."""
    try:
        os.rename(partial, target)
        return True
    except OSError:
        if not target.is_dir():
            raise
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One at a time in `folder`, over threads and processes, as far as the file system can; a kill lets go of it."""
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _swap(target: Path, partial: Path, files: dict[str, bytes]) -> None:
    old = partial / "old"
    os.mkdir(old)
    names = (CONFIG_NAME, TENSORS_NAME)  # the config leaves first: without it nothing loads
    try:
        for name in names:
            if os.path.lexists(target / name):
                os.replace(target / name, old / name)
        for name in reversed(names):
            if name in files:
                os.replace(partial / name, target / name)
    except BaseException:
        if not os.path.lexists(partial / CONFIG_NAME):
            raise  # the last step was done: the new adapter is whole
        for name in reversed(names):
            if os.path.lexists(old / name):
                os.replace(old / name, target / name)
            elif name in files and not os.path.lexists(partial / name) and os.path.lexists(target / name):
                os.unlink(target / name)
        raise
