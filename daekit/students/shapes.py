"""The sizes of a student: those that are possible for a teacher, and the parameters that they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.students.families import Axes, Family, family_of

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

    def total(weights: Mapping[str, Axes]) -> int:
        return sum(prod(size[axis] for axis in axes) for axes in weights.values())

    return total(family.weights_outside(config)) + shape.num_hidden_layers * total(family.weights_of_layer(config))


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
    if config.rope_parameters["rope_type"] not in _SEPARABLE_ROPE:
        return [own]
    pairs = rotated(config, own) // 2
    steps = [step for step in range(2, own + 1) if own % step == pairs % step == 0]
    return [own, *(own // step for step in steps if rotated(config, own // step) == 2 * (pairs // step))]


def require_possible(config: PreTrainedConfig, shape: Shape) -> None:
    """Raise UserError with every broken rule unless a student of ``shape`` can be cut out of a teacher of ``config``."""
    problems = list(problems_of(config, shape))
    if problems:
        raise UserError(f"no such student can be cut from this {config.model_type} teacher: " + "; ".join(problems))


def problems_of(config: PreTrainedConfig, shape: Shape) -> Iterator[str]:
    """The rules that ``shape`` breaks, each with the nearest sizes that keep it."""
    own = vars(Shape.of(config))
    too_far = {name: size for name, size in vars(shape).items() if not 1 <= size <= own[name]}
    for name, size in too_far.items():
        yield f"{name}={size}: must lie between 1 and the teacher's {own[name]}"
    if not too_far:  # otherwise divisions would be by zero, or about sizes that are wrong anyway
        yield from _head_problems(config, shape)
        yield from _hidden_problems(family_of(config), shape)


def _head_problems(config: PreTrainedConfig, shape: Shape) -> Iterator[str]:
    heads, kv_heads, per_group = shape.num_attention_heads, shape.num_key_value_heads, Shape.of(config).queries_per_group
    possible = range(kv_heads, kv_heads * per_group + 1, kv_heads)
    if heads not in possible:
        yield (
            f"num_attention_heads={heads} with num_key_value_heads={kv_heads}: every kept key/value head keeps equally many "
            f"of its {per_group} query heads; nearest valid: {_nearest(heads, possible)}"
        )
    head_dims = possible_head_dims(config)
    if shape.head_dim not in head_dims:
        why = "RoPE keeps every k-th pair of its rotated dimensions, with k a divisor"
        if (rope := config.rope_parameters["rope_type"]) not in _SEPARABLE_ROPE:
            why = f"RoPE of type {rope!r} scales frequencies by their place, so head_dim cannot be cut"
        yield f"head_dim={shape.head_dim}: {why}; nearest valid: {_nearest(shape.head_dim, head_dims)}"


def _hidden_problems(family: Family, shape: Shape) -> Iterator[str]:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if family.hidden_multiple_of_heads and hidden % heads:
        near = _nearest(hidden, range(heads, hidden + heads, heads))
        yield f"hidden_size={hidden}: LlamaConfig wants a multiple of num_attention_heads={heads}; nearest valid: {near}"
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
    return ", ".join(map(str, sorted(sorted(possible, key=lambda other: abs(other - size))[:3])))
