"""How the evolutionary search makes a candidate of others: mixing the choices of two, changing one of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from daekit.students.families import family_of
from daekit.students.space import Blocks, Candidate, Space

_SIZES = ("layers", "hidden", "neurons", "groups", "queries", "head_dims")


def crossed(space: Space, one: Candidate, other: Candidate, generator: random.Random) -> Candidate:
    """Each gene of one of two parents; what a layer of both chose goes with the layers where numbers of layers differ."""
    names = ("layers", "hidden", "neurons", "groups", "queries", "head_dim")
    source = {name: generator.choice((one, other)) for name in names}
    if family_of(space.config).hidden_is_all_heads:  # these depend on each other
        source["hidden"] = source["head_dim"] = source["groups"]
    layers = source["layers"].layers
    genes: dict[str, Any] = {name: getattr(source[name], name) for name in ("hidden", "queries", "head_dim")}
    for name in ("neurons", "groups"):
        genes[name] = _by_layer(space, source[name], layers, getattr(source[name], name))
    return Candidate(layers=layers, **genes)


def _by_layer(space: Space, parent: Candidate, layers: Blocks, genes: tuple[Blocks, ...]) -> tuple[Blocks, ...]:
    """A parent's choices for other layers than its own: where it has no such layer, the first blocks."""
    if space.any_units != "own":
        return genes
    known = dict(zip(parent.layers, genes, strict=True))
    first = tuple(range(len(genes[0])))
    return tuple(known.get(layer, first) for layer in layers)


def mutated(space: Space, candidate: Candidate, generator: random.Random) -> Candidate:
    """One change: a size a step up or down, one up and another down, or other layers or blocks of the same number."""
    changes = ["resize", "trade"]
    changes += ["layer"] * space.any_layers + ["block"] * bool(space.any_units)
    change = generator.choice(changes)
    if change == "layer":
        return _with_layers(space, candidate, _swapped(candidate.layers, space.own.num_hidden_layers, generator))
    if change == "block":
        return _with_other_block(space, candidate, generator)
    sizes = [name for name in _SIZES if len(getattr(space, name)) > 1]
    if not sizes:
        return candidate
    if change == "trade" and len(sizes) > 1:
        up, down = generator.sample(sizes, 2)
        return _stepped(space, _stepped(space, candidate, up, 1), down, -1)
    return _stepped(space, candidate, generator.choice(sizes), generator.choice((-1, 1)))


def _stepped(space: Space, candidate: Candidate, name: str, step: int) -> Candidate:
    """A size moved by a step along the sizes of the space, as far as there are any."""
    shape = space.shape(candidate)
    current = {
        "layers": shape.num_hidden_layers,
        "hidden": shape.hidden_size,
        "neurons": shape.intermediate_size,
        "groups": shape.num_key_value_heads,
        "queries": candidate.queries,
        "head_dims": candidate.head_dim,
    }[name]
    sizes = sorted(getattr(space, name), reverse=step < 0)
    size = next((each for each in sizes if (each - current) * step > 0), current)
    if name == "layers":
        return _with_layers(space, candidate, _deeper_or_shallower(space, candidate.layers, size))
    moved = _resized(space, candidate, name, size)
    if not family_of(space.config).hidden_is_all_heads:
        return moved
    if name == "hidden":  # the width of the heads together is that of the model
        return _resized(space, moved, "groups", size // candidate.head_dim)
    return _resized(space, moved, "hidden", len(moved.groups[0]) * moved.head_dim)


def _resized(space: Space, candidate: Candidate, name: str, size: int) -> Candidate:
    """A candidate with another size: the least important blocks go, the most important missing ones come."""
    if name == "queries":
        return replace(candidate, queries=size)
    if name == "head_dims":
        return replace(candidate, head_dim=size)
    if name == "hidden":
        return replace(candidate, hidden=_more_or_fewer(candidate.hidden, size // space.hidden_block))
    if name == "neurons":
        count = size // space.neuron_block
        return replace(candidate, neurons=tuple(_more_or_fewer(kept, count) for kept in candidate.neurons))
    return replace(candidate, groups=tuple(_more_or_fewer(kept, size) for kept in candidate.groups))


def _more_or_fewer(kept: Blocks, count: int) -> Blocks:
    if count <= len(kept):
        return kept[:count]
    missing = [block for block in range(count) if block not in kept]  # as many as are needed, at least
    return tuple(sorted([*kept, *missing[: count - len(kept)]]))


def _deeper_or_shallower(space: Space, layers: Blocks, count: int) -> Blocks:
    kept = [layer for layer in space.layer_order if layer in layers]
    missing = [layer for layer in space.layer_order if layer not in layers]
    return tuple(sorted([*kept, *missing][:count]))


def _with_layers(space: Space, candidate: Candidate, layers: Blocks) -> Candidate:
    return replace(
        candidate,
        layers=layers,
        neurons=_by_layer(space, candidate, layers, candidate.neurons),
        groups=_by_layer(space, candidate, layers, candidate.groups),
    )


def _with_other_block(space: Space, candidate: Candidate, generator: random.Random) -> Candidate:
    """One kept block given for one that is not, of the channels, or of the neurons or heads of one entry."""
    name = generator.choice(("hidden", "neurons", "groups"))
    own = space.own
    if name == "hidden":
        return replace(candidate, hidden=_swapped(candidate.hidden, own.hidden_size // space.hidden_block, generator))
    units = own.intermediate_size // space.neuron_block if name == "neurons" else own.num_key_value_heads
    genes: list[Blocks] = list(getattr(candidate, name))
    place = generator.randrange(len(genes))
    genes[place] = _swapped(genes[place], units, generator)
    changed: dict[str, Any] = {name: tuple(genes)}
    return replace(candidate, **changed)


def _swapped(kept: Sequence[int], units: int, generator: random.Random) -> Blocks:
    missing = sorted(set(range(units)) - set(kept))
    if not missing:
        return tuple(kept)
    dropped = generator.choice(list(kept))
    return tuple(sorted({*kept, generator.choice(missing)} - {dropped}))
