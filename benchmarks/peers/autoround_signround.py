"""autoround_signround.py SRC OUT CALIB.json [bits] [group] [sym] [--options JSON]: its SignRound.

CALIB.json comes from windows.py. `--options` goes to AutoRound, for example '{"iters": 1000}'; what
is not given stays as AutoRound ships it (200 iterations, batches of 8). The checkpoint is in its
format "auto_round:gptqmodel", which stores zero points as they are. Prints one JSON line last.
"""

import task  # first, for its clock

# isort: split
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

args = task.parser().parse_args()
torch.set_num_threads(args.threads)

windows = task.windows(args.calib)
batches = [
    {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    for ids in windows
]
model = AutoModelForCausalLM.from_pretrained(args.src, dtype=getattr(torch, args.dtype))
tokenizer = AutoTokenizer.from_pretrained(args.src)
rounder = AutoRound(
    model,
    tokenizer,
    bits=args.bits,
    group_size=args.group,
    sym=bool(args.sym),
    dataset=batches,
    nsamples=len(windows),
    seqlen=len(windows[0]),
    device_map="cpu",
    amp=args.dtype != "float32",
    **args.options,
)
before = time.perf_counter()
rounder.quantize_and_save(args.out, format="auto_round:gptqmodel")
seconds = time.perf_counter() - before
[config] = Path(args.out).rglob("config.json")  # it makes a folder within OUT
for path in config.parent.iterdir():
    path.rename(Path(args.out) / path.name)
task.done("autoround", seconds)
