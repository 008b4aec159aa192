"""gptqmodel_gptq.py SRC OUT CALIB.json [bits] [group] [sym] [--options JSON]: GPTQModel's GPTQ.

CALIB.json comes from windows.py. `--options` goes to GPTQConfig, for example '{"mse": 2.4}'.
Prints one JSON line last.
"""

import task  # first, for its clock

# isort: split
import os
import time

# 7.7.0 refuses to load a model on two cores without it.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQConfig, GPTQModel

parser = task.parser()
parser.add_argument("--batch", type=int, default=4)
args = parser.parse_args()
torch.set_num_threads(args.threads)

windows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in task.windows(args.calib)]
config = GPTQConfig(
    bits=args.bits, group_size=args.group, sym=bool(args.sym), device="cpu", **args.options
)
model = GPTQModel.load(args.src, config, dtype=getattr(torch, args.dtype))
before = time.perf_counter()
model.quantize(windows, batch_size=args.batch)
seconds = time.perf_counter() - before
model.save(args.out)
task.done("gptqmodel", seconds)
