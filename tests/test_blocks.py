"""Running blocks one at a time gives what the whole model gives, on every architecture."""

from typing import Any

import pytest
import torch
from torch import nn
from zoo import ARCHITECTURES, tiny_model

from llmq.adapters import RoutedLinear, as_linears, shared_copy
from llmq.blocks import (
    decoder_blocks,
    linears,
    record_calls,
    run_block,
    shared_input_groups,
    staged,
)
from llmq.errors import SourceError
from llmq.moments import second_moment, with_prior


def tokens(model: Any, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    return [torch.randint(0, vocab, shape, generator=generator) for shape in shapes]


@pytest.fixture(params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, dtype=torch.float32).eval()


@torch.no_grad()
def test_replay_is_the_model(model):
    _, blocks = decoder_blocks(model)
    batches = tokens(model, (2, 24), (3, 17))
    recording = record_calls(model, blocks, batches)
    for b, ids in enumerate(batches):
        seen: list[torch.Tensor] = []
        handle = blocks[-1].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        model(ids, use_cache=False)
        handle.remove()
        hidden = recording.hidden[b]
        for i, block in enumerate(blocks):
            hidden = run_block(block, hidden, recording.calls[i][b])
        assert torch.equal(hidden, seen[0])


@torch.no_grad()
def test_a_staged_run_is_a_run_and_halts_at_every_matrix_once(model):
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, tokens(model, (2, 24), (1, 9)))
    block = as_linears(shared_copy(blocks[0]))
    expected = [
        run_block(block, h, c) for h, c in zip(recording.hidden, recording.calls[0], strict=True)
    ]
    hidden = list(recording.hidden)
    groups = shared_input_groups(block, hidden[0], recording.calls[0][0])
    halted = []
    for names, inputs in staged(block, groups, hidden, recording.calls[0]):
        assert len(inputs) == 2
        halted += names
    assert sorted(halted) == sorted(linears(block))
    for a, b in zip(hidden, expected, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_later_groups_see_what_became_of_earlier_ones():
    model = tiny_model("llama", dtype=torch.float32).eval()
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, tokens(model, (2, 16)))
    block: Any = blocks[0]
    hidden = list(recording.hidden)
    groups = shared_input_groups(block, hidden[0], recording.calls[0][0])
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    down = None
    for names, inputs in staged(block, groups, hidden, recording.calls[0]):
        if names[0] == "mlp.gate_proj":
            block.mlp.gate_proj.weight.data.zero_()  # what a solver does: change it in place
        if names[0] == "mlp.down_proj":
            down = inputs[0]
    assert down is not None
    assert (down == 0).all()


def test_fused_experts_compute_the_same_function(model):
    _, blocks = decoder_blocks(model)
    view = as_linears(shared_copy(blocks[0]))
    routed = [m for m in view.modules() if isinstance(m, RoutedLinear)]
    if not routed:
        pytest.skip("no experts")
    recording = record_calls(model, blocks, tokens(model, (2, 24)))
    with torch.no_grad():
        a = run_block(blocks[0], recording.hidden[0], recording.calls[0][0])
        b = run_block(view, recording.hidden[0], recording.calls[0][0])
    assert (a - b).norm() <= 1e-6 * a.norm()


def test_no_blocks():
    with pytest.raises(SourceError, match=r"no nn\.ModuleList"):
        decoder_blocks(nn.Linear(2, 2))


def test_second_moment_against_float64():
    xs = [torch.randn(3, 7, 37), torch.randn(5, 37), torch.randn(0, 37)]
    H, count = second_moment(xs)
    rows = torch.cat([x.reshape(-1, 37) for x in xs]).double()
    expected = rows.T @ rows / len(rows)
    assert count == 26
    assert torch.equal(H, H.T)
    assert (H - expected).norm() <= 1e-6 * expected.norm()
    assert second_moment([torch.zeros(0, 4)])[1] == 0


def test_a_starved_expert_borrows_from_its_siblings():
    H = [torch.eye(4) * v for v in (1.0, 5.0, 9.0)]
    mixed = with_prior(list(zip(H, [10_000, 1, 0], strict=True)))
    assert [n for _, n in mixed] == [10_000, 1, 0]
    rich, poor, none = (M for M, _ in mixed)
    pooled = 1.0 + 4 / 10_001
    assert rich[0, 0] == pytest.approx(1.0, rel=1e-3)
    assert poor[0, 0] == pytest.approx((5 + 4 * pooled) / 5)
    assert none[0, 0] == pytest.approx(pooled)
