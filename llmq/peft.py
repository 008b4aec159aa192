"""Train small adapters on top of packed weights, with the package `peft` (the way of QLoRA).

    get_peft_model          LoRA on a model whose linears are packed
    load_adapter            an adapter from a folder onto a packed model
    prepare_for_training    freeze the model, save memory by gradient checkpointing

Dettmers et al. 2023 (arXiv:2305.14314): the base stays quantized and frozen, gradients flow
through its dequantized weights into the adapters. The adapter folder is peft's own format.
Stacked experts take no adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmq.errors import FormatError, MissingPackageError, SchemeError, SourceError
from llmq.nn import PackedLinear, packed_modules

try:
    import peft
    from peft.tuners.lora import LoraLayer
except ModuleNotFoundError as error:
    raise MissingPackageError(
        "llmq.peft needs the package peft: pip install 'llmq-quant[peft]'"
    ) from error

_WEIGHTS = "adapter_model.safetensors"


class PackedLora(nn.Module, LoraLayer):
    """LoRA beside a `PackedLinear`: y = base(x) + scaling * B(A(dropout(x)))."""

    def __init__(
        self,
        base_layer: PackedLinear,
        adapter_name: str,
        config: peft.LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        if config.use_dora or config.lora_bias:
            raise SchemeError("Packed layers take plain LoRA: no use_dora, no lora_bias.")
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        return None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        place = device or self.get_base_layer().weight_packed.device  # type: ignore[union-attr]
        super()._move_adapter_to_device_of_base_layer(adapter_name, place)  # type: ignore[arg-type]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                A: Any = self.lora_A[name]
                B: Any = self.lora_B[name]
                low = A(self.lora_dropout[name](self._cast_input_dtype(x, A.weight.dtype)))
                y = y + (B(low) * self.scaling[name]).to(y.dtype)
        return y

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise SchemeError("An adapter cannot be merged into packed weights without rounding them.")

    def unmerge(self) -> None:
        raise SchemeError("Nothing was merged.")


def get_peft_model(model: Any, config: peft.LoraConfig, **kwargs: Any) -> peft.PeftModel:
    """`peft.get_peft_model` for a model with packed linears.

    Args:
        model: of `llmq.load`, or quantized in memory.
        config: a LoraConfig; `target_modules` None or "all-linear" takes every packed linear
            but the output layer.
        **kwargs: passed on.

    Raises:
        SchemeError: no packed linear, or a kind of LoRA that packed layers do not have.
    """
    names = packed_linears(model)
    if config.target_modules in (None, "all-linear"):
        config.target_modules = set(names)  # type: ignore[assignment]
    config._register_custom_module({PackedLinear: PackedLora})
    return peft.get_peft_model(model, config, **kwargs)  # type: ignore[return-value]


def load_adapter(model: Any, folder: str | Path, **kwargs: Any) -> peft.PeftModel:
    """An adapter, saved by `save_pretrained` or `llmq correct`, onto a packed model.

    Args:
        model: the packed model that it belongs to.
        folder: with adapter_config.json and adapter_model.safetensors.
        **kwargs: passed on to `peft.PeftModel.from_pretrained`, such as `is_trainable`.

    Raises:
        SourceError: no adapter there.
        FormatError: it belongs to another model: layers or shapes that this one does not have.
    """
    try:
        config: Any = peft.LoraConfig.from_pretrained(str(folder))
        with safe_open(Path(folder) / _WEIGHTS, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(f"{folder}: no LoRA adapter can be read there: {reason}") from error
    _check_shapes(model, shapes, folder)
    config._register_custom_module({PackedLinear: PackedLora})
    return peft.PeftModel.from_pretrained(model, str(folder), config=config, **kwargs)


def _check_shapes(model: Any, shapes: dict[str, tuple[int, ...]], folder: str | Path) -> None:
    """Every matrix of an adapter must fit a layer of the model."""
    layers = dict(model.named_modules())
    for key, shape in shapes.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        layer = layers.get(name)
        wanted = None
        if layer is not None and part.startswith(("A", "B")):
            wide = layer.in_features if part.startswith("A") else layer.out_features
            wanted = (shape[0], wide) if part.startswith("A") else (wide, shape[1])
        if shape != wanted and part:
            said = "has no such layer" if layer is None else f"needs {wanted}"
            raise FormatError(
                f"{folder}: an adapter of another base model: {key} is {shape}; this one {said}."
            )


def prepare_for_training(model: Any, gradient_checkpointing: bool = True) -> Any:
    """Freeze every weight and let gradients pass to the first adapter; returns `model`.

    Args:
        model: a packed model, before or after `get_peft_model`.
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping what is
            inside them.
    """
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)
    if gradient_checkpointing:
        # transformers 5.17 calls it by its older name
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.config.use_cache = False
    return model


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed linear of a model but its output layer, by name.

    Raises:
        SchemeError: there is none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = {
        name: module
        for name, module in packed_modules(model)
        if isinstance(module, PackedLinear) and module is not head
    }
    if not found:
        raise SchemeError(
            "The model has no packed linear: load a checkpoint that llmq quantized (to integers: "
            "code books and super-blocks take no adapter)."
        )
    return found
