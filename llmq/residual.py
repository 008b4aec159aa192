"""Find the sum that a linear's output enters, by watching it happen.

Most blocks add what o_proj and down_proj return to the residual stream. Whether a linear's output
is added, as it is, to another tensor of its shape is observed while the block runs: no names, no
per-model code. A linear whose output is first scaled or normalised is simply not one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmq.blocks import Reached, hooks, run_block
from llmq.calls import Call

ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")


class _Watch(TorchFunctionMode):
    """Ends a forward at the sum that `output` enters, with what it is added to."""

    output: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self.output is not None and getattr(func, "__name__", "") in ADDITIONS and not kwargs:
            self.look(*args[:2])
        return func(*args, **(kwargs or {}))

    def look(self, a: Any, b: Any) -> None:
        assert self.output is not None
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return
        for one, other in ((a, b), (b, a)):
            same = one.data_ptr() == self.output.data_ptr() and one.numel() == self.output.numel()
            if same and other.data_ptr() != one.data_ptr():
                raise Reached(other)


@torch.no_grad()
def reads_and_sums(
    block: nn.Module,
    name: str,
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    sums: bool = True,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Per batch, what the linear `name` reads (..., K) and what its output (..., N) is added to.

    The second is None if the block ends without such a sum, or if not `sums`: the block then runs
    no further than to what is read.
    """
    seen: list[Tensor] = []
    watch = _Watch()

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        if not sums:
            raise Reached(None)

    def after(_: nn.Module, __: Any, output: Tensor) -> None:
        watch.output = output

    linear = block.get_submodule(name)
    handles = linear.register_forward_pre_hook(before), linear.register_forward_hook(after)
    with hooks(*handles):
        for states, call in zip(hidden, calls, strict=True):
            watch.output, other = None, None
            seen.clear()
            try:
                with watch:
                    run_block(block, states, call)
            except Reached as reached:
                other = reached.value
            yield seen[0], other


def enters_a_sum(block: nn.Module, name: str, hidden: Tensor, call: Call) -> bool:
    """Whether the output of the linear `name` is added, as it is, to a tensor that is not its own.

    Some activation functions add their input to a function of it: such a sum moves with the
    linear's output. This is tried out.
    """
    [(_, other)] = reads_and_sums(block, name, [hidden], [call])

    def moved(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + 1

    with hooks(block.get_submodule(name).register_forward_hook(moved)):
        [(_, again)] = reads_and_sums(block, name, [hidden], [call])
    return other is not None and again is not None and torch.equal(other, again)
