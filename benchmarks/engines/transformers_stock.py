"""Greedy tokens and log-probabilities from transformers without llmq.

Run by compare_engines.py with a JSON file of jobs (a folder, and prompts as lists of token ids) and
the number of tokens to add. Prints one JSON line per job.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def answer(model, prompt, count):
    tokens, logprobs, cache, new = [], [], None, list(prompt)
    for _ in range(count):
        found = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        logprob, token = found.logits[0, -1].float().log_softmax(-1).max(-1)
        cache, new = found.past_key_values, [int(token)]
        tokens += new
        logprobs.append(float(logprob))
    return {"tokens": tokens, "logprobs": logprobs}


packages = ("transformers", "compressed-tensors")
version = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
for job in json.loads(Path(sys.argv[1]).read_text()):
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
    found = [answer(model, prompt, int(sys.argv[2])) for prompt in job["prompts"]]
    print(json.dumps({"version": version, "answers": found}), flush=True)
assert "llmq" not in sys.modules
