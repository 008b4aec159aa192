"""Before loading: put packed modules into a model that is still on meta.

Which modules are packed is read from the checkpoint's own keys, in which scheme from its
config.json; nothing is guessed from the architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmq.errors import FormatError
from llmq.formats import codebook, compressed_tensors
from llmq.formats.compressed_tensors import CheckpointConfig
from llmq.nn import (
    STACKS,
    PackedEmbedding,
    PackedExperts,
    expert_weight,
    is_stacked_experts,
    linear_like,
)
from llmq.scheme import QuantScheme

Shapes = Mapping[str, tuple[int, ...]]


def tensor_shapes(files: list[str] | None) -> Shapes:
    """Key -> shape of every tensor in `files`."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise FormatError("A packed checkpoint must be read from safetensors files.")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    return shapes


def packed_parameters(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, list[str]]:
    """Parameter of the dense `model` -> the names under which a file with `keys` packs it.

    A linear layer has one name (`...q_proj.weight`); a stack of experts has one per expert and
    matrix, or a single one where the file stacks them as the model does. Names that the model
    has no parameter for are left out (the loader reports them).
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    own = model.state_dict()
    found: dict[str, list[str]] = {}
    for key in keys:
        if not key.endswith("_packed"):
            continue
        name = key.removesuffix("_packed")
        prefix = model.base_model_prefix
        parameter, _ = rename_source_key(name, renamings, converters, prefix, own)
        if parameter not in own:
            parameter, _ = rename_source_key(name, [], [], prefix, own)
        if parameter in own:
            found.setdefault(parameter, []).append(name)
    return found


def pack_skeleton(model: PreTrainedModel, config: CheckpointConfig, shapes: Shapes) -> None:
    """Replace the modules of `model` (on meta) that a checkpoint with `shapes` packs.

    Raises:
        FormatError: config.json and the files disagree, or a file does not fit the model.
    """
    stacks: dict[str, dict[str, QuantScheme]] = {}
    _pack_embeddings(model, config, shapes)
    names = packed_parameters(model, shapes)
    for parameter, sources in names.items():
        scheme = _common_scheme(parameter, sources, config)
        name, _, attribute = parameter.rpartition(".")
        module = model.get_submodule(name)
        dtype = module.get_parameter(attribute).dtype
        if attribute in STACKS and is_stacked_experts(module):
            stacks.setdefault(name, {})[attribute] = scheme
        elif attribute == "weight" and isinstance(module, nn.Linear | Conv1D):
            N, K = out_in(module)
            _check_divides(name, K, scheme)
            bias = module.bias is not None
            ordered = f"{sources[0]}_order" in shapes
            put(model, name, linear_like(scheme, K, N, bias, dtype, ordered))
        else:
            raise FormatError(f"{sources[0]}: packed, but {type(module).__name__} cannot be.")
    for name, schemes in stacks.items():
        if len(schemes) < len(STACKS):
            raise FormatError(f"{name}: only {', '.join(schemes)} is packed; llmq needs both.")
        experts = model.get_submodule(name)
        for stack, scheme in schemes.items():
            _check_divides(f"{name}.{stack}", expert_weight(experts, stack, 0).shape[1], scheme)
        gate_up, down = (schemes[stack] for stack in STACKS)
        ordered = [s for s in STACKS if any(f"{n}_order" in shapes for n in names[f"{name}.{s}"])]
        put(model, name, PackedExperts(experts, gate_up, down, ordered=ordered))
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}
    for parameter, sources in names.items():
        _check_tensors(parameter, sources, expected, shapes)


def _pack_embeddings(model: PreTrainedModel, config: CheckpointConfig, shapes: Shapes) -> None:
    """Replace the input embeddings if `config` names them.

    Raises:
        FormatError: it names something else, or a file does not fit.
    """
    stored = {n: s for n, s in config.embeddings.items() if f"{n}.weight" in shapes}
    if config.embeddings and not stored:
        name = next(iter(config.embeddings))
        raise FormatError(f"{name}.weight is missing: the checkpoint is incomplete.")
    for parameter, [source] in packed_parameters(
        model, [f"{name}.weight_packed" for name in stored]
    ).items():
        scheme, name = stored[source.removesuffix(".weight")], parameter.removesuffix(".weight")
        table = model.get_submodule(name)
        if not isinstance(table, nn.Embedding):
            raise FormatError(
                f"{source}: stored with one byte per weight, but {type(table).__name__} is no "
                "embedding."
            )
        _check_divides(name, table.embedding_dim, scheme)
        packed = PackedEmbedding(scheme, table)
        for suffix, tensor in packed.named_parameters():
            key = source.removesuffix("weight") + suffix
            if shapes.get(key) != tuple(tensor.shape):
                raise FormatError(
                    f"{key}: {shapes.get(key, 'missing')} in the file does not fit "
                    f"{tuple(tensor.shape)} in the model."
                )
        put(model, name, packed)


def put(model: PreTrainedModel, name: str, packed: nn.Module) -> None:
    """Replace the module `name`, and keep transformers from initialising what is gone.

    Some models (GPT-2) initialise a child's `weight` from the parent's side.
    """
    model.set_submodule(name, packed)
    parent = model.get_submodule(name.rpartition(".")[0])
    if not parent._parameters and not parent._buffers:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def _common_scheme(parameter: str, sources: list[str], config: CheckpointConfig) -> QuantScheme:
    """The one scheme that `config` gives the tensors `sources`."""
    schemes = {config.scheme_for(source.removesuffix(".weight")) for source in sources}
    if len(schemes) > 1:
        raise FormatError(f"{parameter}: its experts have different schemes in config.json.")
    scheme = schemes.pop()
    if scheme is None:
        raise FormatError(
            f"{sources[0]}_packed is in the file, but no config group of config.json covers it."
        )
    return scheme


def _check_divides(name: str, in_features: int, scheme: QuantScheme) -> None:
    if not scheme.divides(in_features):
        raise FormatError(
            f"{name}: in_features={in_features} is not divisible by the group_size="
            f"{scheme.group_size} that config.json states."
        )


def _check_tensors(parameter: str, sources: list[str], expected: Shapes, found: Shapes) -> None:
    """Every tensor of `parameter` is in the file and adds up to the shape the model expects."""
    suffixes = (*compressed_tensors.SUFFIXES, *codebook.OWN)
    for suffix in (name.removeprefix("weight") for name in suffixes):
        if parameter + suffix not in expected:
            continue
        for source in sources:
            if source + suffix not in found:
                raise FormatError(f"{source}{suffix} is missing: the checkpoint is incomplete.")
        want = expected[parameter + suffix]
        shapes = [found[source + suffix] for source in sources]
        width = suffix == "_shape" or all(shape[-1] == want[-1] for shape in shapes)
        if not width or sum(map(math.prod, shapes)) != math.prod(want):
            raise FormatError(
                f"{sources[0]}{suffix}: {len(shapes)} x {shapes[0]} in the file does not fit "
                f"{want} in the model; config.json and the weights disagree."
            )


def out_in(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(N, K); Conv1D stores its weight as (K, N)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx
