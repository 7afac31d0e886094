"""A model on the meta device, without weights, laid out as it will be in memory: quantised, and with its adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from daekit.errors import UserError
from daekit.models.backbone import base_of, decoder_layers
from daekit.planning.quantized_layers import quantize_layers
from daekit.planning.resolve import ResolvedModel
from daekit.recipe.schema import LoraSpec


@dataclass(frozen=True)
class Parameter:
    """One parameter as it is stored.

    Attributes:
        values: Number of values.
        bytes: Bytes of its storage, the scales of quantised weights included.
        width: Bytes per value of its gradient and of its state in the optimizer.
        trained: Whether it has a gradient and a state.
        adapter: Whether it belongs to a LoRA adapter.
        embedding: Whether it is the embedding, whose state the optimizers of bitsandbytes keep in 32 bits.
        rows: Its first dimension; 0 for a vector.
        products: The share of its values that one token is multiplied by: 1, the active experts' share, or 0.
    """

    values: int
    bytes: int
    width: int
    trained: bool
    adapter: bool
    embedding: bool
    rows: int
    products: float


class MetaModel:
    """A model on the meta device.

    Args:
        spec: Its config, dtype and quantisation.
        lora: The adapter that is trained on it; None without.
        trained: Whether the model is a student: its adapter is trained, or all its weights where it has none.

    Raises:
        UserError: The layers of the architecture are not found, the config cannot be built, or the adapter's target modules
            are not there.
    """

    def __init__(self, spec: ResolvedModel, lora: LoraSpec | None = None, trained: bool = False) -> None:
        self.spec, self.trained = spec, trained
        model: Any = _on_meta(spec)
        bits = {None: 0, "4bit": 4, "8bit": 8}[spec.quantization]
        quantised = quantize_layers(model, bits, spec.compute_dtype) if bits else {}
        if lora is not None:
            model = _with_adapter(model, lora, in_bfloat16=bool(bits))
        elif not trained:
            model.requires_grad_(False)
        self.model: Any = model  # once it has been traced, it has one layer of each kind
        base = base_of(model)
        self.head, self.embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
        layers = _layers_of(model)
        within = {id(p) for layer in layers for p in layer.parameters()}
        named = [(name, p) for name, p in model.named_parameters() if id(p) not in within]
        self.outside = [self._described(name, p, quantised) for name, p in named]
        self.layers = [[self._described(n, p, quantised) for n, p in layer.named_parameters()] for layer in layers]

    @property
    def config(self) -> Any:
        """The config of the language model."""
        return base_of(self.model).config.get_text_config()

    @property
    def width(self) -> int:
        """Bytes of a value that its layers compute without mixed precision."""
        return (self.spec.compute_dtype if self.spec.quantization else self.spec.dtype).itemsize

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.head is self.embedding

    def parameters(self) -> Iterator[Parameter]:
        """All parameters, each once."""
        yield from self.outside
        for layer in self.layers:
            yield from layer

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights, an adapter left out."""
        return sum(p.bytes for p in self.parameters() if not p.adapter)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of its adapter."""
        return sum(p.bytes for p in self.parameters() if p.adapter)

    def _described(self, name: str, parameter: nn.Parameter, quantised: dict[int, int]) -> Parameter:
        embedding = parameter is self.embedding
        products = 0.0
        if parameter.ndim > 1 and (parameter is self.head or not embedding):
            # a token is sent to some of the experts that a 3-D parameter holds
            products = self.config.num_experts_per_tok / parameter.shape[0] if parameter.ndim == 3 else 1.0
        return Parameter(
            values=parameter.numel(),
            bytes=quantised.get(id(parameter), parameter.numel() * parameter.element_size()),
            width=parameter.element_size(),
            trained=parameter.requires_grad,
            adapter="lora_" in name,
            embedding=embedding,
            rows=int(parameter.shape[0]) if parameter.ndim > 1 else 0,
            products=products,
        )


def _on_meta(spec: ResolvedModel) -> Any:
    attention = {"attn_implementation": spec.attention} if spec.attention else {}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(spec.config, dtype=spec.dtype, **attention)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError) as error:
        raise UserError(f"a {spec.config.model_type} model cannot be built from its config ({error})") from error


def _layers_of(model: Any) -> list[nn.Module]:
    try:
        return decoder_layers(model)
    except UserError:
        name = type(base_of(model)).__name__
        raise UserError(f"{name}: its layers could not be found, so its memory cannot be planned") from None


def _with_adapter(model: nn.Module, lora: LoraSpec, in_bfloat16: bool) -> Any:
    """The model with its adapter; like TRL's, the adapter of a quantised base is in bfloat16."""
    from peft import get_peft_model  # two seconds, for plans with adapters only

    from daekit.models.adapters import lora_config

    try:
        with torch.device("meta"), warnings.catch_warnings():
            # PEFT reads a property that transformers has deprecated
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            adapted = get_peft_model(model, lora_config(lora))  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"lora: {' '.join(str(error).split())}") from error
    if in_bfloat16:
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return adapted
