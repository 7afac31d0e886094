"""A model without weights, on the meta device, as it will stand in memory: quantised where it will be, with its adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from daekit.errors import UserError
from daekit.models.backbone import base_of, decoder_layers
from daekit.planning.shapes import Shape
from daekit.planning.standins import quantise
from daekit.recipe.schema import LoraSpec


@dataclass(frozen=True)
class Parameter:
    """One parameter as it is stored.

    Attributes:
        values: how many.
        bytes: of its storage, scales included.
        width: bytes per value of its gradient and of its state in the optimizer.
        trained: whether it has these.
        adapter: whether it belongs to a LoRA adapter.
        embedding: whether the optimizers of bitsandbytes keep its state in 32 bits.
        rows: its first dimension, 0 of a vector.
        products: by how much of it a token is multiplied: 1, an expert's share, or 0.
    """

    values: int
    bytes: int
    width: int
    trained: bool
    adapter: bool
    embedding: bool
    rows: int
    products: float


class Skeleton:
    """A model of some shape on the meta device.

    Args:
        shape: what it looks like.
        lora: an adapter that is trained; None: none.
        trained: whether the model is a student: its adapter is trained, or without one all its weights.

    Raises:
        UserError: an architecture whose layers are not known, a quantised student without an adapter, wrong target modules.
    """

    def __init__(self, shape: Shape, lora: LoraSpec | None = None, trained: bool = False) -> None:
        self.shape, self.trained = shape, trained
        model: Any = _on_meta(shape)
        bits = {None: 0, "4bit": 4, "8bit": 8}[shape.quantization]
        quantised = quantise(model, bits, shape.compute_dtype) if bits else {}
        if lora is not None:
            model = _with_adapter(model, lora, in_bfloat16=bool(bits))
        elif not trained:
            model.requires_grad_(False)
        self.model: Any = model  # its layers are those of one kind once it has been traced
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
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.head is self.embedding

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter once."""
        yield from self.outside
        for layer in self.layers:
            yield from layer

    def values(self) -> int:
        """How many values the model has without its adapter."""
        return sum(p.values for p in self.parameters() if not p.adapter)

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


def _on_meta(shape: Shape) -> Any:
    attention = {"attn_implementation": shape.attention} if shape.attention else {}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(shape.config, dtype=shape.dtype, **attention)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError) as error:
        raise UserError(f"a {shape.config.model_type} model cannot be built from its config ({error})") from error


def _layers_of(model: Any) -> list[nn.Module]:
    try:
        return decoder_layers(model)
    except UserError:
        name = type(base_of(model)).__name__
        raise UserError(f"{name}: its layers could not be found, so its memory cannot be planned") from None


def _with_adapter(model: nn.Module, lora: LoraSpec, in_bfloat16: bool) -> Any:
    """A PEFT model; the adapter of a quantised base is in bfloat16, as TRL has it."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        use_dora=lora.use_dora,
    )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # a property of transformers that PEFT still asks for
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"lora: {' '.join(str(error).split())}") from error
    if in_bfloat16:
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def fake_parameters(module: nn.Module) -> list[Tensor]:
    """Put uninitialised tensors of the CPU in the place of a module's on the meta device; call it in a FakeTensorMode."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for names in (part._parameters, part._buffers):
            for name, tensor in names.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = (tensor, nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake)
                names[name] = made[id(tensor)][1]
    return [fake for _, fake in made.values()]
