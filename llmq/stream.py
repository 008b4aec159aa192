"""Quantize a checkpoint into another one with one block in memory at a time.

`Streamed` is the `Store` of the flow for files: a block's weights are read when the flow gets to
it, and what became of it is packed, written and forgotten when it is finished. The journal then
names it, and the hidden states that leave it, so that a run that was stopped goes on from there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmq import ranks, shards
from llmq.ahead import Read
from llmq.codebook import CodebookWeight
from llmq.errors import IntegrityError
from llmq.formats import codebook, superblocks
from llmq.gate import Gate, check_layer
from llmq.hf import saving
from llmq.hf.outline import pack_outline
from llmq.hf.saving import checkpoint_tensors, write_companions
from llmq.hf.streaming import StoredModel
from llmq.journal import Workplace
from llmq.number_formats import scheme_from
from llmq.output import writing
from llmq.report import layer_entry
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.states import States
from llmq.store import LayerReport, outputs_of, pack
from llmq.superblocks import SuperBlockWeight
from llmq.verify import check_exact, check_part

_REST = "rest.safetensors"


class Streamed:
    """A `store.Store` from files to files.

    Args:
        source: the full-precision checkpoint.
        work: where finished blocks are written; its journal has begun.
        gate: judges the result; its streams are kept beside those of the flow. None in a process
            that does not write.
        spill: keep hidden states in memory-mapped files instead of in memory.
        finished: is called with the number of finished blocks, after each of them and when work
            on the first one begins.
        read: gives a block by its number, if not `source.block` (see `ahead`).

    Raises:
        OutputError: nothing can be written any more.
        IntegrityError: what was computed or written is not usable.
    """

    def __init__(
        self,
        source: StoredModel,
        work: Workplace,
        gate: Gate | None,
        spill: bool = False,
        finished: Callable[[int], None] | None = None,
        read: Read | None = None,
    ) -> None:
        self._source = source
        self._read = read or source.block
        self._work = work
        self._gate = gate
        self.lean = spill
        self._finished = finished
        self._judged: States  # the gate's
        self._kept: list[list[dict[str, Any]]] = []  # what the journal names of this process
        self._streams: list[MutableSequence[Tensor]] = []
        self._files: list[States] = []
        self._aside: dict[str, dict[str, Any]] = {}
        self.start = len(work.journal.blocks)
        self.prepared = bool(work.journal.aside or work.journal.blocks)
        self.done = [_report(e) for block in work.journal.blocks for e in block["layers"]]

    def outer(self) -> AbstractContextManager[None]:
        return self._source.outer()

    def open(self, index: int) -> nn.Module:
        for states in (*self._files, self._judged):
            states.boundary = index + 1
        self._opened = time.perf_counter()
        if self._finished and index == self.start:
            self._finished(index)
        return self._read(index)

    def look(self, index: int) -> nn.Module:
        return self._source.block(index)

    def put_aside(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        file = f"aside-{name}.safetensors"
        with writing(self._work.out):
            self._aside[name] = {
                "file": file,
                "sha256": shards.write(self._work.folder / file, tensors),
            }

    def take(self, name: str) -> Mapping[str, Tensor]:
        return load_file(self._work.folder / f"aside-{name}.safetensors")

    def forget(self, name: str) -> None:
        (self._work.folder / f"aside-{name}.safetensors").unlink()
        del self._aside[name]

    def ready(self) -> None:
        self._work.journal.aside = ranks.of_the_first(dict(self._aside))
        if ranks.number() == 0:
            with writing(self._work.out):
                self._work.commit()
        ranks.of_the_first(None)  # it is written when the others ask for it
        self.prepared = True

    def streams(self, count: int) -> Sequence[MutableSequence[Tensor]]:
        # Of every process, those of the flow and the gate's.
        first = ranks.number() * (count + 1)
        found = self._work.journal.streams or [[]] * (ranks.count() * (count + 1))
        numbers = range(first, first + count + 1)
        *self._files, self._judged = (States(self._work.folder, n, found[n]) for n in numbers)
        if self._gate and not self._judged:
            self._gate.start(self._judged)
        self._kept = [list(states.entries) for states in (*self._files, self._judged)]
        self._streams = [s if self.lean else [t.clone() for t in s] for s in self._files]
        return self._streams

    def close(
        self,
        index: int,
        block: nn.Module,
        solved: Mapping[str, Sequence[QuantizedWeight]],
        reports: Sequence[LayerReport],
    ) -> None:
        for report in reports:
            check_layer(report)
        mine = (*self._files, self._judged)
        old = {entry["file"] for entries in self._kept for entry in entries}
        with writing(self._work.out):
            clock = [self._opened, time.perf_counter()]
            if self._gate:
                self._gate.step(index, block, solved, self._judged)
            clock.append(time.perf_counter())
            if not self.lean:
                for states, tensors in zip(self._files, self._streams, strict=True):
                    states[:] = tensors
            self._kept = [list(states.entries) for states in mine]
            streams = [entries for kept in ranks.everyones(self._kept) for entries in kept]
            used = None
            if ranks.number() == 0:
                part = self._write_block(index, block, solved)
                layers = [layer_entry(report) for report in reports]
                self._work.journal.blocks.append({**part, "layers": layers})
                self._work.journal.streams = streams
                used = self._work.journal.aside.pop(outputs_of(index), None)
                self._work.commit()
                clock.append(time.perf_counter())
                self._log(index, reports, clock)
            ranks.of_the_first(None)  # what is old is needed until the journal is written
            if used:
                (self._work.folder / used["file"]).unlink()
            for file in old - {entry["file"] for new in self._kept for entry in new}:
                (self._work.folder / file).unlink()
        if self._finished:
            self._finished(index + 1)

    def finish(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Write the checkpoint into `work.result`, from finished blocks and the rest.

        Returns:
            the SHA-256 of its shards, and what the gate says.
        """
        source, work = self._source, self._work
        verdict = self.verdict()
        with writing(work.out):
            work.result.mkdir(exist_ok=True)
            with source.outer():
                own = source.model.state_dict()
                outside = [key for key in own if not key.startswith(f"{source.prefix}.")]
                self._write(_REST, {key: own[key] for key in outside})
            found = shards.entries(work.folder / _REST)
            for part in work.journal.blocks:
                found |= shards.entries(work.folder / part["file"])
            pack_outline(source.model, self._schemes())
            expected = checkpoint_tensors(source.model, source.keys)
            _compare(expected, found)
            digests = saving.assemble({key: found[key] for key in expected}, work.result)
            write_companions(source.model, work.result, source.folder)
        return digests, verdict

    def full_states(self) -> Sequence[Tensor]:
        """Per batch, what leaves the full-precision model's last block, if the flow matches it."""
        return self._streams[1]

    def verdict(self, model: Any = None) -> dict[str, Any]:
        """What the gate says; see there."""
        assert self._gate
        return self._gate.verdict(self._judged, model)

    def _write_block(
        self, index: int, block: nn.Module, solved: Mapping[str, Sequence[QuantizedWeight]]
    ) -> dict[str, Any]:
        """Pack and write a block, and read it again; its file and that file's SHA-256."""
        pack(block, solved)
        prefix = f"{self._source.prefix}.{index}"
        name = f"part-{index:05}.safetensors"
        own = {f"{prefix}.{key}": tensor for key, tensor in block.state_dict().items()}
        digest = self._write(name, own)
        self._check(name, prefix, solved)
        return {"file": name, "sha256": digest}

    def _log(self, index: int, reports: Sequence[LayerReport], clock: Sequence[float]) -> None:
        steps = zip(("solve", "judge", "write"), pairwise(clock), strict=True)
        seconds = {step: round(stop - start, 3) for step, (start, stop) in steps}
        worst = max(reports, key=lambda report: report.error, default=None)
        found = {"layer": worst.name, "error": worst.error} if worst else None
        name = f"{self._source.prefix}.{index}"
        self._work.log("block", block=name, seconds=seconds, worst=found)

    def _write(self, name: str, own: dict[str, Tensor]) -> str:
        tensors = checkpoint_tensors(self._source.model, self._source.keys, own)
        return shards.write(self._work.folder / name, tensors)

    def _check(
        self, file: str, prefix: str, solved: Mapping[str, Sequence[QuantizedWeight]]
    ) -> None:
        """Unpack what was written and compare it with what was solved."""

        def stored(part: Callable[[QuantizedWeight], Tensor | None]) -> dict[str, Tensor]:
            """One tensor per matrix, named and shaped like the dense weights of the original."""
            own = {}
            for name, results in solved.items():
                values = [found for q in results if (found := part(q)) is not None]
                if not values:
                    continue
                stacked = len(values) > 1
                key = f"{prefix}.{name}" if stacked else f"{prefix}.{name}.weight"
                own[key] = torch.stack(values) if stacked else values[0]
            found = checkpoint_tensors(self._source.model, self._source.keys, own)
            # transformers 5.17 drops dimensions of size one.
            return {key: t.unsqueeze(-1) if t.ndim == 1 else t for key, t in found.items()}

        def plain(part: Callable[[QuantizedWeight], Tensor]) -> dict[str, Tensor]:
            return stored(lambda q: None if isinstance(q, SuperBlockWeight) else part(q))

        bits = plain(lambda q: torch.full((q.shape[0], 1), q.scheme.bits))
        check_part(
            self._work.folder / file,
            {key: int(tensor.flatten()[0]) for key, tensor in bits.items()},
            plain(lambda q: q.codes),
            plain(lambda q: q.scale),
            plain(lambda q: q.zero),
        )
        for suffix in (*codebook.OWN, superblocks.PACKED):
            check_exact(
                self._work.folder / file, suffix, stored(partial(_beside_codes, suffix=suffix))
            )

    def _schemes(self) -> dict[str, QuantScheme]:
        """Scheme of every packed matrix or stack of experts in the finished blocks."""
        reports = [_report(e) for block in self._work.journal.blocks for e in block["layers"]]
        return {stack_name(report.name): report.scheme for report in reports}


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, shards.Entry]) -> None:
    """Refuse finished parts that are not the tensors of the packed model.

    Raises:
        IntegrityError: names one that is missing, too many, or of another shape or dtype.
    """
    for key in {**expected, **found}:
        want, have = expected.get(key), found.get(key)
        if want is None or have is None:
            raise IntegrityError(f"{key}: {'not expected' if have else 'missing'} in the result.")
        if (tuple(want.shape), shards.name_of(want.dtype)) != (have.shape, have.dtype):
            raise IntegrityError(
                f"{key}: {have.dtype} {have.shape} in the result, expected "
                f"{want.dtype} {tuple(want.shape)}."
            )


def _beside_codes(q: QuantizedWeight, suffix: str) -> Tensor | None:
    """A tensor that only code books have, or all that super-blocks have."""
    if isinstance(q, SuperBlockWeight) and suffix == superblocks.PACKED:
        return superblocks.checked(q)
    if isinstance(q, CodebookWeight) and suffix in codebook.OWN:
        return codebook.write("", q).get(suffix)
    return None


def stack_name(name: str) -> str:
    """The stack that an expert's matrix belongs to; other names as they are."""
    return re.sub(r"\.\d+\.(gate_up_proj|down_proj)$", r".\1", name)


def _report(entry: Mapping[str, Any]) -> LayerReport:
    """Undo `report.layer_entry`."""
    return LayerReport(
        entry["name"],
        tuple(entry["shape"]),
        scheme_from(entry),
        entry["error"],
        entry["tokens"],
        entry["seconds"],
    )
