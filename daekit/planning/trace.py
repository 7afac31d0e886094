"""Measures what one layer of a model allocates and keeps, by running it on fake tensors, which have shapes but no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from daekit.errors import UserError
from daekit.models.backbone import base_of, decoder_layers
from daekit.planning.live_bytes import LiveBytes, size_of
from daekit.planning.meta_model import MetaModel, fake_parameters
from daekit.planning.quantized_layers import FusedDropout


@dataclass(frozen=True)
class MicroBatch:
    """The size of a micro-batch, and how it is computed.

    Attributes:
        rows: B.
        length: T.
        padded: Whether some row is shorter, so that attention is given a mask.
        autocast: The dtype of mixed precision; None without.
        gpu: Whether GPU kernels run.
        accumulated: Whether the weights have gradients of earlier micro-batches already.
    """

    rows: int
    length: int
    padded: bool
    autocast: torch.dtype | None
    gpu: bool
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


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Tracer:
    """The costs of one model for different micro-batches; of layers that are alike one is run."""

    def __init__(self, meta: MetaModel) -> None:
        self.meta = meta
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
    def _twin(self) -> tuple[Any, list[nn.Module], list[int], FakeTensorMode, list[Tensor]]:
        """(backbone with one layer of each kind, these layers, the kind of every layer, the mode, all weights)."""
        model = self.meta.model
        layers = decoder_layers(model)
        kinds: dict[Any, int] = {}
        of_layer = [kinds.setdefault(_signature(layer, i, self.meta.config), len(kinds)) for i, layer in enumerate(layers)]
        chosen = [layers[of_layer.index(kind)] for kind in range(len(kinds))]
        backbone = base_of(model).base_model
        holder = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and layers[0] in list(m))
        holder._modules = {str(i): layer for i, layer in enumerate(chosen)}
        mode = FakeTensorMode()
        with mode:
            weights = fake_parameters(backbone)
        return backbone, chosen, of_layer, mode, weights

    def _run(self, batch: MicroBatch) -> ModelCost:
        backbone, chosen, of_layer, mode, weights = self._twin
        backbone.train(self.meta.trained)
        with mode, ExitStack() as stack:
            stack.enter_context(_as_config_of(self.meta.config, of_layer))
            if batch.gpu:
                stack.enter_context(_fused_dropout(backbone))
            calls, ends, width = self._ends(backbone, chosen, batch, weights)
            costs = [self._layer(layer, call, batch, weights) for layer, call in zip(chosen, calls, strict=True)]
            shared = size_of([call.kwargs for call in calls])
        return ModelCost([costs[kind] for kind in of_layer], ends, shared, width)

    def _ends(
        self, backbone: Any, chosen: list[nn.Module], batch: MicroBatch, weights: list[Tensor]
    ) -> tuple[list[_Call], int, int]:
        """(the call of each layer, bytes that the modules around the layers keep, bytes per value of the result)."""
        calls: dict[int, _Call] = {}

        def noted(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def note(_: nn.Module, args: Any, kwargs: Any) -> None:
                calls.setdefault(index, _Call(args, kwargs))

            return note

        hooks = [layer.register_forward_pre_hook(noted(i), with_kwargs=True) for i, layer in enumerate(chosen)]
        ids = torch.zeros((batch.rows, batch.length), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if batch.padded:
            inputs["attention_mask"] = torch.ones((batch.rows, batch.length), dtype=torch.long)
        with _as_identity(chosen):
            with _autocast(batch), torch.no_grad():
                backbone(**inputs)
            for hook in hooks:
                hook.remove()
            with LiveBytes([*weights, ids]) as live, _autocast(batch), torch.set_grad_enabled(self.meta.trained):
                out = backbone(**(inputs | {"attention_mask": None}))
                ends = live.bytes
                width = out.last_hidden_state.element_size()
        return list(calls.values()), ends, width

    def _layer(self, layer: nn.Module, call: _Call, batch: MicroBatch, weights: list[Tensor]) -> LayerCost:
        given = [*weights, *_tensors(call)]
        with LiveBytes(given) as live, _autocast(batch), torch.no_grad():
            y = _run(layer, call, None)
            output, frozen = size_of(y), live.peak
            del y
        if not self.meta.trained:
            return LayerCost(output, frozen)
        gradients = []
        for parameter in (p for p in layer.parameters() if p.requires_grad and batch.accumulated):
            parameter.grad = torch.empty_like(parameter)
            gradients.append(parameter.grad)
        saved, forward, backward = _with_gradient(layer, call, batch, [*given, *gradients])
        layer.zero_grad(set_to_none=True)
        checkpointed, cached, stashed = _checkpointed(layer, call, batch, given)
        return LayerCost(output, frozen, saved, forward, cached, checkpointed, stashed, backward)


def peak_bytes(function: Callable[[], Any], given: list[Tensor]) -> int:
    """Peak bytes beyond ``given`` while ``function`` runs; to be called in a FakeTensorMode."""
    with LiveBytes(given) as live:
        function()
        return live.peak


def _with_gradient(layer: nn.Module, call: _Call, batch: MicroBatch, given: list[Tensor]) -> tuple[int, int, int]:
    """``saved``, ``forward`` and ``backward`` of LayerCost."""
    x = _input(call).detach().requires_grad_()
    with LiveBytes([*given, x]) as live:
        with _autocast(batch):
            y = _run(layer, call, x)
            saved, forward = live.bytes, live.peak
        gradient = torch.empty_like(y)
        level = live.restart()
        y.backward(gradient)
        backward = live.peak - level
    return saved, forward, backward


def _checkpointed(layer: nn.Module, call: _Call, batch: MicroBatch, given: list[Tensor]) -> tuple[int, int, int]:
    """``checkpointed``, ``cached`` and ``stashed`` of LayerCost; saved tensors are dropped, as checkpointing does."""
    x = _input(call).detach().requires_grad_()
    with LiveBytes([*given, x]) as live:
        with _autocast(batch):
            with torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
                y = _run(layer, call, x)
            in_autocast, highest = live.bytes, live.peak
        after = live.bytes
    return highest, in_autocast - after, after - size_of(y)


def _drop(_: Tensor) -> Any:
    """Checkpointing keeps nothing of a saved tensor."""


def _run(layer: nn.Module, call: _Call, x: Tensor | None) -> Tensor:
    """The layer's output hidden states, with ``x`` as its input instead of the recorded one."""
    args, kwargs = call.args, dict(call.kwargs)
    if x is not None:
        if args:
            args = (x, *args[1:])
        else:
            kwargs["hidden_states"] = x
    out = layer(*args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def _input(call: _Call) -> Tensor:
    return call.args[0] if call.args else call.kwargs["hidden_states"]


def _tensors(call: _Call) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]


def _signature(layer: nn.Module, index: int, config: Any) -> Any:
    """Equal for layers that cost the same."""
    types = getattr(config, "layer_types", None)
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), types[index] if types is not None else None, parameters


def _autocast(batch: MicroBatch) -> Any:
    return torch.autocast("cpu", batch.autocast, enabled=batch.autocast is not None)


@contextmanager
def _as_config_of(config: Any, of_layer: list[int]) -> Iterator[None]:
    """Within, the config says that the model has one layer of each kind."""
    kinds = range(len(set(of_layer)))
    types, depth = getattr(config, "layer_types", None), config.num_hidden_layers
    config.num_hidden_layers = len(kinds)
    if types is not None:
        config.layer_types = [types[of_layer.index(kind)] for kind in kinds]
    try:
        yield
    finally:
        config.num_hidden_layers = depth
        if types is not None:
            config.layer_types = types


@contextmanager
def _as_identity(layers: list[nn.Module]) -> Iterator[None]:
    """Within, layers return their input, so that only the ends of the model allocate memory."""
    for layer in layers:
        vars(layer)["forward"] = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


@contextmanager
def _fused_dropout(model: nn.Module) -> Iterator[None]:
    places = [(m, n, c) for m in model.modules() for n, c in m.named_children() if type(c) is nn.Dropout]
    try:
        for module, name, child in places:
            setattr(module, name, FusedDropout(child.p).train(child.training))
        yield
    finally:
        for module, name, child in places:
            setattr(module, name, child)
