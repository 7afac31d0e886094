"""The sizes of a student: those that are possible for a teacher, and the parameters that they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from math import prod

from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.students.families import Family, family_of

# scalings of RoPE that act on every frequency by itself, so that every k-th pair of a wide head is a pair of a narrow one
_SEPARABLE_ROPE = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, named as in its config."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """The sizes of a config, those that follow from others included."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        if family_of(config).hidden_is_all_heads:
            kv_heads, head_dim = heads, hidden // heads
        else:
            kv_heads = config.num_key_value_heads
            head_dim = getattr(config, "head_dim", None) or hidden // heads  # as transformers reads it
        return cls(config.num_hidden_layers, hidden, config.intermediate_size, heads, kv_heads, head_dim)

    @property
    def queries_per_group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


def count_parameters(config: PreTrainedConfig, shape: Shape | None = None) -> int:
    """Parameters of a model of ``config``, cut to ``shape`` if given; embeddings that are tied to the head count once."""
    family, shape = family_of(config), shape or Shape.of(config)
    queries = shape.num_attention_heads * shape.head_dim
    size = {
        "vocab": config.vocab_size,
        "hidden": shape.hidden_size,
        "neuron": shape.intermediate_size,
        "query": queries,
        "kv": shape.num_key_value_heads * shape.head_dim,
        "query_key_value": 3 * queries,
        "dim": shape.head_dim,
    }

    def total(weights: Iterable[tuple[str, ...]]) -> int:
        return sum(prod(size[axis] for axis in axes) for axes in weights)

    outside = total(weight.axes for weight in family.outside.values() if weight.exists(config))
    layer = total(weight.axes for weight in family.layer.values() if weight.exists(config))
    return outside + shape.num_hidden_layers * layer


def rotated(config: PreTrainedConfig, head_dim: int) -> int:
    """How many of a head's dimensions, counted from the first, RoPE rotates."""
    if not family_of(config).partial_rotary:
        return head_dim
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))  # as transformers reads it


def possible_head_dims(config: PreTrainedConfig) -> list[int]:
    """The values of head_dim that can be cut out of a teacher of ``config``, the largest (its own) first.

    Every k-th pair of rotated dimensions turns with just the frequencies that a head with a k-th of the dimensions has; other
    choices of pairs would turn with frequencies that the weights were not trained for.
    """
    own = Shape.of(config).head_dim
    sizes = [own]
    if config.rope_parameters["rope_type"] not in _SEPARABLE_ROPE:
        return sizes
    pairs = rotated(config, own) // 2
    for step in range(2, own + 1):
        if own % step == 0 and pairs % step == 0 and rotated(config, own // step) == 2 * (pairs // step):
            sizes.append(own // step)
    return sizes


def require_possible(config: PreTrainedConfig, shape: Shape) -> None:
    """Raise UserError with every broken rule unless a student of ``shape`` can be cut out of a teacher of ``config``."""
    problems = list(problems_of(config, shape))
    if problems:
        raise UserError(f"no such student can be cut from this {config.model_type} teacher: " + "; ".join(problems))


def problems_of(config: PreTrainedConfig, shape: Shape) -> Iterator[str]:
    """The rules that ``shape`` breaks, each with the nearest sizes that keep it."""
    family, own = family_of(config), Shape.of(config)
    too_far = False
    for each in fields(Shape):
        size, most = getattr(shape, each.name), getattr(own, each.name)
        if not 1 <= size <= most:
            yield f"{each.name}={size}: must lie between 1 and the teacher's {most}"
            too_far = True
    if too_far:
        return  # divisions below would be by zero, or about sizes that are wrong anyway
    yield from _head_problems(config, shape, own)
    yield from _hidden_problems(family, shape)


def _head_problems(config: PreTrainedConfig, shape: Shape, own: Shape) -> Iterator[str]:
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    possible = [kv_heads * queries for queries in range(1, own.queries_per_group + 1)]
    if heads not in possible:
        yield (
            f"num_attention_heads={heads} with num_key_value_heads={kv_heads}: every kept key/value head keeps equally many "
            f"of its {own.queries_per_group} query heads; nearest valid: {_nearest(heads, possible)}"
        )
    head_dims = possible_head_dims(config)
    if shape.head_dim not in head_dims:
        rope = config.rope_parameters["rope_type"]
        why = "RoPE keeps every k-th pair of its rotated dimensions, with k a divisor"
        if rope not in _SEPARABLE_ROPE:
            why = f"RoPE of type {rope!r} scales frequencies by their place, so head_dim cannot be cut"
        yield f"head_dim={shape.head_dim}: {why}; nearest valid: {_nearest(shape.head_dim, head_dims)}"


def _hidden_problems(family: Family, shape: Shape) -> Iterator[str]:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if family.hidden_multiple_of_heads and hidden % heads:
        below = hidden // heads * heads
        near = [size for size in (below, below + heads) if size]
        yield (
            f"hidden_size={hidden}: LlamaConfig wants a multiple of num_attention_heads={heads}; nearest valid: {_words(near)}"
        )
    if family.hidden_is_all_heads:
        if shape.num_key_value_heads != heads:
            yield f"num_key_value_heads={shape.num_key_value_heads}: GPT-NeoX has as many as num_attention_heads={heads}"
        if hidden != heads * shape.head_dim:
            fitting = max(hidden // shape.head_dim, 1)
            yield (
                f"hidden_size={hidden}: GPT-NeoX wants num_attention_heads x head_dim = {heads} x {shape.head_dim} = "
                f"{heads * shape.head_dim}; with {fitting} heads: hidden_size={fitting * shape.head_dim}"
            )


def _nearest(size: int, possible: Iterable[int]) -> str:
    return _words(sorted(sorted(possible, key=lambda other: abs(other - size))[:3]))


def _words(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))
