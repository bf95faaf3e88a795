"""`longbench`, `longbench_e`: 21 long-context datasets with their own prompts and metrics, from local files or the hub.

Source: LongBench, arXiv 2308.14508, github.com/THUDM/LongBench (prompts, answer lengths, truncation, scoring: READ; no
published number was re-run here: UNVERIFIED). A prompt longer than `max_length` loses its middle, as text of two halves
of the tokens. The aggregate is the mean over datasets, each counting alike, as in the paper's tables (which are x 100).

Differs: batches; `samsum` stops at a newline in the text, not at one token; the chat template is the tokenizer's own
(``chat=true``; six few-shot and code datasets are never asked through it, as in the original).
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from .generation import Prompt, PromptTask, encode
from .longbench_metrics import require, score
from .task import Metric, require_language_model

HUB = "THUDM/LongBench"  # its data.zip holds data/NAME.jsonl and data/NAME_e.jsonl
MARGIN = 64  # tokens for a chat template, and for halves that become longer when they are joined
BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))  # words, as the data count them


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Dataset -> prompt, new (tokens of an answer), metric, chat, first_line, e."""
    text = resources.files(__package__).joinpath("longbench.json").read_text(encoding="utf-8")
    return json.loads(text)["datasets"]


@dataclass
class LongBench(PromptTask):
    """LongBench.

    Attributes:
        data: a folder or zip file with NAME.jsonl files, or a hub id of one with data.zip. datasets: names, empty = all
        that `data` has. samples: items per dataset, the first ones, None = all. max_length: tokens of a prompt, None =
        what the model has positions for. batch_size: prompts per generate call. chat: use the chat template.
    """

    data: str = HUB
    datasets: tuple[str, ...] = ()
    samples: int | None = None
    max_length: int | None = None
    batch_size: int = 1
    chat: bool = False

    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "long-context datasets with their own prompts and metrics"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("score", "share", True, digits=4),)
    suffix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        unknown = [d for d in self.datasets if d not in self._known()]
        if unknown:
            raise ValueError(
                f"{self.name}: no dataset {', '.join(unknown)}. There are {', '.join(self._known())}."
            )
        small = {
            k: v
            for k in ("samples", "max_length", "batch_size")
            if (v := getattr(self, k)) is not None and v < 1
        }
        if small:
            raise ValueError(f"{self.name}: {small} must be at least 1")

    def _known(self) -> list[str]:
        return list(table())

    def items(self, model: Any, processor: Any, seed: int) -> list[Prompt]:
        require_language_model(self.name, model, processor)
        if self.chat:
            encode(processor, "", chat=True)  # says that there is no template before the files are read
        rows = read(self.data, self.datasets or tuple(self._known()), self.suffix, bool(self.datasets))
        require([table()[dataset]["metric"] for dataset in rows])
        self._classes: dict[str, list[str]] = {}
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return [
            self._prompt(processor, dataset, row, limit)
            for dataset, found in rows.items()
            for row in found[: self.samples]
        ]

    def _longest(self, row: dict[str, Any]) -> int | None:
        return self.max_length

    def _group(self, dataset: str, row: dict[str, Any]) -> str:
        return dataset

    def _prompt(self, processor: Any, dataset: str, row: dict[str, Any], limit: int | None) -> Prompt:
        about = table()[dataset]
        longest = self._longest(row)
        if limit is not None and (longest is None or longest + about["new"] > limit):
            if longest is not None:
                raise ValueError(
                    f"{self.name}: max_length {longest} + {about['new']} new tokens of {dataset}, the model has "
                    f"{limit} positions. Ask for at most {limit - about['new'] - MARGIN}."
                )
            longest = limit - about["new"] - MARGIN
            if longest < 2:
                raise ValueError(
                    f"{self.name}: {dataset} answers in {about['new']} tokens, the model has {limit} positions."
                )
        text = about["prompt"].format(context=row["context"], input=row["input"])
        text = without_middle(processor, text, longest)
        classes = row.get("all_classes") or []
        self._classes.setdefault(dataset, classes)
        return Prompt(
            ids=tuple(encode(processor, text, self.chat and about["chat"])),
            expected=tuple(map(str, row["answers"])),
            new=about["new"],
            group=self._group(dataset, row),
            facts={"dataset": dataset, "words": row.get("length")},
            stop="\n" if dataset == "samsum" else None,
        )

    def grade(self, answer: str, prompt: Prompt) -> dict[str, float]:
        dataset = prompt.facts["dataset"]
        about = table()[dataset]
        if about["first_line"]:
            answer = answer.lstrip("\n").split("\n")[0]
        return {"score": score(about["metric"], answer, prompt.expected, self._classes[dataset])}

    def weights(self, items: list[Prompt]) -> list[float]:
        """Every group counts alike, however many items it has."""
        groups = self.groups(items)
        return [1.0 / groups.count(group) for group in groups]


@dataclass
class LongBenchE(LongBench):
    """LongBench-E: 13 datasets with even numbers of short, middle and long items.

    Attributes:
        max_lengths: three prompt lengths in tokens, for items of 0-4k, 4-8k and 8k+ words (MoA, arXiv 2406.14909, takes
        3500, 7500, 15500); None = `max_length` for all. Others: as `longbench`.
    """

    max_lengths: tuple[int, ...] | None = None

    name: ClassVar[str] = "longbench_e"
    summary: ClassVar[str] = "LongBench-E: the same by length, 0-4k, 4-8k and 8k+ words"
    suffix: ClassVar[str] = "_e"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_lengths is not None and (len(self.max_lengths) != 3 or min(self.max_lengths) < 1):
            raise ValueError(f"longbench_e: max_lengths={list(self.max_lengths)} must be three lengths")
        if self.max_lengths is not None and self.max_length is not None:
            raise ValueError("longbench_e: max_length and max_lengths are both given. Give one of them.")

    def _known(self) -> list[str]:
        return [name for name, about in table().items() if about["e"]]

    def _longest(self, row: dict[str, Any]) -> int | None:
        if self.max_lengths is None:
            return self.max_length
        return self.max_lengths[("0-4k", "4-8k", "8k+").index(bucket(row["length"]))]

    def _group(self, dataset: str, row: dict[str, Any]) -> str:
        return f"{dataset} {bucket(row['length'])}"


def bucket(words: int) -> str:
    """``0-4k``, ``4-8k`` or ``8k+``."""
    return next((name for bound, name in BUCKETS if words < bound), "8k+")


def without_middle(processor: Any, text: str, longest: int | None) -> str:
    """`text`, or the text of the first and last ``longest // 2`` of its tokens if it has more than `longest`."""
    if longest is None:
        return text
    ids = list(processor(text)["input_ids"])
    if len(ids) <= longest:
        return text
    half = longest // 2
    decode = functools.partial(processor.decode, skip_special_tokens=True)
    return decode(ids[:half]) + decode(ids[len(ids) - half :])


def read(data: str, names: tuple[str, ...], suffix: str, strict: bool) -> dict[str, list[dict[str, Any]]]:
    """Dataset -> rows of its JSONL file; without `strict`, names that are not there are left out.

    Raises:
        ValueError: no such folder, file or hub repository, none of the names is there, or a row without its fields.
    """
    files = _files(data)
    there = {name: files[f"{name}{suffix}.jsonl"] for name in names if f"{name}{suffix}.jsonl" in files}
    missing = [f"{name}{suffix}.jsonl" for name in names if name not in there]
    if missing and (strict or not there):
        raise ValueError(
            f"longbench: {data} has no {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; it has "
            f"{', '.join(sorted(files)[:8]) or 'no JSONL file'}. Give data=FOLDER with the files of the benchmark."
        )
    return {name: _rows(name, load()) for name, load in there.items()}


def _files(data: str) -> dict[str, Any]:
    """File name -> function that reads it."""
    path = Path(data).expanduser()
    if path.is_dir():
        return {p.name: functools.partial(p.read_text, encoding="utf-8") for p in path.rglob("*.jsonl")}
    if not path.is_file():
        path = _download(data)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"longbench: {path} is neither a folder nor a zip file")

    def member(name: str) -> str:
        with zipfile.ZipFile(path) as archive:
            return io.TextIOWrapper(archive.open(name), encoding="utf-8").read()

    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".jsonl")]
    return {Path(n).name: functools.partial(member, n) for n in names}


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "data.zip", repo_type="dataset"))
    except Exception as error:  # the hub has a dozen ways to say no; all lead to the same advice
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"longbench: data={repository!r} is no folder and no zip file here, and cannot be had from the hub: "
            f"{first} Give data=FOLDER with NAME.jsonl files, or data=FILE.zip."
        ) from error


def _rows(name: str, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"longbench: {name}, line {number} is no JSON: {line[:80]!r}") from error
        lacks = [k for k in ("input", "context", "answers", "length") if k not in row]
        if lacks:
            raise ValueError(f"longbench: {name}, line {number} has no {', '.join(lacks)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"longbench: {name} has no rows")
    return rows
