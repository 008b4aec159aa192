"""Packed modules whose weights a backend may hold in its own layout, instead of the file's.

On a GPU a weight would otherwise be in memory twice: as the checkpoint has it and as the kernels
read it. `release` gives up the first, `restore` makes it again bit for bit, and `state_dict` has
it in either case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without a gradient."""
    return nn.Parameter(tensor, requires_grad=False)


class Held(nn.Module):
    """Base of the packed modules.

    While `released`, the parameters that `rebuilt` names have their shape, dtype and device, but
    one zero for storage: read none of them.
    """

    released: bool = False

    def rebuilt(self) -> dict[str, Tensor]:
        """The released parameters by name, from what the backend holds."""
        raise NotImplementedError

    def prepare(self, backend: str | None = None) -> None:
        """Choose a backend and let it repack."""
        raise NotImplementedError

    def release(self, names: list[str]) -> None:
        """Give up these parameters; the backend must be able to rebuild them."""
        for name in names:
            tensor = getattr(self, name, None)
            if tensor is not None:
                setattr(self, name, frozen(tensor.new_zeros(()).expand(tensor.shape)))
        self.released = True

    def restore(self) -> None:
        """Own all parameters again."""
        if self.released:
            for name, tensor in self.rebuilt().items():
                setattr(self, name, frozen(tensor))
            self.released = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Held:
        """`.to()`, `.half()`, `.cuda()` and friends: what was repacked no longer fits."""
        self.restore()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.released:
            destination.update({prefix + name: t for name, t in self.rebuilt().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        released = self.released
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        if released:
            self.prepare(self.wanted)  # type: ignore[arg-type]
