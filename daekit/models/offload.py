"""A frozen model whose layers live in host memory: brought to the device one after another, the next while one runs.

Each layer's tensors lie in one piece of (pinned) host memory. The device has two pieces as large as the largest layer: one
holds the layer that runs, the other receives the next one, copied on a stream of its own. On a CPU the same happens with
plain copies. Embeddings, final norm and output head stay on the device: the loss multiplies by the head without calling it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from daekit.errors import UserError
from daekit.models.backbone import decoder_layers

_ALIGNMENT = 256  # bytes; of each tensor in its piece, as the CUDA allocator aligns
# where a module keeps one tensor: an object and the name of its attribute (buffers are attributes of their module, too)
_Place = tuple[Any, str]


class LayerOffload:
    """Moves the layers of ``model`` to the host, everything else to ``device``, and hooks itself into the layers.

    Memory on the device: two of the largest layer, and what lies outside the layers. On the host: all layers.

    Raises:
        UserError: 8-bit Linear modules, whose state bitsandbytes keeps out of reach; parameters that want a gradient.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.layers, self.device = decoder_layers(model), device
        _require_offloadable(model)
        inside = {(id(owner), name) for layer in self.layers for owner, name in _places(layer)}
        for owner, name in _places(model):
            if (id(owner), name) not in inside:
                setattr(owner, name, getattr(owner, name).to(device))
        self._hosts = [_Piece(list(_places(layer)), device) for layer in self.layers]
        size = max(host.buffer.numel() for host in self._hosts)
        self._slots = [_Slot(size, device) for _ in range(2)]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self.enter(index))
            layer.register_forward_hook(lambda *_, index=index: self.leave(index), always_call=True)

    def resident(self) -> list[int]:
        """The layers that are on the device, or on their way."""
        return [slot.layer for slot in self._slots if slot.layer is not None]

    def enter(self, index: int) -> None:
        """Before a layer runs: it is there, and the next one begins to come."""
        slot = next((slot for slot in self._slots if slot.layer == index), None) or self._fetch(index, self._slots[0])
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        self._hosts[index].show(slot.buffer)
        following = (index + 1) % len(self.layers)
        if following not in self.resident():
            self._fetch(following, next(other for other in self._slots if other is not slot))

    def leave(self, index: int) -> None:
        """After a layer has run (or failed): its tensors are those of the host again; the next fetch may take its place."""
        host = self._hosts[index]
        host.show(host.buffer)
        if self._copies is not None:
            for slot in self._slots:
                if slot.layer == index:
                    slot.left.record(torch.cuda.current_stream(self.device))

    def _fetch(self, index: int, slot: _Slot) -> _Slot:
        slot.layer = index
        source = self._hosts[index].buffer
        target = slot.buffer[: source.numel()]
        if self._copies is None:
            target.copy_(source)
            return slot
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.left)  # the layer that it held has run
            target.copy_(source, non_blocking=True)
            slot.arrived.record(self._copies)
        return slot


class _Piece:
    """All tensors of one layer in one piece of host memory, pinned where they go to a GPU."""

    def __init__(self, places: list[_Place], device: torch.device) -> None:
        self._places = places
        tensors = [getattr(owner, name) for owner, name in places]
        self._spans, end = [], 0
        for tensor in tensors:
            self._spans.append((end, tensor.nbytes, tensor.dtype, tensor.shape))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for view, tensor in zip(self._views(self.buffer), tensors, strict=True):
            view.copy_(tensor)
        self.show(self.buffer)

    def show(self, buffer: Tensor) -> None:
        """Let the layer use the tensors in ``buffer``."""
        for (owner, name), view in zip(self._places, self._views(buffer), strict=True):
            setattr(owner, name, view)

    def _views(self, buffer: Tensor) -> Iterator[Tensor]:
        for start, size, dtype, shape in self._spans:
            yield buffer[start : start + size].view(dtype).view(shape)


class _Slot:
    """A piece of device memory for one layer."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        if device.type == "cuda":
            self.arrived, self.left = torch.cuda.Event(), torch.cuda.Event()


def _places(module: nn.Module) -> Iterator[_Place]:
    """Every tensor under a module, once: parameters, buffers, and the scales of bitsandbytes' 4-bit weights."""
    for parameter in module.parameters():
        yield parameter, "data"
        state = getattr(parameter, "quant_state", None)
        for scales in (state, getattr(state, "state2", None)):
            tensors = {} if scales is None else vars(scales)
            yield from ((scales, name) for name, value in tensors.items() if isinstance(value, Tensor))
    for part in module.modules():
        yield from ((part, name) for name, _ in part.named_buffers(recurse=False))


def _require_offloadable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            raise UserError(
                f"offload: {name} is in LLM.int8, whose weights bitsandbytes keeps in a state of its own; use quantization: "
                "4bit or none with offload"
            )
    trained = next((name for name, parameter in model.named_parameters() if parameter.requires_grad), None)
    if trained is not None:
        raise UserError(f"offload: {trained} is trained; only a frozen model can be offloaded")
