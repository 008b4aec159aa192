"""A quantized checkpoint on disk, opened to be read one matrix at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.codebook import CodebookScheme
from llmq.errors import FormatError, SchemeError, SourceError
from llmq.formats.layouts import Layout, TensorFiles, layout_of, resolved
from llmq.hf.saving import original_folder
from llmq.report import read_json
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.shards import weight_files


@dataclass(frozen=True)
class Opened:
    """A quantized checkpoint on disk.

    Attributes:
        folder: where it is.
        config: its config.json.
        layout: how its modules are read.
        tensors: of all its files.
        schemes: module -> scheme.
    """

    folder: Path
    config: dict[str, Any]
    layout: Layout
    tensors: TensorFiles
    schemes: dict[str, QuantScheme]

    def read(self, name: str) -> QuantizedWeight:
        """One matrix."""
        return self.layout.read(name, self.tensors, self.schemes[name])

    @property
    def embeddings(self) -> dict[str, QuantScheme]:
        """Input embeddings with one byte per weight -> scheme."""
        stored = self.layout.config.embeddings
        return {name: s for name, s in stored.items() if f"{name}.weight" in self.tensors}

    @property
    def symmetric(self) -> bool:
        """Whether no matrix has zero points of its own."""
        return all(scheme.symmetric for scheme in self.schemes.values())

    def dense(self) -> list[str]:
        """Keys of everything that is not packed."""
        packed = {f"{n}.{suffix}" for n in self.schemes for suffix in self.layout.suffixes}
        return [key for key in self.tensors if key not in packed]

    def dense_matrices(self) -> list[str]:
        """Modules with a matrix in full precision; without embeddings and the output layer, which
        are told by their size: as many rows as the vocabulary."""
        vocabulary = self.config.get("vocab_size")
        return [
            key.removesuffix(".weight")
            for key in self.dense()
            if key.endswith(".weight")
            and len(shape := self.tensors.shape(key)) == 2
            and shape[0] != vocabulary
        ]


def open_checkpoint(src: str | os.PathLike[str]) -> Opened:
    """Open a quantized checkpoint: folder or Hub name.

    Raises:
        SourceError: there is none, or it is not quantized.
        FormatError: it is damaged, or in a layout that llmq does not read.
        SchemeError: it stacks experts in one tensor, or its weights are in code books.
    """
    folder = original_folder(os.fspath(src))
    config = read_json(folder / "config.json")
    stated = config.get("quantization_config")
    if not stated:
        raise SourceError(f"{src}: not quantized. Run llmq quantize first.")
    tensors = TensorFiles(weight_files(folder))
    layout = resolved(layout_of(stated), tensors)
    schemes = layout.modules(tensors)
    if stacked := [key for key in tensors if key.endswith("_proj_packed")]:
        raise SchemeError(
            f"{stacked[0]}: experts are stacked in one tensor, which only compressed-tensors holds."
        )
    if books := [name for name, scheme in schemes.items() if isinstance(scheme, CodebookScheme)]:
        raise SchemeError(
            f"{books[0]}: in a code book, which no other layout holds. Quantize the original again "
            "without --codebook."
        )
    if not schemes:
        raise FormatError(f"{src}: config.json says quantized, but no packed module is there.")
    return Opened(folder, config, layout, tensors, schemes)
