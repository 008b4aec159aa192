"""The two places where a transformer keeps matrices that are not `nn.Linear`, made to look alike.

- GPT-2's `Conv1D` stores its matrix transposed.
- transformers 5 stacks the experts of a mixture in 3-D parameters.

`as_linears` gives a block in which every matrix is an `nn.Linear` or a `RoutedLinear`. It is
applied to copies: `shared_copy` has the block's own tensors, `run_copy` is for running.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.nn import is_stacked_experts, packed_modules, without_parameters


class RoutedLinear(nn.Module):
    """One matrix per expert, applied to one batch of rows per expert.

    Attributes:
        weight: (E, N, K).
        bias: (E, N) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, rows: list[Tensor]) -> list[Tensor]:
        """rows[e] (t_e, K) -> (t_e, N) per expert."""
        biases = [None] * len(rows) if self.bias is None else self.bias
        return [
            F.linear(_padded(x), W, b)[: len(x)]
            for x, W, b in zip(rows, self.weight, biases, strict=True)
        ]


def _padded(rows: Tensor) -> Tensor:
    """`rows` (t, K) and zeros below, so that t takes only four values between powers of two.

    On CPUs oneDNN compiles a kernel for each number of rows that it meets and keeps up to 1024 of
    them, more than half a megabyte each; every expert gets another number of tokens in every batch.
    """
    step = 1 << max(0, len(rows).bit_length() - 3)
    return F.pad(rows, (0, 0, 0, -len(rows) % step))


class UnstackedExperts(nn.Module):
    """Stacked experts as two `RoutedLinear`: the first sees what the router sends to each expert.

    Built from any experts module of transformers 5 (`gate_up_proj`, `down_proj` and
    `_apply_gate`); computes the same function.
    """

    def __init__(self, experts: nn.Module):
        super().__init__()
        flip = bool(getattr(experts, "is_transposed", False))
        self.gate_up_proj = _routed(experts, "gate_up_proj", flip)
        self.down_proj = _routed(experts, "down_proj", flip)
        self._apply_gate: Callable[[Tensor], Tensor] = without_parameters(experts)._apply_gate

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden (T, D), top_k_index and top_k_weights (T, top_k) -> (T, D)."""
        count = self.gate_up_proj.weight.shape[0]
        routes = [torch.where(top_k_index == e) for e in range(count)]  # (tokens, positions)
        gate_up = self.gate_up_proj([hidden[tokens] for tokens, _ in routes])
        down = self.down_proj([self._apply_gate(y) for y in gate_up])
        out = torch.zeros_like(hidden)
        for (tokens, positions), y in zip(routes, down, strict=True):
            weighted = y * top_k_weights[tokens, positions, None]
            out.index_add_(0, tokens, weighted.to(out.dtype))
        return out


def _routed(experts: nn.Module, name: str, flip: bool) -> RoutedLinear:
    weight = experts.get_parameter(name).data
    bias = experts._parameters.get(f"{name}_bias")
    return RoutedLinear(weight.transpose(1, 2) if flip else weight, bias)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's linear layer, whose weight is (K, N)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def as_linears(block: nn.Module) -> nn.Module:
    """Replace every `Conv1D` and every stack of experts of `block`, in place; return `block`."""
    for name, module in list(block.named_modules()):
        if is_conv1d(module):
            linear = nn.Linear(1, 1, bias=False, device="meta")
            weight = module.get_parameter("weight").data.T
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = module.get_parameter("bias")
            linear.out_features, linear.in_features = linear.weight.shape
            block.set_submodule(name, linear)
        elif is_stacked_experts(module):
            block.set_submodule(name, UnstackedExperts(module))
    return block


def shared_copy(block: nn.Module) -> nn.Module:
    """A copy of a block's structure around the very same tensors."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(t): t for t in tensors})


def run_copy(block: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a block on `device`, parameters in the dtype in which they run there.

    The CPU does not wait for what a GPU takes from pinned memory.
    """

    def moved(tensor: Tensor) -> Tensor:
        learned = isinstance(tensor, nn.Parameter)
        wanted = run_dtype(tensor.dtype, device) if learned else tensor.dtype
        later = device.type == "cuda"
        data = tensor.detach().to(device, wanted, non_blocking=later, copy=True)
        return nn.Parameter(data, tensor.requires_grad) if learned else data

    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(t): moved(t) for t in tensors})


def run_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model that is stored in `dtype` runs on a device where speed counts.

    On CPUs float16 becomes bfloat16, which is several times faster. Without instructions for that
    (AVX2 has none) torch multiplies either at an eighth of float32's speed, and on the way back at
    a thirtieth to a ninetieth (`benchmarks/halves.py`): both become float32.
    """
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return torch.bfloat16 if _cpu_multiplies(torch.bfloat16) else torch.float32


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for float16 or bfloat16, and torch makes use of them."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widened(model: nn.Module) -> nn.Module:
    """`model`, its dense parameters on the CPU in float32 where their own dtype is slow there.

    Nothing is rounded, and packed matrices stay what they are.
    """
    for parameter in _dense(model):
        data = parameter.data
        half = data.is_cpu and data.dtype in (torch.float16, torch.bfloat16)
        if half and not _cpu_multiplies(data.dtype):
            parameter.data = data.float()
    return model


def _dense(model: nn.Module) -> list[nn.Parameter]:
    """All parameters that belong to no packed module."""
    packed = {id(p) for _, module in packed_modules(model) for p in module.parameters()}
    return [p for p in model.parameters() if id(p) not in packed]


@contextmanager
def running(
    model: nn.Module, device: torch.device, blocks: nn.ModuleList | None = None
) -> Iterator[None]:
    """A model on a device, in the dtypes in which it runs there, for the length of a `with`.

    Its `blocks` stay as they are, and so does what is on meta; packed matrices keep their dtypes.
    """
    inside = {id(t) for t in chain(blocks.parameters(), blocks.buffers())} if blocks else set()
    every = (t for t in chain(model.parameters(), model.buffers()) if id(t) not in inside)
    kept = [(t, t.data) for t in every if not t.is_meta]
    dense = {id(p) for p in _dense(model)}
    try:
        for tensor, data in kept:
            dtype = run_dtype(data.dtype, device) if id(tensor) in dense else data.dtype
            tensor.data = data.to(device, dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
