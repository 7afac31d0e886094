"""Crossover and mutation: how the evolutionary search makes new candidates of old ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from daekit.students.families import family_of
from daekit.students.space import Blocks, Candidate, Space


def crossed(space: Space, one: Candidate, other: Candidate, generator: random.Random) -> Candidate:
    """A candidate that takes each choice from one of two parents; choices of a layer follow the layer where depths differ."""
    source = {each.name: generator.choice((one, other)) for each in fields(Candidate)}
    if family_of(space.config).hidden_is_all_heads:  # these depend on each other
        source["hidden"] = source["head_dim"] = source["groups"]
    choices: dict[str, Any] = {name: getattr(parent, name) for name, parent in source.items()}
    for name in ("neurons", "groups"):
        choices[name] = _by_layer(space, source[name], choices["layers"], choices[name])
    return Candidate(**choices)


def _by_layer(space: Space, parent: Candidate, layers: Blocks, kept: tuple[Blocks, ...]) -> tuple[Blocks, ...]:
    """The blocks that a parent keeps of these layers; the first blocks of a layer that the parent does not have."""
    if space.any_units != "own":
        return kept
    known = dict(zip(parent.layers, kept, strict=True))
    first = tuple(range(len(kept[0])))
    return tuple(known.get(layer, first) for layer in layers)


def mutated(space: Space, candidate: Candidate, generator: random.Random) -> Candidate:
    """A candidate with one change: a size stepped up or down, one size up and another down, another layer, or another block."""
    change = generator.choice(["resize", "trade"] + ["layer"] * space.any_layers + ["block"] * bool(space.any_units))
    if change == "layer":
        return _with_layers(space, candidate, _swapped(candidate.layers, space.blocks["layers"], generator))
    if change == "block":
        return _with_other_block(space, candidate, generator)
    sizes = [name for name in space.sizes(candidate) if len(getattr(space, name)) > 1]
    if not sizes:
        return candidate
    if change == "trade" and len(sizes) > 1:
        up, down = generator.sample(sizes, 2)
        return _stepped(space, _stepped(space, candidate, up, 1), down, -1)
    return _stepped(space, candidate, generator.choice(sizes), generator.choice((-1, 1)))


def _stepped(space: Space, candidate: Candidate, name: str, step: int) -> Candidate:
    """A candidate with one size moved to the next size of the space; unchanged where there is none."""
    current = space.sizes(candidate)[name]
    size = next((each for each in sorted(getattr(space, name), reverse=step < 0) if (each - current) * step > 0), current)
    if name == "layers":
        order = sorted(space.layer_order, key=lambda layer: layer not in candidate.layers)  # the kept ones first
        return _with_layers(space, candidate, tuple(sorted(order[:size])))
    moved = _resized(space, candidate, name, size)
    if not family_of(space.config).hidden_is_all_heads:
        return moved
    if name == "hidden":  # the width of the heads together is that of the model
        return _resized(space, moved, "groups", size // candidate.head_dim)
    return _resized(space, moved, "hidden", len(moved.groups[0]) * moved.head_dim)


def _resized(space: Space, candidate: Candidate, name: str, size: int) -> Candidate:
    """A candidate with another size: its least important blocks are dropped, or the most important missing ones added."""
    if name == "queries":
        return replace(candidate, queries=size)
    if name == "head_dims":
        return replace(candidate, head_dim=size)
    if name == "hidden":
        return replace(candidate, hidden=_more_or_fewer(candidate.hidden, size // space.hidden_block))
    count = size // space.neuron_block if name == "neurons" else size
    kept: dict[str, Any] = {name: tuple(_more_or_fewer(each, count) for each in getattr(candidate, name))}
    return replace(candidate, **kept)


def _more_or_fewer(kept: Blocks, count: int) -> Blocks:
    if count <= len(kept):
        return kept[:count]
    missing = [block for block in range(count) if block not in kept]  # as many as are needed, at least
    return tuple(sorted([*kept, *missing[: count - len(kept)]]))


def _with_layers(space: Space, candidate: Candidate, layers: Blocks) -> Candidate:
    return replace(
        candidate,
        layers=layers,
        neurons=_by_layer(space, candidate, layers, candidate.neurons),
        groups=_by_layer(space, candidate, layers, candidate.groups),
    )


def _with_other_block(space: Space, candidate: Candidate, generator: random.Random) -> Candidate:
    """A candidate with one kept block exchanged for a missing one: of the channels, or of one entry's neurons or heads."""
    name = generator.choice(("hidden", "neurons", "groups"))
    if name == "hidden":
        return replace(candidate, hidden=_swapped(candidate.hidden, space.blocks[name], generator))
    entries: list[Blocks] = list(getattr(candidate, name))
    place = generator.randrange(len(entries))
    entries[place] = _swapped(entries[place], space.blocks[name], generator)
    return replace(candidate, **{name: tuple(entries)})  # type: ignore[arg-type]


def _swapped(kept: Sequence[int], units: int, generator: random.Random) -> Blocks:
    missing = sorted(set(range(units)) - set(kept))
    if not missing:
        return tuple(kept)
    dropped = generator.choice(list(kept))
    return tuple(sorted({*kept, generator.choice(missing)} - {dropped}))
