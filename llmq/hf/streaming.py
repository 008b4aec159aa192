"""A checkpoint on disk as a model whose weights come when they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llmq import shards
from llmq.blocks import decoder_blocks
from llmq.errors import FormatError, SourceError
from llmq.hf.quantizer import convert_packed
from llmq.nn import PackedExperts, is_stacked_experts
from llmq.scheme import QuantScheme


class StoredModel:
    """A full-precision checkpoint behind a model on the meta device.

    Attributes:
        model: parameters on meta, buffers that no file holds in memory.
        folder: where its files are.
        files: its safetensors files.
        keys: the names of all tensors in them.
        prefix, blocks: the model's list of decoder blocks, always on meta, and its name.

    Args:
        folder: with config.json and safetensors files.

    Raises:
        SourceError: no such files, or weights of another shape than the config says.
        FormatError: weights that are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = shards.need_safetensors(folder)
        self._where = {key: e for path in self.files for key, e in shards.entries(path).items()}
        self._stats = {path: _stat(path) for path in self.files}
        self.keys = self._where.keys()
        self.model: Any = _skeleton(folder, self._where)
        self.prefix, self.blocks = decoder_blocks(self.model)
        self._empty = tuple(self.blocks)  # while calls are recorded, others are in their place
        self._parts = self._assign()
        _expect_packed(self.model)

    def block(self, index: int) -> nn.Module:
        """A decoder block with its weights, mapped from the files where they lie there as they are.

        Every call gives another one: what is done to it, or that it is dropped, changes nothing.

        Raises:
            SourceError: it cannot be read.
            FormatError: a file has changed since this model was opened.
        """
        block = copy.deepcopy(self._empty[index])
        prefix = f"{self.prefix}.{index}."
        try:
            for name, tensor in self._read(index):
                _put(block, name.removeprefix(prefix), tensor)
        except (OSError, SafetensorError) as error:
            raise SourceError(
                f"{self.folder}: {prefix}* cannot be read: {error}. Is this folder still there? "
                "The same command goes on when it is."
            ) from error
        return block.eval()

    @contextmanager
    def outer(self) -> Iterator[None]:
        """The model with the weights of everything but the blocks, for the length of a `with`."""
        tied = {id(p): p for p in self.model.parameters()}
        homes: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                homes.setdefault(id(parameter), []).append((module, name))
        filled = []
        for name, tensor in self._read(None):
            parent, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(parent)
            empty = module._parameters.get(leaf)
            if empty is None or not empty.is_meta:  # a buffer, or a layer that was packed
                if leaf in module._buffers:
                    module._buffers[leaf] = tensor
                continue
            parameter = nn.Parameter(tensor, requires_grad=False)
            for home, own in homes[id(empty)]:
                home._parameters[own] = parameter
                filled.append((home, own, tied[id(empty)]))
        try:
            yield
        finally:
            for home, own, empty in filled:
                if own in home._parameters:
                    home._parameters[own] = empty

    def _assign(self) -> dict[int | None, dict[str, list[tuple[str, str | None]]]]:
        """Part -> its parameters -> the keys (and converters' patterns) that they are made of.

        A part is the number of a block, or None for the rest.
        """
        own = self.model.state_dict()
        self._dtypes = {name: tensor.dtype for name, tensor in own.items()}
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._converters = {p: c for c in converters for p in c.source_patterns}
        prefix = self.model.base_model_prefix
        parts: dict[int | None, dict[str, list[tuple[str, str | None]]]] = {}
        for key in sorted(self.keys, key=shards.natural):
            name, pattern = rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name, pattern = rename_source_key(key, [], [], prefix, own)
            if name in own:
                number = name.removeprefix(f"{self.prefix}.").partition(".")[0]
                inside = name.startswith(f"{self.prefix}.") and number.isdigit()
                part = parts.setdefault(int(number) if inside else None, {})
                part.setdefault(name, []).append((key, pattern))
        return parts

    def _read(self, part: int | None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a part under the model's names, converted, in the model's dtypes.

        Raises:
            FormatError: a file has changed since this model was opened.
        """
        for name, sources in self._parts.get(part, {}).items():
            with ExitStack() as stack:
                paths = {self._where[key].path for key, _ in sources}
                for path in paths:
                    if _stat(path) != self._stats[path]:
                        raise FormatError(f"{path}: has changed while the model was quantized.")
                files = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
                pattern = sources[0][1]
                if pattern is None:
                    mapping: Any = WeightRenaming(sources[0][0], name)
                else:
                    mapping = copy.deepcopy(self._converters[pattern])
                for key, pattern in sources:
                    tensor = files[self._where[key].path].get_tensor(key).to(self._dtypes[name])
                    mapping.add_tensor(name, key, pattern or key, tensor)
            made = mapping.convert(name, model=self.model, config=self.model.config)
            for target, value in made.items():
                yield target, value[0] if isinstance(value, list) else value


def _skeleton(folder: Path, where: Mapping[str, shards.Entry]) -> Any:
    """The model on meta, after transformers has checked that every weight is there and fits.

    It gets stand-ins of the right shapes: from files, it would read all of them, to no end.
    """
    stand_ins = {
        key: torch.empty(entry.shape, dtype=shards.DTYPES[entry.dtype], device="meta")
        for key, entry in where.items()
    }
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=stand_ins,
            dtype="auto",
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"{folder}: weights cannot be loaded: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise FormatError(f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}.")
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise SourceError(
            f"{folder}: {name} has shape {tuple(found)}, but config.json says {tuple(expected)}."
        )
    # What the constructor computes, such as rotary frequencies, must be there in earnest.
    with init_empty_weights(include_buffers=False):
        twin = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    for name, buffer in twin.named_buffers():
        _put(model, name, buffer)
    return model.eval()


def _expect_packed(model: Any) -> None:
    """Let `model`, before anything is packed, name packed tensors as its files will."""
    packed = copy.deepcopy(model)
    row = QuantScheme(group_size=-1)
    for name, module in list(packed.named_modules()):
        if is_stacked_experts(module):
            packed.set_submodule(name, PackedExperts(module, row, row))
    model.hf_quantizer = convert_packed(packed)
    model._weight_conversions = packed._weight_conversions


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer of `module`, which may be on meta."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _stat(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
