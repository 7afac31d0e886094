"""Three strategies of a search: evolution, random draws as its baseline, and a grid, which proves the optimum of a small space.

A strategy is a generator: it yields candidates and is sent their scores, in the same order (lower is better; None for a
candidate that dropped out in an early round). It depends on the seed and the scores only, so that sending it the scores again
repeats or resumes a search.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from daekit.students.families import family_of
from daekit.students.space import Blocks, Candidate, Space, Window

Strategy = Generator[list[Candidate], list[float | None], None]
_TRIES = 500  # to find a candidate that is feasible and new
_CROSSOVER = 0.5  # share of the offspring that have two parents
_MUTATIONS = 3  # of a child at most; the actual number is the smaller of two draws


def grid(space: Space, window: Window, batch: int = 16) -> Strategy:
    """Every candidate of a coarse space."""
    every = space.every(window)
    while candidates := list(islice(every, batch)):
        yield candidates


def draw(space: Space, window: Window, seed: int, batch: int = 16) -> Strategy:
    """Random candidates, none of them twice."""
    generator, shapes = random.Random(seed), space.shapes(window)
    seen: set[Candidate] = set()
    while candidates := _new(batch, seen, lambda: space.sample(shapes, generator)):
        yield candidates


def evolve(space: Space, window: Window, seed: int, *, initial: int = 32, offspring: int = 16, elite_size: int = 8) -> Strategy:
    """Random candidates first, then generation after generation offspring of the best, by crossover and mutation.

    A child that breaks a rule, lies outside the window or was proposed before is drawn again before anything is scored. The
    search ends when nothing new is found.

    Args:
        initial: Number of random candidates at the start.
        offspring: Number of candidates of a generation.
        elite_size: Number of the best candidates so far that have offspring.
    """
    generator, shapes = random.Random(seed), space.shapes(window)
    seen: set[Candidate] = set()
    elite: list[tuple[float, Candidate]] = []

    def fresh() -> Candidate:
        return space.sample(shapes, generator)

    def child() -> Candidate | None:
        parents = [candidate for _, candidate in elite]
        made = generator.choice(parents)
        if generator.random() < _CROSSOVER:
            made = crossed(space, made, generator.choice(parents), generator)
        for _ in range(min(generator.randint(1, _MUTATIONS), generator.randint(1, _MUTATIONS))):
            made = mutated(space, made, generator)
        return made if made in seen or space.feasible(made, window) else None

    candidates = _new(initial, seen, fresh)
    while candidates:
        scores = yield candidates
        elite += [(score, each) for each, score in zip(candidates, scores, strict=True) if score is not None]
        elite = sorted(elite, key=lambda entry: entry[0])[:elite_size]  # of equal scores the older one first
        candidates = _new(offspring, seen, child) if elite else []
        # all candidates near the best may have been proposed
        candidates += _new(offspring - len(candidates), seen, fresh)


def _new(count: int, seen: set[Candidate], propose: Callable[[], Candidate | None]) -> list[Candidate]:
    """So many candidates that are not in ``seen``, to which they are added; fewer after many proposals in a row were none."""
    found: list[Candidate] = []
    tries = 0
    while len(found) < count and tries < _TRIES:
        candidate = propose()
        tries += 1
        if candidate is not None and candidate not in seen:
            seen.add(candidate)
            found.append(candidate)
            tries = 0
    return found


def crossed(space: Space, one: Candidate, other: Candidate, generator: random.Random) -> Candidate:
    """A candidate that takes each choice from one of two parents; choices of a layer follow the layer where depths differ."""
    source = {each.name: generator.choice((one, other)) for each in fields(Candidate)}
    if family_of(space.config).hidden_is_all_heads:  # these depend on each other
        source["hidden"] = source["head_dim"] = source["groups"]
    choices: dict[str, Any] = {name: getattr(parent, name) for name, parent in source.items()}
    for name in ("neurons", "groups"):
        choices[name] = _by_layer(space, source[name], choices["layers"], name)
    return Candidate(**choices)


def _by_layer(space: Space, parent: Candidate, layers: Blocks, name: str) -> tuple[Blocks, ...]:
    """The neurons or groups that a parent keeps of these layers; the first ones of a layer that the parent does not have."""
    kept: tuple[Blocks, ...] = getattr(parent, name)
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
    missing = [block for block in range(count) if block not in kept]  # as many as are needed, at least
    return tuple(sorted([*kept, *missing][:count]))


def _with_layers(space: Space, candidate: Candidate, layers: Blocks) -> Candidate:
    blocks: dict[str, Any] = {name: _by_layer(space, candidate, layers, name) for name in ("neurons", "groups")}
    return replace(candidate, layers=layers, **blocks)


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
