"""Read text from files, data sets and Python values.

A *source* of text is one of

    "notes.txt"                 plain text in UTF-8, one document
    "chats.jsonl"               one JSON object per line: {"text": ...} or {"messages": [...]}
    "corpus.parquet"            a column `text` or `messages`
    "folder/"                   what `datasets.Dataset.save_to_disk` wrote
    "name[:config[:split]]"     a data set of the Hugging Face Hub (split: train)
    ["a document", ...]         strings
    [[1, 2, 3], ...] or an integer tensor     token ids, taken as they are (`llmq.calibrate`)
    [Path("a.txt"), Path("b.jsonl"), ...]     several of the first five: equal parts of each, for
                                calibration only (`llmq.calibrate.token_windows`)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from llmq.errors import CalibrationError

Source: TypeAlias = (
    str
    | os.PathLike[str]
    | Sequence[str]
    | Sequence[Sequence[int]]
    | Tensor
    | Sequence[os.PathLike[str]]
)

JOINS = ("documents", "wikitext")
_SUFFIXES = (".txt", ".raw", ".jsonl", ".parquet")
# A data set on the Hub may be far larger than what is needed: stop reading at this many
# characters per token, more than any tokenizer compresses natural text to.
_CHARS_PER_TOKEN = 32


def load_text(
    source: Source,
    tokenizer: Any = None,
    *,
    join: str = "documents",
    max_tokens: int | None = None,
) -> str:
    """The text of a source as one string.

    Raises:
        CalibrationError: missing, unreadable or empty; or chats without a chat template.
    """
    if join not in JOINS:
        raise CalibrationError(f"join={join!r}: use one of {', '.join(JOINS)}.")
    found: list[str] = []
    length, is_chat = 0, False
    for where, row in _rows(source):
        text, chat = _row_text(row, where, tokenizer)
        found.append(text)
        is_chat |= chat
        length += len(text)
        if max_tokens is not None and _on_hub(source) and length > _CHARS_PER_TOKEN * max_tokens:
            break
    if join == "wikitext":
        found = [row for text in found for row in wikitext_rows(text)]
    # A chat template already ends every conversation in its own way.
    text = ("" if is_chat else "\n\n").join(found)
    if not text.strip():
        raise CalibrationError(f"{describe(source)}: the text is empty; 0 tokens found.")
    return text


def documents(source: Source, tokenizer: Any = None) -> list[str]:
    """The documents of a source one by one.

    Raises:
        CalibrationError: missing, unreadable or empty; or chats without a chat template.
    """
    found = [_row_text(row, where, tokenizer)[0] for where, row in _rows(source)]
    if not found:
        raise CalibrationError(f"{describe(source)}: holds no document.")
    return found


def wikitext_rows(text: str) -> list[str]:
    """The rows of the `datasets` version of wikitext from its raw file.

    That version keeps the line break of every line that is not blank and makes blank ones empty.
    The papers join those rows by a blank line, so their perplexities are of that text.
    """
    return [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]


def describe(source: Source) -> str:
    """A source in a few words, for reports and errors."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Tensor):
        return f"token ids {tuple(source.shape)}"
    if paths := several(source):
        return ", ".join(os.fspath(path) for path in paths)
    kind = "texts" if source and isinstance(source[0], str) else "token sequences"
    return f"{len(source)} {kind}"


def several(source: Source) -> list[os.PathLike[str]]:
    """The paths of a source that is several ones; [] if it is one."""
    if isinstance(source, str | os.PathLike | Tensor):
        return []
    paths = [part for part in source if isinstance(part, os.PathLike)]
    return paths if len(paths) == len(source) else []


def _on_hub(source: Source) -> bool:
    """Whether this names a data set of the Hub and no file."""
    return isinstance(source, str | os.PathLike) and not Path(source).exists()


def _rows(source: Source) -> Iterator[tuple[str, Any]]:
    """(where, row) of every document; a row is a string or a mapping with `text`/`messages`."""
    if not isinstance(source, str | os.PathLike):
        yield from ((f"document {number}", row) for number, row in enumerate(source))
        return
    path = Path(source)
    if path.is_dir():
        yield from _numbered(path, _saved_dataset(path))
    elif path.suffix == ".jsonl" and path.exists():
        yield from _json_lines(path)
    elif path.suffix == ".parquet" and path.exists():
        yield from _numbered(path, _parquet(path))
    elif path.exists():
        yield str(path), _read(path)
    elif path.suffix in _SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise CalibrationError(f"{path}: no such file.")
    else:
        yield from _numbered(source, _hub_dataset(str(source)))


def _numbered(where: object, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # bytes: line breaks stay as they are
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start}). Give .txt, .jsonl or .parquet."
        ) from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{path}, line {number}: not JSON: {error.msg}.") from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
        if not columns:
            found = ", ".join(file.schema_arrow.names)
            raise CalibrationError(f"{path}: no column `text` or `messages` among {found}.")
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: not a readable parquet file: {error}.") from error


def _saved_dataset(folder: Path) -> Iterable[Any]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{folder}: a folder must be what `datasets.Dataset.save_to_disk` wrote."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        splits = ", ".join(str(folder / str(split)) for split in saved)
        raise CalibrationError(f"{folder}: holds several splits; give one of {splits}.")
    return saved


def _hub_dataset(name: str) -> Iterable[Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    path, config, split = [*name.split(":"), None, None][:3]
    try:
        return datasets.load_dataset(path, config, split=split or "train", streaming=True)  # type: ignore[arg-type]
    except (OSError, ValueError, DatasetsError) as error:
        raise CalibrationError(
            f"{name}: neither a file nor a data set that can be loaded as name[:config[:split]]: "
            f"{' '.join(str(error).split())}"
        ) from error


def _row_text(row: Any, where: str, tokenizer: Any) -> tuple[str, bool]:
    """The text of one row, and whether it is a chat."""
    if isinstance(row, str):
        return row, False
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"], False
    if not (isinstance(row, dict) and isinstance(row.get("messages"), list)):
        found = f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise CalibrationError(f"{where}: neither `text` nor `messages`, but {found}.")
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where}: `messages` need a tokenizer with a chat template, and this one has none."
        )
    return tokenizer.apply_chat_template(row["messages"], tokenize=False), True
