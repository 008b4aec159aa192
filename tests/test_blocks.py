"""Running blocks one at a time gives what the whole model gives, on every architecture."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ARCHITECTURES, tiny_model

from llmq.adapters import RoutedLinear, as_linears, shared_copy
from llmq.blocks import (
    decoder_blocks,
    hooks,
    inputs_of,
    linears,
    record_calls,
    run_block,
    shared_input_groups,
)
from llmq.errors import SourceError
from llmq.kept import keep_outputs
from llmq.moments import quadratic, second_moments, with_prior


def tokens(model: Any, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    return [torch.randint(0, vocab, shape, generator=generator) for shape in shapes]


def note_input(seen: list[Any], _: nn.Module, args: tuple[Any, ...]) -> None:
    seen.append(args[0])


def note_output(seen: list[Any], _: nn.Module, __: Any, output: Any) -> None:
    seen.append(output[0] if isinstance(output, tuple) else output)


@pytest.fixture(params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, dtype=torch.float32).eval()


@torch.no_grad()
def test_replay_is_the_model(model):
    _, blocks = decoder_blocks(model)
    batches = tokens(model, (2, 24), (3, 17))
    recording = record_calls(model, blocks, batches)
    for b, ids in enumerate(batches):
        seen: list[Any] = []
        with hooks(blocks[-1].register_forward_hook(partial(note_output, seen))):
            model(ids, use_cache=False)
        hidden = recording.hidden[b]
        for i, block in enumerate(blocks):
            hidden = run_block(block, hidden, recording.calls[i][b])
        assert torch.equal(hidden, seen[0])


@torch.no_grad()
def test_inputs_are_those_of_a_whole_run(model):
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, tokens(model, (2, 24), (1, 9)))
    block = as_linears(shared_copy(blocks[0]))
    groups = shared_input_groups(block, recording.hidden[0], recording.calls[0][0])
    assert sorted(name for names in groups for name in names) == sorted(linears(block))
    for names in groups:
        seen: list[Any] = []
        note = partial(note_input, seen)
        with hooks(*[block.get_submodule(n).register_forward_pre_hook(note) for n in names]):
            run_block(block, recording.hidden[1], recording.calls[0][1])
        early = list(inputs_of(block, names[0], recording.hidden, recording.calls[0]))
        assert len(early) == 2
        for whole in seen:
            a, b = ([x] if isinstance(x, torch.Tensor) else x for x in (whole, early[1]))
            assert all(map(torch.equal, a, b))


@torch.no_grad()
def test_parts_that_are_done_run_once(model):
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, tokens(model, (2, 24), (1, 9)))
    batches = list(zip(recording.hidden, recording.calls[0], strict=True))
    block = as_linears(shared_copy(blocks[0]))
    expected = [run_block(block, h, c) for h, c in batches]
    groups = shared_input_groups(block, *batches[0])
    first = groups[0][0].partition(".")[0]  # attention, mostly
    done = {name for name in linears(block) if name.startswith(f"{first}.")}
    runs: list[int] = []
    block.get_submodule(groups[0][0]).register_forward_hook(lambda *_: runs.append(1))
    keep_outputs(block, done, len(batches))
    for _ in range(3):
        outputs = [run_block(block, h, c) for h, c in batches]
        assert all(map(torch.equal, outputs, expected))
    assert len(runs) == len(batches)


@torch.no_grad()
def test_groups_of_a_llama_block():
    model = tiny_model("llama", dtype=torch.float32).eval()
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, tokens(model, (2, 16)))
    assert shared_input_groups(blocks[0], recording.hidden[0], recording.calls[0][0]) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


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
    [(H, count)] = second_moments(xs)
    rows = torch.cat([x.reshape(-1, 37) for x in xs]).double()
    expected = rows.T @ rows / len(rows)
    assert count == 26
    assert torch.equal(H, H.T)
    assert (H - expected).norm() <= 1e-6 * expected.norm()
    assert second_moments([torch.zeros(0, 4)])[0][1] == 0


@pytest.mark.parametrize("K", [1, 3, 37])
def test_quadratic_forms_read_one_half(K):
    D, H = torch.randn(5, K).double(), torch.randn(K, K).double()
    H = H + H.T
    expected = torch.einsum("nj,jk,nk->n", D, H, D)
    torch.testing.assert_close(quadratic(D, H), expected)


def test_a_starved_expert_borrows_from_its_siblings():
    H = [torch.eye(4) * v for v in (1.0, 5.0, 9.0)]
    mixed = with_prior(list(zip(H, [10_000, 1, 0], strict=True)))
    assert [n for _, n in mixed] == [10_000, 1, 0]
    rich, poor, none = (M for M, _ in mixed)
    pooled = 1.0 + 4 / 10_001
    assert rich[0, 0] == pytest.approx(1.0, rel=1e-3)
    assert poor[0, 0] == pytest.approx((5 + 4 * pooled) / 5)
    assert none[0, 0] == pytest.approx(pooled)
