"""Linear layers that unpack their weights and multiply densely: no kernel reads these formats.

CodebookLinear     weights are entries of a code book
SuperBlockLinear   weights are in super-blocks
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq import backends
from llmq.errors import BackendError, SchemeError
from llmq.formats import codebook, superblocks
from llmq.held import frozen
from llmq.scheme import QuantizedWeight, QuantScheme

Own = TypeVar("Own", bound="UnpackedLinear")


class UnpackedLinear(nn.Module):
    """A linear layer that keeps a packed matrix, unpacks it and multiplies densely.

    Args:
        scheme: the number format.
        in_features: K.
        out_features: N.
        bias: whether there is a bias (N,).
        dtype: of the bias, and of scales, tables and outliers where there are some.
        device: where the (uninitialised) tensors live; "meta" for a loader to fill.

    Attributes:
        layout: the module of `formats` that says which tensors a matrix has.
        named: the format, for people.

    Raises:
        SchemeError: the scheme does not divide `in_features`.
    """

    layout: ClassVar[Any]
    named: ClassVar[str]
    weight_packed: Tensor
    bias: Tensor | None
    wanted: str | None = backends.TORCH.name
    backend: backends.Backend = backends.TORCH
    prepared: tuple[Tensor, ...] = ()

    def __init__(
        self,
        scheme: QuantScheme,
        in_features: int,
        out_features: int,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not scheme.divides(in_features):
            raise SchemeError(f"in_features={in_features} is not divisible as {scheme} wants it.")
        self.scheme, self.in_features, self.out_features = scheme, in_features, out_features
        held = self.layout.shapes(scheme, out_features, in_features)
        for name in self.layout.SUFFIXES:
            if name == "weight_shape":
                self.weight_shape = frozen(torch.tensor([out_features, in_features], device=device))
            elif name in held:
                kind = self.layout.DTYPES.get(name, dtype)
                empty = torch.empty(held[name], dtype=kind, device=device)
                self.register_parameter(name, frozen(empty))
            else:
                self.register_parameter(name, None)
        made = frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", made)

    @classmethod
    def from_quantized(cls: type[Own], q: QuantizedWeight, bias: Tensor | None = None) -> Own:
        """Pack a solver's result; `bias` (N,) is kept in its own dtype."""
        layer = cls(q.scheme, q.shape[1], q.shape[0], bias is not None, device="meta")
        for name, tensor in cls.layout.write("", q).items():
            setattr(layer, name, frozen(tensor.to(q.codes.device)))
        if bias is not None:
            layer.bias = frozen(bias.detach().clone())
        return layer

    def quantized(self) -> QuantizedWeight:
        """The unpacked value, exactly as the solver returned it."""
        tensors = {name: getattr(self, name) for name in self.layout.SUFFIXES}
        return self.layout.unpack(self.scheme, (self.out_features, self.in_features), tensors)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (N, K) in `dtype` (default: that of the scales; float32 of super-blocks)."""
        return self.quantized().dequantize(dtype)

    def prepare(self, backend: str | None = None) -> None:
        """There is one way to multiply.

        Raises:
            BackendError: another one is named.
        """
        if backend not in (None, backends.TORCH.name):
            raise BackendError(
                f"backend={backend!r} has no kernel for {self.named}: use "
                f"backend={backends.TORCH.name!r}, or quantize to integers."
            )
        self.wanted = backend

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize(x.dtype), bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}"
        )


class CodebookLinear(UnpackedLinear):
    """A linear layer in a `CodebookScheme`."""

    layout = codebook
    named = "code books"


class SuperBlockLinear(UnpackedLinear):
    """A linear layer in a `SuperBlockScheme`."""

    layout = superblocks
    named = "super-blocks"
