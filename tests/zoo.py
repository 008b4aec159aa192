"""Tiny random models of every supported architecture, and a tokenizer, made offline in a second.

Sizes are multiples of 64, so that groups of 32 and 64 divide every layer. Every parameter is
random (norm weights and biases too: at their usual 1 and 0 they would hide mistakes), and
families that have grouped heads, sliding windows or several layer kinds have them here.
"""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 384
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_SIZES: dict[str, Any] = dict(
    **_COMMON,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
_LLAMA: dict[str, Any] = dict(**_SIZES, head_dim=32)
# Gemma, gpt-oss and Cohere alternate the two kinds of attention from block to block.
_ALTERNATING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA: dict[str, Any] = dict(**{**_LLAMA, "tie_word_embeddings": True}, query_pre_attn_scalar=32)

ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**{**_LLAMA, "tie_word_embeddings": True}),
    "mistral": MistralConfig(**_LLAMA, sliding_window=8),
    "gemma2": Gemma2Config(**_GEMMA, **_ALTERNATING),
    "gemma3": Gemma3TextConfig(**_GEMMA, **_ALTERNATING),
    "phi3": Phi3Config(**_SIZES, sliding_window=8),
    "opt": OPTConfig(
        **_COMMON,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "gpt_neox": GPTNeoXConfig(**{**_SIZES, "num_key_value_heads": None}),
    "gpt2": GPT2Config(**_COMMON, n_embd=128, n_inner=192, n_layer=2, n_head=4, n_positions=128),
    "falcon": FalconConfig(
        **_COMMON,
        hidden_size=128,
        ffn_hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        max_position_embeddings=128,
    ),
    "cohere2": Cohere2Config(
        **{**_LLAMA, "tie_word_embeddings": True}, **_ALTERNATING, logit_scale=1.0
    ),
    "olmo2": Olmo2Config(**_SIZES),
    "glm4": Glm4Config(**_LLAMA),
    "arcee": ArceeConfig(**_LLAMA),
    "nemotron": NemotronConfig(**_LLAMA),
    "helium": HeliumConfig(**_LLAMA),
    "mixtral": MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **_LLAMA,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "gpt_oss": GptOssConfig(
        **_LLAMA,
        **_ALTERNATING,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of the architecture `name`, in evaluation mode.

    Args:
        name: a key of `ARCHITECTURES`.
        dtype: dtype of the floating-point parameters.
        seed: of the parameters; the same seed gives the same model in every dtype but for rounding.
        changes: attributes of the config to set first, such as `tie_word_embeddings=True`.
    """
    config = copy.deepcopy(ARCHITECTURES[name])
    for attribute, value in changes.items():
        setattr(config, attribute, value)
    with torch.random.fork_rng(), torch.no_grad():
        # Built in its dtype: `.to(dtype)` would also round the rotary frequencies.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape).mul_(0.1)
            # Norm weights and biases keep their usual 1 or 0 below the noise.
            parameter.copy_(noise if parameter.ndim > 1 else parameter.float().round() + noise)
    return model.eval()


def tiny_ids(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 (batch, length), longer than the sliding windows above."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


def tiny_text(sentences: int = 200, seed: int = 0) -> str:
    """English-looking sentences, one a line."""
    choose = random.Random(seed).choice
    subjects = ["the old miller", "a quiet river", "my sister", "the last train", "every bird"]
    verbs = ["follows", "remembers", "leaves", "carries", "has never seen", "waits for"]
    objects = ["the harbour", "two letters", "a narrow bridge", "the morning", "its own shadow"]
    ends = ["before dawn", "without a word", "in the rain", "once more", "at last"]
    return "".join(
        f"{choose(subjects).capitalize()} {choose(verbs)} {choose(objects)} {choose(ends)}.\n"
        for _ in range(sentences)
    )


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `VOCAB` entries that puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_text(2000).splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_tiny(
    name: str, folder: str | Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write `tiny_model(name, ...)` and the tokenizer as a Hugging Face folder; its path."""
    tiny_model(name, dtype, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
