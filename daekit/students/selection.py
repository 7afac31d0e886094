"""The layers, channels, neurons and heads of a teacher that a student keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.students.shapes import Shape, require_possible

PerLayer = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Selection:
    """Indices into the teacher, counted from 0. All layers keep equally many units, but not the same ones.

    Attributes:
        layers: The kept layers, in the teacher's order.
        hidden: The kept channels of the residual stream, which are the same in the whole model.
        neurons: The kept neurons of the MLP, for every kept layer.
        kv_heads: The kept key/value heads, for every kept layer.
        query_heads: The kept query heads, for every kept layer; equally many of each kept key/value head, in its order.
        head_dim: The dimensions of a head; a smaller number than the teacher's keeps every k-th of them.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    neurons: PerLayer
    kv_heads: PerLayer
    query_heads: PerLayer
    head_dim: int

    @property
    def shape(self) -> Shape:
        """The sizes of the student."""
        return Shape(
            num_hidden_layers=len(self.layers),
            hidden_size=len(self.hidden),
            intermediate_size=len(self.neurons[0]),
            num_attention_heads=len(self.query_heads[0]),
            num_key_value_heads=len(self.kv_heads[0]),
            head_dim=self.head_dim,
        )


def require_valid(config: PreTrainedConfig, selection: Selection) -> None:
    """Raise UserError unless the indices exist in a teacher of ``config`` and fit together."""
    problems = list(_problems(config, selection))
    if problems:
        raise UserError("selection of a student: " + "; ".join(problems))
    require_possible(config, selection.shape)


def _problems(config: PreTrainedConfig, selection: Selection) -> Iterator[str]:
    own = Shape.of(config)
    yield from _index_problems("layers", selection.layers, own.num_hidden_layers)
    if any(later < earlier for earlier, later in pairwise(selection.layers)):
        yield f"layers={selection.layers}: must be in the teacher's order"
    yield from _index_problems("hidden", selection.hidden, own.hidden_size)
    sizes = {"neurons": own.intermediate_size, "kv_heads": own.num_key_value_heads, "query_heads": own.num_attention_heads}
    for name, size in sizes.items():
        per_layer: PerLayer = getattr(selection, name)
        if len(per_layer) != len(selection.layers):
            yield f"{name}: has {len(per_layer)} layers, but {len(selection.layers)} are kept"
        lengths = sorted({len(indices) for indices in per_layer})
        if len(lengths) > 1:
            yield f"{name}: every layer must keep as many as the others, not {lengths} (a config has one size for all layers)"
        for place, indices in enumerate(per_layer):
            yield from _index_problems(f"{name}[{place}]", indices, size)
    for place, (kv_heads, queries) in enumerate(zip(selection.kv_heads, selection.query_heads, strict=False)):
        each, rest = divmod(len(queries), max(len(kv_heads), 1))
        groups = [kv for kv in kv_heads for _ in range(each)]
        if rest or [query // own.queries_per_group for query in queries] != groups:
            yield (
                f"query_heads[{place}]={queries}: must be equally many of each of kv_heads[{place}]={kv_heads}, in that order "
                f"(query head i reads key/value head i // {own.queries_per_group})"
            )


def _index_problems(name: str, indices: Sequence[int], size: int) -> Iterator[str]:
    if not indices:
        yield f"{name}: keeps nothing"
    outside = [index for index in indices if not 0 <= index < size]
    if outside:
        yield f"{name}: {outside[:3]} do not exist, the teacher has {size}"
    if len(set(indices)) < len(indices):
        yield f"{name}: an index is there twice"
