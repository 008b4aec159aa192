"""judge.py FULL TEXT CANDIDATE... : KL to the full model, perplexity and top-1 of plain folders.

Stock transformers in float32 on the same consecutive windows of TEXT; the first token of a window
is not scored. `--join wikitext` rebuilds the rows of the wikitext data set from the raw file and
joins them with blank lines, as the GPTQ paper and its successors do. Prints one JSON line per
candidate; the error bars are standard errors of the mean over windows.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


def wikitext_rows(text: str) -> str:
    """The raw wikitext file as "\\n\\n".join(rows of the data set)."""
    return "\n\n".join(line + "\n" if line.strip() else "" for line in text.split("\n")[:-1])


def windows_of(tokenizer, path: Path, join: str, seq_len: int, count: int) -> Tensor:
    """int64 (count, seq_len)"""
    text = path.read_text(encoding="utf-8")
    if join == "wikitext":
        text = wikitext_rows(text)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < seq_len * count:
        raise SystemExit(f"{path}: {len(ids)} tokens, {seq_len * count} needed.")
    return torch.tensor(ids[: seq_len * count]).view(count, seq_len)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    data = torch.tensor(values, dtype=torch.float64)
    return data.mean().item(), (data.std() / math.sqrt(len(data))).item()


def score(logits: Tensor, full: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Mean KL(full || candidate), negative log likelihood and top-1 agreement of one window.

    Args:
        logits, full: float32 (T, vocabulary), of the candidate and of the full model.
        targets: int64 (T,)
    """
    p, q = full.log_softmax(-1), logits.log_softmax(-1)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).double().mean()
    top1 = (full.argmax(-1) == logits.argmax(-1)).double().mean()
    return kl.item(), F.nll_loss(q, targets).item(), top1.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("full", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("candidates", nargs="+", type=Path)
    parser.add_argument("--join", choices=["plain", "wikitext"], default="plain")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.full)
    windows = windows_of(tokenizer, args.text, args.join, args.seq_len, args.windows)
    full = AutoModelForCausalLM.from_pretrained(args.full, dtype=torch.float32).eval()
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in args.candidates
    ]
    rows: list[list[tuple[float, float, float]]] = [[] for _ in models]
    full_nll = []
    with torch.inference_mode():
        for window in windows:
            targets = window[1:]
            reference = full(window[None]).logits[0, :-1]  # (T, vocabulary)
            full_nll.append(F.cross_entropy(reference, targets).item())
            for row, model in zip(rows, models, strict=True):
                row.append(score(model(window[None]).logits[0, :-1], reference, targets))

    for path, row in zip(args.candidates, rows, strict=True):
        kl, nll, top1 = (mean_and_error(list(column)) for column in zip(*row, strict=True))
        report = {
            "candidate": str(path),
            "kl": kl[0],
            "kl_stderr": kl[1],
            "perplexity": math.exp(nll[0]),
            "perplexity_stderr": math.exp(nll[0]) * nll[1],
            "full_perplexity": math.exp(mean_and_error(full_nll)[0]),
            "top1": top1[0],
            "windows": args.windows,
            "seq_len": args.seq_len,
            "text": args.text.name,
            "join": args.join,
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main()
