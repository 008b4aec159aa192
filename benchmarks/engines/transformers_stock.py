"""Greedy tokens and log-probabilities from transformers without llmq.

Run by compare_engines.py with the folder of a checkpoint, a JSON file with prompts (lists of
token ids) and the number of tokens to add. Prints one JSON line.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

folder, prompts, count = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
found = []
with torch.no_grad():
    for prompt in prompts:
        ids, logprobs = list(prompt), []
        for _ in range(count):
            scores = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            logprob, token = scores.max(-1)
            ids.append(int(token))
            logprobs.append(float(logprob))
        found.append({"tokens": ids[len(prompt) :], "logprobs": logprobs})
assert "llmq" not in sys.modules
packages = ("transformers", "compressed-tensors")
version = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
print(json.dumps({"version": version, "answers": found}))
