"""Counts the bytes of fake tensors while operations make and drop their storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GROUPED = torch.ops.aten._grouped_mm.default


class LiveBytes(TorchDispatchMode):
    """While active, ``bytes`` is the size of all storages made that still live, and ``peak`` its maximum since ``restart``.

    What a kernel allocates and frees within one operation is not counted.

    Args:
        known: Tensors that do not count, such as weights and inputs.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._watch(tensor, 0)

    def restart(self) -> int:
        """Set the peak to the bytes that live now, and return these."""
        self.peak = self.bytes
        return self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _grouped(*args, **(kwargs or {})) if func is _GROUPED else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf, leaf.untyped_storage().nbytes())
        return out

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


def _grouped(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """The grouped matrix products of MoE experts on fake tensors, in all dtypes; torch has only bfloat16 on a GPU."""
    return a.new_empty((a.shape[0], b.shape[2]) if b.ndim == 3 else (len(offs), a.shape[0], b.shape[1]))


def size_of(*tensors: Any) -> int:
    """Bytes of the storages of all tensors in nested containers, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tree_leaves(tensors) if isinstance(t, Tensor)}
    return sum(storages.values())
