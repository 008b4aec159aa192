"""windows.py TOKENIZER TEXT... OUT --samples N --seq-len T: the first token windows of a text.

Of several texts, as many tokens of each one, one text behind the other.

OUT.json   the windows, a JSON list of lists of token ids: consecutive, non-overlapping, no special
           tokens. Peers read this file, so that none tokenizes or samples on its own.
OUT.txt    the shortest text that holds these windows and no other, for a quantizer that takes
           text; checked to give the same token ids.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("tokenizer")
parser.add_argument("text", type=Path, nargs="+")
parser.add_argument("out", type=Path)
parser.add_argument("--samples", type=int, default=128)
parser.add_argument("--seq-len", type=int, default=512)
args = parser.parse_args()

SPARE = 8  # tokens more, since the last of a text may be cut otherwise than in the middle of one
tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
options = {"add_special_tokens": False, "verbose": False}
wanted = args.samples * args.seq_len


def start(path: Path, tokens: int) -> str:
    """The shortest start of a file that holds so many tokens."""
    text = path.read_text(encoding="utf-8")
    ends = tokenizer(text, return_offsets_mapping=True, **options).offset_mapping
    if len(ends) < tokens:
        raise SystemExit(f"{path}: {len(ends)} tokens, {tokens} needed.")
    return text[: ends[tokens - 1][1]]


*first, last = args.text
share = wanted // len(args.text)
parts = [start(path, share) for path in first]
have = len(tokenizer("\n".join([*parts, ""]), **options).input_ids) if parts else 0
text = "\n".join([*parts, start(last, wanted - have + SPARE)])
ids = tokenizer(text, **options).input_ids[:wanted]
windows = [ids[i : i + args.seq_len] for i in range(0, wanted, args.seq_len)]
if len(ids) < wanted:
    raise SystemExit(f"The texts have {len(ids)} tokens, {wanted} needed.")
args.out.with_suffix(".json").write_text(json.dumps(windows))
args.out.with_suffix(".txt").write_text(text, encoding="utf-8")
