"""Greedy tokens and log-probabilities from transformers without llmq, see jobs.py."""

import sys
from importlib.metadata import version

import jobs
import torch
from transformers import AutoModelForCausalLM


def answers(folder, prompts, count):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [jobs.greedy(model, prompt, count) for prompt in prompts]


packages = ("transformers", "compressed-tensors")
jobs.run(", ".join(f"{name} {version(name)}" for name in packages), answers)
assert "llmq" not in sys.modules
