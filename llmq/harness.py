"""Tasks of EleutherAI's lm-evaluation-harness (package `lm_eval`) on a packed model."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmq.errors import CalibrationError, MissingPackageError
from llmq.evaluate import bootstrap_interval


def check_installed() -> None:
    """Refuse early, before a model is loaded.

    Raises:
        MissingPackageError: lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("Tasks need the package lm_eval: pip install 'llmq-quant[eval]'")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    reference: Any = None,
    limit: int | None = None,
    task_folder: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of each task, as the harness computes them, and how far they are from another model's.

    Args:
        model: a causal language model of transformers, packed or not.
        tokenizer: its tokenizer.
        tasks: names, such as "lambada_openai" or "hellaswag".
        reference: the full-precision model, with the same tokenizer, or None.
        limit: examples per task, from the start; None = all. Scores of a part say little.
        task_folder: more task definitions (YAML).

    Returns:
        task -> {"n": examples, metric: value, metric + "_stderr": its standard error, ...}. With a
        reference, of every metric that is a mean over examples: metric + "_reference", and
        "_difference", the mean over examples of this model's score less the reference's, its
        "_difference_stderr" and "_difference_95" (bootstrap over examples).

    Raises:
        MissingPackageError: lm_eval is not installed.
        CalibrationError: no task of that name.
    """
    check_installed()
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    folder = None if task_folder is None else str(task_folder)
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise CalibrationError(
            f"lm_eval has no task {', '.join(unknown)}. `lm_eval ls tasks` lists them."
        )

    found = _scored(model, tokenizer, tasks, manager, limit)
    counts = found.get("n-samples", {})
    scores = {
        name: _plain(values) | {"n": counts.get(name, {}).get("effective")}
        for name, values in found["results"].items()
    }
    if reference is not None:
        full = _scored(reference, tokenizer, tasks, manager, limit)
        for name in scores.keys() & found["samples"].keys():  # groups of tasks have no samples
            own, others = found["samples"][name], full["samples"][name]
            scores[name] |= paired(found["results"][name], own, others)
    return scores


def _scored(
    model: Any, tokenizer: Any, tasks: Sequence[str], manager: Any, limit: int | None
) -> dict[str, Any]:
    """What the harness makes of one model: its results and samples."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    assert found is not None
    return found


def paired(
    results: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    full: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Differences example by example, see `run_tasks`.

    Args:
        results: of one task, "metric,filter" -> value.
        own, full: the harness' samples of that task, from the model and from the reference.
    """
    found: dict[str, Any] = {}
    for key, value in results.items():
        if not isinstance(value, int | float):  # a name, or an error that is not known
            continue
        metric, _, chosen = key.partition(",")
        mine, others = (
            {
                s["doc_id"]: float(s[metric])
                for s in samples
                if s["filter"] == chosen and isinstance(s.get(metric), int | float)
            }
            for samples in (own, full)
        )
        # Perplexities and the like are no means over examples.
        mean = sum(mine.values()) / len(mine) if mine else math.nan
        if mine.keys() != others.keys() or not math.isclose(mean, value, abs_tol=1e-9):
            continue
        change = torch.tensor([mine[i] - others[i] for i in mine], dtype=torch.float64)
        name = key.removesuffix(",none")
        found[f"{name}_reference"] = sum(others.values()) / len(others)
        found[f"{name}_difference"] = float(change.mean())
        if len(change) > 1:
            found[f"{name}_difference_stderr"] = float(change.std()) / math.sqrt(len(change))
            found[f"{name}_difference_95"] = bootstrap_interval(change)
    return found


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1} -> {"acc": 0.5, "acc_stderr": 0.1}."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, int | float)
    }
