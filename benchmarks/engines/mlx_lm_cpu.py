"""Greedy tokens and log-probabilities from mlx-lm, on a CPU without Metal, see jobs.py."""

from importlib.metadata import version

import jobs
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


def answers(folder, prompts, count):
    model, _ = load(folder)
    return [answer(model, prompt, count) for prompt in prompts]


# Compiled functions would each be built by g++ at run time: minutes per model on a busy machine.
mx.disable_compile()
jobs.run(f"mlx-lm {version('mlx-lm')} on a CPU", answers)
