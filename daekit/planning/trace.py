"""Measures what one layer of a model allocates and keeps, by running it on fake tensors, which have shapes but no data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from daekit.errors import UserError
from daekit.models.backbone import base_of, decoder_layers
from daekit.planning.live_bytes import LiveBytes, size_of
from daekit.planning.meta_model import MetaModel
from daekit.planning.quantized_layers import FusedDropout


@dataclass(frozen=True)
class MicroBatch:
    """The size of a micro-batch, and how it is computed.

    Attributes:
        rows: B.
        length: T.
        padded: Whether some row is shorter, so that attention is given a mask.
        autocast: The dtype of mixed precision; None without.
        accumulated: Whether the weights have gradients of earlier micro-batches already.
    """

    rows: int
    length: int
    padded: bool
    autocast: torch.dtype | None
    accumulated: bool = False


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one layer beyond its weights and its input.

    Attributes:
        output: Bytes of its output.
        frozen: Peak of a forward pass without gradient, its output included.
        saved: Bytes that live after a forward pass with gradient, its output included.
        forward: Peak of that forward pass.
        cached: Copies of weights in the dtype of autocast, which live until the model's forward pass ends.
        checkpointed: Peak of a forward pass under gradient checkpointing.
        stashed: Bytes of that pass that checkpointing cannot drop.
        backward: Peak of the backward pass beyond what lived at its start, new gradients of the weights included.
    """

    output: int
    frozen: int
    saved: int = 0
    forward: int = 0
    cached: int = 0
    checkpointed: int = 0
    stashed: int = 0
    backward: int = 0


@dataclass(frozen=True)
class ModelCost:
    """Bytes of a model's passes.

    Attributes:
        layers: The cost of each layer, in order.
        ends: Bytes that embedding and final norm keep; without gradient those of their output alone.
        shared: Bytes of what all layers are given: attention mask and rotary embedding.
        hidden_width: Bytes per value of the last hidden states.
    """

    layers: list[LayerCost]
    ends: int
    shared: int
    hidden_width: int

    @property
    def frozen(self) -> int:
        """Peak of a forward pass without gradient."""
        return max(layer.frozen for layer in self.layers) + self.layers[0].output + self.shared


class _Call(NamedTuple):
    """What a layer is given."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer's output hidden states, of ``x`` in place of its hidden states."""
        out = layer(x, *self.args, **self.kwargs)
        return out if isinstance(out, Tensor) else out[0]


class Tracer:
    """The costs of one model for different micro-batches; of layers that are alike one is run.

    Args:
        meta: The model.
        gpu: Whether GPU kernels run.
    """

    def __init__(self, meta: MetaModel, gpu: bool) -> None:
        self.meta, self._gpu = meta, gpu
        self._costs: dict[MicroBatch, ModelCost] = {}

    def cost(self, batch: MicroBatch) -> ModelCost:
        """The cost of a micro-batch.

        Raises:
            UserError: The architecture cannot be run without data.
        """
        if batch not in self._costs:
            try:
                self._costs[batch] = self._run(batch)
            except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError) as error:
                name = type(base_of(self.meta.model)).__name__
                raise UserError(f"{name}: its memory cannot be planned ({str(error).strip().splitlines()[0]})") from error
        return self._costs[batch]

    @cached_property
    def _twin(self) -> tuple[Any, list[nn.Module], list[int], FakeTensorMode]:
        """(backbone with one layer of each kind and fake weights, these layers, the kind of every layer, the mode)."""
        backbone, config = base_of(self.meta.model).base_model, self.meta.config
        layers, types = decoder_layers(self.meta.model), getattr(config, "layer_types", None)
        signatures = [_signature(layer, types and types[at]) for at, layer in enumerate(layers)]
        kinds = list(dict.fromkeys(signatures))
        firsts = [signatures.index(kind) for kind in kinds]
        chosen = [layers[at] for at in firsts]
        holder = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and layers[0] in list(m))
        holder._modules = {str(at): layer for at, layer in enumerate(chosen)}
        shorter = copy.deepcopy(config)
        shorter.num_hidden_layers = len(chosen)
        if types is not None:
            shorter.layer_types = [types[at] for at in firsts]
        for module in backbone.modules():
            if getattr(module, "config", None) is config:
                module.config = shorter
            if self._gpu and type(module) is nn.Dropout:
                module.__class__ = FusedDropout
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # they become fake here
        with mode:
            backbone.to_empty(device="cpu")
        return backbone, chosen, [kinds.index(each) for each in signatures], mode

    def _run(self, batch: MicroBatch) -> ModelCost:
        backbone, chosen, of_layer, mode = self._twin
        weights = [*backbone.parameters(), *backbone.buffers()]
        backbone.train(self.meta.trained)
        with mode:
            calls, ends, width = self._ends(backbone, chosen, batch, weights)
            costs = [self._layer(layer, calls[layer], batch, weights) for layer in chosen]
            shared = size_of([call.kwargs for call in calls.values()])
        return ModelCost([costs[kind] for kind in of_layer], ends, shared, width)

    def _ends(
        self, backbone: Any, chosen: list[nn.Module], batch: MicroBatch, weights: list[Tensor]
    ) -> tuple[dict[nn.Module, _Call], int, int]:
        """(the call of each layer, bytes that the modules around the layers keep, bytes per value of the result)."""
        ids = torch.zeros((batch.rows, batch.length), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if batch.padded:
            inputs["attention_mask"] = torch.ones((batch.rows, batch.length), dtype=torch.long)
        with _as_identity(chosen) as calls:
            with _autocast(batch), torch.no_grad():
                backbone(**inputs)
            with LiveBytes([*weights, ids]) as live, _autocast(batch), torch.set_grad_enabled(self.meta.trained):
                out = backbone(**(inputs | {"attention_mask": None}))
                return calls, live.bytes, out.last_hidden_state.element_size()

    def _layer(self, layer: nn.Module, call: _Call, batch: MicroBatch, weights: list[Tensor]) -> LayerCost:
        given = [*weights, *(t for t in tree_leaves(call) if isinstance(t, Tensor))]
        with LiveBytes(given) as live, _autocast(batch), torch.no_grad():
            y = call.run(layer, call.hidden)
            output, frozen = size_of(y), live.peak
            del y
        if not self.meta.trained:
            return LayerCost(output, frozen)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for parameter in trained if batch.accumulated else ():
            parameter.grad = torch.empty_like(parameter)
        x = call.hidden.detach().requires_grad_()
        with LiveBytes([*given, x, *(p.grad for p in trained if p.grad is not None)]) as live:
            with _autocast(batch):
                y = call.run(layer, x)
                saved, forward = live.bytes, live.peak
            gradient = torch.empty_like(y)
            level = live.restart()
            y.backward(gradient)
            backward = live.peak - level
        layer.zero_grad(set_to_none=True)
        x = call.hidden.detach().requires_grad_()
        with LiveBytes([*given, x]) as live:
            with _autocast(batch):
                with torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
                    y = call.run(layer, x)
                in_autocast, checkpointed = live.bytes, live.peak
            after = live.bytes  # what is left of it beside the output checkpointing cannot drop
        return LayerCost(output, frozen, saved, forward, in_autocast - after, checkpointed, after - size_of(y), backward)


def peak_bytes(function: Callable[[], Any], given: list[Tensor]) -> int:
    """Peak bytes beyond ``given`` while ``function`` runs; to be called in a FakeTensorMode."""
    with LiveBytes(given) as live:
        function()
        return live.peak


def _drop(_: Tensor) -> Any:
    """Checkpointing keeps nothing of a saved tensor."""


def _signature(layer: nn.Module, layer_type: str | None) -> Any:
    """Equal for layers that cost the same."""
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), layer_type, parameters


def _autocast(batch: MicroBatch) -> Any:
    return torch.autocast("cpu", batch.autocast, enabled=batch.autocast is not None)


@contextmanager
def _as_identity(layers: list[nn.Module]) -> Iterator[dict[nn.Module, _Call]]:
    """Within, layers return their input, so that only the ends of the model allocate memory; yields what they are given."""
    calls: dict[nn.Module, _Call] = {}

    def note(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.setdefault(layer, _Call(hidden_states, args, kwargs))
        return hidden_states

    for layer in layers:
        vars(layer)["forward"] = partial(note, layer)
    try:
        yield calls
    finally:
        for layer in layers:
            del vars(layer)["forward"]
