"""Tasks of lm-evaluation-harness on a model in memory, a pruned one or a compiled decoder.

The harness (Gao et al., A Framework for Few-Shot Language Model Evaluation) scores what a causal
language model says: likelihoods of given answers, or text until a stop. It is given the model as
transformers has it; a decoder of `sparseworks.compile_decoder` is one of those.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseworks.core.errors import DataError, InvalidArgument, MissingDependency
from sparseworks.models.modes import evaluating

__all__ = ["Score", "evaluate"]

_SEED = {"random_seed": 0, "numpy_random_seed": 0, "torch_random_seed": 0}


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: with the filter of the answers, where it is not "none": "exact_match,strict".
        value: in the metric's own unit.
        error: standard error of the mean, None where the harness gives none.
        samples: documents that were scored.
        higher_is_better: None where the task does not say.
    """

    task: str
    metric: str
    value: float
    error: float | None
    samples: int
    higher_is_better: bool | None


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Score]:
    """Score a causal language model on tasks; it stays as it is.

    Args:
        model: of transformers, or what `compile_decoder` or `load_decoder` returns.
        tokenizer: of transformers.
        tasks: names that the harness knows ("arc_easy"), or YAML files that describe a task. Such a
            file may name functions of Python files beside it, which are then run.
        limit: documents of a task at most; None: all.
        fewshot: solved examples before each question; None: as the task says.
        batch_size: texts at once.
        seed: of the choice of those examples.

    Returns:
        Scores by task, and by metric in the task's order; of groups their tasks' too.

    Raises:
        MissingDependency: lm-eval is not installed.
        InvalidArgument: no such task, or a number out of range.
        DataError: data of a task that cannot be read, or without a document.
    """
    if not tasks:
        raise InvalidArgument("no task given; for example arc_easy, or the YAML file of a task")
    for name, number, least in (("limit", limit, 1), ("fewshot", fewshot, 0),
                                ("batch_size", batch_size, 1)):  # fmt: skip
        if number is not None and number < least:
            raise InvalidArgument(f"{name}={number} must be at least {least}")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingDependency(
            f"tasks need lm-evaluation-harness: pip install 'sparseworks[evaluation]' ({error})"
        ) from None
    with _quiet():
        found, manager = _load(tasks)
        with evaluating(model):
            harness = HFLM(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
            )
            scored: Any = simple_evaluate(
                harness, tasks=found, num_fewshot=fewshot, limit=limit, log_samples=False,
                task_manager=manager, fewshot_random_seed=seed, **_SEED,
            )  # fmt: skip
    return _scores(scored)


def _load(tasks: Sequence[str]) -> tuple[list[Any], Any]:
    """The tasks, with their data read, and the harness's manager of them."""
    from lm_eval.tasks import TaskManager

    for name in tasks:
        if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise InvalidArgument(f"{name}: no such file")
    files = [str(Path(t).resolve()) if Path(t).is_file() else t for t in tasks]
    # an index of the tasks that the harness brings takes seconds
    manager: Any = TaskManager(include_defaults=not all(Path(f).is_file() for f in files))
    loaded: list[Any] = []
    for given, name in zip(tasks, files):
        if not Path(name).is_file() and not manager.match_tasks([name]):
            raise InvalidArgument(
                f"{given}: no such task; `lm_eval ls tasks` lists them, or give a YAML file"
            )
        try:
            made = manager.load([name])
        except Exception as error:  # a task reads data in as many ways as there are tasks
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise DataError(f"{given}: cannot be loaded ({reason[0]})") from error
        loaded += list(made["groups"].values()) or list(made["tasks"].values())
    return loaded, manager


def _scores(scored: Any) -> list[Score]:
    scores = []
    for task, values in scored["results"].items():
        samples = scored["n-samples"].get(task, {}).get("effective")
        better = scored["higher_is_better"].get(task, {})
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            scores.append(Score(
                task, metric if chosen == "none" else f"{metric},{chosen}", float(value),
                float(error) if isinstance(error, (int, float)) else None,
                int(samples or values.get("sample_len") or 0), better.get(metric),
            ))  # fmt: skip
    if not scores:
        raise DataError("the tasks scored nothing: they have no document")
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells of every step; errors are left."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
