"""Packed checkpoints in transformers.

Oracles: the quantized model in memory (logits and tensors, bit for bit); the independent
`compressed-tensors` package behind stock transformers, in a process that never imports llmq.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoQuantizationConfig,
)
from transformers.utils import hub
from transformers.utils.quantization_config import CompressedTensorsConfig

from llmq import hf
from llmq.errors import BackendError, FormatError, OutputError, SchemeError, SourceError
from llmq.formats import compressed_tensors
from llmq.nn import PackedExperts, PackedLinear, packed_modules, prepare
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.rtn import RTN

SYMMETRIC = QuantScheme(4, 32, True)
ASYMMETRIC = QuantScheme(4, 32, False)
# Stock transformers 5.23 with compressed-tensors 0.20 cannot load these. It leaves GPT-2's Conv1D
# and gpt-oss's stacked experts random, and its own Falcon code fails on any packed checkpoint.
NOT_STOCK = ("gpt2", "falcon", "gpt_oss")
ROUTERS = (".gate.weight", ".router.weight")
# Half on disk: what a machine with too little memory does.
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def packed(
    name: str, scheme: QuantScheme = ASYMMETRIC, dtype: torch.dtype = torch.bfloat16, **changes
) -> PreTrainedModel:
    """A tiny model with everything in its blocks rounded to nearest."""
    model = zoo.tiny_model(name, dtype, **changes)
    list(quantize(model, [zoo.tiny_ids()], Recipe(scheme, RTN())))
    return model


def with_packed_head(model: Any, scheme: QuantScheme = ASYMMETRIC) -> Any:
    head = model.get_output_embeddings()
    W = head.weight.detach()
    q = RTN().solve(W, torch.eye(W.shape[1]), scheme)
    model.set_output_embeddings(PackedLinear.from_quantized(q))
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(zoo.tiny_ids(seed=1) if ids is None else ids).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A packed Llama in memory and on disk, made from a source folder."""
    root = tmp_path_factory.mktemp("llama")
    model = AutoModelForCausalLM.from_pretrained(
        zoo.save_tiny("llama", root / "source", torch.bfloat16)
    )
    list(quantize(model, [zoo.tiny_ids()], Recipe(ASYMMETRIC, RTN())))
    return model, hf.save(model, root / "packed", source=root / "source")


# Every architecture: memory -> disk -> memory


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_saved_and_loaded_logits_are_bit_identical(name, scheme, tmp_path):
    source = zoo.save_tiny(name, tmp_path / "source", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source)
    list(quantize(model, [zoo.tiny_ids()], Recipe(scheme, RTN())))
    # Backends may treat few rows differently, so one short and one long input.
    expected = logits(model), logits(model, zoo.tiny_ids(1, 5))
    saved = hf.save(model, tmp_path / "a", source=source)

    loaded = AutoModelForCausalLM.from_pretrained(saved)
    kinds = [type(module) for _, module in packed_modules(loaded)]
    assert kinds == [type(module) for _, module in packed_modules(model)]
    assert (PackedExperts in kinds) == (name in ("mixtral", "qwen3_moe", "gpt_oss"))
    assert [n for n, m in loaded.named_modules() if isinstance(m, nn.Linear)] == ["lm_head"]
    assert torch.equal(logits(loaded), expected[0])
    assert torch.equal(logits(loaded, zoo.tiny_ids(1, 5)), expected[1])
    assert all(not p.requires_grad for _, m in packed_modules(loaded) for p in m.parameters())

    written, originals = tensors(saved), set(tensors(source))
    suffixes = ("_packed", "_scale", "_shape", *([] if scheme.symmetric else ["_zero_point"]))
    stems = {key.removesuffix("_packed") for key in written if key.endswith("_packed")}
    assert stems <= originals
    assert set(written) == (originals - stems) | {stem + s for stem in stems for s in suffixes}
    ignored = read_config(saved)["quantization_config"]["ignore"]
    routers = {k.removesuffix(".weight") for k in originals if k.endswith(ROUTERS)}
    assert routers | {"lm_head"} <= set(ignored)

    loaded.save_pretrained(tmp_path / "b")
    files = {p.name for p in saved.iterdir()} - {"tokenizer.json", "tokenizer_config.json"}
    assert files == {p.name for p in (tmp_path / "b").iterdir()}
    assert_same_tensors(written, tensors(tmp_path / "b"))
    assert read_config(saved) == read_config(tmp_path / "b")


STOCK = """
import sys, torch, zoo
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        torch.save(model(zoo.tiny_ids(seed=1)).logits, folder + "/stock.pt")
assert "compressed_tensors" in sys.modules and "llmq" not in sys.modules
"""


def test_stock_transformers_computes_the_same_logits(tmp_path):
    names = [name for name in zoo.ARCHITECTURES if name not in NOT_STOCK]
    expected = {}
    for name in names:
        model = packed(name, SYMMETRIC)
        hf.save(model, tmp_path / name)
        expected[name] = logits(prepare(model, "torch"))  # the arithmetic of the other package
    folders = [str(tmp_path / name) for name in names]
    environment = {**os.environ, "PYTHONPATH": str(Path(zoo.__file__).parent)}
    run = subprocess.run(
        [sys.executable, "-c", STOCK, *folders], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name in names:
        assert torch.equal(torch.load(tmp_path / name / "stock.pt"), expected[name]), name


# Schemes


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [("llama", b, g) for b in (2, 3, 4, 8) for g in (32, -1)]
    + [("qwen3_moe", 3, 64), ("qwen3_moe", 8, -1)],
)
def test_every_width_and_group_size(name, bits, group_size, tmp_path):
    model = packed(name, QuantScheme(bits, group_size))
    loaded = hf.load(hf.save(model, tmp_path / "a"))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_come_back_as_they_were(dtype, tmp_path):
    model = packed("llama", dtype=dtype)
    loaded = hf.load(hf.save(model, tmp_path / "a"))
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_dtype_given_at_load_is_obeyed(name, tmp_path):
    saved = hf.save(packed(name), tmp_path / "a")
    loaded = hf.load(saved, dtype=torch.float32)
    floats = {p.dtype for p in loaded.parameters() if p.is_floating_point()}
    assert floats == {torch.float32}
    expected = logits(hf.load(saved)).float()
    assert (logits(loaded) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_mixed_schemes_and_skipped_layers(name, tmp_path):
    model = zoo.tiny_model(name, torch.bfloat16)
    skipped = Recipe(SYMMETRIC, RTN(), skip=("layers.0.self_attn.q_proj", "layers.1.*"))
    list(quantize(model, [zoo.tiny_ids()], skipped))
    list(quantize_block(model, 1, QuantScheme(8, 64)))
    loaded = hf.load(hf.save(model, tmp_path / "a"))
    schemes = {n: getattr(m, "scheme", None) for n, m in packed_modules(model)}
    assert {n: getattr(m, "scheme", None) for n, m in packed_modules(loaded)} == schemes
    assert len(set(schemes.values()) - {None}) == 2
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, nn.Linear)
    assert torch.equal(logits(loaded), logits(model))


def quantize_block(model: PreTrainedModel, index: int, scheme: QuantScheme):
    """Round the attention of one block, whose experts, if any, stay dense."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = model.model.layers[index].self_attn.get_submodule(name)
        W = linear.weight.detach()
        q = RTN().solve(W, torch.eye(W.shape[1]), scheme)
        setattr(model.model.layers[index].self_attn, name, PackedLinear.from_quantized(q))
        yield name


# The head


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_a_quantized_head_tied_or_not(name, tmp_path):
    source = zoo.save_tiny(name, tmp_path / "source", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source)
    list(quantize(model, [zoo.tiny_ids()], Recipe(SYMMETRIC, RTN())))
    with_packed_head(model, SYMMETRIC)
    saved = hf.save(model, tmp_path / "a", source=source)
    loaded = hf.load(saved)
    assert isinstance(loaded.get_output_embeddings(), PackedLinear)
    assert isinstance(loaded.get_input_embeddings(), nn.Embedding)
    assert torch.equal(logits(loaded), logits(model))
    config = read_config(saved)
    assert config["quantization_config"]["ignore"] == []
    assert any("re:.*" in t for g in groups(config) for t in g["targets"])
    if zoo.ARCHITECTURES[name].tie_word_embeddings:
        assert config["tie_word_embeddings"] is False
    loaded.save_pretrained(tmp_path / "b")
    assert_same_tensors(tensors(saved), tensors(tmp_path / "b"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # untied, tied
def test_a_head_rounded_while_loading_can_be_saved(name, bits, tmp_path):
    saved = hf.save(packed(name), tmp_path / "a")
    model = hf.load(saved, head_bits=bits)
    head = model.get_output_embeddings()
    assert isinstance(head, PackedLinear)
    assert head.scheme.bits == bits
    plain = logits(hf.load(saved))
    assert 0 < (logits(model) - plain).norm() < (0.02 if bits == 8 else 0.3) * plain.norm()
    again = hf.load(hf.save(model, tmp_path / "b"))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(SchemeError, match="bits=5"):
        hf.load(saved, head_bits=5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_model_fused_while_loading_is_saved_as_it_was(name, tmp_path):
    saved = hf.save(packed(name), tmp_path / "a")
    model = hf.load(saved, fuse=True)
    fused = [n for n, m in packed_modules(model) if "fused" in str(m)]
    assert len(fused) == {"llama": 10, "mixtral": 6, "gpt2": 0}[name]
    plain = logits(hf.load(saved))
    assert (logits(model) - plain).norm() <= 1e-2 * plain.norm()
    assert_same_tensors(tensors(saved), tensors(hf.save(model, tmp_path / "b")))
    model.save_pretrained(tmp_path / "c")
    assert_same_tensors(tensors(saved), tensors(tmp_path / "c"))
    assert torch.equal(logits(hf.load(tmp_path / "c")), plain)


def groups(config: dict) -> list[dict]:
    return list(config["quantization_config"]["config_groups"].values())


def test_packing_more_after_loading_is_saved(llama, tmp_path):
    model = with_packed_head(hf.load(llama[1]))
    loaded = hf.load(hf.save(model, tmp_path / "a"))
    assert isinstance(loaded.lm_head, PackedLinear)
    assert torch.equal(logits(loaded), logits(model))


def test_saving_what_was_loaded_gives_the_same_folder(llama, tmp_path):
    _, saved = llama
    again = hf.save(hf.load(saved), tmp_path / "again", source=saved)
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in saved.iterdir())
    for path in saved.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_tied_embeddings_are_written_once(tmp_path):
    saved = hf.save(packed("qwen3"), tmp_path / "a")
    assert "lm_head.weight" not in tensors(saved)
    loaded = hf.load(saved)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# What else is in the folder


def test_the_original_config_text_and_files_are_kept(llama, tmp_path):
    _, saved = llama
    source = saved.parent / "source"
    config = read_config(saved)
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert list(config.items()) == list(read_config(source).items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(saved)("miller").input_ids[0] == 0


def test_old_style_configs_and_chat_templates_survive(llama, tmp_path):
    model, _ = llama
    source = tmp_path / "source"
    zoo.save_tiny("llama", source, torch.float32)
    old = {**read_config(source), "torch_dtype": "float32", "rope_theta": 10000.0, "mine": [1]}
    del old["dtype"]
    (source / "config.json").write_text(json.dumps(old))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    (source / "notes.txt").write_text("not ours")
    out = hf.save(model, tmp_path / "out", source=source)
    config = read_config(out)
    assert config.pop("quantization_config")
    # The scales are bfloat16; a config that said otherwise would change them on loading.
    assert config == {**old, "torch_dtype": "bfloat16"}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates" / "tool.jinja").exists()
    assert not (out / "notes.txt").exists()
    assert torch.equal(logits(hf.load(out)), logits(model))


def test_no_local_path_is_written(tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "secret-source", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source)
    list(quantize(model, [zoo.tiny_ids()], Recipe(SYMMETRIC, RTN())))
    tokenizer = AutoTokenizer.from_pretrained(source)
    outs = [
        hf.save(model, tmp_path / "a", source=source),
        hf.save(model, tmp_path / "b", tokenizer=tokenizer),
    ]
    for path in (path for out in outs for path in out.iterdir()):
        data = path.read_bytes()
        assert b"secret-source" not in data, path
        assert str(tmp_path).encode() not in data, path


def test_keys_follow_a_source_without_the_base_prefix(tmp_path):
    """The published GPT-2 has `h.0.attn...`, not `transformer.h.0.attn...`."""
    source = zoo.save_tiny("gpt2", tmp_path / "source", torch.bfloat16)
    bare = {k.removeprefix("transformer."): v for k, v in tensors(source).items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(source)
    list(quantize(model, [zoo.tiny_ids()], Recipe(ASYMMETRIC, RTN())))
    saved = hf.save(model, tmp_path / "out", source=source)
    keys = set(tensors(saved))
    assert "h.0.attn.c_attn.weight_packed" in keys
    assert not any(key.startswith("transformer.") for key in keys)
    assert torch.equal(logits(hf.load(saved)), logits(model))


def test_gpt2_weights_are_written_like_those_of_a_linear(tmp_path):
    saved = tensors(hf.save(packed("gpt2"), tmp_path / "a"))
    assert saved["transformer.h.0.attn.c_attn.weight_shape"].tolist() == [384, 128]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_and_their_index(name, tmp_path):
    model = packed(name)
    whole = tensors(hf.save(model, tmp_path / "one"))
    out = hf.save(model, tmp_path / "many", max_shard_size="100KB")
    assert len(list(out.glob("model-*.safetensors"))) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert all(key in load_file(out / file) for key, file in index["weight_map"].items())
    assert all(path.stat().st_size < 220_000 for path in out.glob("model-*.safetensors"))
    assert_same_tensors(tensors(out), whole)
    assert torch.equal(logits(hf.load(out)), logits(model))


# transformers' own doors


def test_import_of_llmq_does_not_import_transformers():
    code = "import sys, llmq; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pipeline_keeps_weights_packed(llama):
    _, saved = llama
    generate = pipeline("text-generation", model=str(saved), device="cpu")
    assert any(packed_modules(generate.model))
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=1)
    text = generate("the old miller", generation_config=greedy)[0]["generated_text"]
    assert text.startswith("the old miller")


def test_generate_with_static_cache_and_compile(tmp_path):
    model = hf.load(hf.save(packed("llama", num_hidden_layers=1), tmp_path / "a"))
    ids = zoo.tiny_ids(1, 7)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    options["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    compiled: Any = CompileConfig(fullgraph=True, backend="aot_eager")
    compiled.mode = None  # an option of inductor, which would take a minute here
    compiled._compile_all_devices = True
    static = model.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(static, expected)
    assert model.hf_quantizer.is_compileable


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_device_map_cpu_and_disk_offload(name, tmp_path):
    # float32, where offloaded layers and the others take the same path.
    model = packed(name, dtype=torch.float32)
    saved = hf.save(model, tmp_path / "a")
    expected = logits(model)
    assert torch.equal(logits(hf.load(saved, device_map="auto")), expected)
    split = hf.load(saved, device_map=SPLIT, offload_folder=tmp_path / "offload")
    held = {n: next(m.parameters()).is_meta for n, m in packed_modules(split)}
    assert all(on_meta == n.startswith("model.layers.1.") for n, on_meta in held.items())
    assert torch.equal(logits(split), expected)
    with pytest.raises(SourceError, match="offloaded"):
        hf.save(split, tmp_path / "b")


def test_push_to_hub_uploads_what_save_pretrained_writes(llama, monkeypatch):
    """Only the network calls are replaced."""
    _, saved = llama
    uploaded = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})()

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()

    def upload_folder(self, *, folder_path, **kwargs):
        for path in Path(folder_path).iterdir():
            uploaded[path.name] = path.read_bytes()

    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard(""))
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    hf.load(saved).push_to_hub("someone/tiny")
    assert {"config.json", "model.safetensors"} <= set(uploaded)
    config = json.loads(uploaded["config.json"])
    assert config["quantization_config"] == read_config(saved)["quantization_config"]


def test_dequantize_gives_a_dense_model_with_the_same_logits(llama):
    _, saved = llama
    loaded = hf.load(saved)
    expected = logits(loaded)
    dense = loaded.dequantize()
    assert not any(packed_modules(dense))
    assert torch.equal(logits(dense), expected)


def test_attach_makes_save_pretrained_write_a_packed_checkpoint(tmp_path):
    model = packed("mixtral")
    hf.attach(model)
    model.save_pretrained(tmp_path / "a")
    assert_same_tensors(tensors(tmp_path / "a"), tensors(hf.save(model, tmp_path / "b")))
    assert torch.equal(logits(hf.load(tmp_path / "a")), logits(model))


# On the fly


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2", "falcon", "mixtral", "gpt_oss"])
def test_quantizing_while_loading_equals_quantizing_in_memory(name, tmp_path):
    source = zoo.save_tiny(name, tmp_path / "source", torch.bfloat16)
    config = hf.LlmqConfig(bits=4, group_size=32, symmetric=False)
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model = packed(name, ASYMMETRIC)
    assert [n for n, _ in packed_modules(loaded)] == [n for n, _ in packed_modules(model)]
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "a")
    assert_same_tensors(tensors(tmp_path / "a"), tensors(hf.save(model, tmp_path / "b")))
    assert torch.equal(logits(hf.load(tmp_path / "a")), logits(model))


def test_on_the_fly_skips_what_it_is_told_and_takes_the_head_if_told(tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "source", torch.bfloat16)
    config = hf.LlmqConfig(8, -1, True, skip=("*.down_proj", "q_proj"), lm_head=True)
    loaded = hf.load(source, quantization_config=config)
    dense = {n.rpartition(".")[2] for n, m in loaded.named_modules() if isinstance(m, nn.Linear)}
    assert dense == {"down_proj", "q_proj"}
    assert isinstance(loaded.lm_head, PackedLinear)
    assert loaded.lm_head.scheme == QuantScheme(8, -1, True)


def test_on_the_fly_with_offload(tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "source", torch.bfloat16)
    config = hf.LlmqConfig(4, 32)
    loaded = hf.load(
        source, quantization_config=config, device_map=SPLIT, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(loaded), logits(packed("llama")))


def test_on_the_fly_refuses_a_group_that_does_not_divide(tmp_path):
    source = zoo.save_tiny("llama", tmp_path / "source")
    with pytest.raises(SchemeError, match=r"layers\.0\.mlp\.down_proj.*192.*group_size=64"):
        hf.load(source, quantization_config=hf.LlmqConfig(4, 128))
    tied = zoo.save_tiny("qwen3", tmp_path / "tied")
    with pytest.raises(SchemeError, match="tied"):
        hf.load(tied, quantization_config=hf.LlmqConfig(4, 64, lm_head=True))


# Takeover


def test_other_compressed_tensors_checkpoints_go_where_they_went_before(tmp_path):
    model = zoo.tiny_model("llama", torch.bfloat16)
    own, quantized = model.state_dict(), {}
    for key, W in own.items():
        if key.endswith("_proj.weight"):
            scale = (W.float().abs().amax(1, keepdim=True) / 127).bfloat16()
            codes = (W.float() / scale.float()).round().clamp(-128, 127)
            quantized |= {key: codes.to(torch.int8), f"{key}_scale": scale}
            own[key] = (codes.bfloat16() * scale).bfloat16()
        else:
            quantized[key] = W.clone()
    model.save_pretrained(tmp_path)
    save_file(quantized, tmp_path / "model.safetensors", metadata={"format": "pt"})
    channel = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    w8a8 = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": channel, "input_activations": token}
        },
    }
    change_config(tmp_path, quantization_config=w8a8)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(packed_modules(loaded))
    assert type(loaded.hf_quantizer).__module__.startswith("transformers.")
    model.load_state_dict(own)
    difference = logits(loaded).float() - logits(model).float()
    assert difference.norm() < 0.05 * logits(model).float().norm()  # activations are int8 there


@pytest.mark.parametrize(
    "change",
    [
        {"format": "float-quantized"},
        {"format": "nvfp4-pack-quantized"},
        {"format": "marlin-24"},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_which_configs_are_ours(change):
    ours = compressed_tensors.config({SYMMETRIC: ["Linear"]}, ["lm_head"])
    assert isinstance(AutoQuantizationConfig.from_dict(ours), hf.LlmqConfig)
    for group in ours["config_groups"].values():
        del group["format"]
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].previous is (
        CompressedTensorsConfig
    )
    with pytest.raises(FormatError):
        compressed_tensors.parse_config(ours | change)


def test_no_private_method_reaches_the_disk(llama, tmp_path):
    _, saved = llama
    loaded = hf.load(saved)
    loaded.config.save_pretrained(tmp_path / "c")
    for folder in (saved, tmp_path / "c"):
        config = read_config(folder)["quantization_config"]
        assert config["quant_method"] == "compressed-tensors"
    assert AutoConfig.from_pretrained(saved).quantization_config["format"] == "pack-quantized"


# Bad input


def test_a_backend_that_is_not_there_or_cannot_run(llama):
    _, saved = llama
    loaded = hf.load(saved, backend="torch")
    names = {m.backend.name for m in loaded.modules() if isinstance(m, PackedLinear)}
    assert names == {"torch"}
    with pytest.raises(BackendError, match="use one of"):
        hf.load(saved, backend="abacus")
    with pytest.raises(BackendError, match="bfloat16"):
        hf.load(saved, backend="cpu-int4", dtype=torch.float32)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(SourceError, match="nowhere"):
        hf.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty"):
        hf.load(tmp_path / "empty")


def test_a_model_that_is_not_a_causal_lm(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(SourceError, match=r"clip.*not a causal language model"):
        hf.load(tmp_path)


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    model, _ = llama
    return hf.save(model, tmp_path / "copy")


def test_a_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FormatError, match="damaged"):
        hf.load(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="weights cannot be read"):
        hf.load(copy)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight_scale", "model.norm.weight"])
def test_a_missing_tensor(copy, lost):
    rest = tensors(copy)
    del rest[lost]
    save_file(rest, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=lost.replace(".", r"\.") + ".*"):
        hf.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 8}, "does not fit"),
        ({"group_size": 128}, "not divisible|does not fit"),
        ({"group_size": 64}, "does not fit"),
    ],
)
def test_a_config_that_contradicts_the_weights(copy, change, message):
    config = read_config(copy)
    groups(config)[0]["weights"] |= change
    change_config(copy, **config)
    with pytest.raises(FormatError, match=message):
        hf.load(copy)


def test_a_config_that_forgets_a_packed_layer(copy):
    config = read_config(copy)
    groups(config)[0]["targets"] = ["re:.*self_attn.*"]
    change_config(copy, **config)
    with pytest.raises(FormatError, match=r"mlp\..*_packed is in the file, but no config group"):
        hf.load(copy)


def test_a_folder_in_the_way(llama, tmp_path):
    model, _ = llama
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="full: this folder is not empty"):
        hf.save(model, tmp_path / "full")
    with pytest.raises(OutputError, match="file: a file with this name exists"):
        hf.save(model, tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert hf.save(model, tmp_path / "empty") == tmp_path / "empty"


def test_a_disk_that_is_full_leaves_nothing_behind(llama, tmp_path):
    """A real failing write: the process may not write files of more than 64 KiB."""
    model, _ = llama
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            hf.save(model, tmp_path / "new" / "deeper" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_any_failure_while_writing_leaves_nothing_behind(llama, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    class Interrupted(Tokenizer):
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    model, _ = llama
    with pytest.raises(OutputError, match="No space left"):
        hf.save(model, tmp_path / "out", tokenizer=Tokenizer())
    with pytest.raises(KeyboardInterrupt):
        hf.save(model, tmp_path / "out", tokenizer=Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_none(llama, tmp_path):
    model, _ = llama
    with pytest.raises(SourceError, match=r"has no config\.json"):
        hf.save(model, tmp_path / "out", source=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_quantized(tmp_path):
    with pytest.raises(SchemeError, match="no packed module"):
        hf.save(zoo.tiny_model("llama"), tmp_path / "out")
