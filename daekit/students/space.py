"""The space of a search: the sizes of a student, the layers that it keeps and, in fine spaces, the units.

The teacher is sorted first (``sort_teacher``), so the first units of everything are those that count most. Units are chosen
in blocks: of channels, of neurons, and key/value heads with their queries.

==========  ===============================================  =====================================================
            coarse                                           fine
==========  ===============================================  =====================================================
uniform     sizes; the first units, of a teacher sorted      sizes, any layers, any blocks, the same in every layer
            alike in every layer (``Importance.uniform``);
            the layers that count most
layerwise   the same of a teacher sorted layer by layer      sizes, any layers, any blocks, each layer its own
==========  ===============================================  =====================================================

A config has one size for all layers, so layers differ in which units they keep, not in how many.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, product
from typing import Literal

from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.students.families import family_of
from daekit.students.importance import Importance
from daekit.students.selection import Selection
from daekit.students.shapes import Shape, count_parameters, problems_of

_MOST_SHAPES = 1_000_000
Blocks = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A student as a search handles it; blocks and heads are those of the sorted teacher, in rising order.

    Attributes:
        layers: The kept layers of the teacher.
        hidden: The kept blocks of channels.
        neurons: The kept blocks of neurons, for every kept layer or in one entry for all layers.
        groups: The kept key/value heads, likewise.
        queries: The number of query heads that each of them keeps, the first ones.
        head_dim: The dimensions of a head.
    """

    layers: Blocks
    hidden: Blocks
    neurons: tuple[Blocks, ...]
    groups: tuple[Blocks, ...]
    queries: int
    head_dim: int


@dataclass(frozen=True)
class Window:
    """The number of parameters that a student may have, both ends included."""

    low: int
    high: int

    def holds(self, parameters: int) -> bool:
        """Whether a student may have this number of parameters."""
        return self.low <= parameters <= self.high


@dataclass(frozen=True)
class Space:
    """The choices of a search; ``space_of`` makes the usual ones.

    Attributes:
        config: The teacher's config.
        layers, hidden, neurons, groups, queries, head_dims: The sizes to choose from, rising, named as in ``Candidate``;
            ``hidden`` and ``neurons`` in channels and neurons.
        layer_order: The teacher's layers, the most important first.
        hidden_block, neuron_block: The number of units of a block.
        any_layers: Whether any layers may be kept instead of the most important ones.
        any_units: Whether any blocks may be kept instead of the first ones: the ``same`` in every layer, or ``own`` ones.
    """

    config: PreTrainedConfig = field(repr=False)
    layers: Sequence[int]
    hidden: Sequence[int]
    neurons: Sequence[int]
    groups: Sequence[int]
    queries: Sequence[int]
    head_dims: Sequence[int]
    layer_order: Sequence[int]
    hidden_block: int
    neuron_block: int
    any_layers: bool = False
    any_units: Literal["same", "own"] | None = None

    @cached_property
    def own(self) -> Shape:
        """The teacher's sizes."""
        return Shape.of(self.config)

    def shape(self, candidate: Candidate) -> Shape:
        """The sizes of a candidate."""
        return _shape(*self.sizes(candidate).values())

    def sizes(self, candidate: Candidate) -> dict[str, int]:
        """The size of each choice, in the order and under the names of the space."""
        return {
            "layers": len(candidate.layers),
            "hidden": len(candidate.hidden) * self.hidden_block,
            "neurons": len(candidate.neurons[0]) * self.neuron_block,
            "groups": len(candidate.groups[0]),
            "queries": candidate.queries,
            "head_dims": candidate.head_dim,
        }

    @cached_property
    def blocks(self) -> dict[str, int]:
        """How many layers, and blocks of units, the teacher has to choose from."""
        own = self.own
        return {
            "layers": own.num_hidden_layers,
            "hidden": own.hidden_size // self.hidden_block,
            "neurons": own.intermediate_size // self.neuron_block,
            "groups": own.num_key_value_heads,
        }

    def parameters(self, candidate: Candidate) -> int:
        """The number of parameters of a candidate."""
        return count_parameters(self.config, self.shape(candidate))

    def selection(self, candidate: Candidate) -> Selection:
        """The units of the sorted teacher that a candidate keeps."""
        layers, per_group = len(candidate.layers), self.own.queries_per_group
        neurons, groups = (kept * layers if len(kept) == 1 else kept for kept in (candidate.neurons, candidate.groups))
        return Selection(
            layers=candidate.layers,
            hidden=_units(candidate.hidden, self.hidden_block),
            neurons=tuple(_units(blocks, self.neuron_block) for blocks in neurons),
            kv_heads=groups,
            query_heads=tuple(_units(heads, per_group, candidate.queries) for heads in groups),
            head_dim=candidate.head_dim,
        )

    def first(self, shape: Shape) -> Candidate:
        """The candidate of a shape that keeps the most important units."""
        entries = shape.num_hidden_layers if self.any_units == "own" else 1
        return Candidate(
            layers=tuple(sorted(self.layer_order[: shape.num_hidden_layers])),
            hidden=tuple(range(shape.hidden_size // self.hidden_block)),
            neurons=(tuple(range(shape.intermediate_size // self.neuron_block)),) * entries,
            groups=(tuple(range(shape.num_key_value_heads)),) * entries,
            queries=shape.queries_per_group,
            head_dim=shape.head_dim,
        )

    def feasible(self, candidate: Candidate, window: Window) -> bool:
        """Whether a candidate's sizes break no rule and lie in the window."""
        return window.holds(self.parameters(candidate)) and not any(problems_of(self.config, self.shape(candidate)))

    def shapes(self, window: Window) -> list[Shape]:
        """Every shape of this space that breaks no rule and lies in the window.

        Raises:
            UserError: There is none, or the space has more than a million combinations of sizes.
        """
        sizes = (self.layers, self.hidden, self.neurons, self.groups, self.queries, self.head_dims)
        looked_at = math.prod(map(len, sizes))
        if looked_at > _MOST_SHAPES:
            raise UserError(f"the space has {looked_at:,} combinations of sizes; take larger steps (at most {_MOST_SHAPES:,})")
        found, below, above = [], 0, 0
        for each in product(*sizes):
            shape = _shape(*each)
            parameters = count_parameters(self.config, shape)
            if window.holds(parameters):
                found.append(shape)
            elif parameters < window.low:
                below = max(below, parameters)
            else:
                above = min(above or parameters, parameters)
        possible = [shape for shape in found if not any(problems_of(self.config, shape))]
        if not possible:
            near = [f"{size:,}" for size in (below, above) if size]
            raise UserError(
                f"no student of this space has between {window.low:,} and {window.high:,} parameters; the nearest sizes have "
                f"{' and '.join(near) or 'sizes that break a rule of the family'}. The teacher has "
                f"{count_parameters(self.config):,}. Widen the window or take smaller steps."
            )
        return possible

    def every(self, window: Window) -> Iterator[Candidate]:
        """Every candidate of a coarse space, shape by shape: of units it takes the most important ones.

        Raises:
            UserError: Nothing lies in the window.
        """
        for shape in self.shapes(window):
            first = self.first(shape)
            any_layers = combinations(range(self.blocks["layers"]), len(first.layers))
            for layers in any_layers if self.any_layers else [first.layers]:
                yield replace(first, layers=layers)

    def sample(self, shapes: Sequence[Shape], generator: random.Random) -> Candidate:
        """A random candidate of one of the shapes; free choices are, half of the time, the most important units."""
        first = self.first(generator.choice(shapes))
        layers = first.layers
        if self.any_layers and generator.random() < 0.5:
            layers = _sample(self.blocks["layers"], len(layers), generator)
        if not self.any_units or generator.random() < 0.5:
            return replace(first, layers=layers)
        return replace(
            first,
            layers=layers,
            hidden=_sample(self.blocks["hidden"], len(first.hidden), generator),
            neurons=tuple(_sample(self.blocks["neurons"], len(kept), generator) for kept in first.neurons),
            groups=tuple(_sample(self.blocks["groups"], len(kept), generator) for kept in first.groups),
        )


def space_of(
    config: PreTrainedConfig,
    importance: Importance,
    granularity: Literal["coarse", "fine"] = "coarse",
    units: Literal["uniform", "layerwise"] = "layerwise",
    *,
    blocks: int = 8,
    min_ratio: float = 0.25,
    head_dims: Sequence[int] | None = None,
) -> Space:
    """The usual space over a teacher: channels and neurons in ``blocks`` steps, every number of heads, queries and layers.

    Args:
        importance: Orders the layers.
        granularity, units: See the table above; for a coarse uniform space the teacher is sorted by ``importance.uniform``.
        blocks: Number of blocks that channels and neurons are divided into.
        min_ratio: Smallest size, as a ratio of the teacher's.
        head_dims: Widths of a head to choose from (default: only the teacher's; see ``possible_head_dims``).

    Raises:
        UserError: The channels or the neurons cannot be divided into so many blocks.
    """
    own = Shape.of(config)
    for name in ("hidden_size", "intermediate_size"):
        if getattr(own, name) % blocks:
            raise UserError(f"blocks={blocks}: does not divide the teacher's {name}={getattr(own, name)}")
    fine = granularity == "fine"

    def sizes(size: int, step: int = 1) -> tuple[int, ...]:
        return tuple(each for each in range(step, size + 1, step) if each >= min_ratio * size)

    hidden_block, neuron_block = own.hidden_size // blocks, own.intermediate_size // blocks
    if family_of(config).hidden_is_all_heads:
        hidden_block = own.head_dim
    return Space(
        config=config,
        layers=sizes(own.num_hidden_layers),
        hidden=sizes(own.hidden_size, hidden_block),
        neurons=sizes(own.intermediate_size, neuron_block),
        groups=sizes(own.num_key_value_heads),
        queries=sizes(own.queries_per_group),
        head_dims=tuple(sorted(head_dims)) if head_dims is not None else (own.head_dim,),
        layer_order=importance.layers_L.sort(descending=True, stable=True).indices.tolist(),
        hidden_block=hidden_block,
        neuron_block=neuron_block,
        any_layers=fine,
        any_units=("own" if units == "layerwise" else "same") if fine else None,
    )


def _shape(layers: int, hidden: int, neurons: int, groups: int, queries: int, head_dim: int) -> Shape:
    return Shape(layers, hidden, neurons, groups * queries, groups, head_dim)


def _units(blocks: Sequence[int], size: int, first: int | None = None) -> tuple[int, ...]:
    """The units of blocks of ``size``, or the first so many of each block."""
    return tuple(block * size + unit for block in blocks for unit in range(first or size))


def _sample(units: int, count: int, generator: random.Random) -> Blocks:
    return tuple(sorted(generator.sample(range(units), count)))
