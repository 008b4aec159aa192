"""Decoding on a GPU that is not there: fake tensors have its device, its shapes and no numbers.

What they cannot do is what a CUDA graph cannot hold: a number that travels to the host.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from zoo import ARCHITECTURES, tiny_ids, tiny_model

from llmq import backends
from llmq.decode import Decoder
from llmq.fuse import fuse_on_gpu
from llmq.nn import packed_modules
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.rtn import RTN

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="this torch knows no CUDA device, not even a fake one"
)
# What transformers does there: OPT counts positions on the host, Falcon picks columns by a list.
WAITS = {"opt", "falcon"}
if "torch.tensor(" in inspect.getsource(masking_utils.eager_mask):
    WAITS |= {"gpt_oss"}  # a constant of its mask, in transformers 5.17


@dataclass(frozen=True)
class Anywhere(backends.Triton):
    """The backend without its refusals: fake tensors reach its operators, not its kernels."""

    def why_not(self, layer: backends.Layer) -> str | None:
        return None


class OnlyOnGpu(TorchDispatchMode):
    """Every tensor of every operation is on the GPU: nothing is copied from or to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.device.type == "cuda", func
        return out


def on_gpu(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A stand-in for `tensor`, on a GPU."""
    return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cuda", 0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_waits_for_nothing(monkeypatch, name: str) -> None:
    """Packed, fused, on the GPU's operators, stacked experts included."""
    model: Any = tiny_model(name, torch.bfloat16)
    list(quantize(model, [tiny_ids()], Recipe(QuantScheme(4, 32, True), RTN())))
    monkeypatch.setattr(backends, "TRITON", Anywhere())
    monkeypatch.setattr(backends, "choose", lambda layer, *_: backends.TRITON)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model._apply(lambda tensor: on_gpu(tensor, mode))
        fuse_on_gpu(model)
        assert all(module.released for _, module in packed_modules(model))
        decoder = Decoder(model, 24)
        decoder.prefill(on_gpu(tiny_ids(2, 5), mode))
        if name in WAITS:
            with pytest.raises((AssertionError, RuntimeError)), OnlyOnGpu():
                decoder.step()
            return
        with OnlyOnGpu():
            decoder.step()
        assert decoder.token.shape == (2, 1)
        assert decoder.token.device.type == "cuda"


def test_the_stand_in_sees_what_a_graph_cannot_hold() -> None:
    with FakeTensorMode() as mode:
        x = on_gpu(torch.ones(3), mode)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            x.sum().item()
        with OnlyOnGpu():
            assert (x + torch.arange(3, device=x.device)).shape == (3,)
        with pytest.raises(AssertionError), OnlyOnGpu():
            x.cpu()
        with pytest.raises(AssertionError), OnlyOnGpu():
            torch.add(x, torch.ones(3))
