"""Greedy tokens and log-probabilities from llama.cpp (package xllamacpp).

Run by compare_engines.py with the folder of a checkpoint, a JSON file with prompts (lists of
token ids) and the number of tokens to add. Prints one JSON line.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import xllamacpp

folder, prompts, count = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
params = xllamacpp.CommonParams()
params.model.path = str(folder / "model.gguf")
params.n_ctx = 512
params.n_parallel = 1
params.cpuparams.n_threads = 1
params.warmup = False
server = xllamacpp.Server(params)
found = []
for prompt in prompts:
    request = {
        "prompt": prompt,
        "n_predict": int(count),
        "max_tokens": int(count),
        "temperature": 0.0,
        "logprobs": 1,
        "n_probs": 1,
        "ignore_eos": True,
    }
    answer = server.handle_completions(request)
    choice = answer["choices"][0]["logprobs"]["content"]
    found.append({"tokens": [t["id"] for t in choice], "logprobs": [t["logprob"] for t in choice]})
version = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
print(json.dumps({"version": version, "answers": found}))
