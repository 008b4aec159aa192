"""The quantizer that transformers drives while it loads and saves a model.

    LlmqConfig       what `quantization_config=` takes, and what a loaded model's config carries
    LlmqQuantizer    packs the skeleton before loading, or rounds each weight as it arrives
    attach           makes a model that was quantized in memory the same thing as a loaded one

Which modules are packed is read from the checkpoint's own keys, in which scheme from its
config.json; nothing is guessed from the architecture. The name "llmq" exists only in memory: on
disk there is only compressed-tensors, which other engines know.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.errors import FormatError, SchemeError
from llmq.formats import compressed_tensors
from llmq.nn import (
    STACKS,
    PackedExperts,
    PackedLinear,
    expert_weight,
    is_stacked_experts,
    packed_modules,
)
from llmq.scheme import QuantizedWeight, QuantScheme, grouped, minmax_grid, round_to_grid

Shapes = Mapping[str, tuple[int, ...]]


class LlmqConfig(QuantizationConfigMixin):
    """Quantize a full-precision checkpoint while it loads, by round to nearest.

    `AutoModelForCausalLM.from_pretrained(path, quantization_config=LlmqConfig(bits=4))`

    Args:
        bits, group_size, symmetric: see `QuantScheme`.
        skip: modules that stay in full precision: names or the ends of names, with shell
            wildcards, as in `quantize.Recipe`.
        lm_head: whether the output head is quantized too.
        checkpoint: a `quantization_config` from a config.json; then the rest is not used.

    Raises:
        SchemeError: a scheme that does not exist.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = False,
        skip: Iterable[str] = (),
        lm_head: bool = False,
        checkpoint: dict[str, Any] | None = None,
    ) -> None:
        self.quant_method = "llmq"  # type: ignore[assignment]
        self.scheme = QuantScheme(bits, group_size, symmetric)
        self.skip = tuple(skip)
        self.lm_head = lm_head
        self.checkpoint = checkpoint

    def to_dict(self) -> dict[str, Any]:
        """What a saved config.json holds: always compressed-tensors."""
        if self.checkpoint is None:
            return compressed_tensors.config({self.scheme: ["Linear"]}, [])
        return copy.deepcopy(self.checkpoint)


class LlmqQuantizer(HfQuantizer):
    """See the module's docstring; the methods are called by transformers."""

    requires_calibration = False
    # The loader stacks per-expert tensors, and splits them again on saving, suffix by suffix.
    serialized_names = {"weight": ["weight", *compressed_tensors.SUFFIXES]}  # noqa: RUF012
    quantization_config: LlmqConfig

    def __init__(self, quantization_config: LlmqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.to_round: frozenset[str] = frozenset()  # parameters that are rounded as they arrive

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def get_weight_conversions(self) -> list[Any]:
        return []

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None):
        # transformers 5.17 has no `copy`: its patterns match suffixed names by themselves.
        if not hasattr(WeightConverter, "copy"):
            return weight_conversions
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            checkpoint = self.quantization_config.checkpoint or {}
            config = compressed_tensors.parse_config(checkpoint)
            pack_skeleton(model, config, _shapes(kwargs.get("checkpoint_files")))
        else:
            self.to_round = _chosen_parameters(model, self.quantization_config)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.to_round

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if param_name in self.to_round:
            return self.quantization_config.scheme.bits_per_weight(param.shape[-1]) / 8
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return RoundToNearest(self.quantization_config.scheme)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for _, module in packed_modules(model):
            module.requires_grad_(False)
            # Offloaded weights are on meta between calls: those layers keep the torch path.
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.prepare()
        if not self.pre_quantized:
            attach(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(packed_modules(model)):
            if isinstance(module, PackedExperts):
                raise SchemeError(f"{name}: stacked experts cannot be dequantized in place.")
            linear = nn.Linear(module.in_features, module.out_features, False, device="meta")
            linear.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
            linear.bias = module.bias  # type: ignore[assignment]
            model.set_submodule(name, linear)
        return model


# Loading a packed checkpoint


def _shapes(files: list[str] | None) -> Shapes:
    """Key -> shape of every tensor in `files`."""
    from safetensors import safe_open

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


def pack_skeleton(
    model: PreTrainedModel, config: compressed_tensors.CheckpointConfig, shapes: Shapes
) -> None:
    """Replace the modules of `model` (on meta) that a checkpoint with `shapes` packs.

    Raises:
        FormatError: config.json and the files disagree, or a file does not fit the model.
    """
    stacks: dict[str, dict[str, QuantScheme]] = {}
    names = packed_parameters(model, shapes)
    for parameter, sources in names.items():
        scheme = _common_scheme(parameter, sources, config)
        name, _, attribute = parameter.rpartition(".")
        module = model.get_submodule(name)
        dtype = module.get_parameter(attribute).dtype
        if attribute in STACKS and is_stacked_experts(module):
            stacks.setdefault(name, {})[attribute] = scheme
        elif attribute == "weight" and isinstance(module, nn.Linear | Conv1D):
            N, K = _out_in(module)
            _check_divides(name, K, scheme)
            bias = module.bias is not None
            _put(model, name, PackedLinear(scheme, K, N, bias, dtype, "meta"))
        else:
            raise FormatError(f"{sources[0]}: packed, but {type(module).__name__} cannot be.")
    for name, schemes in stacks.items():
        if len(schemes) < len(STACKS):
            raise FormatError(f"{name}: only {', '.join(schemes)} is packed; llmq needs both.")
        experts = model.get_submodule(name)
        for stack, scheme in schemes.items():
            _check_divides(f"{name}.{stack}", expert_weight(experts, stack, 0).shape[1], scheme)
        _put(model, name, PackedExperts(experts, *(schemes[stack] for stack in STACKS)))
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}
    for parameter, sources in names.items():
        _check_tensors(parameter, sources, expected, shapes)


def _put(model: PreTrainedModel, name: str, packed: nn.Module) -> None:
    """Replace the module `name`, and keep transformers from initialising what is gone.

    Some models (GPT-2) initialise a child's `weight` from the parent's side.
    """
    model.set_submodule(name, packed)
    parent = model.get_submodule(name.rpartition(".")[0])
    if not parent._parameters and not parent._buffers:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def _common_scheme(
    parameter: str, sources: list[str], config: compressed_tensors.CheckpointConfig
) -> QuantScheme:
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
    for suffix in ("_packed", "_scale", "_zero_point", "_shape"):
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


def _out_in(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(N, K); Conv1D stores its weight as (K, N)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx


# Quantizing while loading


def _chosen_parameters(model: PreTrainedModel, config: LlmqConfig) -> frozenset[str]:
    """The parameters to round: every linear layer and stack of experts not skipped.

    Raises:
        SchemeError: the group size does not divide some of them.
    """
    head = model.get_output_embeddings()
    chosen: dict[str, int] = {}
    for name, module in model.named_modules():
        if any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in config.skip):
            continue
        if isinstance(module, nn.Linear | Conv1D) and (module is not head or config.lm_head):
            chosen[f"{name}.weight"] = _out_in(module)[1]
        elif is_stacked_experts(module):
            widths = {stack: expert_weight(module, stack, 0).shape[1] for stack in STACKS}
            chosen |= {f"{name}.{stack}": width for stack, width in widths.items()}
    bad = {name: width for name, width in chosen.items() if not config.scheme.divides(width)}
    if bad:
        fits = [size for size in (128, 64, 32) if all(w % size == 0 for w in bad.values())]
        listed = ", ".join(f"{name} ({width})" for name, width in bad.items())
        advice = f"Use group_size={fits[0]}" if fits else "Use group_size=-1"
        raise SchemeError(
            f"group_size={config.scheme.group_size} does not divide the input width of {listed}. "
            f"{advice}, or skip these modules."
        )
    if head is not None and config.lm_head and model.config.tie_word_embeddings:
        raise SchemeError("lm_head=True: the head is tied to the embeddings, so it has no weight.")
    return frozenset(chosen)


def _round_to_nearest(W: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """RTN of W (N, K), scales in W's dtype."""
    scale, zero = minmax_grid(grouped(W.float(), scheme), scheme, W.dtype)
    return round_to_grid(W, scale, zero, scheme, W.dtype)


class RoundToNearest(ConversionOps):
    """Rounds one weight as it arrives and puts the packed module in the dense one's place."""

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        missing_keys.discard(full_layer_name)
        name, _, attribute = full_layer_name.rpartition(".")
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear | Conv1D):
            W = tensor if isinstance(module, nn.Linear) else tensor.T
            packed = PackedLinear.from_quantized(_round_to_nearest(W, self.scheme))
        else:
            # Both stacks are needed before the module can be replaced.
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
            if any(module.get_parameter(stack).is_meta for stack in STACKS):
                return {}
            packed = PackedExperts.from_quantized(
                module, *(_rounded_experts(module, stack, self.scheme) for stack in STACKS)
            )
        tensors = {f"{name}.{key}": value for key, value in packed.named_parameters()}
        for key, parameter in module.named_parameters():  # biases, loaded already or still to come
            if key == "bias" or key.endswith("_bias"):
                packed.register_parameter(key, parameter)
                tensors.pop(f"{name}.{key}", None)
        _put(model, name, packed)
        return tensors


def _rounded_experts(experts: nn.Module, stack: str, scheme: QuantScheme) -> list[QuantizedWeight]:
    count = len(experts.get_parameter(stack))
    return [_round_to_nearest(expert_weight(experts, stack, i), scheme) for i in range(count)]


# A model that was quantized in memory


def attach(model: PreTrainedModel) -> None:
    """Make `model`, whose modules were packed in memory, what loading it would have made it.

    Afterwards `save_pretrained` writes the packed checkpoint and its config. Does nothing to a
    model that was loaded packed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, LlmqQuantizer) and quantizer.pre_quantized:
        return
    quantizer = LlmqQuantizer(LlmqConfig(), pre_quantized=True)
    if isinstance(model.get_output_embeddings(), PackedLinear):
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [t for t in transforms if not isinstance(t, PrefixChange)]
    model._weight_conversions = quantizer.update_weight_conversions(transforms, model)
    quantizer.quantization_config.checkpoint = checkpoint_config(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config


def checkpoint_config(model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` for config.json of a model with packed modules.

    The scheme that most modules have is the group "Linear"; the others are named one by one.
    Names are those of the file, in which everything that other engines might take for a linear
    layer (routers too) and that is not packed is listed under `ignore`.
    """
    schemes: dict[QuantScheme, list[str]] = {}
    for name, module in packed_modules(model):
        linear = isinstance(module, PackedLinear)
        for stem, scheme in ({"weight": module.scheme} if linear else module.schemes).items():
            packed = {f"{name}.{stem}_packed": module.get_parameter(f"{stem}_packed")}
            schemes.setdefault(scheme, []).extend(_written(model, packed))
    if not schemes:
        raise SchemeError("The model has no packed module: quantize it first.")
    most = max(schemes, key=lambda scheme: len(schemes[scheme]))
    groups = {most: ["Linear"]} | {s: names for s, names in schemes.items() if s != most}
    head = _head(model)
    if head and isinstance(head[1], PackedLinear) and head[1].scheme == most:
        written = _written(model, {f"{head[0]}.weight_packed": head[1].weight_packed})
        groups[most] += [f"re:.*{name}" for name in sorted({head[0], *written})]
    return compressed_tensors.config(groups, _dense_names(model))


def _written(model: PreTrainedModel, tensors: dict[str, Tensor]) -> list[str]:
    """The names that the modules or stacks with these `tensors` have in the file."""
    keys = revert_weight_conversion(model, tensors)
    return [key.removesuffix("_packed").removesuffix(".weight") for key in keys]


def _head(model: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """The output embeddings and their name."""
    head = model.get_output_embeddings()
    return next(((name, module) for name, module in model.named_modules() if module is head), None)


def _dense_names(model: PreTrainedModel) -> list[str]:
    """Names, as in the file, of matrices that are neither packed nor embeddings.

    The head is also listed under its name in the model: engines differ in which one they ask for.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    dense = {
        key: value
        for key, value in model.named_parameters()
        if (key.endswith(".weight") and value.ndim == 2 and id(value) not in embeddings)
        or (key.endswith(STACKS) and value.ndim == 3)
    }
    head = _head(model)
    names = set()
    if head and not isinstance(head[1], PackedLinear):
        dense[f"{head[0]}.weight"] = head[1].get_parameter("weight")
        names.add(head[0])
    return sorted(names.union(_written(model, dense)))
