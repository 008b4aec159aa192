"""autoround_signround.py SRC OUT CALIB.json [bits] [group] [sym] [--options JSON]: its SignRound.

CALIB.json comes from windows.py. `--options` goes to AutoRound, for example '{"iters": 1000}'; what
is not given stays as AutoRound ships it (200 iterations, batches of 8). The checkpoint is in its
format "auto_round:gptqmodel", which stores zero points as they are. Prints one JSON line last.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

parser = argparse.ArgumentParser()
for name in ("src", "out", "calib"):
    parser.add_argument(name)
parser.add_argument("bits", type=int, nargs="?", default=4)
parser.add_argument("group", type=int, nargs="?", default=64)
parser.add_argument("sym", type=int, nargs="?", default=1)
parser.add_argument("--options", type=json.loads, default={})
parser.add_argument("--dtype", default="float32")
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
torch.set_num_threads(args.threads)

with open(args.calib) as file:
    windows = json.load(file)
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

print()
print(
    json.dumps(
        {
            "peer": "autoround",
            "seconds_quantize": seconds,
            "seconds_process": time.perf_counter() - START,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    ),
    flush=True,
)
