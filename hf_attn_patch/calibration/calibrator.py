"""`Calibrator`: one dataclass per method that turns model + data into the options of a patch, and what all share.

Its fields are its options, on the command line too. Third parties add calibrators with the entry-point group
``hf_attn_patch.calibrators`` (``name = "module:Class"``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import CompositionError, PatchError, did_you_mean
from ..plugins import plugins

GROUP = "hf_attn_patch.calibrators"
Progress = Callable[[str, int, int], None]  # (step, units done, units in all)


class CalibrationError(PatchError, ValueError):
    """A calibration that cannot be done as asked; the message says what was found and the way out."""


def _silent(step: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass
class Calibration:
    """What a calibration found.

    patch: name of the patch it is for. options: its options, ready for ``hap.patch(model, patch, **options)``.
    plan: what `save` writes (the patch reads that file). report: numbers behind the choice, plain data.
    pictures: name -> SVG text.
    """

    name: str
    patch: str
    plan: Any
    options: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: str | Path) -> Path:
        """Write the plan to `path`, the report to ``<stem>.report.json`` and each picture to ``<stem>.<name>.svg``."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(self.plan, indent=1) + "\n")
        write(file.with_suffix(".report.json"), json.dumps(self.report, indent=1) + "\n")
        for name, svg in self.pictures.items():
            write(file.with_suffix(f".{name}.svg"), svg)
        return file

    def __str__(self) -> str:
        lines = [f"calibration {self.name} for patch {self.patch}, {self.seconds:.0f} s"]
        for key, value in self.report.items():
            text = json.dumps(value)
            lines.append(f"  {key}: {text if len(text) <= 160 else text[:157] + '…'}")
        return "\n".join(lines)


class Calibrator:
    """Base of all calibrators. Subclasses are dataclasses with `validate` and `calibrate`.

    Attributes of the class: name, summary, patch (name of the patch the result is for). takes: what of the model the
    command line loads beside it, its ``tokenizer``, or its ``processor`` of text and images where it has one. task:
    the evaluation that the command line suggests afterwards.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    patch: ClassVar[str] = ""
    takes: ClassVar[str] = "tokenizer"
    task: ClassVar[str] = "perplexity"
    shared: ClassVar[tuple[str, ...] | None] = None

    def validate(self) -> None:
        """Check values that need no model. Raises `CalibrationError`."""

    def calibrate(self, model: Any, tokenizer: Any, data: Any, work: Work, progress: Progress) -> Calibration:
        """Do the work. `work` keeps finished pieces; the model is in eval mode and unpatched.

        Raises:
            CalibrationError: goal, data or model do not allow it.
        """
        raise NotImplementedError

    def require(self, condition: bool, name: str, meaning: str) -> None:
        """Raise `CalibrationError` for option `name` unless `condition`."""
        if not condition:
            raise CalibrationError(f"{self.name}: {name}={getattr(self, name)!r} must be {meaning}")


class Work:
    """Finished pieces of a calibration, on disk if there is a folder: an interrupted run goes on where it stopped.

    A folder belongs to one model, calibrator, configuration and data; anything else found there is refused.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any] | None = None):
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        mark, text = folder / "identity.json", json.dumps(identity, indent=1, sort_keys=True)
        if mark.exists() and mark.read_text() != text:
            was = json.loads(mark.read_text())
            differs = sorted(k for k in {*was, *(identity or {})} if was.get(k) != (identity or {}).get(k))
            raise CalibrationError(
                f"{folder} holds pieces of another calibration (different: {', '.join(differs)}). Delete it, or "
                "choose another output file"
            )
        write(mark, text)

    def tensors(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The tensors of piece `name`: read if an earlier run made them, else made and kept."""
        from safetensors.torch import load_file, save_file

        if self.folder is None:
            return make()
        file = self.folder / f"{name}.safetensors"
        if file.exists():
            return load_file(file)
        made = make()
        partial = file.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in made.items()}, partial)
        partial.replace(file)  # a kill while writing leaves no half file under the real name
        return made

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """`tensors` for plain data."""
        if self.folder is None:
            return json.loads(json.dumps(make()))
        file = self.folder / f"{name}.json"
        if not file.exists():
            write(file, json.dumps(make()))
        return json.loads(file.read_text())


def write(file: Path, text: str) -> None:
    """Write a text file in one step: nobody ever reads half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


# -- registry -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One known calibrator: where its class is, and what it does in a line."""

    name: str
    target: str
    summary: str
    problem: str = ""

    def load(self) -> type[Calibrator]:
        if self.problem:
            raise CalibrationError(self.problem)
        module, _, attribute = self.target.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:  # somebody else's module may fail in any way
            raise CalibrationError(
                f"calibrator {self.name!r} cannot be loaded from {self.target}: {error}"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Calibrator)):
            raise CalibrationError(f"calibrator {self.name!r}: {cls!r} is no Calibrator class")
        return cls


_BUILTIN = (
    Entry("moa", "hf_attn_patch.calibration.moa:MoaCalibrator",
          "spans per KV head by gradient influence and integer programming"),
    Entry("head_scores", "hf_attn_patch.calibration.head_scores:HeadScores",
          "which heads retrieve, matter for the loss, or look at the image: a head set"),
    Entry("duo", "hf_attn_patch.calibration.duo:DuoCalibrator",
          "gates per KV head trained on passkeys: retrieval heads and streaming heads"),
    Entry("image_heads", "hf_attn_patch.calibration.image_heads:ImageHeads",
          "which heads look at the image while the model answers: a head set"),
    Entry("sink_dims", "hf_attn_patch.calibration.sink_dims:SinkDims",
          "channels of the hidden state that are huge in sink tokens: dims of var"),
    Entry("paro", "hf_attn_patch.calibration.paro:ParoCalibrator",
          "per head of a ViT the order of the grid's axes and the blocks that hold most of its attention"),
    Entry("vertical_slash", "hf_attn_patch.calibration.vertical_slash:VerticalSlashCalibrator",
          "columns and diagonals per query head by recall of the attention mass"),
)  # fmt: skip


def available() -> dict[str, Entry]:
    """Name -> entry, installed plug-ins included."""
    entries = {e.name: e for e in _BUILTIN}
    for plugin in plugins(GROUP, {e.name: e.target for e in _BUILTIN}):
        if plugin.target:
            entries.setdefault(plugin.name, Entry(plugin.name, plugin.target, "", plugin.problem))
    return entries


def get(name: str) -> type[Calibrator]:
    """The class called `name`.

    Raises:
        CalibrationError: unknown; all names and the nearest are listed.
    """
    entries = available()
    if name not in entries:
        raise CalibrationError(
            f"nothing calibrates {name!r}.{did_you_mean(name, entries)} Known: {', '.join(entries)}"
        )
    return entries[name].load()


def build(what: str | Calibrator, options: dict[str, Any]) -> Calibrator:
    """A validated calibrator from a name, ``name:key=value,…`` or an object, with `options` on top.

    Raises:
        CalibrationError: unknown name or option, or a value out of range.
    """
    if isinstance(what, str):
        from ..eval.specs import SpecError, split_spec, typed_options

        try:
            name, raw = split_spec(what)
            cls = get(name)
            given = typed_options(name, cls, raw, {})
        except SpecError as error:
            raise CalibrationError(str(error)) from error
        options = {**given, **options}
        fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [k for k in options if k not in fields]
        if unknown:
            hints = "".join(did_you_mean(k, fields) for k in unknown)
            raise CalibrationError(
                f"{name}: no option {', '.join(map(repr, unknown))}.{hints} Options: {', '.join(fields)}"
            )
        job = cls(**options)
    else:
        job = dataclasses.replace(what, **options) if options else what  # type: ignore[type-var]
    job.validate()
    return job


def run(
    job: Calibrator,
    model: Any,
    tokenizer: Any,
    *,
    data: Any = None,
    out: str | Path | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """`hap.calibrate` for a ready calibrator."""
    from ..api import active
    from ..model.sites import base_model

    if active(model):
        raise CompositionError(
            f"{job.name}: the model is patched ({active(model)[0]}), so a calibration would describe the patch. Remove "
            "it first (hap.unpatch), calibrate, patch again"
        )
    folder = Path(work) if work is not None else None if out is None else Path(f"{out}.work")
    pieces = Work(folder, identity(job, base_model(model), data) if folder is not None else None)
    started = time.perf_counter()
    with as_it_is(model):
        found = job.calibrate(model, tokenizer, data, pieces, progress or _silent)
    found.seconds = time.perf_counter() - started
    if out is not None:
        found.save(out)
    return found


def identity(job: Calibrator, model: Any, data: Any) -> dict[str, Any]:
    """What pieces of work belong to: calibrator, options, model (shape and a sample of its weights) and data."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(str(parameter.detach().flatten()[:8].float().tolist()).encode())
    if isinstance(data, (str, Path)):
        text: Any = hashlib.sha256(Path(data).read_bytes()).hexdigest() if Path(data).is_file() else str(data)
    else:
        text = None if data is None else hashlib.sha256(json.dumps(data, default=_told).encode()).hexdigest()
    options = json.loads(json.dumps(asdict(job), default=str))  # type: ignore[call-overload]
    if job.shared is not None:
        options = {name: options[name] for name in job.shared}
    return {
        "calibrator": job.name,
        "options": options,
        "model": type(model).__name__,
        "weights": digest.hexdigest(),
        "data": text,
    }


def _told(thing: Any) -> str:
    """An image by its pixels, anything else by its text."""
    return hashlib.sha256(thing.tobytes()).hexdigest() if hasattr(thing, "tobytes") else str(thing)


def model_name(model: Any) -> str:
    """What a plan calls its model: the hub id, or the last part of a folder's path; "" if it is unknown."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Path(name).name if Path(name).is_absolute() else name


@contextmanager
def as_it_is(model: Any) -> Any:
    """Eval mode without parameter gradients inside; every flag comes back afterwards, no gradient stays behind."""
    training = [m for m in model.modules() if m.training]
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
