"""The help pages of the command `llmq`: one paragraph a line, wrapped by whoever prints it."""

ROOT = """Make a language model four times smaller, and say honestly what was lost.

[bold]1.[/bold] llmq quantize MODEL OUT --calibration text.txt
[bold]2.[/bold] llmq eval OUT --text held-out.txt --reference MODEL
[bold]3.[/bold] llmq generate OUT --prompt "Once upon a time"

MODEL is a folder or a name on the Hub; OUT loads in transformers, vLLM and SGLang as it is."""

QUANTIZE = (
    "Quantize a model.\n\n"
    "[bold]Which quality?[/bold] balanced (the default) asks every layer for what the original "
    "model has in its place. fast asks it for its own output, and takes less time. best tunes all "
    "scales together after balanced, and loses least: the whole packed model must fit into memory, "
    "and it takes several times as long. Below 3 bits balanced does so too, briefly "
    "(--tune-scales 0: not). "
    "[bold]Which method?[/bold] Those of papers are there by name: gptq; awq and awq+gptq (for "
    "models with large activation outliers); rtn, which needs no text and takes seconds: fine at "
    "8 bits, poor at 3.\n\n"
    "[bold]Which bits?[/bold] 8: no visible loss. 4: the usual choice. 3 and 2: measure first. "
    "Smaller groups lose less and cost more: 4 symmetric bits in groups of 128 take 4.13 bits "
    "per weight, "
    "in groups of 32 4.50. "
    "An average such as 3.5 gives every layer 2 to 8 bits by what it loses, and larger groups "
    "where those lose less than fewer bits, in the same number of bytes "
    "(llmq sensitivity shows it); the whole model must then fit into memory.\n\n"
    "[bold]llama.cpp?[/bold] --k-quants solves in its super-blocks: Q2_K to Q6_K, by --bits. "
    "llmq convert --format gguf then changes nothing; other engines do not read the result.\n\n"
    "[bold]Which text?[/bold] Text like that which the model will see, 65,000 tokens or more; "
    "never the text you evaluate on. Several texts in equal parts: --calibration more than once. "
    "None at hand: llmq write.\n\n"
    "[bold]Examples[/bold]\n\n"
    "llmq quantize ./model ./model-4bit --calibration c4.txt\n\n"
    "llmq quantize Qwen/Qwen3-8B ./qwen3 --quality fast --calibration chats.jsonl\n\n"
    "llmq quantize ./model ./out --bits 3 --group-size 32 --skip down_proj\n\n"
    "[bold]Stopped?[/bold] The same command goes on where it was, even after a crash; OUT appears "
    "when it is complete and its result has been checked."
)

PLAN = (
    "Say what quantizing would do, before it does it.\n\n"
    "The size of the result (exact for whole bits), memory, disk and time (estimates for this "
    "machine), which layers the group size does not fit, alone and shared "
    "by several GPUs, which engines will load it, and what to do about each problem. Only "
    "config.json and file headers are read: seconds for a model of any size. Status 1 if it "
    "cannot be quantized like this.\n\n"
    "[bold]Example[/bold]\n\n"
    "llmq plan Qwen/Qwen3-8B --bits 4 --group-size 64 --tensor-parallel 1,2,4"
)

SENSITIVITY = (
    "Say which layers must keep more bits.\n\n"
    "For every group of layers that engines fuse: the predicted KL to the full-precision model if "
    "only these were rounded, at 2 to 8 bits, from one backward pass over a little text; "
    "and the widths and groups that lose least at an average of --bits, which is what llmq "
    "quantize --bits 3.5 uses. The whole model must fit into memory.\n\n"
    "[bold]Example[/bold]\n\n"
    "llmq sensitivity ./model --bits 3.5 --group-size 64 --calibration text.txt"
)

EVAL = (
    "Measure a model on a text.\n\n"
    "[bold]Perplexity[/bold] depends on the tokenizer and on the window length: compare only "
    "numbers of one protocol. [bold]KL[/bold] to the full-precision model is the sharpest measure "
    "of what quantization did: it needs far less text than perplexity for the same "
    "certainty.\n\n"
    "With a reference, the change in log-likelihood is measured window by window, so that its "
    "error bar is far smaller than that of either perplexity.\n\n"
    "[bold]Protocols[/bold] windows: the text in windows, nothing added (--bos: BOS in front of "
    "each). wikitext2: the GPTQ paper's, 2048 tokens. c4: that paper's 256 crops; give its "
    "validation file as .jsonl. llama.cpp: 512 tokens, the second half of each window scored.\n\n"
    "[bold]Examples[/bold]\n\n"
    "llmq eval ./model-4bit --text held-out.txt --reference ./model\n\n"
    "As in papers: llmq eval ./model --protocol wikitext2 --text wiki.test.raw\n\n"
    "Gemma needs BOS: llmq eval google/gemma-3-1b-pt --text held-out.txt --bos"
)

PUSH = (
    "Put a checkpoint on the Hugging Face Hub, with a card made from what was measured.\n\n"
    "The folder must be whole. An upload that was interrupted goes on where it stopped when the "
    "command is given again. The card states only numbers that are in the report: run llmq eval "
    "--record first. Log in once with: hf auth login\n\n"
    "[bold]Examples[/bold]\n\n"
    "llmq push ./model-4bit me/model-4bit --dry-run\n\n"
    "llmq push ./model-4bit me/model-4bit --private --base-model org/model"
)

COMPARE = (
    "Put several checkpoints of one model on one page: KL against size.\n\n"
    "Each must have been measured by llmq eval --record on the same text.\n\n"
    "[bold]Example[/bold]\n\n"
    "llmq compare ./model-4bit ./model-3bit --out compare.html"
)

CORRECT = (
    "Win back part of what quantization lost, with a low-rank adapter, without training.\n\n"
    "The adapter is the best one of its rank for the calibration text, layer by layer, in the "
    "format of peft. It helps most at 2 and 3 bits, and costs memory and time: two thin matrices "
    "beside each packed one. Experts of mixtures and layers that AWQ rescaled take none.\n\n"
    "[bold]Example[/bold]\n\n"
    "llmq correct ./model ./model-2bit ./adapter --rank 32 --calibration c4.txt"
)

WRITE = (
    "Let a model write text to calibrate it on.\n\n"
    "It starts from nothing and draws from its own distribution: text of every kind it was trained "
    "on, where there is none like that which it will see. The whole model must fit into "
    "memory (in float32 on CPUs that are slow with less), and every "
    "token takes one step of decoding, 32 documents at a time.\n\n"
    "[bold]Example[/bold]\n\n"
    "llmq write ./model own.jsonl\n\n"
    "llmq quantize ./model ./model-3bit --bits 3 --calibration own.jsonl --calibration c4.txt"
)

GENERATE = (
    "Let a model write.\n\n"
    "[bold]Examples[/bold]\n\n"
    'llmq generate ./model-4bit --prompt "The history of the city"\n\n'
    'llmq generate ./model-4bit --prompt "Why is the sky blue?" --chat --temperature 0.7'
)

INSPECT = (
    "Show every layer of a checkpoint: number format, shape, size, error.\n\n"
    "Also of GPTQ and AWQ checkpoints. Only headers are read. The error is that of the layer's "
    "output on the calibration text, relative to the output, from the report that llmq quantize "
    "left in the folder.\n\n"
    "[bold]Example[/bold]\n\n"
    "llmq inspect ./model-4bit"
)

BENCH = (
    "Measure how fast a model reads prompts and writes tokens, beside its original.\n\n"
    "[bold]of roof[/bold] is the share of this device's measured reading speed that decoding "
    "reaches: every step has to read all weights once. Layers that read one tensor are fused "
    "first. Prompts are random tokens.\n\n"
    "[bold]Examples[/bold]\n\n"
    "llmq bench ./model-4bit --reference ./model\n\n"
    "llmq bench ./model-4bit --batch 1,16 --prompt 128 --head-bits 8 --compile"
)

VERIFY = (
    "Check that a checkpoint is what llmq wrote.\n\n"
    "Every file is compared with checksums.sha256, every packed matrix with config.json, and all "
    "values must be finite. Status 1, and the name of the file, if something is wrong.\n\n"
    "[bold]Example[/bold]\n\n"
    "llmq verify ./model-4bit"
)

CONVERT = (
    "Rewrite a quantized checkpoint in another layout, without solving anything again.\n\n"
    "IN is a compressed-tensors, GPTQ or AWQ checkpoint. Codes and zero points stay as they are; "
    "GPTQ, AWQ and GGUF store scales in float16, and what that rounds is counted.\n\n"
    "[bold]Which format?[/bold] compressed-tensors: transformers, vLLM, SGLang; all widths. gptq: "
    "older loaders; symmetric, or version 2. awq: 4 bits, also asymmetric. gguf: one file for "
    "llama.cpp, for llama, mistral, qwen2 and qwen3; blocks are made from the codes, exactly for "
    "symmetric ones.\n\n"
    "[bold]Smaller GGUF[/bold] --embeddings q8_0 (or q6_k) rounds embeddings and head to nearest. "
    "--k-quants stores 2 bits in Q2_K, symmetric 3 in Q3_K, asymmetric 4 and 5 in Q4_K and "
    "Q5_K: codes stay, scales are rounded, and how far the weights move is printed. What llmq "
    "quantize --k-quants made is in them already, and stays as it is.\n\n"
    "[bold]Examples[/bold]\n\n"
    "llmq convert ./model-4bit ./model-awq --format awq\n\n"
    "llmq convert ./model-3bit ./model-gguf --format gguf --k-quants --embeddings q8_0"
)

DEMO = (
    "Quantize a tiny trained model in every way and compare: offline, under a minute.\n\n"
    "The model is a Llama of one million parameters that comes with llmq. Every row of the table "
    "was saved as a checkpoint, loaded back through from_pretrained and measured on text that "
    "the model has never seen."
)

TEXT = (
    "a .txt, .jsonl (text or messages) or .parquet file, a saved dataset, or "
    "NAME:CONFIG:SPLIT of the Hub."
)
