"""Find a model's decoder blocks and run them one at a time, by looking instead of knowing.

No file in llmq lists architectures. The blocks are the biggest `nn.ModuleList`; what each one is
called with is recorded while the model runs with stand-ins in their place; which linears read the
same tensor, and in which order, is observed by running one block once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.adapters import RoutedLinear
from llmq.calls import Call
from llmq.errors import NonFiniteError, SourceError


@dataclass(frozen=True)
class Recording:
    """Everything needed to replay the decoder blocks without the rest of the model.

    Attributes:
        hidden: per batch, the hidden states (B, T, D) that enter the first block.
        calls: calls[i][b] is what block i is called with on batch b. Kept per block: models that
            alternate sliding and full attention pass different masks to different blocks.
        returns_tuple: whether blocks return (hidden, ...) rather than hidden.
    """

    hidden: MutableSequence[Tensor]
    calls: list[list[Call]]
    returns_tuple: bool


class Reached(Exception):
    """Ends a forward where what is wanted has been seen."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the `nn.ModuleList` that holds most parameters."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise SourceError(
            f"{type(model).__name__}: no nn.ModuleList of decoder blocks found. "
            "Only decoder-only transformer models can be quantized."
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


class Substitute(nn.Module):
    """Takes a module's place; attributes that it lacks are read from the original."""

    def __init__(self, original: nn.Module):
        super().__init__()
        # In a tuple, so that the original does not become a submodule.
        self._original = (original,)

    @property
    def original(self) -> nn.Module:
        return self._original[0]

    def __getattr__(self, name: str) -> Any:  # models read attributes such as `attention_type`
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)


class _StandIn(Substitute):
    """Takes a block's place in the model: notes how it was called, passes hidden states on."""

    def __init__(self, block: nn.Module, calls: list[Call], wrap: Callable[[Tensor], Any]):
        super().__init__(block)
        self._calls = calls
        self._wrap = wrap

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._calls.append(Call(args, kwargs))
        return self._wrap(hidden)


@contextmanager
def replaced(blocks: nn.ModuleList, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    """The model with `stand_ins` in the place of its blocks, for the length of a `with`."""
    originals = list(blocks)
    try:
        for i, stand_in in enumerate(stand_ins):
            blocks[i] = stand_in
        yield
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block


@torch.no_grad()
def record_calls(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: Sequence[Tensor],
    first: nn.Module | None = None,
    hidden: MutableSequence[Tensor] | None = None,
) -> Recording:
    """Run the model on `batches` (int64 (B, T) each) without computing any of its blocks.

    `first` is block 0 with its weights, if that of the model has none; `hidden` is where the
    hidden states are appended, instead of to a new list.
    """
    calls: list[list[Call]] = [[] for _ in blocks]
    hidden = [] if hidden is None else hidden
    with replaced(blocks, [] if first is None else [first]):
        returns_tuple = _returns_tuple(model, blocks, batches[0][:1, :8])

    def enter(i: int, states: Tensor) -> Any:
        if i == 0:
            hidden.append(states)
        if i == len(blocks) - 1:  # the output layer would cost more than everything before
            raise Reached(states)
        return (states, None) if returns_tuple else states

    stand_ins = [_StandIn(block, calls[i], partial(enter, i)) for i, block in enumerate(blocks)]
    with replaced(blocks, stand_ins):
        for ids in batches:
            with suppress(Reached):
                model(input_ids=ids, use_cache=False)
    return Recording(hidden, calls, returns_tuple)


def _returns_tuple(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> bool:
    """Whether blocks return (hidden, ...) rather than hidden; found by running the first one."""

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        raise Reached(isinstance(output, tuple))

    with hooks(blocks[0].register_forward_hook(stop)):
        try:
            model(input_ids=ids, use_cache=False)
        except Reached as reached:
            return reached.value
    raise SourceError(f"{type(model).__name__}: its forward does not run its decoder blocks.")


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states (B, T, D) that leave `block`."""
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """Remove hook handles at the end of a `with`."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The matrices of a block (see `adapters.as_linears`) by name, in registration order."""
    return {n: m for n, m in block.named_modules() if isinstance(m, (nn.Linear, RoutedLinear))}


@torch.no_grad()
def shared_input_groups(block: nn.Module, hidden: Tensor, call: Call) -> list[list[str]]:
    """Names of a block's linears in execution order, grouped by the very tensor they read.

    For a Llama block: [q, k, v], [o], [gate, up], [down]. Linears that did not run are absent.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    alive = []  # inputs are kept, so that no two of them can have one address

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            alive.append(args[0])
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            key = (first.data_ptr(), first.shape[-1]) if first.numel() else (-len(alive), 0)
            names = groups.setdefault(key, [])
            if not any(name in seen for seen in groups.values()):
                names.append(name)

        return hook

    handles = [m.register_forward_pre_hook(note(n)) for n, m in linears(block).items()]
    with hooks(*handles):
        run_block(block, hidden, call)
    return [names for names in groups.values() if names]


@torch.no_grad()
def inputs_of(
    block: nn.Module, name: str, hidden: Iterable[Tensor], calls: Sequence[Call]
) -> Iterator[Any]:
    """Per batch, what the matrix `name` is about to read; the block runs no further than that.

    A tensor (..., K), or for a `RoutedLinear` a list of one tensor (t_e, K) per expert. Nothing
    but one batch is alive at a time: memory does not grow with the amount of calibration text.
    """

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise Reached(args[0])

    with hooks(block.get_submodule(name).register_forward_pre_hook(stop)):
        for states, call in zip(hidden, calls, strict=True):
            try:
                run_block(block, states, call)
            except Reached as reached:
                yield reached.value


@torch.no_grad()
def head_inputs(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: Sequence[Tensor],
    hidden: Iterable[Tensor],
    returns_tuple: bool,
) -> Iterator[Tensor]:
    """Per batch, what the output layer reads if the last block returned `hidden`."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    device, dtype = head.weight.device, head.weight.dtype
    current: list[Tensor] = []

    def resume(_: Tensor) -> Any:
        return (current[0], None) if returns_tuple else current[0]

    stand_ins: list[nn.Module] = [_StandIn(block, [], resume) for block in blocks]
    seen: list[Tensor] = []
    catcher = nn.Identity()
    catcher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.set_output_embeddings(catcher)  # type: ignore[operator]
    try:
        with replaced(blocks, stand_ins):
            for ids, states in zip(batches, hidden, strict=True):
                current[:] = [states.to(device, dtype)]
                model(input_ids=ids, use_cache=False)
                yield seen.pop()
    finally:
        model.set_output_embeddings(head)  # type: ignore[operator]


def drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The sum over tokens of -log p of labels that are drawn from the model's own predictions.

    Its gradients have the Fisher information as their second moment.

    Args:
        logits: (B, T, V).
        generator: on their device.

    Raises:
        NonFiniteError: they are NaN or infinite.
    """
    rows = logits.flatten(0, 1).float()
    if not bool(rows.isfinite().all()):
        raise NonFiniteError(
            "The model's own predictions are NaN or infinite on this text; convert it to "
            "bfloat16 or float32."
        )
    labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)
    return F.cross_entropy(rows, labels.squeeze(1), reduction="sum")


def logits_behind(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, hidden: Tensor, returns_tuple: bool
) -> Tensor:
    """The model's logits (B, T, V) for `ids` (B, T) if the last block returned `hidden`."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    like = next(p for p in embeddings.parameters() if p.is_floating_point())
    states = hidden.to(like.device, like.dtype)

    def resume(_: Tensor) -> Any:
        return (states, None) if returns_tuple else states

    with replaced(blocks, [_StandIn(block, [], resume) for block in blocks]):
        return model(input_ids=ids.to(like.device), use_cache=False).logits
