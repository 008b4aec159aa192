"""Mix texts in equal parts, for calibration: pieces of each in turn.

    python benchmarks/mixed_text.py OUT.txt TEXT TEXT ... [--piece 4000] [--pieces 100]

A TEXT is a file that `llmq quantize --calibration` takes, such as what `llmq write` makes. Marks
of articles (<doc ...>, </doc>), as WikiExtractor writes them, are left out.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from llmq.text import load_text


def pieces_of(text: str, length: int) -> list[str]:
    """`text` in pieces of `length` characters, without marks."""
    text = re.sub(r"</?doc\b[^>]*>\n?", "", text)
    return [text[i : i + length] for i in range(0, len(text), length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--piece", type=int, default=4000, help="characters")
    parser.add_argument("--pieces", type=int, default=100, help="of each text, at most")
    args = parser.parse_args()
    texts = [pieces_of(load_text(path), args.piece) for path in args.texts]
    chosen = [piece for turn in zip(*texts, strict=False) for piece in turn]
    args.out.write_text("\n\n".join(chosen[: args.pieces * len(texts)]), encoding="utf-8")


if __name__ == "__main__":
    main()
