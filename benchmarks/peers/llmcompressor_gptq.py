"""llmcompressor_gptq.py SRC OUT CALIB.json [bits] [group] [sym] [--options JSON]: its GPTQModifier.

CALIB.json comes from windows.py. `--options` goes to GPTQModifier, for example
'{"actorder": "weight"}', but for "weights", which goes to the weights' scheme, for example
'{"weights": {"observer": "mse"}}'. Prints one JSON line last.
"""

import task  # first, for its clock

# isort: split
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = task.parser()
parser.add_argument("--batch", type=int, default=4)
args = parser.parse_args()
torch.set_num_threads(args.threads)

windows = task.windows(args.calib)
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
task.done("llmcompressor", seconds)
