"""Packed checkpoints in transformers: load, save, and `from_pretrained` by itself.

    load         a packed checkpoint (or any other) as a transformers model, weights kept packed
    save         a packed model as a compressed-tensors checkpoint on the original key names
    attach       what `save_pretrained` needs to know about a model quantized in memory
    LlmqConfig   `quantization_config=` to quantize a full-precision checkpoint while it loads

Importing this package also makes plain `AutoModelForCausalLM.from_pretrained` and `pipeline` keep
integer weight-only compressed-tensors, GPTQ and AWQ checkpoints packed. Others (fp8, quantized
activations, sparse ...) still go to whoever handled them before.
"""

from llmq.hf.loading import load, take_over
from llmq.hf.quantizer import LlmqConfig, attach
from llmq.hf.saving import save

__all__ = ["LlmqConfig", "attach", "load", "save"]

take_over()
