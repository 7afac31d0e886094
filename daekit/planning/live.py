"""Bytes of tensors that exist only in name: torch's fake tensors, counted as operations make and drop their storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Inside, ``bytes`` is the size of all storages that were made and still live, ``peak`` the most since ``restart``.

    What a kernel allocates and frees within one operation is not seen.

    Args:
        known: tensors that do not count: weights, inputs.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._watch(tensor, 0)

    def restart(self) -> int:
        """Begin a new peak at what lives now, which is returned."""
        self.peak = self.bytes
        return self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
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


class GroupedProducts(TorchDispatchMode):
    """Inside, fake tensors know products of experts in all dtypes; torch knows those of a GPU, in bfloat16, only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **kwargs)
        a, b = args[:2]
        offsets = args[2] if len(args) > 2 else kwargs["offs"]
        return a.new_empty((a.shape[0], b.shape[2]) if b.ndim == 3 else (len(offsets), a.shape[0], b.shape[1]))


def size_of(*tensors: Any) -> int:
    """Bytes of the storages of tensors, each once; what is no tensor is nothing."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tree_leaves(tensors) if isinstance(t, Tensor)}
    return sum(storages.values())
