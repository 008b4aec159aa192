"""A packed model whose scales learn, codes as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.nn import STACKS, PackedExperts, PackedLinear, packed_modules
from llmq.scheme import stored


class _Product(torch.autograd.Function):
    """x W^T with W = centred codes times scales; keeps x, but never W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, scale: Tensor, centred: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, centred)
        return F.linear(x, _matrix(scale, centred, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale, centred = ctx.saved_tensors
        (grad,) = grads
        rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
        by_weight = (rows.T @ columns).float().unflatten(1, (scale.shape[1], -1))  # (N, K/G, G)
        by_scale = (by_weight * centred.unflatten(1, (scale.shape[1], -1))).sum(-1)
        return grad @ _matrix(scale, centred, grad.dtype), by_scale * scale, None, None


def _matrix(scale: Tensor, centred: Tensor, dtype: torch.dtype) -> Tensor:
    groups = centred.unflatten(1, (scale.shape[1], -1)).to(dtype)
    return (groups * scale.to(dtype).unsqueeze(-1)).flatten(1)


class Tunable(nn.Module):
    """A packed linear with scales that learn.

    Attributes:
        theta: float32 (N, K/G), logarithms of what the scales are multiplied by.
        bits: of a code.
    """

    def __init__(self, layer: PackedLinear):
        super().__init__()
        q = layer.quantized()
        groups = q.codes.unflatten(1, (q.scale.shape[1], -1)).to(torch.int16)
        narrow = torch.int16 if q.scheme.bits > 7 else torch.int8
        # Attributes, not buffers: nothing that casts or moves the model may touch them.
        self.centred = (groups - q.zero.unsqueeze(-1)).flatten(1).to(narrow)
        self.start = q.scale.float()
        self.dtype, self.qmax, self.order = q.scale.dtype, q.scheme.qmax, q.order
        self.bits = q.scheme.bits
        self.theta = torch.zeros_like(self.start).requires_grad_()
        self.bias = layer.bias

    def scale(self) -> Tensor:
        """float32 (N, K/G), as the scales would be stored."""
        return stored(self.start * self.theta.detach().exp(), self.dtype, self.qmax)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x.index_select(-1, self.order)
        y = _Product.apply(x, self.theta, self.scale(), self.centred)
        assert isinstance(y, Tensor)
        return y if self.bias is None else y + self.bias


@contextmanager
def tunable(model: nn.Module) -> Iterator[dict[str, list[Tunable]]]:
    """`model` with scales that learn, everything else float32 (bfloat16 on GPUs) and frozen.

    Yields the layers by name of their scales. At the end the model is as it was before, but for
    the scales, which are those of the layers.
    """
    modules = {
        name: module
        for name, module in packed_modules(model)
        if isinstance(module, PackedLinear | PackedExperts)  # code books have no scales that learn
    }
    made: dict[str, list[Tunable]] = {}
    kept: list[tuple[Tensor, Tensor]] = []
    for name, module in modules.items():
        if isinstance(module, PackedLinear):
            made[f"{name}.weight_scale"] = [Tunable(module)]
            model.set_submodule(name, made[f"{name}.weight_scale"][0])
        else:
            pairs = [module.expert(i) for i in range(module.num_experts)]
            for stack, layers in zip(STACKS, zip(*pairs, strict=True), strict=True):
                made[f"{name}.{stack}_scale"] = [Tunable(layer) for layer in layers]
    biases = (layer.bias for layers in made.values() for layer in layers if layer.bias is not None)
    try:
        for parameter in {id(p): p for p in (*model.parameters(), *biases)}.values():
            parameter.requires_grad_(False)
            if parameter.is_floating_point():
                wide = torch.bfloat16 if parameter.is_cuda else torch.float32
                kept.append((parameter, parameter.data))
                parameter.data = parameter.data.to(wide)
        for name, module in modules.items():
            if isinstance(module, PackedExperts):
                stacks = (made[f"{name}.{stack}_scale"] for stack in STACKS)
                module.use_experts(list(zip(*stacks, strict=True)))
        yield made
    finally:
        for parameter, data in kept:
            parameter.data = data
        for name, module in modules.items():
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module)
        for key, layers in made.items():
            parent, _, leaf = key.rpartition(".")
            scales = torch.stack([layer.scale().to(layer.dtype) for layer in layers])
            scales = scales if leaf != "weight_scale" else scales[0]
            setattr(model.get_submodule(parent), leaf, nn.Parameter(scales, requires_grad=False))
        for module in modules.values():
            module.prepare(module.wanted)
