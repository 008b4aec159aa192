"""Widen the MLPs of a Llama with zeros, so that groups divide them; the function stays the same.

    python benchmarks/padded_model.py MODEL OUT [--multiple 64]

stories260K has 172 MLP channels, which no group size divides. New channels have zero weights in
gate, up and down: they are 0 in every token, and no tool has anything to lose on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

PROBE = torch.arange(3, 35).unsqueeze(0)


def widen(model: Any, multiple: int) -> None:
    """Pad every `mlp` of `model` in place, and its configuration."""
    for name, module in model.named_modules():
        if name.endswith((".gate_proj", ".up_proj")):
            extra = -module.weight.shape[0] % multiple
            module.weight.data = F.pad(module.weight.data, (0, 0, 0, extra))
        elif name.endswith(".down_proj"):
            extra = -module.weight.shape[1] % multiple
            module.weight.data = F.pad(module.weight.data, (0, extra))
    model.config.intermediate_size += -model.config.intermediate_size % multiple


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--multiple", type=int, default=64)
    options = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    before = model(PROBE).logits
    widen(model, options.multiple)
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    widened: Any = AutoModelForCausalLM.from_pretrained(options.out, dtype="auto").eval()
    after = widened(PROBE).logits
    assert torch.allclose(after, before, atol=1e-4), "the function has changed"


if __name__ == "__main__":
    main()
