"""`lm_eval`: any task of lm-evaluation-harness on the live, patched object.

Source: EleutherAI/lm-evaluation-harness (package ``lm-eval``), `simple_evaluate` with `HFLM(pretrained=model)`, which
takes a model object as it stands. An item is one document of one task; its score is the task's first metric. The
aggregate is the mean over tasks, each counting alike; every task is a group.

Differs: tasks whose first metric is no number per document (corpus BLEU, perplexity of a whole text) are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .task import Metric, Scores, Task, Tick, require_language_model


@dataclass(frozen=True)
class Document:
    """The document `index` of `task`, by the numbers of the harness."""

    task: str
    index: int


@dataclass
class LmEval(Task):
    """Tasks of lm-evaluation-harness.

    Attributes:
        tasks: names of the harness, e.g. arc_easy,hellaswag. samples: documents per task, the first ones, None = all.
        shots: examples in the prompt, None = as the task says. batch_size: requests per forward. include: folder with
        YAML files of tasks of your own.
    """

    tasks: tuple[str, ...] = ("arc_easy",)
    samples: int | None = None
    shots: int | None = None
    batch_size: int = 1
    include: str | None = None

    name: ClassVar[str] = "lm_eval"
    summary: ClassVar[str] = "any task of lm-evaluation-harness on the patched object"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("score", "share", True, digits=3),)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError('lm_eval: tasks is empty; name some, e.g. tasks=["arc_easy","hellaswag"]')
        if self.batch_size < 1 or (self.samples is not None and self.samples < 1):
            raise ValueError(
                f"lm_eval: batch_size={self.batch_size} and samples={self.samples} must be at least 1"
            )

    def items(self, model: Any, processor: Any, seed: int) -> list[Document]:
        require_language_model(self.name, model, processor)
        self._seed = seed
        self._manager: Any = None  # the harness's index of tasks, made once
        found = _harness()[1](self)
        items = []
        for name, task in found.items():
            count = len(task.eval_docs)
            items += [Document(name, i) for i in range(min(count, self.samples or count))]
        return items

    def batches(self, items: list[Document]) -> list[list[int]]:
        """One task each: the harness sorts and groups the requests of a call."""
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(item.task, []).append(i)
        return list(groups.values())

    def groups(self, items: list[Document]) -> list[str]:
        return [item.task for item in items]

    def facts(self, items: list[Document]) -> list[dict[str, Any]]:
        return [{"task": item.task, "document": item.index} for item in items]

    def weights(self, items: list[Document]) -> list[float]:
        """Every task counts alike."""
        names = self.groups(items)
        return [1.0 / names.count(name) for name in names]

    def score(self, model: Any, processor: Any, items: list[Document], reference: Any, tick: Tick) -> Scores:
        evaluate, _ = _harness()
        scores: list[float] = []
        for batch in self.batches(items):
            name, wanted = items[batch[0]].task, [items[i].index for i in batch]
            found = evaluate(self, model, processor, name, max(wanted) + 1)
            scores += [found[index] for index in wanted]
            tick(len(batch))
        return {"score": scores}


def _harness() -> tuple[Any, Any]:
    """(evaluate, load): the two things asked of the package.

    Raises:
        ValueError: lm-eval is not installed.
    """
    try:
        import lm_eval  # absolute: the installed package, this file is hf_attn_patch.eval.lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"lm_eval: {error}. Install the harness: pip install 'hf_attn_patch[lm-eval]'."
        ) from error

    def load(job: LmEval) -> dict[str, Any]:
        if (
            job.include is not None
        ):  # the harness's own index of thousands of files takes seconds: only if it is needed
            job._manager = TaskManager(include_path=job.include, include_defaults=False)
        if job.include is None or any(n not in job._manager.all_tasks for n in job.tasks):
            job._manager = TaskManager(include_path=job.include)
        unknown = [n for n in job.tasks if n not in job._manager.all_tasks]
        if unknown:
            raise ValueError(
                f"lm_eval: the harness has no task {', '.join(unknown)}. See `lm_eval ls tasks`, or give "
                "include=FOLDER with its YAML file."
            )
        return job._manager.load(list(job.tasks))["tasks"]  # groups of the harness become their tasks

    def evaluate(job: LmEval, model: Any, processor: Any, name: str, limit: int) -> dict[int, float]:
        out = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=processor, batch_size=job.batch_size),
            tasks=[name],
            task_manager=job._manager,
            num_fewshot=job.shots,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=job._seed,
            numpy_random_seed=job._seed,
            torch_random_seed=job._seed,
            fewshot_random_seed=job._seed,
        )
        return {s["doc_id"]: _number(name, s) for s in out["samples"][name]}

    return evaluate, load


def _number(task: str, sample: dict[str, Any]) -> float:
    metric = sample["metrics"][0]
    value = sample[metric]
    if isinstance(value, (bool, int, float)):
        return float(value)
    raise ValueError(
        f"lm_eval: {task} gives {type(value).__name__} for {metric} of a document, not a number. "
        "Use `lm_eval` itself for it."
    )
