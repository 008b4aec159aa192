"""An output folder or file that is there as a whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llmq.errors import MemoryLimitError, OutputError

_LACK = re.compile(r"out of memory|allocate memory", re.IGNORECASE)  # of CUDA, of torch on CPUs


@contextmanager
def staged_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `out` if the `with` ends without an exception.

    It lies on the file system of `out`, so that the last step is a rename. After any exception,
    Ctrl-C included, nothing is left of it.

    Raises:
        OutputError: `out` is a file or a folder that is not empty, or nothing can be written.
    """
    target = Path(out).expanduser().resolve()
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(f"{out}: this folder is not empty. Choose a new one or empty it.")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{out}: a file with this name exists. Choose another name.")
    ancestor = next(parent for parent in target.parents if parent.exists())
    stage = ancestor / f".{target.name}.partial-{os.getpid()}"
    try:
        stage.mkdir()
    except OSError as error:
        raise OutputError(f"{out}: cannot be created: {error.strerror}.") from error
    try:
        yield stage
        with writing(out):
            target.parent.mkdir(parents=True, exist_ok=True)
            stage.replace(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def writing(out: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what goes wrong while writing (disk full, no permission, ...) into an OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"{out}: cannot be written: {reason}. Free some space or choose another folder."
        ) from error


@contextmanager
def staged_file(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden file to fill, which becomes `out` if the `with` ends without an exception.

    After any exception, Ctrl-C included, nothing is left of it, and an older `out` is as it was.

    Raises:
        OutputError: nothing can be written there; known before the `with` begins.
    """
    target = Path(out).expanduser().resolve()
    stage = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with writing(out):
        stage.touch()
    try:
        yield stage
        with writing(out):
            stage.replace(target)
    finally:
        stage.unlink(missing_ok=True)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn a lack of memory, of the machine or its GPU, into a MemoryLimitError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        if not (isinstance(error, MemoryError) or _LACK.search(told)):
            raise
        raise MemoryLimitError(
            f"Out of memory ({told.strip().splitlines()[0][:120] if told.strip() else 'malloc'}). "
            "Free some, add --activations disk, or take fewer or shorter --samples."
        ) from error
