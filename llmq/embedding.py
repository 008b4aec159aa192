"""Input embeddings at one byte per weight: only the rows that are looked up become floating point.

8 bits, since that is the one layout of quantized embeddings that transformers with
compressed-tensors loads too (see `formats.bytewise`).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from llmq.errors import SchemeError
from llmq.formats import bytewise
from llmq.held import frozen
from llmq.scheme import QuantizedWeight, QuantScheme, grouped, minmax_grid, round_to_grid

_WEIGHTS = 1 << 22  # that are rounded at once


class PackedEmbedding(nn.Module):
    """An embedding whose table stays quantized.

    A subclass of nn.Embedding may do more than the lookup (Gemma 3 multiplies by a constant). Its
    own forward is run then, on a table of the rows that are wanted.

    Args:
        scheme: the number format, of 8 bits.
        table: what it takes the place of; may be on meta. It is changed, and kept if its class has
            a forward of its own.

    Raises:
        SchemeError: other than 8 bits, or the group size does not divide the width of a row.
    """

    weight: Tensor  # int8 (N, K): code - 128
    weight_scale: Tensor  # (N, K/G)
    weight_zero_point: Tensor | None  # int8 (N, K/G): zero - 128

    def __init__(self, scheme: QuantScheme, table: nn.Embedding) -> None:
        super().__init__()
        N, K = table.weight.shape
        if scheme.bits != 8 or not scheme.divides(K):
            raise SchemeError(
                f"embeddings in {scheme}: use 8 bits and a group size that divides {K}."
            )
        self.scheme = scheme
        groups = (N, K // scheme.group_width(K))
        device, dtype = table.weight.device, table.weight.dtype
        self.weight = frozen(torch.empty((N, K), dtype=torch.int8, device=device))
        self.weight_scale = frozen(torch.empty(groups, dtype=dtype, device=device))
        zero = torch.empty(groups, dtype=torch.int8, device=device)
        self.register_parameter("weight_zero_point", None if scheme.symmetric else frozen(zero))
        self.table = None if type(table).forward is nn.Embedding.forward else table
        if self.table is not None:
            row = torch.zeros((1, K), dtype=dtype, device=device)
            del table.weight
            table.register_buffer("weight", row, persistent=False)
            table.padding_idx = None  # matters for gradients only

    @classmethod
    def from_embedding(cls, table: nn.Embedding, scheme: QuantScheme) -> PackedEmbedding:
        """Round a dense table to nearest on the grid that just covers each group.

        No Hessian could do better: the output is the row itself, and rows are not mixed.

        Raises:
            SchemeError: see the class; or the output is no function of the rows alone.
        """
        W = table.weight.detach()
        ids = torch.arange(min(4, len(W)), device=W.device).flip(0)
        probe = copy.copy(table)
        probe.padding_idx = None  # may be larger than the number of rows here
        if not torch.equal(_behind(probe, W[ids]), table(ids)):
            raise SchemeError(
                f"{type(table).__name__} does more with token ids than look up rows: its table "
                "cannot be packed. Leave the embeddings as they are."
            )
        packed = cls(scheme, table)
        step = max(1, _WEIGHTS // W.shape[1])
        for start in range(0, len(W), step):
            rows = slice(start, start + step)
            scale, zero = minmax_grid(grouped(W[rows].float(), scheme), scheme, W.dtype)
            q = round_to_grid(W[rows], scale, zero, scheme, W.dtype)
            for name, tensor in bytewise.write("", q).items():
                packed.get_parameter(name)[rows] = tensor
        return packed

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table (..., K), in the dtype of the scales, for int64 `ids` (...)."""
        codes = self.weight[ids].short().unflatten(-1, (self.weight_scale.shape[1], -1))
        if self.weight_zero_point is not None:
            codes = codes - self.weight_zero_point[ids].unsqueeze(-1)
        scale = self.weight_scale[ids].unsqueeze(-1)
        return (codes.to(scale.dtype) * scale).flatten(-2)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.rows(ids)
        return rows if self.table is None else _behind(self.table, rows)

    def quantized(self) -> QuantizedWeight:
        """The unpacked value."""
        return bytewise.read("", dict(self.named_parameters()), self.scheme)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An embedding with the values of this one; this one cannot be used any more.

        Args:
            dtype: of its table; None = that of the scales.
        """
        weight = frozen(self.quantized().dequantize(dtype))
        table = self.table
        if table is None:
            table = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
        del table.weight
        table.weight = weight
        return table

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, {self.scheme}"


def _behind(table: nn.Embedding, rows: Tensor) -> Tensor:
    """What `table` would return for ids whose rows (..., K) are these."""
    places = torch.arange(rows[..., 0].numel(), device=rows.device).view(rows.shape[:-1])
    parts = {"weight": rows.flatten(0, -2)}
    return torch.func.functional_call(table, parts, (places,))
