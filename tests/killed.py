"""Run `llmq.quantize` in processes that are killed. A script: JSON in, JSON out.

    in   [{"src": ..., "out": ..., "kill": N, "after": seconds, "options": {...}}, ...]
    out  [{"status": exit status (-9 if killed), "steps": N, "seconds": ...}, ...]

A step is anything that a run is about to do to a file of its own: open it for writing, rename it,
remove it, make a folder. A job dies by SIGKILL right before its step number `kill`, or `after` some
time wherever it is; 0 = never. Jobs are forks of one process, so that libraries are imported only
once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmq import api

torch.set_num_threads(1)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def run(job: dict[str, Any], results: int) -> None:
    """Run one job; how many steps it took goes to the pipe `results`."""
    name = Path(job["out"]).name
    steps = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event not in EVENTS or f"{name}" not in str(arguments[0]):
            return
        if event == "open" and not (arguments[1] and set("wax+") & set(str(arguments[1]))):
            return
        steps += 1
        if steps == job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    api.quantize(job["src"], job["out"], **job["options"])
    os.write(results, str(steps).encode())


def main() -> None:
    found = []
    for job in json.load(sys.stdin):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(job, writing)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writing)
        start = time.monotonic()
        if job.get("after"):
            time.sleep(job["after"])
            os.kill(child, signal.SIGKILL)  # it is a zombie if it has come to its end
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - start
        steps = os.read(reading, 100)
        os.close(reading)
        code = os.waitstatus_to_exitcode(status)
        found.append({"status": code, "steps": int(steps or 0), "seconds": seconds})
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
