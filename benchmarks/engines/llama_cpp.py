"""Greedy tokens and log-probabilities from llama.cpp (package xllamacpp).

Run by compare_engines.py with a JSON file of jobs (a folder, and prompts as lists of token ids) and
the number of tokens to add. Prints one JSON line per job.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import xllamacpp


def answer(server, prompt, count):
    request = {
        "prompt": prompt,
        "n_predict": count,
        "max_tokens": count,
        "temperature": 0.0,
        "logprobs": 1,
        "n_probs": 1,
        "ignore_eos": True,
    }
    found = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    if len(found) < count:  # it keeps back what is no whole character
        raise RuntimeError(f"RuntimeError: {len(found)} of {count} tokens came back")
    return {"tokens": [t["id"] for t in found], "logprobs": [t["logprob"] for t in found]}


version = f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"
for job in json.loads(Path(sys.argv[1]).read_text()):
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(job["folder"]) / "model.gguf")
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    found = [answer(server, prompt, int(sys.argv[2])) for prompt in job["prompts"]]
    print(json.dumps({"version": version, "answers": found}), flush=True)
