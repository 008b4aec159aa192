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
from mlx_lm.models.cache import make_prompt_cache


def answer(model, prompt, count):
    tokens, logprobs, cache, new = [], [], make_prompt_cache(model), list(prompt)
    for _ in range(count):
        scores = model(mx.array([new]), cache=cache)[0, -1].astype(mx.float32)
        scores = scores - mx.logsumexp(scores)
        new = [int(scores.argmax())]
        tokens += new
        logprobs.append(float(scores[new[0]]))
    return {"tokens": tokens, "logprobs": logprobs}


version = f"mlx-lm {importlib.metadata.version('mlx-lm')} on a CPU"
for job in json.loads(Path(sys.argv[1]).read_text()):
    model, _ = load(job["folder"])
    found = [answer(model, prompt, int(sys.argv[2])) for prompt in job["prompts"]]
    print(json.dumps({"version": version, "answers": found}), flush=True)
