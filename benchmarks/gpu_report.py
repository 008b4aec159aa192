"""What on_gpu.py and its sections write."""

from __future__ import annotations

import json
import time
from pathlib import Path


class Report:
    """Rows, flushed to a JSON file as they come, and the time that is left."""

    def __init__(self, path: Path, seconds: float, head: dict | None = None) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        self.head, self.rows = head or {}, []
        if head is None and path.is_file():
            self.read()
        else:
            self.write()

    def read(self) -> None:
        """Take over what a section has written to the file."""
        found = json.loads(self.path.read_text())
        self.head, self.rows = found["environment"], found["rows"]

    def add(self, kind: str, **values: object) -> None:
        """Append a row, print it, write everything."""
        self.rows.append({"kind": kind} | values)
        print(kind, *(f"{k}={_short(v)}" for k, v in values.items()), flush=True)
        self.write()

    def write(self) -> None:
        """The file, whole: a reader never sees half of it."""
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps({"environment": self.head, "rows": self.rows}, indent=1))
        part.replace(self.path)

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def failed(self) -> int:
        """Checks that found something wrong."""
        return sum(row.get("ok") is False for row in self.rows)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
