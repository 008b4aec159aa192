"""Modules that keep their weights packed.

    PackedLinear    in place of nn.Linear (or transformers' Conv1D)
    PackedExperts   in place of a module that stacks its experts in 3-D parameters

Parameters have the names and the layout of the file (`formats.compressed_tensors`), so loading
copies bytes. They are frozen Parameters, not buffers, because that is what `device_map` can
offload. `prepare` chooses a backend; before that, `forward` is the plain torch reference.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmq import backends
from llmq.errors import SchemeError
from llmq.formats import compressed_tensors
from llmq.formats.bits import words
from llmq.held import Held, frozen
from llmq.scheme import QuantizedWeight, QuantScheme, grouped, minmax_grid, round_to_grid
from llmq_kernels.layout import PackedWeight
from llmq_kernels.reference import expert

logger = logging.getLogger(__name__)

HELD = compressed_tensors.SUFFIXES[:3]  # what a backend may hold in place of a layer
STACKS: tuple[Literal["gate_up_proj", "down_proj"], ...] = ("gate_up_proj", "down_proj")


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


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether `module` stacks gated experts in 3-D parameters, as transformers 5 does.

    Recognised by structure: 3-D `gate_up_proj` and `down_proj`, the layout flags
    `is_transposed` and `has_bias`, and a gate `_apply_gate`.
    """
    stacks = (module._parameters.get(name) for name in STACKS)
    return (
        all(stack is not None and stack.ndim == 3 for stack in stacks)
        and all(hasattr(module, flag) for flag in ("is_transposed", "has_bias", "_apply_gate"))
        and not getattr(module, "has_post_expert_norm", False)
    )


def expert_weight(module: nn.Module, name: str, index: int) -> Tensor:
    """Weight (N, K) of one expert, a view: `name` is "gate_up_proj" or "down_proj"."""
    weight = getattr(module, name)[index]
    return weight.T if module.is_transposed else weight


def expert_bias(module: nn.Module, name: str, index: int) -> Tensor | None:
    """Bias (N,) of one expert, a view, or None."""
    return getattr(module, f"{name}_bias")[index] if module.has_bias else None


class PackedExperts(Held):
    """Stacked experts whose weights stay quantized, (N, K) per expert whatever the source's order.

    For each of `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I), with the suffixes
    `_packed`, `_scale`, `_zero_point`: the tensors of E PackedLinears, stacked. `_shape` is
    (E, 2), or (E, 4) where the file keeps gate and up apart and a loader concatenates them.
    Biases keep their names and shapes.

    Args:
        experts: the module to replace (may be on meta); only its gate and its shapes are used.
        gate_up: scheme of all gate_up matrices.
        down: scheme of all down matrices.
        dtype: of the scales (default: that of the module's weights).
        device: where the (uninitialised) tensors live.
        ordered: stacks whose inputs are permuted, expert by expert: `_order` (E, K).
    """

    def __init__(
        self,
        experts: nn.Module,
        gate_up: QuantScheme,
        down: QuantScheme,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = "meta",
        ordered: Collection[str] = (),
    ) -> None:
        super().__init__()
        stack: Tensor = experts.down_proj  # type: ignore[assignment]
        self.num_experts = stack.shape[0]
        self.schemes = {"gate_up_proj": gate_up, "down_proj": down}
        self.shapes = {name: tuple(expert_weight(experts, name, 0).shape) for name in STACKS}
        self.has_bias = bool(experts.has_bias)
        self.merged = not experts.is_transposed and getattr(experts, "is_concatenated", True)
        self.apply_gate = without_parameters(experts)._apply_gate
        self.wanted: str | None = backends.TORCH.name
        self._experts: list[tuple[Any, Any]] | None = None
        self._stacked: tuple[PackedWeight, PackedWeight] | None = None
        for name, scheme in self.schemes.items():
            N, K = self.shapes[name]
            kind = dtype or stack.dtype
            one = PackedLinear(scheme, K, N, self.has_bias, kind, "meta", name in ordered)
            for suffix, parameter in one.named_parameters():
                shape = (self.num_experts, *parameter.shape)
                if suffix == "weight_shape" and name == "gate_up_proj" and self.merged:
                    shape = (self.num_experts, 4)
                tensor = torch.empty(shape, dtype=parameter.dtype, device=device)
                self.register_parameter(_stacked_name(name, suffix), frozen(tensor))

    @classmethod
    def from_quantized(
        cls,
        experts: nn.Module,
        gate_up: Sequence[QuantizedWeight],
        down: Sequence[QuantizedWeight],
    ) -> PackedExperts:
        """Pack solver results, one per expert, rows in the module's own order: (2I, H), (H, I).

        Raises:
            SchemeError: the experts of one stack have different schemes.
        """
        packed = cls(experts, gate_up[0].scheme, down[0].scheme)
        for name, results in zip(STACKS, (gate_up, down), strict=True):
            if any(q.scheme != results[0].scheme for q in results):
                raise SchemeError(f"{name}: all experts of one layer must share one scheme.")
            columns: dict[str, list[Tensor]] = {}
            for index, q in enumerate(results):
                layer = PackedLinear.from_quantized(q, expert_bias(experts, name, index))
                for suffix, parameter in layer.named_parameters():
                    columns.setdefault(suffix, []).append(parameter.detach())
            for suffix, tensors in columns.items():
                stacked = torch.stack(tensors)
                if suffix == "weight_shape" and name == "gate_up_proj" and packed.merged:
                    N, K = results[0].shape
                    stacked = stacked.new_tensor([[N // 2, K, N // 2, K]]).repeat(len(results), 1)
                setattr(packed, _stacked_name(name, suffix), frozen(stacked))
        return packed

    def expert(self, index: int) -> tuple[PackedLinear, PackedLinear]:
        """gate_up and down of one expert as layers that share this module's storage."""
        gate_up, down = (self._layer(name, index) for name in STACKS)
        return gate_up, down

    def _layer(self, name: Literal["gate_up_proj", "down_proj"], index: int) -> PackedLinear:
        stacked: dict[str, Tensor] = {
            suffix: getattr(self, _stacked_name(name, suffix))
            for suffix in (*compressed_tensors.SUFFIXES[:3], "weight_order", "bias")
            if hasattr(self, _stacked_name(name, suffix))
        }
        N, K = self.shapes[name]
        layer = PackedLinear(self.schemes[name], K, N, self.has_bias, device="meta")
        for suffix, tensor in stacked.items():
            setattr(layer, suffix, frozen(tensor.detach()[index]))
        layer.weight_shape = frozen(torch.tensor([N, K]))
        if self._stacked is not None:
            weight = expert(self._stacked[STACKS.index(name)], index)
            layer.backend, layer.prepared = backends.TRITON, backends.tensors_of(weight)
            layer.released = self.released
        return layer

    def prepare(self, backend: str | None = None) -> None:
        """Choose a backend for all experts (see `PackedLinear.prepare`).

        The Triton kernels multiply by all chosen experts of a stack in one launch.
        """
        self.restore()
        self.wanted, self._experts, self._stacked = backend, None, None
        if any(parameter.is_meta for parameter in self.parameters()):
            return  # offloaded: what is on meta now is replaced before every call
        experts = [self.expert(index) for index in range(self.num_experts)]
        triton = backends.TRITON
        refused = any(
            layer.weight_order is not None or triton.why_not_stacked(layer) for layer in experts[0]
        )
        if backend in (None, triton.name) and not refused:
            self.stack_experts(experts)
            return
        for layer in (layer for pair in experts for layer in pair):
            layer.prepare(backend)
        self._experts = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route each token (T, H) through its experts (T, top_k), weighted (T, top_k)."""
        tokens, top_k = top_k_index.shape
        if self._stacked is not None and not (
            torch.is_grad_enabled() and hidden_states.requires_grad
        ):
            x = self._all_chosen(hidden_states, 0, top_k_index)
            outputs = self._all_chosen(self.apply_gate(x), 1, top_k_index)
        else:
            outputs = self._one_by_one(hidden_states, top_k_index)
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.unflatten(0, (tokens, top_k)).sum(1).to(hidden_states.dtype)

    def stack_experts(self, experts: Sequence[tuple[PackedLinear, PackedLinear]]) -> None:
        """Repack all experts, (gate_up, down) each, for `Triton.matmul_stacked`."""
        gate_up, down = (backends.TRITON.stack(layers) for layers in zip(*experts, strict=True))
        self._stacked = gate_up, down
        self.release([_stacked_name(name, suffix) for name in STACKS for suffix in HELD])

    def rebuilt(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for stack, name in enumerate(STACKS):
            one = [self.expert(index)[stack].rebuilt() for index in range(self.num_experts)]
            for suffix in one[0]:
                found[_stacked_name(name, suffix)] = torch.stack([t[suffix] for t in one])
        return found

    def use_experts(self, experts: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Multiply by these (gate_up, down), one by one, until `prepare` is called."""
        self._experts, self._stacked = list(experts), None

    def repacked(self) -> Iterator[Tensor]:
        """What the backends made of the parameters and keep beside them."""
        for layer in (layer for pair in self._experts or () for layer in pair):
            yield from layer.prepared
        for stack in self._stacked or ():
            yield from (stack.qweight, stack.scale, stack.counters)
            if stack.zero is not None:
                yield stack.zero

    def _all_chosen(self, x: Tensor, stack: int, chosen: Tensor) -> Tensor:
        """x through the experts chosen (T, top_k), in one launch: (T * top_k, N)."""
        assert self._stacked is not None
        y = backends.TRITON.matmul_stacked(x, self._stacked[stack], chosen)
        return y + getattr(self, f"{STACKS[stack]}_bias")[chosen.flatten()] if self.has_bias else y

    def _one_by_one(self, hidden_states: Tensor, top_k_index: Tensor) -> Tensor:
        """Each chosen expert's output for each token (T * top_k, H)."""
        tokens, top_k = top_k_index.shape
        chosen = top_k_index.flatten()  # (S,), S = T * top_k
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        outputs = hidden_states.new_empty(tokens * top_k, hidden_states.shape[-1])
        for index, rows in enumerate(order.split(counts)):
            if len(rows):
                gate_up, down = self._experts[index] if self._experts else self.expert(index)
                x = hidden_states[rows // top_k]
                outputs[rows] = down(self.apply_gate(gate_up(x)))
        return outputs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        super()._apply(fn, recurse)
        if self._experts or self._stacked:
            self.prepare(self.wanted)
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {self.schemes}"


def _stacked_name(name: str, suffix: str) -> str:
    """("down_proj", "weight_scale") -> "down_proj_scale"; ("down_proj", "bias") -> ..._bias."""
    return f"{name}_{suffix.removeprefix('weight_')}"


def without_parameters(module: nn.Module) -> Any:
    """A shallow copy that keeps configuration and activations but no weights."""
    stripped = copy.copy(module)
    stripped._parameters = {}
    return stripped


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedExperts]]:
    """Every packed module of `model` with its name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedExperts):
            yield name, module


def prepare(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Choose a backend for every packed module of `model`, in place; returns `model`.

    Logs one line if any of them is left to plain torch although nobody asked for that.

    Raises:
        BackendError: the named backend cannot run one of the layers.
    """
    slow: Counter[str] = Counter()
    for _, module in packed_modules(model):
        module.prepare(backend)
        layer = module if isinstance(module, PackedLinear) else module.expert(0)[0]
        if backend is None and backends.choose(layer) == backends.TORCH:
            slow[backends.why_plain(layer)] += 1
    if slow:
        reason, _ = slow.most_common(1)[0]
        logger.warning("%d packed modules run on plain torch: %s", slow.total(), reason)
    return model
