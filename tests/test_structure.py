"""Imports go one way, importing is cheap, and `kernels/` never becomes a package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may import modules of lower levels only.
LEVELS = [
    {
        "errors",
        "factor",
        "plots",
        "calls",
        "progress",
        "cli_help",
        "demo",
        "graph",
        "machine",
        "sizes",
    },
    {"ahead", "ranks", "needs", "held", "cli_common"},
    {
        "allocate",
        "scheme",
        "markup",
        "formats.bits",
        "origin",
        "moments",
        "output",
        "text",
        "decode",
        "shards",
    },
    {"operations", "codebook", "formats.kquants", "formats.parts", "states"},
    {"formats.codebook", "superblocks"},
    {"formats.superblocks", "number_formats"},
    {
        "formats.bytewise",
        "formats.compressed_tensors",
        "formats.columns",
        "gguf_metadata",
        "page",
        "calibrate",
        "journal",
    },
    {"backends.base"},
    {"backends.cpu_int4", "backends.triton"},
    {"backends", "embedding", "formats.gptq", "formats.awq", "formats.gguf", "drawing"},
    {"linear", "lookup"},
    {"experts"},
    {"nn", "solvers", "solvers.babai", "solvers.grid", "formats.layouts"},
    {"solvers.loops"},
    {
        "division",
        "fuse",
        "peft",
        "adapters",
        "store",
        "solvers.rtn",
        "solvers.trials",
        "solvers.affine",
    },
    {"solvers.gptq"},
    {
        "blocks",
        "correction",
        "solvers.descent",
        "solvers.superblock_descent",
        "solvers.books",
    },
    {"solvers.superblocks", "solvers.feedback"},
    {"solvers.awq_pairs", "residual", "retry", "kept"},
    {"solvers.awq", "objective", "sensitivity", "tunable"},
    {"tuning", "tuning_blocks"},
    {"recipe"},
    {"blockwise", "curvature"},
    {"quantize", "evaluate", "hf.skeleton", "hf.names", "protocols"},
    {"hf.rounding", "ladder", "harness", "hf.foreign", "engines", "outlook"},
    {"hf.quantizer"},
    {"hf.loading", "hf.saving"},
    {"hf.outline", "hf.streaming"},
    {"hf"},
    {"report", "generate", "gate", "writing"},
    {"stored", "opened"},
    {"source", "plan", "verify", "card", "comparison", "convert"},
    {"gguf_file"},
    {"stream", "hub", "mixing", "inputs"},
    {"refine"},
    {"pipeline", "bench", "measure", "survey"},
    {"api"},
    {"showcase"},
    {"cli_share", "cli_plan", "cli_measure"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
HUGGING_FACE = {"transformers", "huggingface_hub", "datasets", "accelerate"}
MAY_IMPORT_HUGGING_FACE = {
    "hf.skeleton",
    "hf.names",
    "hf.rounding",
    "hf.foreign",
    "hf.quantizer",
    "hf.loading",
    "hf.saving",
    "hf.outline",
    "hf.streaming",
    "plan",
    "text",
    "source",
    "origin",
    "card",
    "hub",
    "cli_common",
    "api",
    "cli",
    "bench",
    "decode",
    "generate",
    "gguf_metadata",
    "inputs",
    "pipeline",
    "showcase",
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted((ROOT / "llmq").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "llmq").with_suffix("").parts)
        name = name.removesuffix(".__init__")
        if name != "__init__" and not (name == "formats" and path.stat().st_size == 0):
            found.append((name, path))
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            if node.module.split(".")[0] == "llmq":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if type(v) is str else "")
def test_imports_go_one_way(name, path):
    assert name in LEVEL, f"give llmq.{name} a level"
    for target in imported(path):
        inner = target.removeprefix("llmq.")
        if inner in LEVEL and target != inner:
            assert LEVEL[inner] < LEVEL[name], f"llmq.{name} imports llmq.{inner}"
        if target.split(".")[0] in HUGGING_FACE:
            assert name in MAY_IMPORT_HUGGING_FACE, f"llmq.{name} imports {target}"


def test_kernels_import_only_torch():
    allowed = {"torch", "triton", "llmq_kernels"} | set(sys.stdlib_module_names)
    for path in (ROOT / "kernels" / "llmq_kernels").rglob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path


def test_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_import_is_light():
    code = (
        "import sys, llmq, llmq.cli; "
        "heavy = {'torch', 'transformers', 'datasets', 'triton'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_stay_what_they_are():
    import llmq.evaluate
    import llmq.quantize

    for name in llmq.__all__:
        assert getattr(llmq, name) is not None
    assert callable(llmq.quantize)
    assert callable(llmq.evaluate)
    assert set(llmq.__all__) <= set(dir(llmq))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        llmq.quantise  # noqa: B018


def test_no_bare_excepts_and_no_environment():
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, path
                assert getattr(node.type, "id", "") not in ("Exception", "BaseException"), path
            if isinstance(node, ast.Attribute):
                assert not (node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os")
