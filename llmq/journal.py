"""The hidden folder in which a run lives until it is complete, and its journal.

    .OUT.partial/                    beside OUT, on the same file system
        quantization_log.jsonl       one line per finished block
        lock                         of the process that works here; freed if that dies
        journal.json                 what the run is, and what of it is finished
        part-00000.safetensors ...   finished blocks, packed
        stream-0-00003-00000.bin     the hidden states that leave the last finished block
        aside-outputs-12.safetensors how the loss feels the outputs of block 12 (`curvature`)
    tuning-00015.safetensors     the state of tuning after so many steps
        result/                      becomes OUT, by rename, when it is complete

The journal is replaced as a whole, by rename, after the files that it names are written. So the
run can be killed at any instant: what the journal does not name is written again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from llmq import shards
from llmq.errors import OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

VERSION = 2
_JOURNAL = "journal.json"
_LOCK = "lock"
LOG = "quantization_log.jsonl"
RESULT = "result"
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass
class Journal:
    """What a run is and what of it is finished; JSON.

    Attributes:
        identity: everything that determines the result, by name.
        blocks: per finished block, its file, that file's SHA-256, and its layers' reports.
        streams: per stream of hidden states, per batch, file, SHA-256, dtype and shape.
        aside: by name, what blocks that are not finished will be solved with: file, SHA-256.
        tuning: after the last block, the state of scale tuning: its file, that file's SHA-256, and
            the numbers of a `tuning.Progress`.
        complete: whether `result/` only waits to be renamed.
    """

    identity: dict[str, Any]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    streams: list[list[dict[str, Any]]] = field(default_factory=list)
    aside: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    complete: bool = False

    def files(self) -> list[dict[str, Any]]:
        """Every file that it names, with its SHA-256."""
        tuning = [self.tuning] if self.tuning else []
        streams = (entry for stream in self.streams for entry in stream)
        return [*self.blocks, *self.aside.values(), *tuning, *streams]


class Workplace:
    """The hidden folder of a run; made by `workplace`.

    Attributes:
        out: the folder that is to appear, as the user gave it.
        folder: the hidden folder.
        result: what becomes `out`.
        journal: see `Journal`; there from `begin` on.
    """

    journal: Journal

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = out
        self.target = Path(out).expanduser().resolve()
        ancestor = next(parent for parent in self.target.parents if parent.exists())
        name = ".".join(self.target.relative_to(ancestor).parts)
        self.folder = ancestor / f".{name}.partial"
        self.result = self.folder / RESULT

    def begin(self, identity: Mapping[str, Any]) -> Journal:
        """Go on with the run that the journal tells of, or start one.

        Raises:
            OutputError: the journal is of another run, or it or a file that it names is damaged.
        """
        wanted = json.loads(json.dumps(identity))
        found = self._read()
        if found is not None:
            self._compare(found.identity, wanted)
            for entry in found.files():
                path = self.folder / entry["file"]
                if not path.is_file() or shards.file_hash(path) != entry["sha256"]:
                    raise self._damaged(f"{entry['file']} is not what the journal says")
        self.journal = found or Journal(wanted)
        self.log("go on" if self.journal.blocks else "start", **wanted)
        named = {entry["file"] for entry in self.journal.files()}
        for path in self.folder.iterdir():
            if path == self.result and not self.journal.complete:
                shutil.rmtree(path)
            elif path.is_file() and path.name not in {*named, _JOURNAL, _LOCK, LOG}:
                path.unlink()
        return self.journal

    def commit(self) -> None:
        """Write the journal; from now on, what it says survives the end of this process."""
        body = asdict(self.journal)
        text = json.dumps(body)
        new = self.folder / f"{_JOURNAL}.new"
        seal = hashlib.sha256(text.encode()).hexdigest()
        new.write_text(json.dumps({"version": VERSION, "sha256": seal, "journal": text}))
        new.replace(self.folder / _JOURNAL)

    def log(self, event: str, **fields: Any) -> None:
        """Append a line to the log: JSON with the time (UTC), the event and its fields."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, "event": event, **fields}) + "\n")

    def publish(self) -> None:
        """Rename `result/` to `out`."""
        self.journal.complete = True
        self.commit()
        with (self.result / LOG).open("w", encoding="utf-8") as file:
            for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line that a kill has cut
                    event = json.loads(line)
                    event.pop("message", None)  # it may name local paths
                    file.write(json.dumps(event) + "\n")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.result.replace(self.target)

    def started(self) -> int:
        """How many finished blocks the journal on disk names; more than 0 if it cannot be read."""
        try:
            found = self._read()
        except OutputError:
            return 1
        return len(found.blocks) if found else 0

    def delivered(self) -> bool:
        """Whether nothing is left here but what a run did not tidy up after its last step."""
        found = self._read()
        return found is None or (found.complete and not self.result.is_dir())

    def _read(self) -> Journal | None:
        path = self.folder / _JOURNAL
        if not path.is_file():
            return None
        try:
            outer = json.loads(path.read_text())
            text = outer["journal"]
            if outer["sha256"] != hashlib.sha256(text.encode()).hexdigest():
                raise ValueError("its checksum is wrong")
            if outer["version"] != VERSION:
                raise ValueError(f"version {outer['version']}")
            return Journal(**json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{_JOURNAL} is damaged ({error})") from error

    def _damaged(self, what: str) -> OutputError:
        return OutputError(
            f"{self.out}: an unfinished run cannot be continued: in {self.folder}, {what}. "
            "Start over with --fresh (fresh=True)."
        )

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        differing = [
            f"{key} changed"
            if _HASH.fullmatch(str(old.get(key)))
            else f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        if differing:
            raise OutputError(
                f"{self.out}: an unfinished run with other settings is there: "
                f"{'; '.join(differing)}. Give its settings to continue it, start over with "
                "--fresh (fresh=True), or choose another folder."
            )


@contextmanager
def workplace(out: str | os.PathLike[str], fresh: bool = False) -> Iterator[Workplace]:
    """The hidden folder of a run, for this process alone.

    At the end it is removed, except after a failure or an interruption when blocks are finished:
    then it stays, to be continued.

    Args:
        out: the folder that is to appear.
        fresh: forget an unfinished run.

    Raises:
        OutputError: `out` is a file or a folder that is not empty, another process writes it, or
            nothing can be written.
    """
    work = Workplace(out)
    if work.target.exists() and not work.target.is_dir():
        raise OutputError(f"{out}: a file with this name exists. Choose another name.")
    full = work.target.is_dir() and any(work.target.iterdir())
    if full and not work.folder.is_dir():
        raise _occupied(out)
    try:
        work.folder.mkdir(exist_ok=True)
        lock = (work.folder / _LOCK).open("a")
    except OSError as error:
        raise OutputError(f"{out}: cannot be created: {error.strerror}.") from error
    with lock:
        if not _locked(lock, work.folder / _LOCK):
            raise OutputError(f"{out}: another process is writing it. Wait for its end.")
        if full:
            if not fresh and work.delivered():
                shutil.rmtree(work.folder)
            raise _occupied(out)
        if fresh:
            for path in work.folder.iterdir():
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield from _until_done(work)


def _until_done(work: Workplace) -> Iterator[Workplace]:
    done = False
    try:
        yield work
        done = True
    finally:
        kept = 0 if done else work.started()
        if kept:
            error = sys.exc_info()[1]
            with suppress(OSError):  # the disk may be full
                work.log("stopped", reason=type(error).__name__, message=str(error))
            logger.warning(
                "%s: %d finished blocks are kept in %s. Run the same command again to go on, or "
                "start over with --fresh.",
                work.out,
                kept,
                work.folder.name,
            )
        else:
            shutil.rmtree(work.folder, ignore_errors=True)


def _occupied(out: str | os.PathLike[str]) -> OutputError:
    return OutputError(f"{out}: this folder is not empty. Choose a new one or empty it.")


def _locked(file: IO[str], path: Path) -> bool:
    """Lock an open file for this process; False if another one has it, or has moved it away."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
