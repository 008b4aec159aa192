"""The table of engines in README.md, from results/engines.json.

python benchmarks/engine_table.py      writes it between its two marks
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "engines.json"
PAGE = HERE.parent / "README.md"
START, STOP = "<!-- engines: from benchmarks/engine_table.py -->", "<!-- /engines -->"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line per engine and layout; models that it ran are counted and added up."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["engine"], row["layout"]), []).append(row)
    lines = [
        "| engine | layout | models | greedy tokens equal | mean difference of log-probability "
        "| llmq in bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for (engine, layout), found in groups.items():
        ran = [row for row in found if "error" not in row]
        models = "; ".join(row["model"] for row in ran)
        if refused := [row["model"] for row in found if "error" in row]:
            models += f"{'; ' if models else ''}not: {'; '.join(refused)}"
        equal, difference, narrow = "-", "-", "-"
        if ran:
            own = [row["llmq_in_bf16"] for row in ran if "llmq_in_bf16" in row]
            if len(own) == len(ran):
                kept = sum(row["greedy_tokens_equal"] for row in own)
                narrow = f"{kept}, {max(row['mean_abs_logprob_difference'] for row in own):.3f}"
            same, tokens = (sum(r[key] for r in ran) for key in ("greedy_tokens_equal", "tokens"))
            equal = f"{same} of {tokens}"
            if all("others_behind_at_most" in row for row in ran) and same < tokens:
                equal += f" ({max(row['others_behind_at_most'] for row in ran):.3f} nats)"
            worst = max(row["mean_abs_logprob_difference"] for row in ran)
            difference = f"{worst:.1e}" if worst < 1e-3 else f"{worst:.3f}"
        version = next((row["version"] for row in ran), engine)
        lines.append(f"| {version} | {layout} | {models} | {equal} | {difference} | {narrow} |")
    return "\n".join(lines)


def with_table(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """`page` with the table between its marks."""
    before, rest = page.split(START)
    _, after = rest.split(STOP)
    return f"{before}{START}\n\n{table(rows)}\n\n{STOP}{after}"


if __name__ == "__main__":
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
