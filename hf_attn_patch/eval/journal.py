"""`Journal`: finished items of a run in ``OUT/items.jsonl``, so that a killed run goes on where it stopped.

The first line says which run it is (task, model and weights, items, patches, seed, versions); every other line is one
finished item of one variant, written and flushed as soon as it is known. Numbers are kept as JSON floats, which Python
reads back exactly. With several processes each writes a file of its own (``items.rank1.jsonl``, …); all are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import IO, Any

NAME = "items.jsonl"


class JournalError(ValueError):
    """The folder holds items of another run; the message says what differs and the ways out."""


@dataclass
class Finished:
    """What is known of one variant. items: index -> {"scores": {metric: number}, "answer": text or None}."""

    items: dict[int, dict[str, Any]] = field(default_factory=dict)
    sites: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Journal:
    """Finished items per variant. Without a folder it only remembers; nothing is written.

    Args:
        folder: where the files are, None = nowhere. fingerprint: what the run is; JSON values. rank: of this process.

    Raises:
        JournalError: the folder holds items of a run with another fingerprint.
    """

    def __init__(self, folder: str | Path | None, fingerprint: Mapping[str, Any], rank: int = 0):
        self.finished: dict[str, Finished] = {}
        self._file: IO[str] | None = None
        self._fingerprint = json.loads(json.dumps(fingerprint, default=str))
        self._path: Path | None = None
        self._rank = rank
        if folder is None:
            return
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for path in sorted(place.glob("items*.jsonl")):
            self._read(path)
        self._path = place / (NAME if rank == 0 else f"items.rank{rank}.jsonl")

    def __getitem__(self, label: str) -> Finished:
        return self.finished.setdefault(label, Finished())

    def known(self) -> int:
        """Finished items of all variants."""
        return sum(len(f.items) for f in self.finished.values())

    def add(
        self, label: str, entries: Mapping[int, Mapping[str, Any]], seconds: float, sites: list[Any]
    ) -> None:
        """Keep the `entries` (index -> scores and answer) of one batch; they are on disk when this returns."""
        mine = self[label]
        mine.items.update({i: dict(e) for i, e in entries.items()})
        mine.seconds += seconds
        mine.sites = sites or mine.sites
        lines: list[dict[str, Any]] = [{"variant": label, "sites": sites}] if sites else []
        share = seconds / max(len(entries), 1)
        lines += [{"variant": label, "item": i, "seconds": share, **e} for i, e in entries.items()]
        self._write(lines)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self._path is None:
            return
        if self._file is None:
            new = not self._path.exists() or self._path.stat().st_size == 0
            self._file = self._path.open("a", encoding="utf-8")
            if new:
                self._file.write(json.dumps({"run": self._fingerprint}) + "\n")
        for line in lines:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self, path: Path) -> None:
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):  # killed while writing: half a line would spoil the next one
            with path.open("r+b") as file:
                os.truncate(file.fileno(), len(whole))
        lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        if not lines:
            return
        self._check(path, lines[0].get("run", {}))
        for line in lines[1:]:
            finished = self[line["variant"]]
            if "sites" in line:
                finished.sites = line["sites"]
            else:
                finished.items[line["item"]] = {"scores": line["scores"], "answer": line["answer"]}
                if self._rank == 0:  # the seconds of all processes are added up
                    finished.seconds += line["seconds"]

    def _check(self, path: Path, found: Mapping[str, Any]) -> None:
        asked = self._fingerprint
        other = [k for k in {**found, **asked} if found.get(k) != asked.get(k)]
        if other:
            said = "; ".join(
                f"{k}: {_short(found.get(k))} there, {_short(asked.get(k))} asked" for k in other
            )
            raise JournalError(
                f"{path} holds the items of another run ({said}). Give another folder with --out, repeat the "
                f"command of that run, or delete {path.name} to start again."
            )


def fingerprint(
    task: Mapping[str, Any],
    model: Any,
    items: list[Any],
    patches: Mapping[str, Any],
    carried: list[str],
    seed: int,
) -> dict[str, Any]:
    """What makes two runs the same: everything that a score may depend on.

    Args:
        task: name and config. patches: label -> patch as plain values. carried: patches that the model had before.
    """
    from .. import __version__
    from ..env import git_hash

    return {
        "task": task,
        "model": model_fingerprint(model),
        "items": f"{len(items)} items, {digest(items)}",
        "patches": dict(patches),
        "files": _files(dict(patches)),
        "carried": carried,
        "seed": seed,
        "versions": {**_versions(), "hf_attn_patch": __version__, "git": git_hash()},
    }


def _files(value: Any) -> dict[str, str]:
    """Hashes of the files that options name (plans, head sets): the same path may hold something else next time."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return {k: v for inner in value for k, v in _files(inner).items()}
    if isinstance(value, (str, Path)) and 0 < len(str(value)) < 4096 and os.path.isfile(value):
        return {str(value): hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]}
    return {}


def model_fingerprint(model: Any) -> dict[str, Any]:
    """Class, number format and hashes of config and of a sample of every weight (64 numbers each)."""
    sample = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 64)][:64]
        sample.update(name.encode())
        sample.update(picked.float().cpu().numpy().tobytes())
    return {
        "class": type(model).__name__,
        "name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest()[:16],
        "weights": sample.hexdigest()[:16],
    }


def digest(value: Any) -> str:
    """A hash of plain values, dataclasses, arrays and tensors, nested at will; other objects count by their class."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()[:16]


def _feed(state: Any, value: Any) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        _feed(state, [(f.name, getattr(value, f.name)) for f in fields(value)])
    elif isinstance(value, Mapping):
        _feed(state, list(value.items()))
    elif isinstance(value, (list, tuple)):
        state.update(f"[{len(value)}".encode())
        for inner in value:
            _feed(state, inner)
    elif hasattr(value, "detach"):
        _feed(state, [tuple(value.shape), value.detach().double().cpu().numpy().tobytes()])
    elif hasattr(value, "tobytes"):
        _feed(state, value.tobytes())
    elif isinstance(value, (str, int, float, bytes, type(None))):
        state.update(f"{type(value).__name__}{value!r};".encode())
    else:
        state.update(type(value).__name__.encode())


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
