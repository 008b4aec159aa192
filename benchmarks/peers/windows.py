"""windows.py TOKENIZER TEXT OUT [samples] [seq_len]: the first token windows of a text.

OUT.json   the windows, a JSON list of lists of token ids: consecutive, non-overlapping, no special
           tokens. Peers read this file, so that none tokenizes or samples on its own.
OUT.txt    the shortest start of TEXT that holds these windows and no other, for a quantizer that
           takes text; checked to give the same token ids.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("tokenizer")
parser.add_argument("text", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("samples", type=int, nargs="?", default=128)
parser.add_argument("seq_len", type=int, nargs="?", default=512)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
text = args.text.read_text(encoding="utf-8")
options = {"add_special_tokens": False, "verbose": False}
encoding = tokenizer(text, return_offsets_mapping=True, **options)
ids, wanted = encoding.input_ids, args.samples * args.seq_len
if len(ids) < wanted + 8:
    raise SystemExit(f"{args.text}: {len(ids)} tokens, {wanted + 8} needed.")
ids = ids[:wanted]
# A few tokens more, since the last of a text may be cut otherwise than in the middle of one.
start = text[: encoding.offset_mapping[wanted + 7][1]]
if tokenizer(start, **options).input_ids[:wanted] != ids:
    raise SystemExit("The start of the text does not give the same tokens.")
windows = [ids[i : i + args.seq_len] for i in range(0, wanted, args.seq_len)]
args.out.with_suffix(".json").write_text(json.dumps(windows))
args.out.with_suffix(".txt").write_text(start, encoding="utf-8")
