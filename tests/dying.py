"""`llmq ARGUMENTS` under torchrun in processes of which one kills itself: RANK STEP ARGUMENTS.

It dies right before it opens a file of hidden states for writing for the STEPth time.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from llmq.cli import main


def dies(step: int) -> None:
    """Let this process die at that step."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open" and "stream-" in str(arguments[0]) and "w" in str(arguments[1]):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    rank, step, *command = sys.argv[1:]
    if os.environ["RANK"] == rank:
        dies(int(step))
    main(command)
