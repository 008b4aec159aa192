"""Tasks of EleutherAI's lm-evaluation-harness (package `lm_eval`) on a packed model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq.errors import CalibrationError, MissingPackageError


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
    limit: int | None = None,
    task_folder: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of each task, as the harness computes them.

    Args:
        model: a causal language model of transformers, packed or not.
        tokenizer: its tokenizer.
        tasks: names, such as "lambada_openai" or "hellaswag".
        limit: examples per task, from the start; None = all. Scores of a part say little.
        task_folder: more task definitions (YAML).

    Returns:
        task -> {"n": examples, metric: value, metric + "_stderr": its standard error, ...}.

    Raises:
        MissingPackageError: lm_eval is not installed.
        CalibrationError: no task of that name.
    """
    check_installed()
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    folder = None if task_folder is None else str(task_folder)
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise CalibrationError(
            f"lm_eval has no task {', '.join(unknown)}. `lm_eval ls tasks` lists them."
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    assert found is not None
    counts = found.get("n-samples", {})
    return {
        name: _plain(values) | {"n": counts.get(name, {}).get("effective")}
        for name, values in found["results"].items()
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1} -> {"acc": 0.5, "acc_stderr": 0.1}."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, int | float)
    }
