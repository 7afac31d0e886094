"""Three strategies of a search: evolution, random draws as its baseline, and a grid, which proves the optimum of a small space.

A strategy is a generator: it yields candidates and is sent their scores, in the same order (lower is better; None for a
candidate that dropped out in an early round). It depends on the seed and the scores only, so that sending it the scores again
repeats or resumes a search.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from itertools import islice

from daekit.students.mutation import crossed, mutated
from daekit.students.space import Candidate, Space, Window

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
