"""Which inference engines will load the result, and with which limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from llmq.codebook import CodebookScheme
from llmq.gguf_metadata import ARCHITECTURES
from llmq.nn import STACKS
from llmq.recipe import Recipe
from llmq.scheme import QuantScheme
from llmq.superblocks import SuperBlockScheme


@dataclass(frozen=True)
class Engine:
    """Whether an inference engine loads the result.

    Attributes:
        name: the engine.
        loads: True, False, or None where nobody has tried.
        note: limits, or why not.
    """

    name: str
    loads: bool | None
    note: str


def engines(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], recipe: Recipe
) -> list[Engine]:
    """Who loads the result. FORMATS are compressed-tensors `pack-quantized` in every case."""
    schemes = {s for name in shapes if (s := recipe.scheme_for(name))}
    if any(isinstance(scheme, CodebookScheme) for scheme in schemes):
        others = ("stock transformers", "vLLM", "SGLang", "llama.cpp")
        why = "it has no place for these code books: leave --codebook away"
        own = Engine("llmq (transformers with llmq)", True, "looked up, then multiplied densely")
        return [own, *(Engine(name, False, why) for name in others)]
    if any(isinstance(scheme, SuperBlockScheme) for scheme in schemes):
        return _of_super_blocks(getattr(model.config, "model_type", ""))
    symmetric = all(s.symmetric for s in schemes)
    widths = sorted({s.bits for s in schemes})
    common = all(bits in (4, 8) for bits in widths)
    modules = dict(model.named_modules())
    odd = sorted({type(m).__name__ for n in shapes if (m := modules.get(n)) and not _plain(m)})
    experts = any(name.rpartition(".")[2] in STACKS and name not in modules for name in shapes)
    stock = Engine("stock transformers", True, "with compressed-tensors; weights become dense")
    if not symmetric:
        stock = Engine(stock.name, False, "it refuses zero points: use --symmetric")
    elif odd:
        stock = Engine(stock.name, False, f"it does not know {', '.join(odd)} as linear layers")
    text = f"{' and '.join(map(str, widths))} bits"
    vllm = Engine("vLLM", True, "per GPU: N a multiple of 64, K of 128")
    small = sorted({K for n, (_, K) in shapes.items() if recipe.scheme_for(n) and K % 128})
    if small:  # its fast kernel, Marlin, refuses; others may take it
        vllm = Engine("vLLM", None, f"on GPUs not tried where K={small[0]} is no multiple of 128")
    sglang = Engine("SGLang", True, "from its source, not run")
    if not common:
        vllm = Engine("vLLM", None, f"{text}: not tried; 4 and 8 bits are known to load")
        sglang = Engine("SGLang", False, f"{text}: it reads 4 and 8 bits only")
    elif experts and not symmetric:
        sglang = Engine("SGLang", None, "mixtures with zero points: doubtful; use --symmetric")
    if recipe.embeddings:  # it wants them in the packed layout, which transformers cannot load
        why = "it does not read quantized embeddings in the layout that transformers reads"
        vllm, sglang = Engine("vLLM", False, why), Engine("SGLang", False, why)
    return [
        Engine("llmq (transformers with llmq)", True, "weights stay packed"),
        stock,
        vllm,
        sglang,
        _llama_cpp(getattr(model.config, "model_type", ""), schemes),
    ]


def _llama_cpp(family: str, schemes: set[QuantScheme]) -> Engine:
    """Whether `gguf_file` can write what llama.cpp reads."""
    if family not in ARCHITECTURES:
        return Engine("llama.cpp", False, f"llmq writes GGUF for {', '.join(ARCHITECTURES)}")
    if any(scheme.bits == 8 and not scheme.symmetric for scheme in schemes):
        return Engine("llama.cpp", False, "no block of GGUF holds 8 bits with zero points")
    return Engine("llama.cpp", True, "after llmq convert --format gguf")


def _of_super_blocks(family: str) -> list[Engine]:
    own = Engine("llmq (transformers with llmq)", True, "unpacked, then multiplied densely")
    loads = family in ARCHITECTURES
    why = "after llmq convert --format gguf, the same weights"
    if not loads:
        why = f"llmq writes GGUF for {', '.join(ARCHITECTURES)}"
    others = ("stock transformers", "vLLM", "SGLang")
    refused = "it has no place for super-blocks: leave --k-quants away"
    return [own, Engine("llama.cpp", loads, why), *(Engine(n, False, refused) for n in others)]


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear
