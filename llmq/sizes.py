"""What of a model, and of what is to be done to it, matters for memory and time: numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["rtn", "grid", "gptq", "polished", "book"]


@dataclass(frozen=True)
class Group:
    """Matrices of a block that read one tensor and are solved together.

    Attributes:
        rows: N of all of them (of one expert).
        widest: N of the largest.
        columns: K.
        experts: how many of these there are.
        active: how many of them a token goes through.
        matrices: how many there are (of one expert).
    """

    rows: int
    widest: int
    columns: int
    experts: int = 1
    active: int = 1
    matrices: int = 1

    @property
    def weights(self) -> int:
        """All weights."""
        return self.experts * self.rows * self.columns

    def felt(self, hidden: int) -> int:
        """Numbers in the output moments of its matrices (see `curvature`), about."""
        return self.rows * self.widest if self.experts == 1 and self.widest <= hidden else 0

    @property
    def behind(self) -> bool:
        """Whether what is missing is summed up behind the matrices (see `objective.Drift`)."""
        return self.rows <= self.columns

    def share(self, processes: int) -> Group:
        """What one of so many processes solves, about; see `division.divide`."""
        if self.experts >= processes:
            return replace(self, experts=-(-self.experts // processes))
        rows = -(-self.rows // processes)
        return replace(self, rows=rows, widest=min(self.widest, rows))


@dataclass(frozen=True)
class Shape:
    """What of a model matters.

    Attributes:
        blocks: decoder blocks.
        block_bytes: of the largest of them.
        rest_bytes: of everything outside them.
        groups: of the largest block, in the order in which they are solved.
        hidden: width of the hidden states.
        vocabulary: width of the logits.
        itemsize: bytes of a weight.
        running: bytes of one in the dtype in which blocks run, and of a number of a hidden state.
        judging: bytes of one in the dtype in which the CPU compares logits.
        heads: of attention.
        eager: whether attention holds the probabilities of all pairs of tokens.
    """

    blocks: int
    block_bytes: int
    rest_bytes: int
    groups: tuple[Group, ...]
    hidden: int
    vocabulary: int
    itemsize: int
    running: int
    judging: int
    heads: int
    eager: bool

    def run(self, size: int) -> int:
        """Bytes of a copy that runs, of weights of so many."""
        return size * self.running // self.itemsize


@dataclass(frozen=True)
class Job:
    """How it shall be done.

    Attributes:
        tokens: of calibration text in this process.
        window: tokens of one window.
        batch: tokens that go through a block at once.
        kind: of solver: rounding, rounding on searched grids, GPTQ, GPTQ and descent, or GPTQ with
            code books.
        match: whether the full-precision stream is carried along.
        felt: tokens on which it is measured how the loss feels the outputs of linears.
        parts: that matrices are then solved in.
        again: sweeps of coordinate descent when the parts are visited again.
        awq: whether channels are scaled.
        lean: whether hidden states are kept in files.
        scan: whether the whole model is run backwards first, to allocate an average of bits.
        head: whether the output layer is quantized too.
        embeddings: whether the input embeddings are.
        tuning: steps of tuning all scales in the end.
        step: tokens of one of them.
        looks: at held-out text before, between and after them.
        ahead: whether the next block is read while one is worked on.
        group: weights that share a scale; -1 = a row.
        symmetric: whether there are no zero points.
        trials: grids per group that GPTQ tries in earnest.
        processes: that share the text and the work.
    """

    tokens: int
    window: int
    batch: int
    kind: Kind
    match: bool = False
    felt: int = 0
    parts: int = 1
    again: int = 0
    awq: bool = False
    lean: bool = False
    scan: bool = False
    head: bool = False
    embeddings: bool = False
    tuning: int = 0
    step: int = 0
    looks: int = 0
    ahead: bool = False
    group: int = 128
    symmetric: bool = True
    trials: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Phase:
    """What is held at once at the fullest moment of a part of a run, in bytes by name.

    Attributes:
        name: of the part.
        device: on the device that calibrates.
        host: in memory of the CPU, whatever the device.
        mapped: pages of files, which the system takes back when it needs room.
    """

    name: str
    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    mapped: dict[str, int] = field(default_factory=dict)

    @property
    def on_device(self) -> int:
        return sum(self.device.values())

    @property
    def on_host(self) -> int:
        return sum(self.host.values())

    @property
    def of_files(self) -> int:
        return sum(self.mapped.values())
