"""What does it cost that a run can go on after a crash? Pairs of runs, with a journal and without.

    python benchmarks/journal_cost.py [--pairs 16] [--out benchmarks/results/journal_cost.json]
    python benchmarks/journal_cost.py --tiny          # does it run?

Both write the same checkpoint. One writes, behind every block, the hidden states that leave it,
their hashes and the journal, as llmq always does; the other keeps hidden states in memory and
could not go on. The two of a pair run at the same time, one thread each on a core of its own, so
that both see the machine at its pace of that moment; the next pair has the cores the other way
round. A row has seconds of the processor and of the clock, from the first block to the end of the
run, and their ratios; the summary their geometric mean with an interval of 95 % (bootstrap over
pairs of pairs). A row also says how many of its seconds the run with a journal spent on writing
hidden states and the journal (all but those of the 256 tokens that the gate carries along).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, MutableSequence, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import environment
from random_models import write_model
from torch import Tensor, nn
from transformers import AutoConfig

from llmq.gate import TOKENS, Gate, check_layer
from llmq.hf.streaming import StoredModel
from llmq.journal import workplace
from llmq.ladder import METHODS, QUALITIES
from llmq.outlook import batch_windows
from llmq.output import writing
from llmq.quantize import quantize
from llmq.report import layer_entry
from llmq.scheme import QuantScheme
from llmq.stream import Streamed

MOST = 0.02
KINDS = ("seconds", "cpu_seconds")


class Stopwatch:
    """Seconds of the clock and of the processor within all `counted` blocks, or all but them."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    @contextlib.contextmanager
    def counted(self, sign: int = 1) -> Iterator[None]:
        clock, processor = time.perf_counter(), time.process_time()
        yield
        self.seconds += sign * (time.perf_counter() - clock)
        self.cpu_seconds += sign * (time.process_time() - processor)


class Forgetful(Streamed):
    """Writes finished blocks, and nothing to go on from."""

    watch: Stopwatch

    def streams(self, count: int) -> Sequence[MutableSequence[Tensor]]:
        kept: Any = []
        self._judged = kept
        assert self._gate
        self._gate.start(kept)
        self._streams = [[] for _ in range(count)]
        return self._streams

    def open(self, index: int) -> nn.Module:
        self._opened = time.perf_counter()
        return self._read(index)

    def close(self, index: int, block: nn.Module, solved: Any, reports: Any) -> None:
        for report in reports:
            check_layer(report)
        assert self._gate
        with writing(self._work.out):
            self._gate.step(index, block, solved, self._judged)
            part = self._write_block(index, block, solved)
            layers = [layer_entry(report) for report in reports]
            self._work.journal.blocks.append({**part, "layers": layers})


class Watched(Streamed):
    """Times what `Forgetful` leaves out."""

    watch: Stopwatch

    def streams(self, count: int) -> Sequence[MutableSequence[Tensor]]:
        with self.watch.counted():
            return super().streams(count)

    def close(self, index: int, block: nn.Module, solved: Any, reports: Any) -> None:
        with self.watch.counted():
            super().close(index, block, solved, reports)

    def _write_block(self, index: int, block: nn.Module, solved: Any) -> dict[str, Any]:
        with self.watch.counted(-1):
            return super()._write_block(index, block, solved)


class WatchedGate(Gate):
    """Not a part of the journal."""

    watch: Stopwatch

    def step(self, index: int, block: nn.Module, solved: Any, states: Any) -> None:
        with self.watch.counted(-1):
            super().step(index, block, solved, states)


def child(source: str, out: str, journal: bool, method: str, samples: int, seq_len: int) -> None:
    """One run, from the first block to the written checkpoint; prints its seconds."""
    torch.set_num_threads(1)
    recipe = dataclasses.replace((METHODS | QUALITIES)[method], scheme=QuantScheme(4, 64, True))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(2, 1000, (samples + 1, seq_len), generator=generator)
    batches = windows[1:].split(batch_windows(samples, seq_len))
    with workplace(out) as work:
        stored = StoredModel(Path(source))
        work.begin({})
        clock, processor = time.perf_counter(), time.process_time()
        gate = WatchedGate(stored, windows[:1, :TOKENS], "cpu")
        store = (Watched if journal else Forgetful)(stored, work, gate)
        store.watch = gate.watch = watch = Stopwatch()
        list(quantize(stored.model, batches, recipe, "cpu", store))
        digests, _ = store.finish()
        seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - processor
    told = {"seconds": seconds, "cpu_seconds": cpu_seconds, "digests": digests}
    print(json.dumps({**told, "spent": vars(watch)} if journal else told))


def begin(
    source: Path, out: Path, journal: bool, options: Sequence[str], core: int
) -> subprocess.Popen[str]:
    """One run in a process of its own, on one core."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(source), str(out)]
    command += [str(int(journal)), *options]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    os.sched_setaffinity(process.pid, {core})
    return process


def pair(source: Path, room: Path, options: Sequence[str], swapped: bool) -> dict[str, Any]:
    """A run with a journal and one without, and what the first took of the second."""
    cores = sorted(os.sched_getaffinity(0))
    found = {}
    with tempfile.TemporaryDirectory(dir=room) as own:
        both = {
            journal: begin(
                source, Path(own) / str(journal), journal, options, cores[-(journal != swapped)]
            )
            for journal in (True, False)
        }
        for journal, process in both.items():
            told = process.communicate()[0]
            if process.returncode:
                raise SystemExit(f"A run ended with status {process.returncode}.")
            found[journal] = json.loads(told.splitlines()[-1])
    if found[True].pop("digests") != found[False].pop("digests"):
        raise SystemExit("The two runs of a pair wrote different checkpoints.")
    spent = found[True].pop("spent")
    ratios = {f"{kind}_ratio": found[True][kind] / found[False][kind] for kind in KINDS}
    shares = {f"{kind}_share": spent[kind] / found[True][kind] for kind in KINDS}
    return {"with": found[True], "without": found[False], **ratios, **shares}


def mean_ratio(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, float]:
    """The geometric mean, and where it lies with 95 % confidence."""
    logs = [math.log(row[f"{kind}_ratio"]) for row in rows]
    # Two pairs in a row have the cores either way.
    own = [sum(logs[i : i + 2]) / len(logs[i : i + 2]) for i in range(0, len(logs), 2)]
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(own, k=len(own))) for _ in range(4000))
    low, middle, high = means[100], statistics.fmean(own), means[-100]
    return {"low": math.exp(low), "mean": math.exp(middle), "high": math.exp(high)}


def llama(layers: int, hidden: int, inner: int) -> Any:
    """The configuration of a model of that size."""
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=4096,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", nargs=6)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--method", default="gptq", help="or a quality")
    parser.add_argument("--tiny", action="store_true", help="narrow blocks, little text")
    parser.add_argument("--folder", type=Path, help="for models (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/journal_cost.json")
    args = parser.parse_args()
    if args.child:
        source, out, journal, method, samples, seq_len = args.child
        child(source, out, journal == "1", method, int(samples), int(seq_len))
        return
    if args.tiny:
        args.hidden, args.inner, args.samples, args.seq_len, args.pairs = 128, 256, 8, 64, 2
    options = [args.method, str(args.samples), str(args.seq_len)]
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as room:
        model = Path(room) / "model"
        write_model(llama(args.layers, args.hidden, args.inner), model)
        for number in range(args.pairs):
            rows.append(pair(model, Path(room), options, swapped=bool(number % 2)))
            print(json.dumps(rows[-1]), flush=True)
    ratios = {kind: mean_ratio(rows, kind) for kind in KINDS}
    shares = {kind: statistics.median(row[f"{kind}_share"] for row in rows) for kind in KINDS}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "folder", "child")}
    good = ratios["seconds"]["mean"] <= 1 + MOST
    result = {"environment": environment(1), "settings": settings, "most": MOST, "good": good}
    result |= {"ratios": ratios, "shares": shares, "pairs": rows}
    print(json.dumps({"ratios": ratios, "shares": shares}))
    default = None if args.tiny else Path("benchmarks/results/journal_cost.json")
    if target := args.out or default:
        target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
