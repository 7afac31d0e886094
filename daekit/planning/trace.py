"""What one layer of a model keeps and needs at most, by running it on tensors that exist only in name."""

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
from daekit.planning.live import GroupedProducts, Live, size_of
from daekit.planning.skeleton import Skeleton, fake_parameters
from daekit.planning.standins import FusedDropout


@dataclass(frozen=True)
class Setting:
    """One micro-batch.

    Attributes:
        rows: B.
        length: T.
        padded: whether some row is shorter, so that attention gets a mask of its own.
        autocast: dtype of mixed precision, None without.
        gpu: whether GPU kernels run.
    """

    rows: int
    length: int
    padded: bool
    autocast: torch.dtype | None
    gpu: bool


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one layer beyond its weights and its input.

    Attributes:
        output: what it hands on.
        frozen: the most while it runs without gradient, its output included.
        saved: what lives after it has run with gradient, its output included.
        forward: the most while it runs so.
        cached: copies of weights in the dtype of autocast, which live until the forward pass of the model ends.
        checkpointed: the most while it runs under gradient checkpointing.
        stashed: what checkpointing cannot drop.
        backward: the most in its backward pass beyond what lived at its start, new gradients of its weights included.
        backward_again: the same where the weights have gradients of earlier micro-batches.
    """

    output: int
    frozen: int
    saved: int = 0
    forward: int = 0
    cached: int = 0
    checkpointed: int = 0
    stashed: int = 0
    backward: int = 0
    backward_again: int = 0


@dataclass(frozen=True)
class ModelCost:
    """Bytes of a model's passes.

    Attributes:
        layers: the cost of each layer, in order.
        ends: what embedding and final norm keep (without gradient: their output alone).
        shared: what all layers are handed: attention mask, rotary embedding.
        hidden_width: bytes per value of the last hidden states.
    """

    layers: list[LayerCost]
    ends: int
    shared: int
    hidden_width: int


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Tracer:
    """Costs of one skeleton under different settings; layers that look alike are run once."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._costs: dict[Setting, ModelCost] = {}

    def cost(self, setting: Setting) -> ModelCost:
        """The cost of a micro-batch.

        Raises:
            UserError: an architecture that cannot be run without data.
        """
        if setting not in self._costs:
            try:
                self._costs[setting] = self._run(setting)
            except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError) as error:
                name = type(base_of(self.skeleton.model)).__name__
                raise UserError(f"{name}: its memory cannot be planned ({str(error).strip().splitlines()[0]})") from error
        return self._costs[setting]

    @cached_property
    def _twin(self) -> tuple[Any, list[nn.Module], list[int], FakeTensorMode, list[Tensor]]:
        """(backbone with one layer of each kind, these layers, which of them each layer is, the mode, all weights)."""
        model = self.skeleton.model
        layers = decoder_layers(model)
        kinds: dict[Any, int] = {}
        of_layer = [kinds.setdefault(_signature(layer, i, self.skeleton.config), len(kinds)) for i, layer in enumerate(layers)]
        chosen = [layers[of_layer.index(kind)] for kind in range(len(kinds))]
        backbone = base_of(model).base_model
        holder = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and layers[0] in list(m))
        holder._modules = {str(i): layer for i, layer in enumerate(chosen)}
        mode = FakeTensorMode()
        with mode:
            weights = fake_parameters(backbone)
        return backbone, chosen, of_layer, mode, weights

    def _run(self, setting: Setting) -> ModelCost:
        backbone, chosen, of_layer, mode, weights = self._twin
        backbone.train(self.skeleton.trained)
        with mode, GroupedProducts(), ExitStack() as stack:
            stack.enter_context(_as_config_of(self.skeleton.config, of_layer))
            if setting.gpu:
                stack.enter_context(_fused_dropout(backbone))
            calls, ends, width = self._ends(backbone, chosen, setting, weights)
            costs = [self._layer(layer, call, setting, weights) for layer, call in zip(chosen, calls, strict=True)]
            shared = size_of([call.kwargs for call in calls])
        return ModelCost([costs[kind] for kind in of_layer], ends, shared, width)

    def _ends(
        self, backbone: Any, chosen: list[nn.Module], setting: Setting, weights: list[Tensor]
    ) -> tuple[list[_Call], int, int]:
        """(how each layer is called, bytes that the parts around the layers keep, bytes per value of the result)."""
        calls: dict[int, _Call] = {}

        def noted(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def note(_: nn.Module, args: Any, kwargs: Any) -> None:
                calls.setdefault(index, _Call(args, kwargs))

            return note

        hooks = [layer.register_forward_pre_hook(noted(i), with_kwargs=True) for i, layer in enumerate(chosen)]
        ids = torch.zeros((setting.rows, setting.length), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if setting.padded:
            inputs["attention_mask"] = torch.ones((setting.rows, setting.length), dtype=torch.long)
        with _autocast(setting), torch.no_grad():
            backbone(**inputs)
        for hook in hooks:
            hook.remove()
        with Live([*weights, ids]) as live, _autocast(setting), _as_identity(chosen):
            with torch.set_grad_enabled(self.skeleton.trained):
                out = backbone(**(inputs | {"attention_mask": None}))
            ends = live.bytes
            width = out.last_hidden_state.element_size()
        return list(calls.values()), ends, width

    def _layer(self, layer: nn.Module, call: _Call, setting: Setting, weights: list[Tensor]) -> LayerCost:
        given = [*weights, *_tensors(call)]
        with Live(given) as live, _autocast(setting), torch.no_grad():
            y = _run(layer, call, None)
            output, frozen = size_of(y), live.peak
            del y
        if not self.skeleton.trained:
            return LayerCost(output, frozen)
        saved, forward, backward = _with_gradient(layer, call, setting, given)
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        _, _, again = _with_gradient(layer, call, setting, [*given, *gradients])
        layer.zero_grad(set_to_none=True)
        del gradients
        checkpointed, cached, stashed = _checkpointed(layer, call, setting, given)
        return LayerCost(output, frozen, saved, forward, cached, checkpointed, stashed, backward, again)


def most(function: Callable[[], Any], given: list[Tensor]) -> int:
    """The most bytes that live beyond ``given`` while ``function`` runs; call it in a FakeTensorMode."""
    with Live(given) as live:
        function()
        return live.peak


def _with_gradient(layer: nn.Module, call: _Call, setting: Setting, given: list[Tensor]) -> tuple[int, int, int]:
    """(saved, forward, backward) of LayerCost."""
    x = _input(call).detach().requires_grad_()
    with Live([*given, x]) as live:
        with _autocast(setting):
            y = _run(layer, call, x)
            saved, forward = live.bytes, live.peak
        gradient = torch.empty_like(y)
        level = live.restart()
        y.backward(gradient)
        backward = live.peak - level
    return saved, forward, backward


def _checkpointed(layer: nn.Module, call: _Call, setting: Setting, given: list[Tensor]) -> tuple[int, int, int]:
    """(checkpointed, cached, stashed) of LayerCost; what non-reentrant checkpointing would drop is dropped."""
    x = _input(call).detach().requires_grad_()
    with Live([*given, x]) as live:
        with _autocast(setting):
            with torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
                y = _run(layer, call, x)
            in_autocast, highest = live.bytes, live.peak
        after = live.bytes
    return highest, in_autocast - after, after - size_of(y)


def _drop(_: Tensor) -> Any:
    """What checkpointing keeps of a saved tensor."""


def _run(layer: nn.Module, call: _Call, x: Tensor | None) -> Tensor:
    """The layer's hidden states, with ``x`` in the place of the first tensor it was called with."""
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
    """What two layers have in common that cost the same."""
    types = getattr(config, "layer_types", None)
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), types[index] if types is not None else None, parameters


def _autocast(setting: Setting) -> Any:
    return torch.autocast("cpu", setting.autocast, enabled=setting.autocast is not None)


@contextmanager
def _as_config_of(config: Any, of_layer: list[int]) -> Iterator[None]:
    """A config that says that there is one layer of each kind."""
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
    """Layers that hand on what they are given: what remains is the ends of the model."""
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
