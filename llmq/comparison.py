"""Several checkpoints of one model, by what `llmq eval --record` measured of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq.errors import SourceError
from llmq.output import staged_file, writing
from llmq.page import compare_page
from llmq.report import read_report
from llmq.stored import bits_per_weight, inspect_checkpoint

_MEASURES = ("kl", "kl_stderr", "top1", "perplexity", "perplexity_stderr")


def collect(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """What is known of each checkpoint, and the protocol by which all were measured.

    Returns:
        one entry per folder (see `page.compare_page`), and the newest protocol they share.

    Raises:
        SourceError: a folder without a measured KL, or no protocol that all of them share.
    """
    measured = [_divergences(folder) for folder in folders]
    shared = [p for p in reversed(measured[0]) if all(p in other for other in measured)]
    if not shared:
        first, other = measured[0], next(m for m in measured if not m.keys() & measured[0].keys())
        raise SourceError(
            "These checkpoints were not measured in the same way: "
            f"{list(first)[-1]!r} and {list(other)[-1]!r}. Run llmq eval --record on the same text."
        )
    entries = []
    names = _distinct(folders)
    for folder, name, found in zip(folders, names, measured, strict=True):
        layers = inspect_checkpoint(folder)
        values = {key: found[shared[0]].get(key) for key in _MEASURES}
        stored = {"bytes": sum(x.bytes for x in layers), "bits_per_weight": bits_per_weight(layers)}
        entries.append({"name": name, **stored, **values})
    return entries, shared[0]


def write(out: Path, entries: Sequence[dict[str, Any]], protocol: str) -> None:
    """Write the page.

    Raises:
        OutputError: `out` cannot be written.
    """
    with staged_file(out) as stage, writing(out):
        stage.write_text(compare_page(entries, protocol), encoding="utf-8")


def _divergences(folder: Path) -> dict[str, dict[str, Any]]:
    """Measurements with a KL, by protocol, oldest first."""
    report = read_report(folder) if folder.is_dir() else None
    found = {
        entry["protocol"]: entry
        for entry in (report or {}).get("evaluations", [])
        if entry.get("kl") is not None
    }
    if not found:
        raise SourceError(
            f"{folder}: no KL was recorded. Run: llmq eval {folder} --text HELD_OUT.txt "
            "--reference ORIGINAL --record"
        )
    return found


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole path where two have the same."""
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]
