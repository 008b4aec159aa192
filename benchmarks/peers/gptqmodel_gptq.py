"""gptqmodel_gptq.py SRC OUT CALIB.json [bits] [group] [sym] [--options JSON]: GPTQModel's GPTQ.

CALIB.json comes from windows.py. `--options` goes to GPTQConfig, for example '{"mse": 2.4}'.
Prints one JSON line last.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402

# 7.7.0 refuses to load a model on two cores without it.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch  # noqa: E402
from gptqmodel import GPTQConfig, GPTQModel  # noqa: E402

parser = argparse.ArgumentParser()
for name in ("src", "out", "calib"):
    parser.add_argument(name)
parser.add_argument("bits", type=int, nargs="?", default=4)
parser.add_argument("group", type=int, nargs="?", default=64)
parser.add_argument("sym", type=int, nargs="?", default=1)
parser.add_argument("--options", type=json.loads, default={})
parser.add_argument("--dtype", default="float32")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
torch.set_num_threads(args.threads)

with open(args.calib) as file:
    windows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(file)]
config = GPTQConfig(
    bits=args.bits, group_size=args.group, sym=bool(args.sym), device="cpu", **args.options
)
model = GPTQModel.load(args.src, config, dtype=getattr(torch, args.dtype))
before = time.perf_counter()
model.quantize(windows, batch_size=args.batch)
seconds = time.perf_counter() - before
model.save(args.out)

print()
print(
    json.dumps(
        {
            "peer": "gptqmodel",
            "seconds_quantize": seconds,
            "seconds_process": time.perf_counter() - START,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    ),
    flush=True,
)
