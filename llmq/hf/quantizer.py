"""The quantizer that transformers drives while it loads and saves a model.

    LlmqConfig       what `quantization_config=` takes, and what a loaded model's config carries
    LlmqQuantizer    packs the skeleton before loading, or rounds each weight as it arrives
    attach           makes a model that was quantized in memory the same thing as a loaded one

The name "llmq" exists only in memory: on disk there is only compressed-tensors, which other
engines know. Without llmq a private name would load random weights with no more than a warning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.errors import SchemeError
from llmq.formats import compressed_tensors
from llmq.formats.layouts import Layout, TensorFiles, layout_of, packed_shapes, resolved
from llmq.hf.foreign import is_repacking, loading_conversions
from llmq.hf.names import checkpoint_config
from llmq.hf.rounding import RoundToNearest, chosen_parameters
from llmq.hf.skeleton import pack_skeleton, tensor_shapes
from llmq.nn import (
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    SuperBlockLinear,
    UnpackedLinear,
    packed_modules,
    prepare,
)
from llmq.scheme import QuantScheme

# transformers 5.17 has no `copy`. There, patterns of key names also match suffixed names, and
# tensors whose key was renamed keep the dtype they have in the file.
SUFFIXES_MATCH = not hasattr(WeightConverter, "copy")


class LlmqConfig(QuantizationConfigMixin):
    """Quantize a full-precision checkpoint while it loads, by round to nearest.

    `AutoModelForCausalLM.from_pretrained(path, quantization_config=LlmqConfig(bits=4))`

    Args:
        bits, group_size, symmetric: see `QuantScheme`.
        skip: modules that stay in full precision: names or the ends of names, with shell
            wildcards, as in `quantize.Recipe`.
        lm_head: whether the output head is quantized too.
        checkpoint: a `quantization_config` from a config.json (compressed-tensors, GPTQ or AWQ);
            then the rest is not used.

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
        """What a saved config.json holds: compressed-tensors, but for what that cannot hold."""
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
        self.repacked: Layout | None = None  # of a checkpoint of another tool
        self.ordered = False  # whether it keeps inputs in an order that cannot be saved
        self.saving_conversions: list[Any] = []

    def is_serializable(self) -> bool:  # type: ignore[override]
        return not self.ordered

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        return True  # adapters beside packed weights, see llmq.peft

    @property
    def is_compileable(self) -> bool:
        return True

    def get_weight_conversions(self) -> list[Any]:
        return []

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None):
        original = weight_conversions
        if not SUFFIXES_MATCH:
            weight_conversions = super().update_weight_conversions(weight_conversions, model)
        if self.repacked is None:
            return weight_conversions
        self.saving_conversions = list(weight_conversions)
        return loading_conversions(original, self.repacked)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None):
        if is_repacking(converter):
            return None  # the operation reads the tensors as they are in the file
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            layout = layout_of(config.checkpoint or {})
            shapes = tensor_shapes(kwargs.get("checkpoint_files"))
            if layout.method != compressed_tensors.METHOD:
                files = TensorFiles(kwargs["checkpoint_files"])
                self.repacked = layout = resolved(layout, files)
                shapes = packed_shapes(layout, files)
                self.ordered = any(key.endswith(".weight_order") for key in shapes)
            pack_skeleton(model, layout.config, shapes)
        else:
            self.to_round = chosen_parameters(model, config.scheme, config.skip, config.lm_head)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.to_round

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if param_name in self.to_round:
            return self.quantization_config.scheme.bits_per_weight(param.shape[-1]) / 8
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return RoundToNearest(self.quantization_config.scheme)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if SUFFIXES_MATCH:
            _cast(model, model.config.dtype)
        for module in model.modules():
            if isinstance(module, PackedLinear | PackedExperts | PackedEmbedding | UnpackedLinear):
                module.requires_grad_(False)
        prepare(model)
        if self.repacked is not None:
            used = {id(t) for t in model._weight_conversions}
            model._weight_conversions = [
                t
                for t in self.saving_conversions
                if id(t) in used or isinstance(t, WeightConverter)
            ]
        if not self.pre_quantized or (self.repacked is not None and not self.ordered):
            attach(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # as transformers 5.17 leaves it in a config that was saved
            dtype = getattr(torch, dtype)
        assert dtype is None or isinstance(dtype, torch.dtype)
        for name, module in list(packed_modules(model)):
            if isinstance(module, PackedExperts):
                raise SchemeError(f"{name}: stacked experts cannot be dequantized in place.")
            linear = nn.Linear(module.in_features, module.out_features, False, device="meta")
            own = model.dtype if isinstance(module, SuperBlockLinear) else None
            linear.weight = nn.Parameter(module.dequantize(dtype or own), requires_grad=False)
            linear.bias = module.bias  # type: ignore[assignment]
            model.set_submodule(name, linear)
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedEmbedding):
                model.set_submodule(name, module.dense(dtype))
        return model


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Give every parameter the dtype the model was asked for, except what must stay float32."""
    kept = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def convert_packed(model: Any) -> LlmqQuantizer:
    """Let the conversions from the names of `model` to those of its files know packed tensors."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not (isinstance(quantizer, LlmqQuantizer) and quantizer.pre_quantized):
        quantizer = LlmqQuantizer(LlmqConfig(), pre_quantized=True)
        transforms = getattr(model, "_weight_conversions", None)
        if transforms is None:
            transforms = get_model_conversion_mapping(model, add_legacy=False)
            transforms = [t for t in transforms if not isinstance(t, PrefixChange)]
        model._weight_conversions = quantizer.update_weight_conversions(transforms, model)
        model.hf_quantizer = quantizer
    return quantizer


def attach(model: Any) -> None:
    """Make `model`, whose modules were packed in memory, what loading it would have made it.

    Afterwards `save_pretrained` writes the packed checkpoint and its config. Call it again after
    packing more modules.

    Raises:
        SchemeError: the model has no packed module.
    """
    quantizer = convert_packed(model)
    if isinstance(model.get_output_embeddings(), PackedLinear | UnpackedLinear):
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    config = LlmqConfig(checkpoint=checkpoint_config(model))
    quantizer.quantization_config = config
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
