"""llmcompressor_gptq.py SRC OUT CALIB.json [bits] [group] [sym] [--options JSON]: its GPTQModifier.

CALIB.json comes from windows.py. `--options` goes to GPTQModifier, for example
'{"actorder": "weight"}', but for "weights", which goes to the weights' scheme, for example
'{"weights": {"observer": "mse"}}'. Prints one JSON line last.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

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
    windows = json.load(file)
dataset = Dataset.from_dict(
    {"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]}
)
model = AutoModelForCausalLM.from_pretrained(args.src, dtype=getattr(torch, args.dtype))
weights = {
    "num_bits": args.bits,
    "type": "int",
    "symmetric": bool(args.sym),
    "strategy": "group",
    "group_size": args.group,
    **args.options.pop("weights", {}),
}
recipe = GPTQModifier(
    config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
    ignore=["lm_head"],
    **args.options,
)
before = time.perf_counter()
oneshot(
    model=model,
    dataset=dataset,
    recipe=recipe,
    max_seq_length=len(windows[0]),
    num_calibration_samples=len(windows),
    batch_size=args.batch,
)
seconds = time.perf_counter() - before
model.save_pretrained(args.out, save_compressed=True)
AutoTokenizer.from_pretrained(args.src).save_pretrained(args.out)

print()
print(
    json.dumps(
        {
            "peer": "llmcompressor",
            "seconds_quantize": seconds,
            "seconds_process": time.perf_counter() - START,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    ),
    flush=True,
)
