"""The search for a student: a strategy proposes candidates, rounds score them on more and more text, a log keeps each score.

A search that was killed is resumed by running it again with the same log: the strategy is deterministic, so it proposes the
same candidates again, and what the log holds is read instead of scored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.files import append_json_lines, read_json_lines
from daekit.progress import clock
from daekit.students.selection import Selection
from daekit.students.space import Candidate, Space
from daekit.students.strategies import Strategy

# (selection, tokens) -> nats per token of the student on that many first tokens of the calibration text
Score = Callable[[Selection, int], float]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Round:
    """One round over the candidates of a batch: each is scored on ``tokens``; the best share ``keep``, at least one, go on."""

    tokens: int
    keep: float = 0.25


@dataclass(frozen=True)
class Scored:
    """A candidate with the score of its last round."""

    candidate: Candidate
    parameters: int
    score: float


@dataclass
class SearchResult:
    """The result of a search.

    Attributes:
        best: The best candidate of the last round.
        finalists: All candidates of the last round, the best first.
        candidates: Number of candidates that were scored.
        tokens: Number of tokens that they were scored on, all together: the cost of the search.
    """

    best: Scored
    finalists: list[Scored] = field(repr=False)
    candidates: int
    tokens: int


def run_search(
    space: Space,
    strategy: Strategy,
    score: Score,
    rounds: Sequence[Round],
    *,
    candidates: int,
    log: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Let a strategy propose candidates until enough were scored, or it has no more.

    Args:
        strategy: A strategy over the same space.
        score: The score of a selection on the first tokens of the text; ``CandidateScorer``.
        rounds: The rounds of a batch, with rising tokens; ``keep`` of the last one has no meaning.
        candidates: Number of candidates to score; the last batch is not cut short.
        log: A JSONL file with a line for the search and one for every score. If it exists, the search goes on from it.
        identity: All that the scores depend on (teacher, text, space, seed); a log with another identity is refused.
        progress: Is called with a line of text after every batch.

    Raises:
        UserError: The log is that of another search, or damaged.
    """
    header = {"rounds": [[each.tokens, each.keep] for each in rounds]} | dict(identity or {})
    known = _Scores(space, score, log, header)
    finalists: list[Scored] = []
    scored = 0
    speed = _Clock(candidates)
    batch = next(strategy, None)
    while batch:
        results = _score_batch(batch, rounds, known)
        scored += len(batch)
        finalists += [Scored(each, space.parameters(each), results[each]) for each in batch if each in results]
        finalists.sort(key=lambda scored: scored.score)
        if progress is not None:
            progress(speed.line(scored, known.fresh, finalists[0]))
        if scored >= candidates:
            break
        try:
            batch = strategy.send([results.get(candidate) for candidate in batch])
        except StopIteration:
            break
    assert finalists, "a strategy proposes at least one candidate, or raises"
    return SearchResult(finalists[0], finalists, scored, known.tokens)


def _score_batch(batch: Sequence[Candidate], rounds: Sequence[Round], known: _Scores) -> dict[Candidate, float]:
    """The scores of the candidates of the last round."""
    left, scores = list(batch), {}
    for number, each_round in enumerate(rounds):
        scores = {each: known.score(number, each_round.tokens, each) for each in left}
        keep = max(1, math.ceil(len(left) * each_round.keep))
        left = sorted(left, key=lambda each: scores[each])[:keep]
    return scores


class _Scores:
    """The scores of candidates in each round, read from a log or computed; each new one is written there at once."""

    def __init__(self, space: Space, score: Score, path: Path | None, header: Mapping[str, Any]) -> None:
        self.space, self.compute, self.path = space, score, path
        self.known: dict[tuple[int, str], float] = {}
        self.fresh = self.tokens = 0  # how many were computed, and on how many tokens all were
        if path is None:
            return
        header = json.loads(json.dumps({"search": header}))
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, _ = read_json_lines(path, repair=True)
        if not lines:
            append_json_lines(path, [header])
        elif lines[0] != header:
            raise UserError(
                f"{path}: is the log of another search ({_difference(lines[0], header)}); give this one a log of its own, or "
                "move that one away"
            )
        try:
            self.known = {(line["round"], json.dumps(line["candidate"])): line["score"] for line in lines[1:]}
        except KeyError as error:
            raise UserError(f"{path}: not the log of a search ({error} is missing); move it away to start anew") from error

    def score(self, number: int, tokens: int, candidate: Candidate) -> float:
        """The score of a candidate in a round of this many tokens."""
        choices = asdict(candidate)
        key = (number, json.dumps(choices))
        self.tokens += tokens
        if key not in self.known:
            start = time.perf_counter()
            self.known[key] = self.compute(self.space.selection(candidate), tokens)
            self.fresh += 1
            line = {
                "round": number,
                "tokens": tokens,
                "score": self.known[key],
                "parameters": self.space.parameters(candidate),
                "seconds": round(time.perf_counter() - start, 4),
                "candidate": choices,
            }
            if self.path is not None:
                append_json_lines(self.path, [line])
        return self.known[key]


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    ours, theirs = expected["search"], found.get("search") or {}
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in keys) or "no header"


class _Clock:
    """Says how fast a search is and how long it will take, counted from the first candidate that was not in the log."""

    def __init__(self, candidates: int) -> None:
        self.candidates, self.known, self.start = candidates, 0, time.perf_counter()

    def line(self, scored: int, fresh: int, best: Scored) -> str:
        """``search 48/200  2.1 candidates/s  1:12 left  best 3.214 nats (12,345,678 parameters)``"""
        if fresh:
            rate = (scored - self.known) / max(time.perf_counter() - self.start, 1e-9)
            pace = f"{rate:.1f} candidates/s  {clock(max(self.candidates - scored, 0) / rate)} left"
        else:
            self.known, self.start = scored, time.perf_counter()
            pace = "from the log"
        total = max(self.candidates, scored)
        return f"search {scored}/{total}  {pace}  best {best.score:.4f} nats ({best.parameters:,} parameters)"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, for every candidate the one of its last round."""
    last = {json.dumps(line["candidate"]): line for line in read_json_lines(path)[0][1:]}
    return list(last.values())
