"""The pages: examples run, commands and links exist, the page of options is current."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from llmq import demo
from llmq.cli import app

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README = DOCS.parent / "README.md"
BLOCK = re.compile(r"^```(\w+)( run)?\n(.*?)^```$", re.S | re.M)
WORDS = {
    "MODEL": demo.model_path,
    "calibration.txt": demo.calibration_path,
    "held-out.txt": demo.evaluation_path,
}


def blocks(page: Path, run: bool) -> list[tuple[str, str]]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(language, code) for language, marked, code in found if bool(marked) or not run]


def commands() -> list[str]:
    lines = [
        line
        for page in [*PAGES, README]
        for language, code in blocks(page, run=False)
        if language == "sh"
        for line in code.splitlines()
    ]
    return sorted({line for line in lines if line.startswith("llmq ")})


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_examples_run(page: Path, run, tmp_path, monkeypatch) -> None:
    examples = blocks(page, run=True)
    if any("peft" in code or " correct " in code for _, code in examples):
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    for language, code in examples:
        for word, path in WORDS.items():
            code = re.sub(rf"\b{re.escape(word)}\b", str(path()), code)
        if language == "python":
            exec(compile(code, page.name, "exec"), {})
            continue
        for line in code.splitlines():
            status, _, stderr = run(*shlex.split(line)[1:])
            assert status == 0, f"{line}\n{stderr}"


@pytest.mark.parametrize("line", commands())
def test_every_command_and_option_exists(line: str) -> None:
    group: Any = typer.main.get_command(app)
    name, *rest = shlex.split(line)[1:]
    if not name.startswith("-"):
        group.commands[name].make_context(name, rest)  # parses, and runs nothing


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), target
    if page.name not in ("README.md",):
        assert f"({page.name})" in (DOCS / "README.md").read_text(encoding="utf-8")


def script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_engines_is_what_was_measured() -> None:
    module = script(DOCS.parent / "benchmarks" / "engine_table.py")
    rows = json.loads(module.RESULTS.read_text(encoding="utf-8"))["rows"]
    page = module.PAGE.read_text(encoding="utf-8")
    assert page == module.with_table(page, rows), "run: python benchmarks/engine_table.py"


def test_the_page_of_options_is_current() -> None:
    module = script(DOCS / "make_cli.py")
    current = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert current == module.page(), "run: python docs/make_cli.py"
