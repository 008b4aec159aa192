"""Greedy tokens and log-probabilities from GPTQModel, see jobs.py."""

from importlib.metadata import version

import jobs
import torch
from gptqmodel import BACKEND, GPTQModel


def answers(folder, prompts, count):
    loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    return [jobs.greedy(loaded.model, prompt, count) for prompt in prompts]


jobs.run(f"GPTQModel {version('gptqmodel')}, fp16", answers)
