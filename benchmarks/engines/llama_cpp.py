"""Greedy tokens and log-probabilities from llama.cpp (package xllamacpp), see jobs.py."""

from importlib.metadata import version
from pathlib import Path

import jobs
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


def answers(folder, prompts, count):
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(folder) / "model.gguf")
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    return [answer(server, prompt, count) for prompt in prompts]


jobs.run(f"llama.cpp (xllamacpp {version('xllamacpp')})", answers)
