"""A linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq import backends
from llmq.errors import SchemeError
from llmq.formats import compressed_tensors
from llmq.formats.bits import words
from llmq.held import Held, frozen
from llmq.scheme import QuantizedWeight, QuantScheme, grouped, minmax_grid, round_to_grid

HELD = compressed_tensors.SUFFIXES[:3]  # what a backend may hold in place of a layer


class _Differentiable(torch.autograd.Function):
    """Any backend forward; backward multiplies by the dequantized weight. Keeps no activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.backend.matmul(x, layer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ backends.dequantize(ctx.layer, grad.dtype), None


class PackedLinear(Held):
    """A linear layer whose weight stays quantized.

    Args:
        scheme: the number format.
        in_features: K.
        out_features: N.
        bias: whether there is a bias (N,).
        dtype: of the scales and the bias.
        device: where the (uninitialised) tensors live; "meta" for a loader to fill.
        ordered: whether `weight_order` (K,) permutes inputs (see `QuantizedWeight.order`).

    Raises:
        SchemeError: the group size does not divide `in_features`.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_order: Tensor | None
    bias: Tensor | None
    prepared: tuple[Tensor, ...]

    def __init__(
        self,
        scheme: QuantScheme,
        in_features: int,
        out_features: int,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        ordered: bool = False,
    ) -> None:
        super().__init__()
        if not scheme.divides(in_features):
            raise SchemeError(
                f"in_features={in_features} is not divisible by group_size={scheme.group_size}."
            )
        self.scheme = scheme
        self.in_features = in_features
        self.out_features = out_features
        K, N = in_features, out_features
        groups = K // scheme.group_width(K)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> nn.Parameter:
            return frozen(torch.empty(shape, dtype=dtype, device=device))

        self.weight_packed = empty(N, words(K, scheme.bits))
        self.weight_scale = empty(N, groups, dtype=dtype)
        zero = None if scheme.symmetric else empty(words(N, scheme.bits), groups)
        self.register_parameter("weight_zero_point", zero)
        order = empty(K, dtype=torch.int64) if ordered else None
        self.register_parameter("weight_order", order)
        self.weight_shape = frozen(torch.tensor([N, K], device=device))
        self.register_parameter("bias", empty(N, dtype=dtype) if bias else None)
        self.wanted: str | None = backends.TORCH.name
        self.backend: backends.Backend = backends.TORCH
        self.prepared = ()

    @classmethod
    def from_quantized(cls, q: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
        """Pack a solver's result; `bias` (N,) is kept in its own dtype."""
        layer = cls(q.scheme, q.shape[1], q.shape[0], bias is not None, device="meta")
        tensors = compressed_tensors.write("", replace(q, order=None))
        if q.order is not None:
            tensors["weight_order"] = q.order
        for name, tensor in tensors.items():
            setattr(layer, name, frozen(tensor.to(q.codes.device)))
        if bias is not None:
            layer.bias = frozen(bias.detach().clone())
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: QuantScheme) -> PackedLinear:
        """Round a dense layer to nearest on the grid that just covers each group.

        Raises:
            SchemeError: the group size does not divide its `in_features`.
        """
        W = linear.weight.detach()
        scale, zero = minmax_grid(grouped(W.float(), scheme), scheme, W.dtype)
        return cls.from_quantized(round_to_grid(W, scale, zero, scheme, W.dtype), linear.bias)

    def quantized(self) -> QuantizedWeight:
        """The unpacked value, exactly as the solver returned it."""
        if self.released:
            return replace(self.holder.restore(self), order=self.weight_order)
        q = compressed_tensors.unpack(
            self.scheme,
            (self.out_features, self.in_features),
            self.weight_packed.detach(),
            self.weight_scale.detach(),
            self.weight_zero_point,
        )
        return replace(q, order=self.weight_order)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (N, K) in `dtype` (default: that of the scales)."""
        return self.quantized().dequantize(dtype)

    def prepare(self, backend: str | None = None) -> None:
        """Choose a backend (or take the one named) and let it repack. Call after loading.

        Raises:
            BackendError: the named backend cannot run this layer.
        """
        self.restore()
        self.wanted = backend
        self.use(backends.choose(self, backend))

    def use(self, backend: backends.Backend) -> None:
        """Let this backend repack; one that then holds the weight is its only holder."""
        self.backend, self.prepared = backend, backend.prepare(self)
        if isinstance(backend, backends.Holder):
            self.release(list(HELD))

    @property
    def holder(self) -> backends.Holder:
        """The backend of a released layer."""
        assert isinstance(self.backend, backends.Holder)
        return self.backend

    def rebuilt(self) -> dict[str, Tensor]:
        tensors = compressed_tensors.write("", self.holder.restore(self))
        return {name: tensors[name] for name in HELD if name in tensors}

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_order is not None:
            x = x.index_select(-1, self.weight_order)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Differentiable.apply(x, self)  # type: ignore[return-value]
        return self.backend.matmul(x, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.prepare(self.wanted)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}, backend={self.backend.name}"
        )
