"""Three strategies of a search: evolution, random draws as its baseline, and a grid, which proves the optimum of a small space.

A strategy is a generator: it yields candidates and is sent their scores, in the same order (lower is better; None for a
candidate that dropped out in an early round). It depends on the seed and the scores only, so that sending it the scores again
repeats or resumes a search.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from daekit.students.mutation import crossed, mutated
from daekit.students.shapes import Shape
from daekit.students.space import Candidate, Space, Window

Strategy = Generator[list[Candidate], list[float | None], None]
_TRIES = 500  # to find a candidate that is feasible and new


@dataclass(frozen=True)
class Evolution:
    """Settings of the evolutionary search.

    Attributes:
        initial: Number of random candidates at the start.
        offspring: Number of candidates of a generation.
        elite: Number of the best candidates so far that have offspring.
        crossover: Share of the offspring that have two parents.
        mutations: Largest number of mutations of a child; the actual number is the smaller of two draws.
    """

    initial: int = 32
    offspring: int = 16
    elite: int = 8
    crossover: float = 0.5
    mutations: int = 3


def grid(space: Space, window: Window, batch: int = 16) -> Strategy:
    """Every candidate of a coarse space."""
    every = space.every(window)
    while candidates := list(islice(every, batch)):
        yield candidates


def draw(space: Space, window: Window, seed: int, batch: int = 16) -> Strategy:
    """Random candidates, none of them twice."""
    generator, shapes = random.Random(seed), space.shapes(window)
    seen: set[Candidate] = set()
    while candidates := list(islice(_fresh(space, shapes, generator, seen), batch)):
        yield candidates


def evolve(space: Space, window: Window, seed: int, settings: Evolution) -> Strategy:
    """Random candidates first, then generation after generation offspring of the best, by crossover and mutation.

    A child that breaks a rule, lies outside the window or was proposed before is drawn again before anything is scored. The
    search ends when nothing new is found.
    """
    generator, shapes = random.Random(seed), space.shapes(window)
    seen: set[Candidate] = set()
    candidates = list(islice(_fresh(space, shapes, generator, seen), settings.initial))
    elite: list[tuple[float, int, Candidate]] = []  # the number keeps the order of equal scores
    born = 0
    while candidates:
        scores = yield candidates
        for candidate, score in zip(candidates, scores, strict=True):
            born += 1
            if score is not None:
                elite.append((score, born, candidate))
        elite = sorted(elite, key=lambda entry: entry[:2])[: settings.elite]
        parents = [candidate for *_, candidate in elite]
        candidates = list(islice(_children(space, window, parents, generator, settings, seen), settings.offspring))
        if len(candidates) < settings.offspring:  # all candidates near the best have been proposed
            missing = settings.offspring - len(candidates)
            candidates += islice(_fresh(space, shapes, generator, seen), missing)


def _fresh(space: Space, shapes: Sequence[Shape], generator: random.Random, seen: set[Candidate]) -> Iterator[Candidate]:
    """New candidates of the shapes, until many tries in a row find none."""
    tries = 0
    while tries < _TRIES:
        candidate = space.sample(shapes, generator)
        tries += 1
        if candidate not in seen:
            seen.add(candidate)
            tries = 0
            yield candidate


def _children(
    space: Space,
    window: Window,
    parents: Sequence[Candidate],
    generator: random.Random,
    settings: Evolution,
    seen: set[Candidate],
) -> Iterator[Candidate]:
    tries = 0
    while tries < _TRIES and parents:
        tries += 1
        child = generator.choice(parents)
        if generator.random() < settings.crossover:
            child = crossed(space, child, generator.choice(parents), generator)
        changes = min(generator.randint(1, settings.mutations), generator.randint(1, settings.mutations))
        for _ in range(changes):
            child = mutated(space, child, generator)
        if child not in seen and space.feasible(child, window):
            seen.add(child)
            tries = 0
            yield child
