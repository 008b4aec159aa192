"""What the scripts of engines share. They run in environments of their own: this needs no package.

compare_engines.py runs each with a JSON file of jobs (a folder, and prompts as lists of token ids)
and the number of tokens to add; it prints one JSON line per job.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

Answer = dict[str, list]  # tokens, and logprobs of each


def run(version: str, answers: Callable[[str, list[list[int]], int], list[Answer]]) -> None:
    """Do all jobs; `answers` gets the folder, the prompts and the number of tokens to add."""
    count = int(sys.argv[2])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        found = answers(job["folder"], job["prompts"], count)
        print(json.dumps({"version": version, "answers": found}), flush=True)


def greedy(model, prompt: list[int], count: int) -> Answer:
    """From a model of transformers."""
    import torch

    tokens, logprobs, cache, new = [], [], None, list(prompt)
    with torch.no_grad():
        for _ in range(count):
            found = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            logprob, token = found.logits[0, -1].float().log_softmax(-1).max(-1)
            cache, new = found.past_key_values, [int(token)]
            tokens += new
            logprobs.append(float(logprob))
    return {"tokens": tokens, "logprobs": logprobs}
