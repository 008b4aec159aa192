"""The layouts that llmq reads, behind one face: what a checkpoint's files and config.json mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmq.codebook import CodebookScheme
from llmq.errors import FormatError
from llmq.formats import awq, codebook, compressed_tensors, gptq, superblocks
from llmq.formats.bits import words
from llmq.formats.compressed_tensors import CheckpointConfig
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.superblocks import SuperBlockScheme

Read = Callable[[str, Mapping[str, Tensor], QuantScheme], QuantizedWeight]


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some safetensors files, each read when it is asked for.

    Raises:
        FormatError: a file is no safetensors file.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise FormatError(f"{path}: damaged, or no safetensors file ({error}).") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, key: str) -> Tensor:
        return self._files[key].get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header."""
        return tuple(self._files[key].get_slice(key).get_shape())


@dataclass(frozen=True)
class Layout:
    """How one checkpoint is read.

    Attributes:
        method: its quant_method.
        config: the schemes of its modules.
        suffixes: of the tensors of one module; the first one holds the codes.
        read: module name, tensors, scheme -> value.
        read_zeros: the same -> zeros (N, K/G), where config.json cannot be trusted to say
            whether they are symmetric.
    """

    method: str
    config: CheckpointConfig
    suffixes: tuple[str, ...]
    read: Read
    read_zeros: Callable[[str, Mapping[str, Tensor], QuantScheme], Tensor] | None = None

    def modules(self, keys: Iterable[str]) -> dict[str, QuantScheme]:
        """Packed module -> scheme.

        Raises:
            FormatError: a module that config.json has no scheme for.
        """
        ending = f".{self.suffixes[0]}"
        found: dict[str, QuantScheme] = {}
        for name in (key.removesuffix(ending) for key in keys if key.endswith(ending)):
            scheme = self.config.scheme_for(name)
            if scheme is None:
                raise FormatError(f"{name} is packed, but config.json gives it no scheme.")
            found[name] = scheme
        return found

    def shape(self, name: str, tensors: TensorFiles, scheme: QuantScheme) -> tuple[int, int]:
        """(N, K) of a packed module, from headers."""
        if self.method == compressed_tensors.METHOD:
            N, K = tensors[f"{name}.weight_shape"].tolist()
            return N, K
        key = f"{name}.qweight"
        layout = gptq if self.method == gptq.METHOD else awq
        return layout.shape(name, {key: tensors.shape(key)}, scheme)

    def is_ordered(self, name: str, tensors: TensorFiles, scheme: QuantScheme) -> bool:
        """Whether the module's inputs are permuted (see `QuantizedWeight.order`).

        Raises:
            FormatError: its g_idx makes no sense.
        """
        key = f"{name}.g_idx"
        if self.method != gptq.METHOD or key not in tensors:
            return False
        gptq_shape = self.shape(name, tensors, scheme)
        if tensors.shape(key) != gptq_shape[1:]:
            raise FormatError(f"{key}: {tensors.shape(key)}, expected {gptq_shape[1:]}.")
        return gptq.is_ordered(name, tensors[key].long(), scheme)


def layout_of(quantization_config: Mapping[str, Any]) -> Layout:
    """How a checkpoint with this `quantization_config` is read.

    Raises:
        FormatError: it is none that llmq reads.
    """
    method = quantization_config.get("quant_method")
    if method == gptq.METHOD:
        version = gptq.version_of(quantization_config)
        return Layout(
            method,
            gptq.parse_config(quantization_config),
            gptq.SUFFIXES,
            partial(gptq.read, version=version),
            partial(gptq.read_zeros, version=version),
        )
    if method == awq.METHOD:
        config = awq.parse_config(quantization_config)
        return Layout(method, config, awq.SUFFIXES, awq.read, awq.read_zeros)
    config = compressed_tensors.parse_config(quantization_config)
    suffixes = (*compressed_tensors.SUFFIXES, *codebook.OWN)
    return Layout(compressed_tensors.METHOD, config, suffixes, _read)


def _read(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    if isinstance(scheme, CodebookScheme):
        return codebook.read(name, tensors, scheme)
    if isinstance(scheme, SuperBlockScheme):
        return superblocks.read(name, tensors, scheme)
    return compressed_tensors.read(name, tensors, scheme)


def resolved(layout: Layout, tensors: TensorFiles) -> Layout:
    """`layout` with symmetric schemes if the zeros of all modules are in the middle.

    Raises:
        FormatError: zeros are missing or contradict config.json.
    """
    if layout.read_zeros is None:
        return layout
    symmetric = all(
        bool((layout.read_zeros(name, tensors, scheme) == scheme.middle).all())
        for name, scheme in layout.modules(tensors).items()
    )
    groups = ((replace(s, symmetric=symmetric), names) for s, names in layout.config.groups)
    return replace(layout, config=CheckpointConfig(tuple(groups), layout.config.ignore))


def packed_shapes(layout: Layout, tensors: TensorFiles) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that a checkpoint would have in compressed-tensors' layout.

    `weight_order` (K,) stands beside the modules whose inputs are permuted.

    Raises:
        FormatError: tensors and config.json contradict each other.
    """
    schemes = layout.modules(tensors)
    packed = {f"{name}.{suffix}" for name in schemes for suffix in layout.suffixes}
    shapes = {key: tensors.shape(key) for key in tensors if key not in packed}
    for name, scheme in schemes.items():
        N, K = layout.shape(name, tensors, scheme)
        if not scheme.divides(K):
            raise FormatError(
                f"{name}: in_features={K} is not divisible by group_size={scheme.group_size}."
            )
        groups = K // scheme.group_width(K)
        shapes[f"{name}.weight_packed"] = (N, words(K, scheme.bits))
        shapes[f"{name}.weight_scale"] = (N, groups)
        shapes[f"{name}.weight_shape"] = (2,)
        if not scheme.symmetric:
            shapes[f"{name}.weight_zero_point"] = (words(N, scheme.bits), groups)
        if layout.is_ordered(name, tensors, scheme):
            shapes[f"{name}.weight_order"] = (K,)
    return shapes
