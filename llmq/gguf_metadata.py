"""What llama.cpp must know about a model besides its weights: sizes, rotary embedding, tokenizer.

`writer` is a `gguf.GGUFWriter` throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmq.errors import SchemeError

# transformers' model_type -> llama.cpp's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# How a byte-level tokenizer splits text before merging -> llama.cpp's name. None: ByteLevel alone.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS = {
    None: "gpt-2",
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}
_SPACE = "▁"  # stands for a space in vocabularies of SentencePiece
_NO_RANK = 10**6  # of what no merge makes: after all merges


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def add_model(writer: Any, config: Mapping[str, Any], name: str) -> None:
    """Sizes of the model, from its config.json.

    Raises:
        SchemeError: a rotary embedding that llmq cannot describe to llama.cpp.
    """
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(key_value_heads(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_rope(writer, config)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the rotary embedding, from an old or new style of config.json."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def _add_rope(writer: Any, config: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise SchemeError(
            f"rope_type={kind!r}: llmq writes GGUF for default, linear, yarn, llama3."
        )
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        known = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # llama.cpp's own
        known |= {"attention_factor": None, "mscale": None, "mscale_all_dim": None}
        for key, value in known.items():
            if rope.get(key, value) != value:
                raise SchemeError(f"rope {key}={rope[key]!r}: llmq writes GGUF for {value} only.")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(config: PreTrainedConfig, arch: str) -> np.ndarray | None:
    """What llama.cpp divides rotary frequencies by, float32 (head_dim / 2,); None = nothing.

    Raises:
        SchemeError: llama.cpp reads no such factors for the architecture `arch`.
    """
    raw = config.to_dict()
    if _rope(raw)["rope_type"] != "llama3":
        return None
    if arch != "llama":
        raise SchemeError(f"rope_type='llama3': llama.cpp knows it for llama, not for {arch}.")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_dim(raw)
    exponents = torch.arange(0, width, 2).double() / width
    plain = _rope(raw)["rope_theta"] ** -exponents
    return (plain / scaled.double()).float().numpy()


def add_tokenizer(writer: Any, tokenizer: Any, parts: Mapping[str, Any], count: int) -> list[str]:
    """The vocabulary, merges or scores, and special tokens of a BPE tokenizer.

    Args:
        tokenizer: of transformers.
        parts: its tokenizer.json.
        count: rows of the model's embeddings.

    Returns:
        what the user should know.

    Raises:
        SchemeError: a tokenizer of another kind.
    """
    from gguf import TokenType

    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    pieces = _is_sentencepiece(parts)
    tokens, types = [], []
    for index in range(count):
        token = by_id.get(index, f"[PAD{index}]")
        tokens.append(token)
        if index not in by_id:
            types.append(TokenType.UNUSED)
        elif token == parts["model"].get("unk_token"):
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index] else TokenType.USER_DEFINED)
        else:
            is_byte = pieces and len(token) == 6 and token.startswith("<0x")
            types.append(TokenType.BYTE if is_byte else TokenType.NORMAL)
    merges = [m.split(" ") if isinstance(m, str) else m for m in parts["model"]["merges"]]
    notes = []
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        rank: dict[str, int] = {}
        for number, (left, right) in enumerate(merges):
            rank.setdefault(left + right, number)
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(rank.get(token, _NO_RANK)) for token in tokens])
        writer.add_add_space_prefix(_adds_space(parts))
        if any("Regex" in (step.get("pattern") or {}) for step in _steps(parts, "normalizer")):
            notes.append("llama.cpp does not clean up spaces in a text as this tokenizer does")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(parts))
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types(types)
    for special in ("bos", "eos", "pad", *(["unk"] if pieces else [])):
        if (index := getattr(tokenizer, f"{special}_token_id")) is not None:
            getattr(writer, f"add_{special}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    return notes


def _steps(parts: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, alone or in a sequence."""
    whole = parts.get(key) or {}
    return whole.get("normalizers") or whole.get("pretokenizers") or ([whole] if whole else [])


def _is_sentencepiece(parts: Mapping[str, Any]) -> bool:
    """Whether this is the BPE of SentencePiece (Llama 2, Mistral): spaces are letters, unknown
    characters become bytes, and text is not split before it is merged."""
    model = parts["model"]
    steps = _steps(parts, "pre_tokenizer")
    splits = [s for s in steps if s["type"] != "Metaspace" or s.get("split", True)]
    spaces = any(
        s.get("pattern", {}).get("String") == " " and s.get("content") == _SPACE
        for s in _steps(parts, "normalizer")
    ) or any(s["type"] == "Metaspace" for s in steps)
    known = all(s["type"] in ("Prepend", "Replace") for s in _steps(parts, "normalizer"))
    return model["type"] == "BPE" and model.get("byte_fallback") and spaces and known and not splits


def _adds_space(parts: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    return any(s["type"] == "Prepend" for s in _steps(parts, "normalizer")) or any(
        s.get("prepend_scheme", "never") != "never" for s in _steps(parts, "pre_tokenizer")
    )


def _splitter(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text.

    Raises:
        SchemeError: llmq does not know the name, or the tokenizer is of another kind.
    """
    steps = _steps(parts, "pre_tokenizer")
    patterns = [s["pattern"].get("Regex", "") for s in steps if s["type"] == "Split"]
    known = [s["type"] in ("Split", "ByteLevel") for s in steps]
    pattern = patterns[0] if patterns else None
    last = steps[-1] if steps else {"type": None}
    byte_level = parts["model"]["type"] == "BPE" and last["type"] == "ByteLevel"
    whole = pattern is None and not last.get("use_regex", True)  # text is not split at all
    if not (byte_level and all(known) and len(patterns) < 2 and pattern in SPLITTERS) or whole:
        raise SchemeError(
            "tokenizer.json: llmq writes GGUF for BPE tokenizers that split text as GPT-2, Llama "
            "3 or Qwen 2 do, or not at all, as Llama 2 and Mistral, and this one does neither. "
            "Convert the full-precision model with llama.cpp's own convert_hf_to_gguf.py."
        )
    return SPLITTERS[pattern]
