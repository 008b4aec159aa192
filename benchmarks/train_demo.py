"""Train the model that `llmq demo` quantizes: a Llama of one million parameters, from scratch.

    python benchmarks/train_demo.py TEXT [--out llmq/demo] [--steps 1600] [--seed 0]

TEXT is one plain text file (the shipped model: the works of Shakespeare known as tinyshakespeare,
public domain). The last `--held-out` bytes are never seen in training; the tokenizer is trained
on the same part as the model. Every width is a multiple of 128, so that groups of 32, 64 and 128
divide every layer. One thread and one seed: a second run on the same machine and versions gives
the same weights. It writes

    OUT/model/            config.json, generation_config.json, model.safetensors (bf16), tokenizer
    OUT/calibration.txt   a part of the training text
    OUT/evaluation.txt    the held-out text
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("llmq/demo"))
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--held-out", type=int, default=80_000, help="bytes at the end of TEXT")
    parser.add_argument("--calibration", type=int, default=200_000, help="bytes of training text")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def split(text: str, held_out: int) -> tuple[str, str]:
    """Training and held-out text, cut between two speeches."""
    cut = text.rindex("\n\n", 0, len(text) - held_out) + 2
    return text[:cut], text[cut:]


def train_tokenizer(text: str, vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; it adds no token of its own, so decode(encode(text)) == text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def new_model(vocab: int, seq_len: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=seq_len,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def optimizer_of(model: LlamaForCausalLM, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def next_token_loss(model: LlamaForCausalLM, window: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of every token but the first of each window (batch, length)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        logits = model(window, use_cache=False).logits[:, :-1]
    return F.cross_entropy(
        logits.flatten(0, 1).float(), window[:, 1:].flatten(), reduction=reduction
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, seq_len: int) -> float:
    """Mean loss per scored token over consecutive windows of `tokens` (length,)."""
    training = model.training
    model.eval()
    windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    total = sum(next_token_loss(model, batch, "sum").item() for batch in windows.split(8))
    model.train(training)
    return total / (windows.numel() - len(windows))


def train(model: LlamaForCausalLM, tokens: Tensor, held: Tensor, args: argparse.Namespace) -> None:
    optimizer = optimizer_of(model, args.lr, args.weight_decay)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        first = torch.randint(len(tokens) - args.seq_len + 1, (args.batch,), generator=generator)
        window = torch.stack([tokens[i : i + args.seq_len] for i in first.tolist()])
        loss = next_token_loss(model, window)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            line = f"step {step + 1}/{args.steps} loss {loss.item():.3f}"
            if (step + 1) % 400 == 0:
                line += f" held-out {held_out_loss(model, held, args.seq_len):.4f}"
            seconds = time.perf_counter() - start
            left = seconds / (step + 1) * (args.steps - step - 1)
            print(f"{line} {seconds:.0f} s, {left:.0f} s left", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config.update(do_sample=False, pad_token_id=0)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def report(out: Path, held_text: str, seq_len: int) -> dict[str, float | str]:
    """What the saved folder is worth, read back the way a user reads it (fp32 compute)."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model: Any = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise SystemExit(f"{name} is not finite")
    ids = tokenizer(held_text, return_tensors="pt").input_ids[0]
    loss = held_out_loss(model, ids, seq_len)
    prompt = tokenizer("KING RICHARD:\n", return_tensors="pt")
    sample = model.generate(**prompt, max_new_tokens=100, do_sample=False)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_tokens": len(ids),
        "perplexity_per_token": math.exp(loss),
        "perplexity_per_byte": math.exp(loss * len(ids) / len(held_text.encode())),
        "sample": tokenizer.decode(sample[0], skip_special_tokens=True),
    }


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    text, held_text = split(args.text.read_text(encoding="utf-8"), args.held_out)
    print(f"training on {len(text)} characters, {len(held_text)} held out", flush=True)
    tokenizer = train_tokenizer(text, args.vocab)
    tokens, held = (torch.tensor(tokenizer(part).input_ids) for part in (text, held_text))
    model = new_model(args.vocab, args.seq_len)
    print(f"{model.num_parameters()} parameters, {len(tokens)} + {len(held)} tokens", flush=True)

    train(model, tokens, held, args)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, args.out / "model")
    (args.out / "calibration.txt").write_text(text[: text.index("\n\n", args.calibration) + 2])
    (args.out / "evaluation.txt").write_text(held_text)
    print(json.dumps(report(args.out / "model", held_text, args.seq_len), indent=1))


if __name__ == "__main__":
    main()
