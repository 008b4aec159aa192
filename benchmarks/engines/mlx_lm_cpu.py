"""Greedy tokens and log-probabilities from mlx-lm, on a CPU where there is no Metal.

Run by compare_engines.py with a JSON file of jobs (a folder, and prompts as lists of token ids) and
the number of tokens to add. Prints one JSON line per job.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import load


def answer(model, prompt, count):
    ids, logprobs = list(prompt), []
    for _ in range(count):
        scores = model(mx.array([ids]))[0, -1].astype(mx.float32)
        scores = scores - mx.logsumexp(scores)
        token = int(scores.argmax())
        ids.append(token)
        logprobs.append(float(scores[token]))
    return {"tokens": ids[len(prompt) :], "logprobs": logprobs}


version = f"mlx-lm {importlib.metadata.version('mlx-lm')} on a CPU"
for job in json.loads(Path(sys.argv[1]).read_text()):
    model, _ = load(job["folder"])
    found = [answer(model, prompt, int(sys.argv[2])) for prompt in job["prompts"]]
    print(json.dumps({"version": version, "answers": found}), flush=True)
