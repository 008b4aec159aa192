"""Seeds for all tests, and fixtures of several files. Two processes run, one thread in each."""

from __future__ import annotations

import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Before anything reads them: colours and widths of help, and a proxy in front of the fake Hub.
os.environ.update(GITHUB_ACTIONS="", FORCE_COLOR="", PY_COLORS="", TTY_COMPATIBLE="")
os.environ.update(NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")
# The same on every machine: "auto" is the CPU, here and in processes that tests start. What needs a
# GPU is checked by benchmarks/on_gpu.py.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging
from zoo import save_tiny, tiny_text

from llmq.cli import main

torch.set_num_threads(1)

QUICK = ["--samples", "4", "--seq-len", "64", "--group-size", "64"]
SEED = 1234  # not that of the models in zoo.py, whose weights a test would draw again


def pytest_configure() -> None:
    """The same examples every time, however slow or busy the machine is.

    `--hypothesis-profile default` draws new ones.
    """
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile(
        "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=slow
    )
    hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """What a fixture draws depends on no test and on no other fixture."""
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """What a test draws depends on no other test and on no fixture."""
    seed()


def seed() -> None:
    """Start the global random generators anew."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@contextmanager
def short_files(most: int) -> Iterator[None]:
    """No file of this process can grow beyond `most` bytes, as on a full disk or with a quota."""
    limits, bytecode = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # else imports may leave half a file for the next process
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = bytecode


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16 and its tokenizer."""
    return save_tiny("llama", tmp_path_factory.mktemp("cli") / "model", torch.bfloat16)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is long enough."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text(300))
    return path


@pytest.fixture(scope="module")
def packed_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A packed Llama in memory and on disk, made from the folder `source` beside that."""
    from hf_cases import round_to_nearest  # needs llmq.hf, which most tests do without

    from llmq import hf

    root = tmp_path_factory.mktemp("llama")
    source = save_tiny("llama", root / "source", torch.bfloat16)
    model = round_to_nearest(AutoModelForCausalLM.from_pretrained(source))
    return model, hf.save(model, root / "packed", source=source)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads` until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command in this process: (status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")  # not those of the terminal
    verbosity = logging.get_verbosity()

    def run(*arguments: object) -> tuple[int, str, str]:
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    logging.set_verbosity(verbosity)  # the command line keeps transformers quiet
    logging.enable_progress_bar()


@pytest.fixture
def refused(run, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """`llmq quantize` that must fail with one line and leave nothing; the line."""

    def refused(src: object, *options: object, out: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        status, stdout, stderr = run("quantize", src, out or tmp_path / "out", *QUICK, *options)
        assert status == 1
        assert stderr.startswith("llmq: ")
        assert stderr.count("\n") == 1
        assert "Traceback" not in stdout + stderr
        assert sorted(tmp_path.rglob("*")) == before
        return stderr

    return refused
