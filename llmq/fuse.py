"""Fewer, larger multiplications for decoding.

    fuse_shared_inputs   q, k, v (or gate, up) read one tensor: multiply once, hand out slices
    fuse_on_gpu          the same, if the Triton kernels run the model
    pack_head            the output layer rounded to nearest, even where it is tied to the embedding

Batch-1 decoding reads every weight once per token, so that the fixed cost of a call weighs as
much as the bytes of a small layer, and an unquantized head more than the whole quantized body.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq import backends
from llmq.nn import HELD, PackedLinear, packed_modules
from llmq.scheme import QuantizedWeight, QuantScheme


@dataclass(eq=False)
class SharedInput:
    """One multiplication for several layers that read the same tensor.

    The first layer called with a new input multiplies for all; each takes its slice. The input
    is recognised by identity, so a layer called with another tensor is still right, only not
    faster.
    """

    fused: PackedLinear
    sizes: list[int]
    x: Tensor | None = None
    parts: dict[int, Tensor] = field(default_factory=dict)

    def part(self, x: Tensor, index: int) -> Tensor:
        if x is not self.x or index not in self.parts:
            self.x = x
            self.parts = dict(enumerate(self.fused(x).split(self.sizes, dim=-1)))
        part = self.parts.pop(index)
        if not self.parts:
            self.x = None
        return part


@dataclass(frozen=True, eq=False)
class Part(backends.Holder):
    """The backend of one of these layers: its rows of the fused one."""

    shared: SharedInput
    index: int

    @property
    def rows(self) -> slice:
        start = sum(self.shared.sizes[: self.index])
        return slice(start, start + self.shared.sizes[self.index])

    @property
    def name(self) -> str:
        return f"{self.shared.fused.backend.name}, fused"

    def why_not(self, layer: backends.Layer) -> str | None:
        return None

    def prepare(self, layer: backends.Layer) -> tuple[Tensor, ...]:
        return ()

    def matmul(self, x: Tensor, layer: backends.Layer) -> Tensor:
        return self.shared.part(x, self.index)

    def restore(self, layer: backends.Layer) -> QuantizedWeight:
        q = self.shared.fused.quantized()
        codes, scale, zero = (t[self.rows] for t in (q.codes, q.scale, q.zero))
        return QuantizedWeight(q.scheme, codes, scale, zero)

    def dense(self, layer: backends.Layer, dtype: torch.dtype) -> Tensor:
        return backends.dequantize(self.shared.fused, dtype)[self.rows]


def fuse_shared_inputs(model: nn.Module, *args: object, **kwargs: object) -> int:
    """Fuse, in place, the packed layers of `model` that read the same tensor.

    Which layers those are is observed in one call `model(*args, **kwargs)`, for example
    `input_ids=torch.zeros(1, 1, dtype=torch.long)`. Parameters keep their names, shapes and
    values (they become views of the fused ones, or are rebuilt from them when asked for), so the
    model can still be saved; moving or casting it undoes the fusion.

    Returns:
        the number of fused groups.
    """
    groups = [group for group in _readers(model, args, kwargs) if _fusable(group)]
    for group in groups:
        _fuse(group)
    return len(groups)


def fuse_on_gpu(model: nn.Module) -> int:
    """`fuse_shared_inputs` of a language model of transformers that the Triton kernels run.

    Returns:
        the number of fused groups; 0 if no layer runs on those kernels.
    """
    layers = [module for _, module in packed_modules(model) if isinstance(module, PackedLinear)]
    found = next((layer for layer in layers if layer.backend == backends.TRITON), None)
    if found is None:
        return 0
    ids = torch.zeros(1, 1, dtype=torch.long, device=found.weight_packed.device)
    return fuse_shared_inputs(model, input_ids=ids)


def _readers(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[list[PackedLinear]]:
    """Packed layers by the tensor they read, in the order of execution."""
    seen: list[tuple[Tensor, int, list[PackedLinear]]] = []

    def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, PackedLinear)
        x = inputs[0]
        for tensor, version, layers in reversed(seen):
            if tensor is x and version == x._version:
                layers.append(layer)
                return
        seen.append((x, x._version, [layer]))  # holds x, so that its identity is not reused

    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [group for _, _, group in seen]


def _fusable(group: list[PackedLinear]) -> bool:
    """Whether the tensors of these layers can be stacked along N."""
    kinds = {
        (
            layer.scheme,
            layer.in_features,
            layer.weight_packed.device,
            layer.weight_scale.dtype,
            layer.bias is not None,
            layer.backend,
        )
        for layer in group
    }
    # Zero points are packed along N: they can be stacked if every layer fills whole words.
    whole = all(
        layer.scheme.symmetric or layer.out_features * layer.scheme.bits % 32 == 0
        for layer in group
    )
    distinct = len({id(layer) for layer in group}) == len(group)
    here = not any(layer.weight_packed.is_meta for layer in group)  # offloaded layers are on meta
    plain = here and not any(layer.weight_order is not None for layer in group)
    return len(group) > 1 and len(kinds) == 1 and whole and distinct and plain


def _fuse(group: list[PackedLinear]) -> None:
    sizes = [layer.out_features for layer in group]
    first = group[0]
    fused = PackedLinear(
        first.scheme, first.in_features, sum(sizes), first.bias is not None, device="meta"
    )
    backend = first.backend
    for layer in group:
        layer.restore()
    for name, _ in first.named_parameters():
        if name == "weight_shape":
            continue
        tensors = [getattr(layer, name).detach() for layer in group]
        stacked = torch.cat(tensors)
        setattr(fused, name, nn.Parameter(stacked, requires_grad=False))
        rows = [tensor.shape[0] for tensor in tensors]
        for layer, view in zip(group, stacked.split(rows), strict=True):
            setattr(layer, name, nn.Parameter(view, requires_grad=False))
    fused.use(backend)
    shared = SharedInput(fused, sizes)
    for index, layer in enumerate(group):
        layer.backend, layer.prepared = Part(shared, index), ()
        if fused.released:
            layer.release(list(HELD))


def pack_head(model: nn.Module, scheme: QuantScheme | None = None) -> None:
    """Replace, in place, the output layer by its 8-bit (default) round-to-nearest version.

    A tied embedding keeps its own full-precision weight; `hf.attach` makes such a model one that
    can be saved.

    Args:
        model: has `get_output_embeddings` and `set_output_embeddings`, as transformers' do.
        scheme: default `head_scheme` of 8 bits.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    packed = PackedLinear.from_linear(head, scheme or head_scheme(head.weight.shape[1]))
    packed.prepare()
    model.set_output_embeddings(packed)  # type: ignore[operator]


def head_scheme(in_features: int, bits: int = 8) -> QuantScheme:
    """Symmetric, in the largest group that divides the width; below 8 bits the smallest."""
    sizes = (128, 64, 32) if bits == 8 else (32,)
    return QuantScheme(bits, next((s for s in sizes if in_features % s == 0), -1), symmetric=True)
