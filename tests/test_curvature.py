"""What the loss feels of outputs, against the gradients of the whole model."""

from typing import Any

import pytest
import torch
from test_quantize import SCHEME, batches
from torch import Tensor
from torch.nn import functional as F
from zoo import tiny_model

from llmq.blocks import decoder_blocks, linears
from llmq.curvature import MOST, prepare, windows
from llmq.errors import NonFiniteError, SchemeError
from llmq.quantize import Recipe
from llmq.solvers.awq import AWQ
from llmq.solvers.feedback import Feedback
from llmq.store import InMemory

RECIPE = Recipe(SCHEME, match=True, feedback=Feedback(tokens=10**6))


def oracle(model: Any, texts: list[Tensor], width: int) -> dict[str, Tensor]:
    """Mean of g g^T per linear, one window after the other."""
    prefix, blocks = decoder_blocks(model)
    modules = {f"{prefix}.{i}.{n}": m for i, b in enumerate(blocks) for n, m in linears(b).items()}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _, __, output: outputs.__setitem__(name, output)

    handles = [m.register_forward_hook(note(n)) for n, m in modules.items()]
    rows: dict[str, list[Tensor]] = {}
    for number, ids in enumerate(row for text in texts for row in text.split(1)):
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        generator = torch.Generator().manual_seed(number)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        loss = F.cross_entropy(logits, labels.squeeze(1), reduction="sum")
        names = [n for n in modules if outputs[n].shape[-1] <= width]
        for name, g in zip(
            names, torch.autograd.grad(loss, [outputs[n] for n in names]), strict=True
        ):
            g = g.flatten(0, -2).double()
            size = g.square().sum(1)
            weight = (MOST * size.mean() / size.clamp(min=1e-300)).clamp(max=1)
            rows.setdefault(name, []).append(g * weight.sqrt()[:, None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(g).T @ torch.cat(g) / len(torch.cat(g)) for name, g in rows.items()}


def found(model: Any, texts: list[Tensor], recipe: Recipe = RECIPE) -> dict[str, Tensor]:
    prefix, blocks = decoder_blocks(model)
    store, steps = InMemory(blocks), []
    prepare(model, texts, recipe, None, store, steps.append)
    assert steps == list(range(2 * len(blocks) + 1))
    assert store.prepared
    assert set(store._aside) == {f"outputs-{i}" for i in range(len(blocks))}  # and no states
    return {
        f"{prefix}.{i}.{name}": G
        for i in range(len(blocks))
        for name, G in store.take(f"outputs-{i}").items()
    }


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt_neox", "falcon"])
def test_moments_of_the_gradients_of_the_whole_model(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    texts = batches(model, 2)
    moments = found(model, texts)
    wanted = oracle(model, texts, model.config.hidden_size)
    assert moments.keys() == wanted.keys()
    assert any("down" in n or "fc2" in n or "h_to_h" in n or "4h_to" in n for n in moments)
    for linear, G in moments.items():
        scale = float(wanted[linear].abs().max())
        torch.testing.assert_close(G.double(), wanted[linear], atol=1e-3 * scale, rtol=1e-3)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_experts_and_skipped_linears_have_none():
    model: Any = tiny_model("mixtral", dtype=torch.float32).eval()
    recipe = Recipe(SCHEME, match=True, feedback=Feedback(), skip=("k_proj",))
    names = {name.rpartition(".")[2] for name in found(model, batches(model, 1), recipe)}
    assert names == {"q_proj", "v_proj", "o_proj"}


def test_as_many_windows_as_make_up_the_tokens():
    texts = [torch.zeros(4, 10, dtype=torch.long)] * 3
    assert [(w.number, w.batch, w.row) for w in windows(texts, 40)] == [
        (0, 0, 0),
        (4, 1, 0),
        (8, 2, 0),
        (9, 2, 1),
    ]
    assert len(windows(texts, 10**6)) == 12
    assert len(windows(texts, 1)) == 1


def test_not_beside_awq():
    with pytest.raises(SchemeError, match="no feedback"):
        Recipe(SCHEME, match=True, awq=AWQ(), feedback=Feedback())


def test_a_model_that_overflows_is_named():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    model.lm_head.weight.data[3, 5] = torch.inf
    with pytest.raises(NonFiniteError, match="own predictions"):
        found(model, batches(model, 1))


def test_labels_are_drawn_the_same_way_every_time():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    texts = batches(model, 1)
    one, two = found(model, texts), found(model, texts)
    assert all(torch.equal(one[name], two[name]) for name in one)
